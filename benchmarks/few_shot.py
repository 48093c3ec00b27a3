"""Measure, on tasks that the generator has never seen, what each way of using a few labelled examples reaches, and how long it takes.

    python benchmarks/few_shot.py --tasks tasks --zoo zoo --out results [--seeds 3] [--shots 8] [--task scicite …]

Measures the zoo's unseen tasks one after the other into `<out>/<task>/*.json`, writes `<out>/summary.json` and prints a table; what is
measured is not measured again. Accuracy on up to 200 rows of each task's test split, on which nothing is selected; every column
of a half has the same knowledge. Without examples (description and label names): the base model, the generated adapter, one multi-task
LoRA, the mean of all adapters of the zoo (mean), kernel regression on them (kernel), the adapter of the nearest trained task
(retrieval), the adapter trained on the task itself, and one generated for another task's prompt (shuffled). With `--shots` examples a
class, drawn from the training split: the same with the examples in the class prototypes, and

- logistic: logistic regression on the base model's embeddings of the examples and, as further examples, of the label names;
- SetFit, where the package is installed, with its defaults, on tasks with few labels (its pairs grow with their square); and beside it,
  timed in the same minute, quick: `refine` with two steps from one generated adapter;
- generated: the best of eight candidates, chosen by the pipeline on the examples; one: a single candidate, which the examples may
  reject for the base model; raw: the same without asking them;
- refined: `refine` from the best of eight, also where the base model is preferred to it; cold: `refine` from an adapter of zeros.

Below the means stands the generated adapter minus each column, with the standard error over the tasks.
*share* is (column − base) / (trained − base) of the means: the base with the examples, the trained adapter with names only, as it was
trained.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cond_pdiff import CondPDiffPipeline, LoraAdapter, PrototypeClassifier, TaskPrompt
from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.conditions.texts import Text
from cond_pdiff.refinement import refine
from cond_pdiff.training.evaluate.baselines import ZooBaselines, logistic_regression
from cond_pdiff.training.evaluate.measure import difference, mean
from cond_pdiff.training.tasks.tasks import Row, Task
from cond_pdiff.training.zoo.zoo import Zoo, soup

CANDIDATES = 8
ROWS = 200
NAMES_ONLY = ("base", "generated", "multi-task", "mean", "kernel", "retrieval", "trained", "shuffled")
WITH_EXAMPLES = (*NAMES_ONLY, "one", "raw", "logistic", "setfit", "quick", "refined", "cold")
QUICK_STEPS = 2


class TaskMeasurer:
    """A generator and the adapters that it is compared with."""

    def __init__(self, generator: str, zoo: Zoo) -> None:
        self.pipe = CondPDiffPipeline.from_pretrained(generator)
        self.pipe.set_progress_bar_config(disable=True)
        self.zoo, self.base = zoo, self.pipe.base_model()

    @functools.cached_property
    def baselines(self) -> ZooBaselines:
        """The baselines made of the tasks that the generator was trained on."""
        names = self.pipe.condition_index.names
        return ZooBaselines(self.pipe, self.zoo, {name: [run.adapter() for run in self.zoo.runs(name)] for name in names})

    def fixed(self, task: Task, prompt: TaskPrompt) -> dict[str, LoraAdapter | None]:
        """Return the adapters that are not the generator's: column → adapter, None for the base model.

        Args:
            prompt: the task's, which kernel regression reads as the generator does.
        """
        output = self.generate(TaskPrompt(task.description, labels=task.labels), 1)
        retrieved = [run.adapter() for run in self.zoo.runs(output.report.nearest[0].task)]
        if not retrieved or self.baselines.multitask is None:
            raise SystemExit(f"{self.zoo.folder} lacks the multi-task adapter, or one of {output.report.nearest[0].task}")
        return {
            "base": None,
            "multi-task": self.baselines.multitask,
            "mean": self.baselines.mean,
            "kernel": self.baselines.regressed(prompt),
            "retrieval": soup(retrieved),
            "trained": self.zoo.runs(task.name)[0].adapter(),
        }

    def names_only(self, task: Task, other: Task) -> dict[str, float]:
        """Measure the accuracies without examples.

        Args:
            other: whose prompt the shuffled adapter is generated from.
        """
        adapters = self.fixed(task, TaskPrompt(task.description, labels=task.labels))
        for name, source in (("generated", task), ("shuffled", other)):
            adapters[name] = self.generate(TaskPrompt(source.description, labels=source.labels), 1).adapter
        return {name: self.accuracy(task, adapter) for name, adapter in adapters.items()}

    def with_examples(self, task: Task, other: Task, shots: int, seed: int) -> dict[str, Any]:
        """Measure accuracies and seconds with a draw of examples, and return them with what the pipeline predicted."""
        prompt = task.prompt(f"shots/{seed}", shots * len(task.labels))
        values: dict[str, float] = {}
        seconds: dict[str, float] = {}

        def add(name: str, adapter: LoraAdapter | None, started: float, with_examples: bool = True) -> None:
            seconds[name] = time.perf_counter() - started
            values[name] = self.accuracy(task, adapter, prompt if with_examples else None)

        started = time.perf_counter()
        output = self.generate(prompt, CANDIDATES)
        add("generated", output.adapter, started, output.report.choice.score.with_examples)
        started = time.perf_counter()
        add("refined", refine(self.classifier(task, output.adapters[output.chosen], prompt)), started - seconds["generated"])
        started = time.perf_counter()
        single = self.generate(prompt, 1)
        add("one", single.adapter, started, single.report.choice.score.with_examples)
        raw = single.adapters[0]
        add("raw", raw, time.perf_counter())
        started = time.perf_counter()
        add("cold", refine(self.classifier(task, raw.scaled(0.0), prompt)), started)
        wrong = TaskPrompt(other.description, other.prompt("shots/0", len(prompt.examples)).examples, other.labels)
        add("shuffled", self.generate(wrong, 1).adapters[0], time.perf_counter())
        for name, adapter in self.fixed(task, prompt).items():
            add(name, adapter, time.perf_counter())
        started = time.perf_counter()
        values["logistic"] = self.logistic(task, prompt)
        seconds["logistic"] = time.perf_counter() - started
        return {"accuracy": values, "seconds": {name: round(value, 2) for name, value in seconds.items()}, "report": report_facts(single)}

    def setfit(self, task: Task, shots: int, seed: int) -> dict[str, dict[str, float]]:
        """Measure accuracy and seconds of SetFit, and of the quickest refined adapter, with the same examples."""
        texts, targets = map(list, zip(*test_rows(task), strict=True))
        prompt = task.prompt(f"shots/{seed}", shots * len(task.labels))
        classes = [task.labels.index(label) for _, label in prompt.examples]
        folder, given = str(self.base.model.name_or_path), [text for text, _ in prompt.examples]
        right, seconds = setfit(folder, given, classes, texts, targets)
        started = time.perf_counter()
        adapter = refine(self.classifier(task, self.generate(prompt, 1).adapters[0], prompt), QUICK_STEPS)
        quick = time.perf_counter() - started
        return {
            "setfit": {"accuracy": right, "seconds": round(seconds, 2)},
            "quick": {"accuracy": self.accuracy(task, adapter, prompt), "seconds": round(quick, 2)},
        }

    def generate(self, prompt: TaskPrompt, count: int) -> Any:
        """Generate candidates with the seeds 0, 1, 2 …"""
        return self.pipe(prompt, num_adapters=count, generator=[torch.Generator().manual_seed(seed) for seed in range(count)])

    def classifier(self, task: Task, adapter: LoraAdapter | None, prompt: TaskPrompt | None = None) -> PrototypeClassifier:
        """Return a task's classifier, with a prompt's examples in its prototypes; every text is read at the generator's length."""
        max_length = self.pipe.template.config.max_length
        return PrototypeClassifier(self.base, task.labels, adapter, max_length, prompt.examples if prompt else ())

    def accuracy(self, task: Task, adapter: LoraAdapter | None, prompt: TaskPrompt | None = None) -> float:
        """Measure the accuracy on rows of the task's test split, with a prompt's examples in the prototypes."""
        return hits(task, self.classifier(task, adapter, prompt).logits(texts_of(task)).argmax(1))

    def logistic(self, task: Task, prompt: TaskPrompt) -> float:
        """Measure the accuracy of `logistic_regression` on the same rows."""
        return hits(task, logistic_regression(self.classifier(task, None, prompt), texts_of(task)))


