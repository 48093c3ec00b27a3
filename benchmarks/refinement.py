"""Measure what refining is worth on far tasks: `reported` of `unseen_tasks.json`, which no setting was chosen on.

    python benchmarks/refinement.py --tasks tasks --zoo zoo --out refinement [--shots 8] [--seed 0] [--shard 0/2]

One draw of examples a class, the same for every column, on up to 100 rows of each task's test split (texts at the generator's length,
embedded in bfloat16); every column has the examples in its prototypes. A file a task; what is measured is not measured again, and the
first task of every source comes first. Columns:

- base: the base model; logistic: logistic regression on its embeddings, with the label names as further examples;
- generated: one candidate, whatever the examples say of it; multi-task: one LoRA of the whole zoo, both factors;
- refined: `refine` from the generated one; cold: from zeros; from multi-task.

Prints a table of means, differences with their 95 % intervals over sources (the tasks of one source are one), the share of tasks that end
more than a point below the base model, and seconds on the CPU of one thread; writes `<out>/summary.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from few_shot import TaskMeasurer, once

from cond_pdiff import LoraAdapter, PrototypeClassifier
from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.refinement import refine
from cond_pdiff.training.card import markdown_table
from cond_pdiff.training.evaluate.baselines import logistic_regression, multitask_adapter
from cond_pdiff.training.evaluate.measure import difference, mean
from cond_pdiff.training.precision import mixed_precision
from cond_pdiff.training.tasks.tasks import Task
from cond_pdiff.training.zoo.zoo import Zoo

ROWS = 100
LISTS = Path(__file__).parent / "unseen_tasks.json"
COLUMNS = {
    "base": "base model",
    "logistic": "logistic regression",
    "generated": "generated, one, unjudged",
    "multi-task": "multi-task LoRA",
    "refined": "refined from the generated one",
    "cold": "refined from nothing",
    "from multi-task": "refined from the multi-task LoRA",
}


def reported_tasks() -> list[str]:
    """Return the names of the reported tasks, the first one of every source first."""
    by_source: dict[str, list[str]] = json.loads(LISTS.read_text(encoding="utf-8"))["reported"]
    most = max(map(len, by_source.values()))
    return [names[place] for place in range(most) for names in by_source.values() if place < len(names)]


def measure(measurer: TaskMeasurer, multitask: LoraAdapter, task: Task, shots: int, seed: int) -> dict[str, Any]:
    """Measure a task: accuracy and CPU seconds of each column."""
    prompt = task.prompt(f"shots/{seed}", shots * len(task.labels))
    rows = task.test_rows(ROWS)
    texts, right = [text for text, _ in rows], torch.tensor([label for _, label in rows])
    accuracy: dict[str, float] = {}
    seconds: dict[str, float] = {}

    def add(name: str, predicted: torch.Tensor, began: float) -> None:
        seconds[name], accuracy[name] = round(began, 3), round(float((predicted.cpu() == right).float().mean()), 4)

    def under(adapter: LoraAdapter | None) -> PrototypeClassifier:
        return measurer.classifier(task, adapter, prompt)

    def answers(adapter: LoraAdapter | None) -> torch.Tensor:
        with mixed_precision("bf16", torch.device("cpu")):
            return under(adapter).logits(texts).float().argmax(1)

    started = time.process_time()
    output = measurer.generate(prompt, 1)
    generated, made = output.adapters[0], time.process_time() - started
    starts = {"generated": generated, "multi-task": multitask}
    add("base", answers(None), 0.0)
    with mixed_precision("bf16", torch.device("cpu")):
        add("logistic", logistic_regression(under(None), texts), 0.0)
    for name, adapter in starts.items():
        add(name, answers(adapter), made if adapter is generated else 0.0)
    for name, start in (("refined", generated), ("cold", generated.scaled(0.0)), ("from multi-task", multitask)):
        started = time.process_time()
        adapter = refine(under(start))
        took = time.process_time() - started
        add(name, answers(adapter), took + (made if start is generated else 0.0))
    return {
        "task": task.name,
        "source": (task.source or task.name).split(" : ")[0],
        "labels": len(task.labels),
        "accuracy": accuracy,
        "seconds": seconds,
        "similarity": output.report.nearest[0].similarity,
    }


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over tasks, differences of columns over sources, median and largest seconds, and how often each is below the base."""
    sources: dict[str, list[Mapping[str, float]]] = {}
    for result in results:
        sources.setdefault(result["source"], []).append(result["accuracy"])
    of_source = [{column: statistics.fmean(row[column] for row in rows) for column in COLUMNS} for rows in sources.values()]
    seconds = {column: [result["seconds"][column] for result in results] for column in COLUMNS}
    below = {column: [result["accuracy"][column] < result["accuracy"]["base"] - 0.01 for result in results] for column in COLUMNS}
    return {
        "tasks": len(results),
        "sources": len(sources),
        "means": {column: mean([result["accuracy"][column] for result in results]) for column in COLUMNS},
        "minus the base": {column: difference([(row[column], row["base"]) for row in of_source]) for column in COLUMNS},
        "refined minus": {column: difference([(row["refined"], row[column]) for row in of_source]) for column in COLUMNS},
        "seconds": {column: {"median": statistics.median(found), "most": max(found)} for column, found in seconds.items() if any(found)},
        "below the base by a point": {column: round(statistics.fmean(found), 4) for column, found in below.items()},
        "results": results,
    }


def table(summary: Mapping[str, Any]) -> str:
    """Return a summary as a Markdown table."""

    def points(found: Mapping[str, Any]) -> str:
        interval = found["interval"]
        return f"{100 * found['mean']:+.1f}" + (f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})" if interval else "")

    rows = []
    for column, title in COLUMNS.items():
        took = summary["seconds"].get(column)
        rows.append([
            title,
            f"{100 * summary['means'][column]:.1f}",
            points(summary["minus the base"][column]) if column != "base" else "–",
            points(summary["refined minus"][column]) if column != "refined" else "–",
            f"{summary['below the base by a point'][column]:.0%}" if column != "base" else "–",
            f"{took['median']:.1f}, at most {took['most']:.0f}" if took else "–",
        ])  # fmt: skip
    heads = ["", "accuracy", "minus the base model", "refined minus it", "a point below the base", "CPU seconds"]
    return markdown_table(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", required=True, type=Path)
    parser.add_argument("--zoo", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--generator", default="cond-pdiff/minilm-text-tasks")
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th task beginning with I; the summary is of all that are there")
    arguments = parser.parse_args()
    zoo = Zoo(arguments.zoo)
    multitask = multitask_adapter(zoo)
    if multitask is None:
        raise SystemExit(f"{zoo.folder} has no multi-task adapter")
    measurer, (first, step) = TaskMeasurer(arguments.generator, zoo), map(int, arguments.shard.split("/"))
    names = reported_tasks()
    for name in names[first::step]:
        task = Task.load(arguments.tasks / name)
        once(arguments.out / f"{name}.json", partial(measure, measurer, multitask, task, arguments.shots, arguments.seed))
        print(name, flush=True)
    found = [json.loads(path.read_text(encoding="utf-8")) for name in names if (path := arguments.out / f"{name}.json").exists()]
    summary = summarize(found)
    write_text(arguments.out / "summary.json", dump_json(summary))
    print(f"{summary['tasks']} tasks of {summary['sources']} sources\n\n{table(summary)}")


if __name__ == "__main__":
    main()
