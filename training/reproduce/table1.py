"""Table 1: adapters that are generated beside those that are trained, at every rank, on every zoo.

What the paper's table lacks stands beside it: one metric a task in all columns, the base model, a multi-task LoRA, retrieval,
and two controls with isotropic noise, which say how much of a result any adapter of that distance would have.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.training.card import markdown_table
from cond_pdiff.training.evaluate.measure import mean
from cond_pdiff.training.evaluate.similarity import ZooSpace, common_errors
from cond_pdiff.training.reproduce.cells import Cell, Plan, Step
from cond_pdiff.training.reproduce.experiment import Experiment, TrainedZoo, generator_path, spread
from cond_pdiff.training.tasks.metrics import NAMES, metric_names

COLUMNS = {
    "base": "base",
    "full": "full fine-tuning",
    "multitask": "multi-task LoRA",
    "retrieval": "retrieval",
    "original": "original",
    "soup": "soup",
    "generated": "generated",
    "generated_best": "generated, best",
    "noise": "original + noise",
    "soup_noise": "soup + noise",
}
DEVIATIONS = ("original", "generated")
"""The columns that are means over several adapters, and are given with their standard deviation."""

NOVELTY = ("distance", "common_errors", "common_errors_between_originals")


def plan(experiment: Experiment) -> Plan:
    """Plan a cell for each task's whole model, and one for each rank, zoo and task."""
    cells: dict[str, Cell | Step] = {f"table1/{name}": Cell(partial(_whole_model, experiment, name)) for name in experiment.tasks}
    for zoo, rank in itertools.product(experiment.config.table_zoos, experiment.config.ranks):
        needs = (generator_path(zoo, rank),)
        cells |= {f"table1/{zoo}-{rank}/{name}": Cell(partial(_adapters, experiment, zoo, rank, name), needs) for name in experiment.tasks}
    return cells


def _whole_model(experiment: Experiment, name: str) -> dict[str, Any]:
    task = experiment.tasks[name]
    return {
        "split": task.test_split,
        "rows": len(experiment.rows(task)),
        "base": experiment.score(task, experiment.predict(task, None)),
        "full": experiment.full_fine_tuning(task),
    }


def _adapters(experiment: Experiment, zoo: str, rank: int, name: str) -> dict[str, Any]:
    """Measure all columns of one task that are adapters: a list of scores each; how new and how well routed the generated ones are."""
    task, trained_zoo = experiment.tasks[name], experiment.with_generator(zoo, rank)
    samples = trained_zoo.generate(trained_zoo.prompt(task), experiment.config.samples)
    best = min(range(len(samples)), key=lambda index: experiment.training_loss(task, samples[index]))
    retrieved = trained_zoo.retrieved(task)
    noise, soup_noise = noise_controls(trained_zoo, name, samples[0])
    columns: dict[str, list[LoraAdapter]] = {
        "multitask": [trained_zoo.multitask] if trained_zoo.multitask else [],
        "retrieval": trained_zoo.trained[retrieved][:1],
        "original": spread(trained_zoo.trained[name], experiment.config.reported_samples),
        "soup": [trained_zoo.soups[name]],
        "generated": samples[: experiment.config.reported_samples],
        "generated_best": [samples[best]],
        "noise": [noise],
        "soup_noise": [soup_noise],
    }
    unique = {id(adapter): adapter for adapters in columns.values() for adapter in adapters}
    predicted = {key: experiment.predict(task, adapter) for key, adapter in unique.items()}
    predictions = {column: [predicted[id(adapter)] for adapter in adapters] for column, adapters in columns.items()}
    result: dict[str, Any] = {column: [experiment.score(task, row) for row in rows] for column, rows in predictions.items()}
    labels = experiment.labels(task)
    classes = task.label_range is None
    pairs = itertools.product(predictions["generated"], predictions["original"])
    between = itertools.combinations(predictions["original"], 2)
    return result | {
        "retrieved": retrieved,
        "routed": trained_zoo.routed(task),
        "novelty": {
            "distance": mean([distance for _, distance in trained_zoo.space.nearest(samples)]),
            "common_errors": mean([common_errors(*pair, labels) for pair in pairs]) if classes else None,
            "common_errors_between_originals": mean([common_errors(*pair, labels) for pair in between]) if classes else None,
        },
    }


