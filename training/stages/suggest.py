"""Suggestion of a recipe for a folder of tasks: runs, steps and sizes by their number, and what that takes on this machine."""

from __future__ import annotations

import copy
import itertools
import math
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cond_pdiff.errors import TaskDataError
from cond_pdiff.families.family import family_named
from cond_pdiff.pipelines.provenance import machine_facts
from cond_pdiff.training.config import AutoencoderConfig, CollectConfig, FitConfig, UNetConfig, parse
from cond_pdiff.training.precision import training_device
from cond_pdiff.training.stages.autoencoder import AutoencoderStage
from cond_pdiff.training.stages.condition_bank import ConditionBank
from cond_pdiff.training.stages.denoiser import DenoiserStage
from cond_pdiff.training.stages.loop import Stage, fit
from cond_pdiff.training.tasks.task import ZooTask
from cond_pdiff.training.zoo.collect import collect
from cond_pdiff.training.zoo.params import ZooParams
from cond_pdiff.training.zoo.zoo import Zoo

RULE = "rules of thumb: the shipped recipe of 58 tasks, scaled to the number of tasks; other numbers of tasks were not measured"
FEWEST_TASKS = 2
FEWEST_ADAPTERS = 60
"""So many adapters are collected at least, in up to 12 runs a task: of fewer, an autoencoder learns each by heart."""
HELD_OUT_FROM, HELD_OUT_SHARE = 8, 1 / 8
"""From so many tasks on, a share of them is kept out as unseen, to see what a generator does with a task it does not know."""
MANY_TASKS = 150
"""Above so many tasks, latents and U-Net are twice as wide as in the recipe."""
PASSES = 74
"""The autoencoder's passes through the zoo (those of the shipped recipe)."""
FEW_STEPS, MORE_STEPS = 2, 8
"""The steps of a short and of a longer probe: their difference tells what a step takes, the rest is what a run takes beside its steps."""
GOES = 2
"""Each probe is made so often, and the quickest counts: the first one imports and reads, and others may be using the machine."""


@dataclass(frozen=True)
class Estimate:
    """Seconds that the parts of making a generator take, measured on a few steps of each of them on this machine.

    Args:
        collect: fine-tuning of all adapters, and of the multi-task baseline.
        conditions: the condition embeddings of all tasks.
        autoencoder: its training.
        unet: the training of the U-Net.
    """

    collect: float
    conditions: float
    autoencoder: float
    unet: float

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.collect + self.conditions + self.autoencoder + self.unet


@dataclass(frozen=True)
class Suggestion:
    """A suggested recipe and what it takes.

    Args:
        recipe: sections that `collect` and `train` read.
        adapters: the number of adapters that are collected, those of unseen tasks included.
        estimate: of the time.
        machine: on which it was measured.
    """

    recipe: dict[str, Any]
    adapters: int
    estimate: Estimate
    machine: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        seconds = {name: round(value, 1) for name, value in asdict(self.estimate).items()}
        seconds["total"] = round(self.estimate.total, 1)
        return {"adapters": self.adapters, "seconds": seconds, "machine": self.machine, "rule": RULE}

    def __str__(self) -> str:
        """Write number of adapters, steps and time as text for people."""
        collected, parts = self.recipe["collect"], asdict(self.estimate)
        told = ", ".join(f"{name} {_duration(value)}" for name, value in parts.items())
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        return (
            f"zoo        {self.adapters} adapters: {len(collected['tasks'])} tasks, {collected['runs']} runs each; "
            f"{len(collected['unseen'])} tasks kept out\n"
            f"steps      autoencoder {self.recipe['autoencoder']['fit']['steps']}, U-Net {self.recipe['unet']['fit']['steps']}\n"
            f"time       about {_duration(self.estimate.total)}: {told}\n"
            f"measured   on a few steps of each part, two tasks ({machine}); other work on the machine makes it longer\n"
            f"sizes      {RULE}"
        )


