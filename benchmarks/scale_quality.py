"""Measure what a generator of large adapters keeps: accuracy after encoding and decoding, of generated adapters, and identification.

    python benchmarks/scale_quality.py ZOO --tasks TASKS --recipe FILE --folder DIR --name NAME [--rows 200] [--out results]

The zoo has two adapters a task or more: runs, or checkpoints of one. The last of every third task is held out: neither codec nor
denoiser sees it. Columns are the metric of the zoo's family on `--rows` rows of the test split: base model, mean of the zoo, directly
trained (the first run), nearest adapter (of the task whose condition is most like the request), a Gaussian in the code's coordinates (a
task's mean, and the variance between runs of one task), generated (one sample, from the task's plainest condition); for held-out runs
the run itself and what encoding and decoding leave of it, also at its own size, which is the ceiling of a generator with this code.
Nothing is selected. Differences have 95 % intervals over tasks (bootstrap). Everything is kept in `--folder` (what no generator changes
in `cells` beside it) and goes on where it stopped; the table is added to `results/scale_quality.json` under NAME.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.families.family import family_named
from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.sampling import seeded
from cond_pdiff.training.config import AutoencoderConfig, CollectConfig, UNetConfig, parse
from cond_pdiff.training.evaluate.similarity import delta_gram
from cond_pdiff.training.recipe import read_recipe
from cond_pdiff.training.stages.codec_stages import codec_stage
from cond_pdiff.training.stages.condition_bank import ConditionBank
from cond_pdiff.training.stages.denoiser import DenoiserStage
from cond_pdiff.training.stages.loop import fit
from cond_pdiff.training.stages.train import save_generator
from cond_pdiff.training.zoo.params import ZooParams
from cond_pdiff.training.zoo.zoo import Zoo

HELD_OUT_EVERY, PROMPTS, TASKS_AT_ONCE, RESAMPLES = 3, 2, 8, 10_000
COLUMNS = ("base", "mean", "trained", "nearest", "gaussian", "generated")


class Quality:
    """The zoo, the generator on the part of it that is not held out, and the measures."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.zoo, self.folder = Zoo(arguments.zoo), arguments.folder
        recipe = read_recipe(arguments.recipe)
        self.tasks = self.zoo.load_tasks(arguments.tasks, self.zoo.task_names)
        settings = {**self.zoo.facts["collect"], "base": self.zoo.facts["base"], "metric_rows": arguments.rows}
        config = parse(CollectConfig, settings, "collect")
        self.fine_tuning = family_named(config.family).fine_tuning(config, self.tasks)
        self.data = ZooParams.load(self.zoo, self.folder / "params")
        by_task = [torch.nonzero(self.data.tasks == index).flatten().tolist() for index in range(len(self.tasks))]
        self.first = [rows[0] for rows in by_task]
        self.held_out = {index: rows[-1] for index, rows in enumerate(by_task) if index % HELD_OUT_EVERY == 0}
        names = self.data.names
        of_one_run = [names[row] == names[self.first[index]] for index, row in self.held_out.items()]
        self.held_out_kind = "checkpoints" if any(of_one_run) else "runs"
        self.part = self.data.part([row for row in range(len(self.data)) if row not in self.held_out.values()])
        self.stage = codec_stage(self.part, parse(AutoencoderConfig, recipe["autoencoder"], "autoencoder"))
        started = time.perf_counter()
        self.stage.train(self.folder / "autoencoder")
        self.seconds = {"codec": time.perf_counter() - started}
        self.unet_config = parse(UNetConfig, recipe["unet"], "unet")

    def generator(self) -> CondPDiffPipeline:
        """Return the generator, trained if it is not there."""
        folder = self.folder / "generator"
        if not folder.exists():
            bank = ConditionBank.build(self.tasks, self.unet_config, self.folder)
            denoiser = DenoiserStage(self.stage.codec, self.part, bank, self.unet_config, self.stage.identity, self.stage.latents())
            fit(denoiser, self.unet_config.fit, self.folder / "unet")
            save_generator(denoiser.pipeline(), folder)
        pipe = CondPDiffPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def measure(self, adapter: LoraAdapter, index: int) -> float:
        """Return the metric of a task under an adapter, in percent."""
        found = self.fine_tuning.metrics(adapter, self.tasks[index])
        return round(100 * float(next(value for value in found.values() if isinstance(value, float))), 2)

    def cached(self, name: str, make: Callable[[], Any], shared: bool = False) -> Any:
        """Return what `make` makes, kept on disk; `shared`: for all generators of this zoo."""
        path = (self.folder.parent if shared else self.folder) / "cells" / f"{name}.json"
        if not path.exists():
            write_text(path, dump_json(make()))
        return json.loads(path.read_text(encoding="utf-8"))

    def adapter(self, row: int) -> LoraAdapter:
        """Return an adapter of the zoo."""
        return self.data.template.to_adapter(self.data[torch.tensor([row])][0])

    def mean(self) -> torch.Tensor:
        """Return the mean of all params that are not held out."""
        total = torch.zeros(self.data.template.layout.num_params)
        for chunk in self.part.chunks():
            total += chunk.sum(0)
        return total / len(self.part)

    def decoded(self, latents: torch.Tensor) -> LoraAdapter:
        """Return the adapter of one adapter's latents, shape `(1, …)`."""
        return self.stage.codec.to_adapter(self.stage.codec.decode(latents)[0])

    @torch.no_grad()
    def held_out_row(self, index: int) -> dict[str, float]:
        """Measure a held-out run, before and after encoding and decoding."""
        codec, row = self.stage.codec, self.held_out[index]
        params = self.data[torch.tensor([row])]
        decoded = codec.decode(codec.encode(params))
        lost = float((decoded - params).double().square().sum() / (params - self.mean()).double().square().sum())
        kept = self.cached(f"held-out-{index}", lambda: self.measure(self.adapter(row), index), shared=True)
        return {"energy": round(100 * (1 - lost), 2), "held_out": kept, "projected": self.measure(codec.to_adapter(decoded[0]), index)}

    @torch.no_grad()
    def resized(self, index: int) -> float:
        """Measure a held-out run after encoding and decoding, with every module's distance from the mean as it was in the run."""
        codec, mean = self.stage.codec, self.mean()
        params = self.data[torch.tensor([self.held_out[index]])][0]
        decoded = codec.decode(codec.encode(params[None]))[0]
        for span in codec.template.layout.module_spans():
            place = slice(span.start, span.stop)
            ratio = (params[place] - mean[place]).norm() / (decoded[place] - mean[place]).norm()
            decoded[place] = mean[place] + ratio * (decoded[place] - mean[place])
        return self.measure(codec.to_adapter(decoded), index)

    @torch.no_grad()
    def row(self, index: int, pipe: CondPDiffPipeline) -> dict[str, float]:
        """Measure all columns of one task."""
        output = pipe(self.tasks[index].conditions(1)[0], generator=seeded(index, 1))
        nearest = self.zoo.task_names.index(output.report.nearest[0].task)
        trained = self.adapter(self.first[index])

        def shared(name: str, adapter: Callable[[], LoraAdapter]) -> float:
            return float(self.cached(f"{name}-{index}", lambda: self.measure(adapter(), index), shared=True))

        return {
            "base": shared("base", lambda: trained.scaled(0)),
            "mean": shared("mean", lambda: self.data.template.to_adapter(self.mean())),
            "trained": shared("trained", lambda: trained),
            "nearest": shared("trained" if nearest == index else f"nearest-{nearest}", lambda: self.adapter(self.first[nearest])),
            "gaussian": self.measure(self.decoded(self.gaussian(index)), index),
            "generated": self.measure(output.adapter, index),
        }

    def gaussian(self, index: int) -> torch.Tensor:
        """Draw latents of a task: its mean, and the variance of each coefficient between two runs of one task, over all tasks."""
        latents = self.stage.codec.fit_scaling_factor(self.stage.latents())
        between = [latents[self.part.tasks == task] for task in range(len(self.tasks))]
        spread = torch.stack([(rows[1] - rows[0]).square() / 2 for rows in between if len(rows) > 1]).mean(0).sqrt()
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(index))
        return (between[index].mean(0) + spread * noise)[None]

    def identified(self, pipe: CondPDiffPipeline, indices: Sequence[int]) -> list[bool]:
        """Return of adapters for several conditions of each of these tasks whether the nearest first run, in ΔW, is that of their task."""
        asked = [(index, number, each) for index in indices for number, each in enumerate(self.tasks[index].conditions(PROMPTS))]
        made = [self.kept(pipe(each, generator=seeded(100 + number, 1)).adapter) for _, number, each in asked]
        distances = []
        for row in self.first:  # ‖ΔW − ΔW'‖² = ‖ΔW‖² − 2⟨ΔW, ΔW'⟩ + ‖ΔW'‖², of which the first is the same for all
            trained = self.adapter(row)
            norm = self.cached(f"norm-{row}", lambda trained=trained: float(delta_gram([trained], [trained])), shared=True)
            distances.append(norm - 2 * delta_gram(made, [trained])[:, 0])
        return [bool(nearest == index) for (index, _, _), nearest in zip(asked, torch.stack(distances, 1).argmin(1).tolist(), strict=True)]

    @staticmethod
    def kept(adapter: LoraAdapter) -> LoraAdapter:
        """Return an adapter whose tensors are in memory, as they are read many times."""
        return replace(adapter, tensors=dict(adapter.tensors))


