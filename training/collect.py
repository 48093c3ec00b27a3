"""`collect`: fine-tune adapters for a folder of tasks into a zoo. Run the same command again to go on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save
from torch import nn
from tqdm.auto import tqdm

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.atomic import check_output_folder, dump_json, write_bytes, write_text
from cond_pdiff.errors import TrainingError
from cond_pdiff.lora import LoraSpec, base_fingerprint
from cond_pdiff.training.config import CollectConfig
from cond_pdiff.training.head_tuning import HeadTuning
from cond_pdiff.training.precision import mixed_precision
from cond_pdiff.training.style_tuning import StyleTuning
from cond_pdiff.training.text_tuning import TextTuning
from cond_pdiff.training.zoo import RUN_FILE, Zoo, write_run

MULTITASK = "multitask"
TUNINGS: dict[str, type] = {"text": TextTuning, "head": HeadTuning, "style": StyleTuning}


class Tuning(Protocol):
    """A base model, and how an adapter for it learns a kind of task. Tasks have a `name`."""

    model: nn.Module
    """What adapters are attached to, on the device that trains; there once tasks are loaded."""
    task_type: str | None
    """peft's."""

    def load_tasks(self, folder: str | Path, names: Sequence[str] | None) -> Sequence[Any]:
        """The named tasks of a collection, or all."""

    def facts(self, task: Any) -> dict[str, Any]:
        """What the zoo records of a task; `source` names the task that it was made from, if there is one."""

    def metadata(self, task: Any) -> dict[str, Any]:
        """What an adapter records of its task, beside its name."""

    def batches(self, task: Any, rng: random.Random) -> Iterator[Any]:
        """Endless training batches."""

    def loss(self, batch: Any, task: Any) -> torch.Tensor:
        """The loss of a batch."""

    def metrics(self, adapter: LoraAdapter, task: Any) -> dict[str, Any]:
        """Quality on rows that are not trained on, for the manifest."""


def collect(config: CollectConfig, tasks_folder: str | Path, zoo_folder: str | Path, shard: tuple[int, int] = (0, 1)) -> Zoo:
    """Collect every missing adapter of the zoo.

    A finished job is a folder that exists; an interrupted one left nothing. Jobs are ordered by run, so that a zoo cut
    short covers all tasks.

    Args:
        config: see `CollectConfig`.
        tasks_folder: a task collection (see `cond_pdiff.training.tasks`).
        zoo_folder: created, or continued if it was collected with the same settings.
        shard: (i, n) does every n-th job beginning with i, so n processes can share the work.
    """
    tuning: Tuning = TUNINGS[config.kind](config)
    tasks = {task.name: task for task in tuning.load_tasks(tasks_folder, [*config.tasks, *config.unseen] if config.tasks else None)}
    if not config.tasks:
        kept_out = set(config.unseen)  # and what was made from it
        names = (name for name, task in tasks.items() if not kept_out & {name, tuning.facts(task).get("source")})
        config = dataclasses.replace(config, tasks=tuple(sorted(names)))
    if missing := sorted(set(config.unseen) - set(tasks)):
        raise TrainingError(f"{tasks_folder} has no {missing[0]!r}, which the recipe keeps out of the zoo")
    zoo, lora_a = _open_zoo(config, tasks, Path(zoo_folder), tuning)
    made = {name for name in config.tasks if tuning.facts(tasks[name]).get("source")}  # there for variety: one run says it
    jobs = [(name, 0) for name in (*config.tasks, *config.unseen)]
    jobs += [(name, run) for run in range(1, config.runs) for name in config.tasks if name not in made]
    if config.multitask_steps:
        jobs.insert(0 if config.from_multitask else len(jobs), (MULTITASK, 0))
    mine = jobs[shard[0] :: shard[1]]
    tuner = _Tuner(tuning, config, zoo, lora_a)
    for name, run in tqdm(mine, desc="collect", unit="adapter"):
        folder = zoo.folder / MULTITASK if name == MULTITASK else zoo.run_folder(name, run)
        if not (folder / RUN_FILE).exists():
            tuner.finetune([tasks[task] for task in config.tasks] if name == MULTITASK else [tasks[name]], name, run, folder)
    zoo.write_manifest()
    return zoo


def _open_zoo(config: CollectConfig, tasks: dict[str, Any], folder: Path, tuning: Tuning) -> tuple[Zoo, dict[str, torch.Tensor]]:
    """Create the zoo's settings and its `lora_A`, or check that they are the ones asked for."""
    spec = LoraSpec(
        str(config.base["repo_id"]),
        config.rank,
        config.alpha,
        config.target_modules,
        tuning.task_type,
        modules_to_save=config.modules_to_save,
        fan_in_fan_out=config.fan_in_fan_out,
    )
    spec = dataclasses.replace(spec, base_fingerprint=base_fingerprint(tuning.model, spec))
    facts = {
        "base": config.base,
        "lora": spec.to_json(),
        "collect": config.record(),
        "tasks": {name: tuning.facts(tasks[name]) for name in config.tasks},
        "unseen": {name: tuning.facts(tasks[name]) for name in config.unseen},
    }
    facts = json.loads(json.dumps(facts))
    if not (folder / "zoo.json").exists():
        # Another shard may be writing the same files aside at this moment.
        temporary = [path.name for path in folder.glob(".*.json.*")] + [path.name for path in folder.glob(".*.safetensors.*")]
        check_output_folder(folder, ("lora_a.safetensors", "zoo.json", *temporary), overwrite=True)
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        model = get_peft_model(tuning.model, _peft_config(config, tuning.task_type))
        lora_a = {key: value for key, value in get_peft_model_state_dict(model).items() if ".lora_B." not in key}
        write_bytes(folder / "lora_a.safetensors", save({key: value.contiguous() for key, value in lora_a.items()}))
        model.unload()
        write_text(folder / "zoo.json", dump_json(facts))
    zoo = Zoo(folder)
    if zoo.facts != facts:
        different = sorted(name for name in facts if zoo.facts.get(name) != facts[name])
        raise TrainingError(f"{folder} was collected with other settings ({', '.join(different)} differ); choose another folder")
    return zoo, load_file(folder / "lora_a.safetensors")


