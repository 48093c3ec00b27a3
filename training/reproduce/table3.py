"""Table 3: what of the method matters. Every ablation is trained with several seeds and measured on a part of the tasks."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.training.card import markdown_table
from cond_pdiff.training.config import parse
from cond_pdiff.training.reproduce.ablations import Ablation, AblationRunner
from cond_pdiff.training.reproduce.cells import Cell, Plan, Step
from cond_pdiff.training.reproduce.experiment import Experiment
from cond_pdiff.training.tasks.metrics import metric_names

BLOCK = re.compile(r"\.(\d+)\.")
"""The number of a transformer block in the name of a tensor."""


def ablations(experiment: Experiment) -> list[Ablation]:
    """Return the recipe's ablations; `TrainingError` says which entry is wrong."""
    config = experiment.settings.ablation
    found = [parse(Ablation, entry, f"ablation, ablations, {index}") for index, entry in enumerate(config.ablations, 1)]
    for ablation in found:
        experiment.settings.collect(ablation.zoo, config.rank)
    return found


def plan(experiment: Experiment) -> Plan:
    """Plan a cell for each ablation and seed, and its steps; ablations that differ in nothing but their name share it."""
    runner, plan = AblationRunner(experiment), dict[str, Cell | Step]()
    for ablation in ablations(experiment):
        for seed in range(experiment.settings.ablation.seeds):
            steps = runner.steps(ablation, seed)
            plan |= steps
            plan[f"table3/{ablation.key()}-{seed}"] = Cell(partial(_measure, runner, ablation, seed), tuple(steps))
    return plan


def _measure(runner: AblationRunner, ablation: Ablation, seed: int) -> dict[str, Any]:
    """Measure for each task the main metric of what was made, its mean, and the share that is nearest, in params, to the task's own."""
    experiment, data = runner.experiment, runner.zoo(ablation)
    result = {}
    for name in runner.config.tasks:
        task, number = experiment.tasks[name], runner.bank.names.index(name)
        params = runner.params(ablation, task, seed)
        original = data.template.to_adapter(data[data.tasks == number][0])
        adapters = [first_blocks(data.template.to_adapter(row), original, ablation.blocks) for row in params]
        metric, limit = metric_names(task)[0], runner.config.max_rows
        scores = [experiment.score(task, experiment.predict(task, adapter, limit), limit)[metric] for adapter in adapters]
        nearest = torch.cat([(params[:, None] - chunk).norm(dim=2) for chunk in data.chunks()], dim=1).argmin(1)
        routed = (data.tasks[nearest] == number).float().mean()
        result[name] = {"score": round(statistics.fmean(scores), 4), "routed": round(float(routed), 4)}
    return result


def first_blocks(generated: LoraAdapter, original: LoraAdapter, share: float) -> LoraAdapter:
    """Return the generated adapter in this share of the base model's first blocks (at least one), the original in the others."""
    number = {key: int(found[1]) for key in generated.tensors if (found := BLOCK.search(key))}
    count = max(1, round(share * len(set(number.values()))))
    return replace(generated, tensors={key: (generated if number[key] < count else original).tensors[key] for key in generated.tensors})


def summarize(experiment: Experiment, values: Mapping[str, Any]) -> dict[str, Any]:
    """Gather a row for each ablation: mean and standard deviation over the seeds, of each task and of the tasks' mean."""
    rows = []
    for ablation in ablations(experiment):
        cells = [values[f"table3/{ablation.key()}-{seed}"] for seed in range(experiment.settings.ablation.seeds)]
        row: dict[str, Any] = {"group": ablation.group, "name": ablation.name}
        for name in experiment.settings.ablation.tasks:
            row[name], row[f"{name}_deviation"] = _spread([cell[name]["score"] for cell in cells])
        row["mean"], row["mean_deviation"] = _spread([statistics.fmean(part["score"] for part in cell.values()) for cell in cells])
        row["routing"] = round(statistics.fmean(part["routed"] for cell in cells for part in cell.values()), 4)
        rows.append(row)
    config = experiment.settings.ablation
    sizes = {"rank": config.rank, "seeds": config.seeds, "samples": config.samples, "max_rows": config.max_rows}
    return {"tasks": list(config.tasks), **sizes, "rows": rows}


def _spread(numbers: list[float]) -> tuple[float, float]:
    return round(statistics.fmean(numbers), 4), round(statistics.pstdev(numbers), 4)


def to_markdown(result: Mapping[str, Any], about: str) -> str:
    """Return one table, group after group, as Markdown."""
    tasks = [*result["tasks"], "mean"]
    rows = []
    for row in result["rows"]:
        cells = [f"{100 * row[name]:.1f} ± {100 * row[f'{name}_deviation']:.1f}" for name in tasks]
        rows.append([row["group"], row["name"], *cells, f"{100 * row['routing']:.0f}"])
    how = (
        f"Rank {result['rank']}; mean ± standard deviation over {result['seeds']} seeds of the generator's training, {result['samples']} "
        f"generated adapters each, on up to {result['max_rows']} rows a task."
    )
    return "\n".join(["# Table 3", "", about, "", how, "", markdown_table(["", "ablation", *tasks, "routing"], rows), ""])