@functools.cache
def test_rows(task: Task) -> list[Row]:
    """Return the rows of a task's test split that everything is measured on."""
    return task.test_rows(ROWS)


def texts_of(task: Task) -> list[Text]:
    """Return the texts of these rows."""
    return [text for text, _ in test_rows(task)]


def hits(task: Task, predicted: torch.Tensor) -> float:
    """Return the share of these rows of which a prediction, shape `(rows,)`, is right."""
    return round(float((predicted == torch.tensor([label for _, label in test_rows(task)])).float().mean()), 4)


def report_facts(output: Any) -> dict[str, Any]:
    choice = output.report.choice
    return {
        "similarity": output.report.nearest[0].similarity,
        "predicted_gain": choice.predicted_gain,
        "strength": choice.strength,
        "examples": {"base": choice.base.accuracy, "chosen": choice.scores[choice.index].accuracy},
    }


def setfit(base: str, given: list[Any], classes: list[int], texts: list[Any], targets: list[int]) -> tuple[float, float]:
    """Train SetFit with its defaults, and return its accuracy and seconds; the texts of a pair are joined."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    def joined(rows: list[Any]) -> list[str]:
        return [row if isinstance(row, str) else " [SEP] ".join(row) for row in rows]

    torch.manual_seed(0)
    started = time.perf_counter()
    model = SetFitModel.from_pretrained(base)
    arguments = TrainingArguments(report_to="none", show_progress_bar=False, save_strategy="no", seed=0)
    Trainer(model, arguments, Dataset.from_dict({"text": joined(given), "label": classes})).train()
    seconds = time.perf_counter() - started
    predicted = torch.as_tensor(model.predict(joined(texts)))
    return round(float((predicted == torch.tensor(targets)).float().mean()), 4), seconds


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Gather of each half every task's accuracies (means over draws of examples), means over tasks, and the generated minus each column.

    A column that not all tasks have has neither a mean nor a difference.
    """
    halves = {"names only": NAMES_ONLY, "with examples": WITH_EXAMPLES}
    summary: dict[str, Any] = {}
    for half, columns in halves.items():
        tasks = {}
        for result in results:
            rows = [result[half]] if half == "names only" else [row["accuracy"] for row in result[half]]
            known = [name for name in columns if all(name in row for row in rows)]
            tasks[result["task"]] = {name: round(statistics.fmean(row[name] for row in rows), 4) for name in known}
        shared = [name for name in columns if all(name in values for values in tasks.values())]
        summary[half] = {
            "tasks": tasks,
            "means": {name: mean([row[name] for row in tasks.values()]) for name in shared},
            "generated minus": {
                name: difference([(row["generated"], row[name]) for row in tasks.values()]) for name in shared if name != "generated"
            },
        }
    seconds: dict[str, list[float]] = {}
    for row in (row for result in results for row in result["with examples"]):
        for name, value in row["seconds"].items():
            seconds.setdefault(name, []).append(value)
    return {**summary, "seconds, median": {name: round(statistics.median(values), 2) for name, values in seconds.items()}}