def _peft_config(config: CollectConfig, task_type: str | None) -> LoraConfig:
    # peft declares lora_alpha as a whole number, and works with any.
    alpha: Any = config.alpha
    # Only what peft adds is in training mode: with lora_dropout, the base model's own dropouts stay off.
    return LoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        target_modules=list(config.target_modules),
        task_type=task_type,
        modules_to_save=list(config.modules_to_save) or None,
        fan_in_fan_out=config.fan_in_fan_out,
        lora_dropout=config.lora_dropout,
    )


class _Tuner:
    """Fine-tunes one adapter after another on one base model."""

    def __init__(self, tuning: Tuning, config: CollectConfig, zoo: Zoo, lora_a: dict[str, torch.Tensor]) -> None:
        self.tuning, self.config, self.zoo, self.lora_a = tuning, config, zoo, lora_a
        self.spec = LoraSpec.from_json(zoo.facts["lora"])

    def finetune(self, tasks: Sequence[Any], name: str, run: int, folder: Path) -> None:
        """Train one adapter on one task (or, for the multi-task baseline, on many) and save it with its `run.json`."""
        config, started = self.config, time.monotonic()
        seed = int.from_bytes(hashlib.sha256(f"{config.seed}/{name}/{run}".encode()).digest()[:4], "big")
        steps = config.multitask_steps if name == MULTITASK else config.steps
        rate = config.learning_rates[run % len(config.learning_rates)]
        if name == MULTITASK and config.multitask_learning_rate:
            rate = config.multitask_learning_rate
        torch.manual_seed(seed)
        model = get_peft_model(self.tuning.model, _peft_config(config, self.tuning.task_type))
        try:
            set_peft_model_state_dict(model, self._start(name))
            train_lora_a = config.train_lora_a or (config.from_multitask and name == MULTITASK)
            parts = (".lora_B.", ".modules_to_save.", *([".lora_A."] if train_lora_a else []))
            trained = []
            for key, parameter in model.named_parameters():
                parameter.requires_grad = any(part in key for part in parts)
                if parameter.requires_grad:
                    trained.append(parameter)
            kept: dict[int, dict[str, torch.Tensor]] = {}

            def keep(step: int) -> None:
                back, rest = divmod(steps - step, config.checkpoint_every)
                if rest == 0 and back < config.last_checkpoints:
                    kept[step] = {key: value.detach().to("cpu", copy=True) for key, value in get_peft_model_state_dict(model).items()}

            loss = optimise(self.tuning, config, trained, tasks, steps, rate, seed, keep)
        finally:
            model.unload()
        adapter = LoraAdapter(self.spec, kept.pop(steps), {"base": config.base, "task": name})
        facts: dict[str, Any] = {"task": name, "run": run, "seed": seed, "steps": steps, "learning_rate": rate, "loss": round(loss, 4)}
        if name != MULTITASK:
            adapter = dataclasses.replace(adapter, metadata={**adapter.metadata, **self.tuning.metadata(tasks[0])})
            facts.update(self.tuning.metrics(adapter, tasks[0]))
        facts["seconds"] = round(time.monotonic() - started, 1)
        write_run(folder, adapter, facts, kept)

    def _start(self, name: str) -> dict[str, torch.Tensor]:
        """What a run's adapter is before its first step: the zoo's `lora_A` and head, or the multi-task adapter."""
        if not self.config.from_multitask or name == MULTITASK:
            return self.lora_a
        if (start := self.zoo.multitask()) is None:
            raise TrainingError(
                f"{self.zoo.folder} has no multi-task adapter yet, from which all runs start; "
                "begin with shard 0, which trains it, and start the others when it is there"
            )
        return dict(start.adapter().tensors)


def optimise(
    tuning: Tuning,
    config: CollectConfig,
    parameters: Sequence[nn.Parameter],
    tasks: Sequence[Any],
    steps: int,
    rate: float,
    seed: int,
    after_step: Callable[[int], None] = lambda _: None,
) -> float:
    """Train parameters of the base model, or of what is attached to it, with the settings of a run; the mean of the last 20 losses.

    Args:
        tuning: the base model and how it learns a task.
        config: batch size, precision, warm-up and weight decay.
        parameters: what moves.
        tasks: one of them a step, drawn at random.
        steps: of AdamW; `rate` rises linearly in the warm-up and falls by a cosine.
        seed: of the batches.
        after_step: is told the number of steps that are done.

    Raises:
        TrainingError: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=config.weight_decay)
    warmup = max(1, round(config.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)),
    )
    rng = random.Random(seed)
    streams = [(task, tuning.batches(task, rng)) for task in tasks]
    recent: list[float] = []
    for step in range(steps):
        task, batches = streams[0] if len(streams) == 1 else rng.choice(streams)
        with mixed_precision(config.precision, parameters[0].device):
            loss = tuning.loss(next(batches), task)
        if not math.isfinite(loss.item()):
            raise TrainingError(f"{task.name}: the loss is {loss.item()} at step {step}; lower the learning rate ({rate})")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        after_step(step + 1)
        recent = [*recent[-19:], loss.item()]
    return sum(recent) / len(recent)
