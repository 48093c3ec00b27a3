"""What to believe of a generated adapter before any example is seen: the prior of `cond_pdiff.few_shot.choose`.

    python benchmarks/choice_prior.py --tasks tasks --generator curves/generators/29/run/generator --out prior [--draws 2] [--shots 8]

For a generator that was trained on a part of a zoo (`benchmarks/unseen_curves.py tasks` trains such), every task of the recipe's zoo that
it has not seen, and that is not one of the unseen tasks that results are reported for: what one adapter gains over the base model in
accuracy on `--shots` examples a class, held out as `choose` does, and what it really gains on up to 200 other training rows. Fitted by
least squares: real gain = (n · gain on n examples + m · g) / (n + m), the expectation under a normal prior, of which m is `examples` and
g is `gain`. Measured into `<out>/<task>_<draw>.json`; what is measured is not measured again.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path

import numpy as np
import torch
from few_shot import once
from scipy.optimize import least_squares
from scipy.stats import spearmanr

from cond_pdiff import CondPDiffPipeline, PrototypeClassifier
from cond_pdiff.few_shot import ExampleScore
from cond_pdiff.training.config import read_recipe
from cond_pdiff.training.tasks import Task, sample_rows

ROWS = 200


def measure(pipe: CondPDiffPipeline, task: Task, draw: int, shots: int) -> dict[str, float]:
    """Gain on the examples of a draw, and on other training rows."""
    prompt = task.prompt(f"shots/{draw}", shots * len(task.labels))
    given = {text for text, _ in prompt.examples}
    rows = sample_rows([row for row in task.rows("train") if row[0] not in given], ROWS, f"{task.name}/prior")
    texts, labels = zip(*rows, strict=True)
    adapter = pipe(prompt, generator=torch.Generator().manual_seed(0)).adapters[0]
    on_examples, on_rows = [], []
    for tried in (None, adapter):
        classifier = PrototypeClassifier(pipe.base_model(), task.labels, tried, pipe.template.config.max_length, prompt.examples)
        on_examples.append(ExampleScore.measure(classifier, with_examples=True).accuracy)
        on_rows.append(float((classifier.logits(texts).argmax(1) == torch.tensor(labels)).float().mean()))
    return {
        "examples": len(prompt.examples),
        "gain_on_examples": round(on_examples[1] - on_examples[0], 4),
        "gain": round(on_rows[1] - on_rows[0], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", required=True, type=Path)
    parser.add_argument("--generator", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--recipe", default="minilm-text-tasks")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--shots", type=int, default=8)
    arguments = parser.parse_args()
    pipe = CondPDiffPipeline.from_pretrained(arguments.generator)
    pipe.set_progress_bar_config(disable=True)
    found = []
    for name in sorted(set(read_recipe(arguments.recipe)["collect"]["tasks"]) - set(pipe.condition_index.names)):
        task = Task.load(arguments.tasks / name)
        for draw in range(arguments.draws):
            job = functools.partial(measure, pipe, task, draw, arguments.shots)
            found.append(once(arguments.out / f"{name}_{draw}.json", job))
        print(name, *(f"{100 * row['gain_on_examples']:+.1f} {100 * row['gain']:+.1f}" for row in found[-arguments.draws :]), flush=True)
    count, seen, real = (np.array([row[key] for row in found], float) for key in ("examples", "gain_on_examples", "gain"))

    def expected(prior: np.ndarray) -> np.ndarray:
        examples, gain = prior
        result: np.ndarray = (count * seen + examples * gain) / (count + examples)
        return result

    fitted = least_squares(lambda prior: expected(prior) - real, (16.0, 0.05), bounds=((0.0, -1.0), (1000.0, 1.0)), x_scale=(16.0, 0.05)).x
    print(f"{len(found)} draws: mean gain {100 * statistics.fmean(real):.1f} points; prior: {fitted[0]:.0f} examples, gain {fitted[1]:.3f}")
    error = 100 * float(np.sqrt(np.square(expected(fitted) - real).mean()))
    print(f"expected and real gain: rank correlation {spearmanr(expected(fitted), real).statistic:.2f}, error {error:.1f} points (rms)")


if __name__ == "__main__":
    main()