def interval(values: Sequence[float]) -> list[float]:
    """Return a mean with its 95 % bootstrap interval."""
    numbers = torch.tensor(values, dtype=torch.float64)
    drawn = numbers[torch.randint(len(numbers), (RESAMPLES, len(numbers)), generator=torch.Generator().manual_seed(0))].mean(1)
    return [round(float(value), 2) for value in (numbers.mean(), *drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)))]


def markdown(measured: dict[str, Any]) -> list[str]:
    """Return the rows of both tables in docs/large_adapters.md."""

    def with_interval(values: Sequence[float], sign: bool = False) -> str:
        middle, low, high = values
        return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})" if sign else f"{middle:.1f}"

    lines = []
    for name, facts in measured.items():
        cells = [name, f"{facts['numbers']:,}", f"{facts['tasks']}, {facts['adapters']}"]
        cells += [with_interval(facts["columns"][column]) for column in COLUMNS]
        identified = facts["identified"]
        cells += [with_interval(facts["generated_minus"]["trained"], sign=True), f"{100 * identified['share']:.1f} % of {identified['of']}"]
        lines.append("| " + " | ".join(cells) + " |")
    for name, facts in measured.items():
        held_out = facts["held_out"]
        kept = (100 * (1 - facts["lost"]), held_out["energy"][0])
        cells = [name, f"{held_out['adapters']} {held_out['what']}", *(f"{share:.1f} %" for share in kept)]
        cells += [with_interval(held_out[column]) for column in ("held_out", "projected")]
        cells += [with_interval(held_out[f"{column}_minus_held_out"], sign=True) for column in ("projected", "resized")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    for option in ("--tasks", "--folder", "--recipe"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    quality = Quality(arguments)
    codec_rows = {}
    for index in quality.held_out:
        codec_rows[index] = quality.cached(f"projected-{index}", lambda index=index: quality.held_out_row(index))
        codec_rows[index]["resized"] = quality.cached(f"resized-{index}", lambda index=index: quality.resized(index))
        print(quality.tasks[index].name, codec_rows[index], flush=True)
    pipe = quality.generator()
    rows, hits = {}, []
    for index, task in enumerate(quality.tasks):
        rows[task.name] = quality.cached(f"row-{index}", lambda index=index: quality.row(index, pipe))
        print(task.name, rows[task.name], flush=True)
    for start in range(0, len(quality.tasks), TASKS_AT_ONCE):
        part = range(start, min(start + TASKS_AT_ONCE, len(quality.tasks)))
        hits += quality.cached(f"identified-{start}", lambda part=part: quality.identified(pipe, part))
    facts = {
        "numbers": quality.data.template.layout.num_params,
        "tasks": len(rows),
        "adapters": len(quality.part),
        "code": list(quality.stage.codec.latent_shape),
        "lost": round(quality.stage.lost(), 4),
        "codec_seconds": round(quality.seconds["codec"], 1),
        "rows": arguments.rows,
        "held_out": {
            "what": quality.held_out_kind,
            "adapters": len(codec_rows),
            **{name: interval([row[name] for row in codec_rows.values()]) for name in ("energy", "held_out", "projected", "resized")},
            "projected_minus_held_out": interval([row["projected"] - row["held_out"] for row in codec_rows.values()]),
            "resized_minus_held_out": interval([row["resized"] - row["held_out"] for row in codec_rows.values()]),
        },
        "columns": {name: interval([row[name] for row in rows.values()]) for name in COLUMNS},
        "generated_minus": {name: interval([row["generated"] - row[name] for row in rows.values()]) for name in COLUMNS[:-1]},
        "identified": {"of": len(hits), "share": round(sum(hits) / len(hits), 4)},
        "by_task": rows,
    }
    path = arguments.out / "scale_quality.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text(path, dump_json({**found, arguments.name: facts}))
    print("\n".join(markdown({arguments.name: facts})))