def _duration(seconds: float) -> str:
    """Say seconds in the unit that suits them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def suggest(start: dict[str, Any], tasks_folder: str | Path) -> Suggestion:
    """Scale a recipe to a folder of tasks, and time a few steps of each part of it on this machine.

    Args:
        start: sections `collect`, `autoencoder` and `unet`; what is not scaled stays.
        tasks_folder: the tasks.

    Raises:
        TaskDataError: fewer than two tasks, or one that adapters cannot be collected on.
    """
    family = family_named(parse(CollectConfig, start.get("collect", {}), "collect").family)
    tasks = list(family.load_tasks(tasks_folder, None))
    if len(tasks) < FEWEST_TASKS:
        raise TaskDataError(f"{tasks_folder} has {len(tasks)} task; a generator is trained on at least {FEWEST_TASKS}: import another one")
    for task in tasks:
        task.check()
    recipe = scaled(start, [task.name for task in tasks])
    collected = parse(CollectConfig, recipe["collect"], "collect")
    adapters = len(collected.tasks) * collected.runs * collected.last_checkpoints + len(collected.unseen)
    return Suggestion(recipe, adapters, measure(recipe, tasks_folder, tasks), machine_facts(training_device()))


def scaled(start: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a recipe with runs, steps and sizes for these tasks (`RULE`); some of many tasks are kept out, the same ones every time."""
    recipe = copy.deepcopy({name: start.get(name, {}) for name in ("collect", "autoencoder", "unet")})
    held_out = round(HELD_OUT_SHARE * len(names)) if len(names) >= HELD_OUT_FROM else 0
    unseen = sorted(random.Random("unseen").sample(sorted(names), held_out))
    tasks = sorted(set(names) - set(unseen))
    runs = min(max(math.ceil(FEWEST_ADAPTERS / len(tasks)), 3), 12)
    recipe["collect"] |= {"tasks": tasks, "unseen": unseen, "runs": runs, "multitask_steps": min(max(25 * len(tasks), 100), 1500)}
    batch = parse(AutoencoderConfig, recipe["autoencoder"], "autoencoder").fit.batch_size
    steps = min(max(round(PASSES * len(tasks) * runs / batch), 400), 8000)
    recipe["autoencoder"]["fit"] = {**recipe["autoencoder"].get("fit", {}), "steps": steps}
    recipe["unet"]["fit"] = {**recipe["unet"].get("fit", {}), "steps": min(max(52 * len(tasks), 1000), 20_000)}
    recipe["unet"]["conditions_per_task"] = min(max(round(1400 / len(tasks)), 24), 64)
    if len(tasks) > MANY_TASKS:
        model, denoiser = recipe["autoencoder"].get("model", {}), recipe["unet"].get("denoiser", {})
        if "latent_dim" in model:
            model["latent_dim"] *= 2
        if "block_out_channels" in denoiser:  # the last one is the U-Net's narrowest place
            *widths, last = denoiser["block_out_channels"]
            denoiser["block_out_channels"] = [*(2 * width for width in widths), last]
    return {"about": f"Suggested for {len(tasks)} tasks ({RULE}).", **recipe}


def measure(recipe: dict[str, Any], tasks_folder: str | Path, tasks: Sequence[ZooTask]) -> Estimate:
    """Take a few steps of each part of a recipe in a temporary folder, on two of its tasks, and reckon what all of it takes."""
    config = parse(CollectConfig, recipe["collect"], "collect")
    autoencoder_config = parse(AutoencoderConfig, recipe["autoencoder"], "autoencoder")
    unet_config = parse(UNetConfig, recipe["unet"], "unet")
    probed = [task for task in tasks if task.name in config.tasks][:FEWEST_TASKS]
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        short, long = (
            [_probe_zoo(config, tasks_folder, probed, steps, folder / f"zoo-{steps}-{go}") for go in range(GOES)]
            for steps in (FEW_STEPS, MORE_STEPS)
        )
        (few, _), (more, zoo) = (min(probes, key=lambda probe: probe[0]) for probes in (short, long))
        a_step = max((more - few) / (MORE_STEPS - FEW_STEPS) / len(probed), 0.0)
        found = [float(run.facts["seconds"]) for task in probed for run in zoo.runs(task.name)]
        a_run = max(sum(found) / len(found) - MORE_STEPS * a_step, 0.0)  # writing and measuring an adapter
        runs = len(config.tasks) * config.runs + len(config.unseen)
        data = ZooParams.load(zoo, folder / "params")
        started = time.monotonic()
        bank = ConditionBank.build(probed, unet_config, folder)
        conditions = (time.monotonic() - started) * len(config.tasks) / len(probed)
        autoencoder = AutoencoderStage(data, autoencoder_config)
        autoencoder.module.eval()
        codec = autoencoder.codec
        return Estimate(
            collect=runs * (a_run + config.steps * a_step) + config.multitask_steps * a_step,
            conditions=conditions,
            autoencoder=_training_seconds(lambda: AutoencoderStage(data, autoencoder_config), autoencoder_config.fit, folder / "first"),
            unet=_training_seconds(
                lambda: DenoiserStage(codec, data, bank, unet_config, {}, autoencoder.latents()), unet_config.fit, folder / "second"
            ),
        )


def _probe_zoo(
    config: CollectConfig, tasks_folder: str | Path, tasks: Sequence[ZooTask], steps: int, folder: Path
) -> tuple[float, Zoo]:
    """Collect one short run of each task; return the seconds that it took, and the zoo."""
    names, started = tuple(task.name for task in tasks), time.monotonic()
    short = replace(config, tasks=names, unseen=(), runs=1, steps=steps, last_checkpoints=1, multitask_steps=0, from_multitask=False)
    zoo = collect(short, tasks_folder, folder)
    return time.monotonic() - started, zoo


def _training_seconds(make: Callable[[], Stage], config: FitConfig, folder: Path) -> float:
    """Return what all steps of a stage take, by a short and a longer training of it."""
    taken = dict.fromkeys((FEW_STEPS, MORE_STEPS), math.inf)
    for steps, go in itertools.product(taken, range(GOES)):
        stage, started = make(), time.monotonic()
        fit(stage, replace(config, steps=steps), folder / f"{steps}-{go}")
        taken[steps] = min(taken[steps], time.monotonic() - started)
    a_step = max((taken[MORE_STEPS] - taken[FEW_STEPS]) / (MORE_STEPS - FEW_STEPS), 0.0)
    return taken[FEW_STEPS] + a_step * (config.steps - FEW_STEPS)
