"""Table 3: what of the method matters. Every variant is trained with several seeds and measured on a part of the tasks."""

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
from cond_pdiff.training.reproduce.cells import Plan
from cond_pdiff.training.reproduce.lab import Lab
from cond_pdiff.training.reproduce.variants import Variant, Workshop
from cond_pdiff.training.tasks.metrics import metric_names

BLOCK = re.compile(r"\.(\d+)\.")
"""The number of a transformer block in the name of a tensor."""


def variants(lab: Lab) -> list[Variant]:
    """The recipe's variants; `TrainingError` says which entry is wrong."""
    config = lab.settings.ablation
    found = [parse(Variant, entry, f"ablation, variants, {index}") for index, entry in enumerate(config.variants, 1)]
    for variant in found:
        lab.settings.collect(variant.way, config.rank)
    return found


def plan(lab: Lab) -> Plan:
    """A cell for each variant and seed; variants that differ in nothing but their name share it."""
    workshop = Workshop(lab)
    return {
        f"table3/{variant.key()}-{seed}": partial(_measure, workshop, variant, seed)
        for variant in variants(lab)
        for seed in range(lab.settings.ablation.seeds)
    }


def _measure(workshop: Workshop, variant: Variant, seed: int) -> dict[str, Any]:
    """For each task the main metric of what was made, its mean, and the share of it that is nearest, in params, to the task's own."""
    lab, data = workshop.lab, workshop.zoo(variant)
    result = {}
    for name in workshop.config.tasks:
        task, number = lab.tasks[name], workshop.bank.names.index(name)
        params = workshop.params(variant, task, seed)
        original = data.template.to_adapter(data[data.tasks == number][0])
        adapters = [first_blocks(data.template.to_adapter(row), original, variant.blocks) for row in params]
        metric, limit = metric_names(task)[0], workshop.config.max_rows
        scores = [lab.score(task, lab.predict(task, adapter, limit), limit)[metric] for adapter in adapters]
        nearest = torch.cat([(params[:, None] - chunk).norm(dim=2) for chunk in data.chunks()], dim=1).argmin(1)
        routed = (data.tasks[nearest] == number).float().mean()
        result[name] = {"score": round(statistics.fmean(scores), 4), "routed": round(float(routed), 4)}
    return result


def first_blocks(generated: LoraAdapter, original: LoraAdapter, share: float) -> LoraAdapter:
    """The generated adapter in this share of the base model's first blocks (at least one), the original in the others."""
    number = {key: int(found[1]) for key in generated.tensors if (found := BLOCK.search(key))}
    count = max(1, round(share * len(set(number.values()))))
    return replace(generated, tensors={key: (generated if number[key] < count else original).tensors[key] for key in generated.tensors})


def summarize(lab: Lab, values: Mapping[str, Any]) -> dict[str, Any]:
    """A row a variant: mean and standard deviation over the seeds, of each task and of the tasks' mean."""
    rows = []
    for variant in variants(lab):
        cells = [values[f"table3/{variant.key()}-{seed}"] for seed in range(lab.settings.ablation.seeds)]
        row: dict[str, Any] = {"group": variant.group, "name": variant.name}
        for name in lab.settings.ablation.tasks:
            row[name], row[f"{name}_deviation"] = _spread([cell[name]["score"] for cell in cells])
        row["mean"], row["mean_deviation"] = _spread([statistics.fmean(part["score"] for part in cell.values()) for cell in cells])
        row["routing"] = round(statistics.fmean(part["routed"] for cell in cells for part in cell.values()), 4)
        rows.append(row)
    config = lab.settings.ablation
    sizes = {"rank": config.rank, "seeds": config.seeds, "samples": config.samples, "max_rows": config.max_rows}
    return {"tasks": list(config.tasks), **sizes, "rows": rows}


def _spread(numbers: list[float]) -> tuple[float, float]:
    return round(statistics.fmean(numbers), 4), round(statistics.pstdev(numbers), 4)


def to_markdown(result: Mapping[str, Any], about: str) -> str:
    """One table, group after group."""
    tasks = [*result["tasks"], "mean"]
    rows = []
    for row in result["rows"]:
        cells = [f"{100 * row[name]:.1f} ± {100 * row[f'{name}_deviation']:.1f}" for name in tasks]
        rows.append([row["group"], row["name"], *cells, f"{100 * row['routing']:.0f}"])
    how = (
        f"Rank {result['rank']}; mean ± standard deviation over {result['seeds']} seeds of the generator's training, {result['samples']} "
        f"generated adapters each, on up to {result['max_rows']} rows a task."
    )
    return "\n".join(["# Table 3", "", about, "", how, "", markdown_table(["", "variant", *tasks, "routing"], rows), ""])