def noise_controls(trained_zoo: TrainedZoo, name: str, generated: LoraAdapter) -> tuple[LoraAdapter, LoraAdapter]:
    """Return the task's nearest trained adapter, and its soup, plus noise: as far from them, in ΔW, as the generated adapter is."""
    trained, soup = trained_zoo.trained[name], trained_zoo.soups[name]
    *distances, from_soup = ZooSpace([*trained, soup], [name] * (len(trained) + 1)).distances([generated])[0].tolist()
    nearest = min(range(len(trained)), key=distances.__getitem__)
    return trained_zoo.with_noise(trained[nearest], distances[nearest], seed=1), trained_zoo.with_noise(soup, from_soup, seed=2)


def summarize(experiment: Experiment, values: Mapping[str, Any]) -> dict[str, Any]:
    """Gather a row for each rank, zoo, task and metric; and means over the tasks, of their main metrics.

    `missing` names the ranks and zoos of which a task is not measured yet; there are no rows of them.
    """
    rows: list[dict[str, Any]] = []
    means: list[dict[str, Any]] = []
    missing: list[str] = []
    for rank, zoo in itertools.product(sorted(experiment.config.ranks), experiment.config.table_zoos):
        if not all(f"table1/{zoo}-{rank}/{name}" in values for name in experiment.tasks):
            missing.append(f"rank {rank}, {zoo}")
            continue
        cells = {name: values[f"table1/{name}"] | values[f"table1/{zoo}-{rank}/{name}"] for name in experiment.tasks}
        place: dict[str, Any] = {"rank": rank, "zoo": zoo}
        measured = [(name, metric) for name, task in experiment.tasks.items() for metric in metric_names(task)]
        own = [place | _row(experiment, name, metric, cells[name]) for name, metric in measured]
        rows += own
        main = [row for row in own if row["metric"] == metric_names(experiment.tasks[row["task"]])[0]]
        routed = [hit for cell in cells.values() for hit in cell["routed"]]
        means.append(
            place
            | {column: mean([row[column] for row in main]) for column in COLUMNS}
            | {"routing": round(statistics.fmean(routed), 4), "routing_samples": len(routed)}
            | {f"novelty_{name}": mean([cell["novelty"][name] for cell in cells.values()]) for name in NOVELTY}
        )
    return {"rows": rows, "means": means, "missing": missing}


def _row(experiment: Experiment, name: str, metric: str, cell: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    for column in COLUMNS:
        scores = cell[column] if isinstance(cell[column], list) else [cell[column]]
        found[column] = [score[metric] for score in scores]
    deviations = {f"{column}_deviation": round(statistics.pstdev(found[column]), 4) for column in DEVIATIONS}
    where = {"task": name, "metric": metric, "split": cell["split"], "rows": cell["rows"], "retrieved": cell["retrieved"]}
    return where | {column: mean(numbers) for column, numbers in found.items()} | deviations


def to_markdown(result: Mapping[str, Any], about: str) -> str:
    """Return the means, then every row, as Markdown."""
    heads = list(COLUMNS.values())
    means = [
        [str(row["rank"]), row["zoo"], *(percent(row[column]) for column in COLUMNS), percent(row["routing"])]
        + [percent(row[f"novelty_{name}"]) for name in NOVELTY]
        for row in result["means"]
    ]
    rows = [
        [str(row["rank"]), row["zoo"], row["task"], NAMES[row["metric"]], str(row["rows"]), *_cells(row)] for row in result["rows"]
    ]
    novelty = ["ΔW novelty", "common errors", "… of two originals"]
    gaps = [f"Not measured yet: {'; '.join(result['missing'])}.", ""] if result["missing"] else []
    return "\n".join([
        "# Table 1", "", about, "", *gaps,
        "## Means over the tasks", "", markdown_table(["rank", "zoo", *heads, "routing", *novelty], means), "",
        "## Every task", "", markdown_table(["rank", "zoo", "task", "metric", "rows", *heads], rows), "",
    ])  # fmt: skip


def _cells(row: Mapping[str, Any]) -> Sequence[str]:
    return [
        percent(row[column]) + (f" ± {100 * row[f'{column}_deviation']:.1f}" if column in DEVIATIONS else "") for column in COLUMNS
    ]


def percent(value: float | None) -> str:
    """Show a share in percent: 0.5 → 50.0."""
    return "–" if value is None else f"{100 * value:.1f}"