def table(results: list[dict[str, Any]]) -> str:
    """Return what `summarize` says as a table, and the rank correlation of predicted and real gains."""
    summary = summarize(results)

    def line(title: str, cells: Mapping[str, str], columns: Sequence[str] = WITH_EXAMPLES) -> str:
        return f"{title:<24}" + "".join(f"{cells.get(name, '–'):>12}" for name in columns)

    def percent(values: Mapping[str, float]) -> dict[str, str]:
        return {name: f"{100 * value:.1f}" for name, value in values.items()}

    def points(differences: Mapping[str, dict[str, float | None]]) -> dict[str, str]:
        errors = {name: found["standard_error"] for name, found in differences.items()}
        shown = {name: "–" if error is None else f"{100 * error:.1f}" for name, error in errors.items()}
        return {name: f"{100 * (found['mean'] or 0.0):+.1f} ± {shown[name]}" for name, found in differences.items()}

    examples, names = summary["with examples"], summary["names only"]
    means = examples["means"]
    gap = names["means"]["trained"] - means["base"]
    return "\n".join([
        line("with examples", {name: name for name in WITH_EXAMPLES}),
        *(line(task, percent(values)) for task, values in examples["tasks"].items()),
        line("mean", percent(means)),
        line("generated minus it", points(examples["generated minus"])),
        line("share of the gap", {name: f"{(value - means['base']) / gap:.0%}" for name, value in means.items()}),
        line("seconds, median", {name: f"{value:.2f}" for name, value in summary["seconds, median"].items()}),
        line("names only", {name: name for name in NAMES_ONLY}, NAMES_ONLY),
        line("mean", percent(names["means"]), NAMES_ONLY),
        line("generated minus it", points(names["generated minus"]), NAMES_ONLY),
        gains(results),
    ])  # fmt: skip


