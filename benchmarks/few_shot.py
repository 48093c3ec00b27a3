"""A few labelled examples of a task that the generator has not seen: what each way of using them reaches, and how long it takes.

    python benchmarks/few_shot.py --tasks tasks --name stance_hillary --name clickbait … [--shots 8] [--seeds 1]

Every column has the same examples, `--shots` of each class, drawn from the training split; accuracy is on up to 200 rows of the
reported split, on which nothing is selected. *base* knows the label names only. *base+*: they and the examples in the prototypes;
*probe*: logistic regression on the base model's embeddings; *generated+*: the best of eight generated adapters, by the loss of
examples left out one by one; *refined*: `refine` from it; *cold*: `refine` from an adapter of zeros.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from cond_pdiff import CondPDiffPipeline, PrototypeClassifier
from cond_pdiff.few_shot import refine
from cond_pdiff.training.tasks import Task

GENERATOR, CANDIDATES = "cond-pdiff/minilm-text-tasks", 8


def left_out_loss(classifier: PrototypeClassifier) -> float:
    return float(nn.functional.cross_entropy(classifier.example_logits(), classifier.targets))


def measure(pipe: CondPDiffPipeline, task: Task, shots: int, seed: int, steps: int, rate: float) -> dict[str, tuple[float, float]]:
    """Column → accuracy and seconds."""
    prompt = task.prompt(f"shots/{seed}", shots * len(task.labels))
    rows = task.report_rows(200)
    texts, targets = [text for text, _ in rows], torch.tensor([label for _, label in rows])
    plain = PrototypeClassifier(pipe.base_model(), task.labels)
    known = PrototypeClassifier(pipe.base_model(), task.labels, examples=prompt.examples)
    columns: dict[str, tuple[float, float]] = {}

    def add(name: str, classifier: PrototypeClassifier, started: float) -> None:
        seconds = time.perf_counter() - started
        columns[name] = (float((classifier.logits(texts).argmax(1) == targets).float().mean()), seconds)

    add("base", plain, time.perf_counter())
    add("base+", known, time.perf_counter())
    started = time.perf_counter()
    probe = LogisticRegression(max_iter=1000).fit(plain.backbone.embed([text for text, _ in prompt.examples]).numpy(), known.targets)
    seconds = time.perf_counter() - started
    columns["probe"] = (float(probe.score(plain.backbone.embed(texts).numpy(), targets)), seconds)
    started = time.perf_counter()
    adapters = pipe(
        prompt, num_adapters=CANDIDATES, generator=[torch.Generator().manual_seed(index) for index in range(CANDIDATES)]
    ).adapters
    best = min(map(known.with_adapter, adapters), key=left_out_loss)
    add("generated+", best, started)
    add("refined", best.with_adapter(refine(best, steps, rate)), started)
    zeros = {key: torch.zeros_like(tensor) if ".lora_B." in key else tensor for key, tensor in adapters[0].tensors.items()}
    cold = known.with_adapter(dataclasses.replace(adapters[0], tensors=zeros))
    started = time.perf_counter()
    add("cold", known.with_adapter(refine(cold, steps, rate)), started)
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", required=True, type=Path)
    parser.add_argument("--name", action="append", required=True)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    pipe = CondPDiffPipeline.from_pretrained(GENERATOR)
    pipe.set_progress_bar_config(disable=True)
    found: dict[str, list[dict[str, tuple[float, float]]]] = {}
    for name in arguments.name:
        task = Task.load(arguments.tasks / name)
        found[name] = [
            measure(pipe, task, arguments.shots, seed, arguments.steps, arguments.learning_rate) for seed in range(arguments.seeds)
        ]
        columns = list(found[name][0])
        if len(found) == 1:
            print(f"{'task':<24}" + "".join(f"{column:>12}" for column in columns))
        print(
            f"{name:<24}" + "".join(f"{statistics.fmean(row[column][0] for row in found[name]):>12.3f}" for column in columns), flush=True
        )
    rows = [row for name in found for row in found[name]]
    for what, place in (("mean accuracy", 0), ("mean seconds", 1)):
        print(f"{what:<24}" + "".join(f"{statistics.fmean(row[column][place] for row in rows):>12.3f}" for column in columns))


if __name__ == "__main__":
    main()