def gains(results: list[dict[str, Any]]) -> str:
    """Say how well the gain of one adapter over the base model was predicted, and on which tasks it is worse than that."""
    from scipy.stats import spearmanr

    real, predicted, worse = [], [], []
    for result in results:
        rows = result["with examples"]
        real.append(statistics.fmean(row["accuracy"]["one"] - row["accuracy"]["base"] for row in rows))
        predicted.append(statistics.fmean(row["report"]["predicted_gain"] for row in rows))
        if real[-1] < -0.01:
            worse.append(f"{result['task']} {100 * real[-1]:.1f}")
    correlation = float(spearmanr(real, predicted).statistic) if len(real) > 2 else float("nan")
    mean_real, mean_predicted = 100 * statistics.fmean(real), 100 * statistics.fmean(predicted)
    return (
        f"gain: predicted {mean_predicted:.1f}, real {mean_real:.1f} points; rank correlation over tasks {correlation:.2f}; "
        f"worse than the base by more than a point: {', '.join(worse) or 'none'}"
    )


def once(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a file holds, measured if it is not there."""
    if not path.exists():
        write_text(path, dump_json(measure()))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", required=True, type=Path)
    parser.add_argument("--zoo", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--generator", default="cond-pdiff/minilm-text-tasks")
    parser.add_argument("--task", action="append", default=[])
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--setfit-labels", type=int, default=4, help="SetFit is trained on tasks with so many labels at most: its pairs")
    arguments = parser.parse_args()
    zoo = Zoo(arguments.zoo)
    measurer = TaskMeasurer(arguments.generator, zoo)
    tasks = [Task.load(arguments.tasks / name) for name in arguments.task or zoo.unseen_names]
    results = []
    for task in tasks:
        other = Task.load(arguments.tasks / zoo.unseen_names[(zoo.unseen_names.index(task.name) + 1) % len(zoo.unseen_names)])
        folder = arguments.out / task.name
        names_only = once(folder / "names_only.json", functools.partial(measurer.names_only, task, other))
        seeded = [
            once(folder / f"seed_{seed}.json", functools.partial(measurer.with_examples, task, other, arguments.shots, seed))
            for seed in range(arguments.seeds)
        ]
        with_setfit = importlib.util.find_spec("setfit") and len(task.labels) <= arguments.setfit_labels
        for seed, columns in enumerate(seeded if with_setfit else ()):
            found = once(folder / f"setfit_{seed}.json", functools.partial(measurer.setfit, task, arguments.shots, seed))
            for name, values in found.items():
                columns["accuracy"][name], columns["seconds"][name] = values["accuracy"], values["seconds"]
        results.append({"task": task.name, "names only": names_only, "with examples": seeded})
        print(f"{len(results)}/{len(tasks)} {task.name}", flush=True)
    write_text(arguments.out / "summary.json", dump_json(summarize(results)))
    print(table(results))
    compared = [result for result in results if all("setfit" in row["accuracy"] for row in result["with examples"])]
    if 0 < len(compared) < len(results):
        print(f"\nThe {len(compared)} tasks that SetFit was trained on\n{table(compared)}")


if __name__ == "__main__":
    main()
