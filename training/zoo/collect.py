"""`collect`: fine-tune adapters for a folder of tasks into a zoo. Run the same command again to go on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.atomic import check_output_folder, dump_json, write_bytes, write_text
from cond_pdiff.attach import attached_to_groups
from cond_pdiff.base_state import check_state
from cond_pdiff.errors import TrainingError
from cond_pdiff.families.family import family_named, family_of
from cond_pdiff.lora import KEY_PREFIX, LoraSpec, same_base, target_linears, update_shape
from cond_pdiff.pipelines.provenance import machine_facts
from cond_pdiff.training.config import CollectConfig
from cond_pdiff.training.finetuning.fine_tuning import FineTuning
from cond_pdiff.training.jobs.run import Execution, run_jobs
from cond_pdiff.training.jobs.work import Work
from cond_pdiff.training.precision import attention_backend, mixed_precision
from cond_pdiff.training.stages.loop import rate_factor
from cond_pdiff.training.tasks.task import ZooTask
from cond_pdiff.training.zoo.zoo import MULTITASK, Job, Zoo, write_run


def collect(
    config: CollectConfig,
    tasks_folder: str | Path,
    zoo_folder: str | Path,
    shard: tuple[int, int] = (0, 1),
    together: int = 1,
    execution: Execution | None = None,
) -> Zoo:
    """Collect every missing adapter of the zoo.

    Jobs are ordered by run, so that a zoo cut short covers all tasks. One that fails three times is set aside, the others are done.

    The same settings give the same bytes on one make of machine with one number of CPU threads (`OMP_NUM_THREADS`); with another one
    sums round differently, and training makes more of it. Each `run.json` says under `machine` where its run was trained, so two zoos
    can be expected to have equal hashes where those entries are equal.

    Args:
        config: see `CollectConfig`.
        tasks_folder: a task collection (see `cond_pdiff.training.tasks.tasks`).
        zoo_folder: created, or continued if it was collected with the same settings.
        shard: (i, n) does every n-th job beginning with i, so n processes can share the work.
        together: adapters that are trained side by side, each on its own rows of one batch. They come out the same but for rounding,
            on a GPU in a fraction of the time.
        execution: where; default: in this process.

    Raises:
        TrainingError: settings that do not fit each other or the zoo, or jobs that failed: of a loss that is not finite.
        TaskDataError: a task is missing or malformed.
    """
    if together < 1 or (together > 1 and (config.modules_to_save or config.lora_dropout)):
        raise TrainingError(f"together must be at least 1, and 1 with modules_to_save or lora_dropout, got {together}")
    work = CollectWork(config, Path(tasks_folder), Path(zoo_folder), together)
    report = run_jobs(work, execution, shard)
    work.zoo.write_manifest()
    report.check()
    return work.zoo


@dataclasses.dataclass
class CollectWork(Work):
    """The adapters of a zoo, each a job; see `collect`."""

    label = "collect"
    unit = "adapter"

    config: CollectConfig
    tasks_folder: Path
    folder: Path
    at_once: int = 1

    @cached_property
    def _opened(self) -> tuple[CollectConfig, dict[str, ZooTask], _FineTuner]:
        """The settings with the names of all tasks, the tasks, and what trains on them; the zoo is begun if need be."""
        config, family = self.config, family_named(self.config.family)
        found: Sequence[ZooTask] = family.load_tasks(self.tasks_folder, [*config.tasks, *config.unseen] if config.tasks else None)
        for task in found:
            task.check()
        fine_tuning: FineTuning = family.fine_tuning(config, found)
        tasks = {task.name: task for task in found}
        if not config.tasks:
            kept_out = set(config.unseen)  # and what was made from it
            names = (name for name, task in tasks.items() if not kept_out & {name, task.zoo_facts().get("source")})
            config = dataclasses.replace(config, tasks=tuple(sorted(names)))
        if both := sorted(set(config.unseen) & set(config.tasks)):
            raise TrainingError(f"{both[0]!r} is named both as a task to train on and as unseen")
        if missing := sorted(set(config.unseen) - set(tasks)):
            raise TrainingError(f"{self.tasks_folder} has no {missing[0]!r}, which the recipe keeps out of the zoo")
        zoo, lora_a = _open_zoo(config, tasks, self.folder, fine_tuning)
        return config, tasks, _FineTuner(fine_tuning, config, zoo, lora_a)

    def close(self) -> None:
        """Let go of the base model; it is loaded again when it is needed."""
        self.__dict__.pop("_opened", None)

    @property
    def zoo(self) -> Zoo:
        """The zoo that is collected."""
        return self._opened[2].zoo

    def jobs(self) -> list[str]:
        """Return the folders of all runs; those of run 0 first, in the recipe's order of tasks."""
        config, _, _ = self._opened
        order = {name: place for place, name in enumerate((*config.tasks, *config.unseen))}  # the recipe's; a zoo sorts its tasks
        first = -1 if config.from_multitask else config.runs
        jobs = sorted(self.zoo.jobs, key=lambda job: (first, 0) if job[0] == MULTITASK else (job[1], order[job[0]]))
        return [self._name(job) for job in jobs]

    @cached_property
    def _numbers(self) -> dict[str, Job]:
        return {self._name(job): job for job in self.zoo.jobs}

    def _name(self, job: Job) -> str:
        return self.zoo.job_folder(job).relative_to(self.folder).as_posix()

    def needs(self, job: str) -> list[str]:
        """Return the multi-task baseline, where all runs start from it."""
        return [MULTITASK] if self.config.from_multitask and job != MULTITASK else []

    def joins(self, first: str, other: str) -> bool:
        """Return whether two runs have one learning rate; the baseline stays alone."""
        return MULTITASK not in (first, other) and self._numbers[first][1] == self._numbers[other][1]

    def shared(self) -> list[str]:
        """Return the zoo's settings and its `lora_A`."""
        return ["lora_a.safetensors", "zoo.json"]

    def run_job(self, job: str) -> None:
        """Train one adapter."""
        config, tasks, fine_tuner = self._opened
        name, _ = self._numbers[job]
        fine_tuner.finetune([tasks[task] for task in config.tasks] if name == MULTITASK else [tasks[name]], self._numbers[job])

    def run_jobs(self, jobs: Sequence[str]) -> None:
        """Train several adapters of one run number side by side; one alone as ever."""
        _, tasks, fine_tuner = self._opened
        numbers = [self._numbers[job] for job in jobs]
        if self.at_once == 1 or MULTITASK in jobs:
            super().run_jobs(jobs)
        elif jobs:
            fine_tuner.finetune_together([tasks[name] for name, _ in numbers], numbers[0][1])


def collected(config: CollectConfig, tasks_folder: str | Path, zoo_folder: str | Path, execution: Execution | None = None) -> Zoo:
    """Return the zoo, which is collected, or collected to the end, if it is not complete; see `collect`."""
    if (Path(zoo_folder) / "zoo.json").exists() and not (zoo := Zoo(zoo_folder)).missing:
        return zoo
    return collect(config, tasks_folder, zoo_folder, execution=execution)


def _open_zoo(
    config: CollectConfig, tasks: dict[str, ZooTask], folder: Path, fine_tuning: FineTuning
) -> tuple[Zoo, dict[str, torch.Tensor]]:
    """Create the zoo's settings and its `lora_A`, or check that they are the ones asked for."""
    spec = LoraSpec(
        str(config.base["repo_id"]),
        config.rank,
        config.alpha,
        config.target_modules,
        fine_tuning.task_type,
        modules_to_save=config.modules_to_save,
        fan_in_fan_out=config.fan_in_fan_out,
    )
    family = family_named(config.family)
    if family_of(spec, target_linears(fine_tuning.model, spec)) is not family:
        spec = dataclasses.replace(spec, family=family.name)
    check_state(fine_tuning.model, spec)
    spec = dataclasses.replace(spec, base_fingerprint=family.fingerprint(fine_tuning.model, spec))
    facts = {
        "base": config.base,
        "lora": spec.to_json(),
        "collect": config.record(),
        "tasks": {name: tasks[name].zoo_facts() for name in config.tasks},
        "unseen": {name: tasks[name].zoo_facts() for name in config.unseen},
        "condition": next(iter(tasks.values())).condition_kind.name,
    }
    facts = json.loads(json.dumps(facts))
    if (folder / "zoo.json").exists():  # perhaps of 0.1.0, whose fingerprints were shorter
        recorded = str(Zoo(folder).facts["lora"].get("base_fingerprint"))
        if same_base(recorded, str(spec.base_fingerprint)):
            facts["lora"]["base_fingerprint"] = recorded
    if not (folder / "zoo.json").exists():
        # Another shard may be writing the same files aside at this moment.
        temporary = [path.name for path in folder.glob(".*.json.*")] + [path.name for path in folder.glob(".*.safetensors.*")]
        check_output_folder(folder, ("lora_a.safetensors", "zoo.json", *temporary), overwrite=True)
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        model = get_peft_model(fine_tuning.model, _peft_config(config, fine_tuning.task_type))
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


class _FineTuner:
    """A fine-tuner of adapters on one base model, one after another or side by side."""

    def __init__(self, fine_tuning: FineTuning, config: CollectConfig, zoo: Zoo, lora_a: dict[str, torch.Tensor]) -> None:
        self.fine_tuning, self.config, self.zoo, self.lora_a = fine_tuning, config, zoo, lora_a
        self.spec = LoraSpec.from_json(zoo.facts["lora"])

    def finetune(self, tasks: Sequence[Any], job: Job) -> None:
        """Train one adapter on one task (or, for the multi-task baseline, on many) and save it with its `run.json`."""
        (name, run), config, started = job, self.config, time.monotonic()
        seed = self._seed(job)
        steps, rate = config.steps, config.learning_rates[run % len(config.learning_rates)]
        if name == MULTITASK:
            steps, rate = config.multitask_steps, config.multitask_rate
        torch.manual_seed(seed)
        model = get_peft_model(self.fine_tuning.model, _peft_config(config, self.fine_tuning.task_type))
        try:
            set_peft_model_state_dict(model, self._start(name))
            parts = self._trained(name)
            trained = []
            for key, parameter in model.named_parameters():
                parameter.requires_grad = any(part in key for part in parts)
                if parameter.requires_grad:
                    trained.append(parameter)
            kept: dict[int, dict[str, torch.Tensor]] = {}

            def keep(step: int) -> None:
                if self._keeps(step, steps):
                    kept[step] = {key: value.detach().to("cpu", copy=True) for key, value in get_peft_model_state_dict(model).items()}

            loss = optimise(self.fine_tuning, config, trained, one_of(self.fine_tuning, tasks, seed), steps, rate, keep)[0]
        finally:
            model.unload()
        self._write(None if name == MULTITASK else tasks[0], job, kept, steps, rate, loss, time.monotonic() - started)

    def finetune_together(self, tasks: Sequence[Any], run: int) -> None:
        """Train an adapter on each of several tasks, all in one batch, and save them."""
        config, started, model = self.config, time.monotonic(), self.fine_tuning.model.requires_grad_(False)
        jobs = [(task.name, run) for task in tasks]
        parts, device = self._trained(tasks[0].name), next(model.parameters()).device
        start = self._start(tasks[0].name)
        for name, linear in target_linears(model, self.spec).items():  # a zoo does not keep the zeros that every `lora_B` begins with
            start.setdefault(f"{KEY_PREFIX}{name}.lora_B.weight", torch.zeros(update_shape(linear)[0], self.spec.rank))
        stacked = {key: torch.stack([value] * len(tasks)).to(device) for key, value in start.items()}
        trained = [value.requires_grad_() for key, value in stacked.items() if any(part in key for part in parts)]
        streams = [one_of(self.fine_tuning, [task], self._seed(job)) for job, task in zip(jobs, tasks, strict=True)]
        rate = config.learning_rates[run % len(config.learning_rates)]
        kept: dict[int, dict[str, torch.Tensor]] = {}

        def keep(step: int) -> None:
            if self._keeps(step, config.steps):
                kept[step] = {key: value.detach().to("cpu", copy=True) for key, value in stacked.items()}

        drawn = (([batch for (batch,), _ in each], tasks) for each in zip(*streams, strict=True))
        with attached_to_groups(model, self.spec, stacked):
            losses = optimise(self.fine_tuning, config, trained, drawn, config.steps, rate, keep)
        seconds = (time.monotonic() - started) / len(tasks)
        for index, (job, task) in enumerate(zip(jobs, tasks, strict=True)):
            own = {step: {key: value[index].clone() for key, value in tensors.items()} for step, tensors in kept.items()}
            self._write(task, job, own, config.steps, rate, losses[index], seconds)

    def _write(
        self, task: Any, job: Job, kept: dict[int, dict[str, torch.Tensor]], steps: int, rate: float, loss: float, seconds: float
    ) -> None:
        """Save an adapter with its earlier checkpoints and its `run.json`; `task` None: it was trained on many."""
        (name, run), started = job, time.monotonic()
        adapter = LoraAdapter(self.spec, kept.pop(steps), {"base": self.config.base, "max_length": self.config.max_length, "task": name})
        facts: dict[str, Any] = {"task": name, "run": run, "seed": self._seed(job), "steps": steps, "learning_rate": rate}
        facts |= {"loss": round(loss, 4), "train_lora_a": ".lora_A." in self._trained(name)}
        facts["machine"] = machine_facts(next(self.fine_tuning.model.parameters()).device)
        if task is not None:
            adapter = dataclasses.replace(adapter, metadata={**adapter.metadata, **task.adapter_facts()})
            facts.update(self.fine_tuning.metrics(adapter, task))
        facts["seconds"] = round(seconds + time.monotonic() - started, 1)
        write_run(self.zoo.job_folder(job), adapter, facts, kept)

    def _seed(self, job: Job) -> int:
        name, run = job
        return int.from_bytes(hashlib.sha256(f"{self.config.seed}/{name}/{run}".encode()).digest()[:4], "big")

    def _trained(self, name: str) -> tuple[str, ...]:
        """Return what the names of tensors that a run trains have in them; the multi-task baseline trains both factors, which is best."""
        train_lora_a = self.config.train_lora_a or name == MULTITASK
        return (".lora_B.", ".modules_to_save.", *([".lora_A."] if train_lora_a else []))

    def _keeps(self, step: int, steps: int) -> bool:
        """Return whether the adapter after this many of `steps` steps is one of the last checkpoints."""
        back, rest = divmod(steps - step, self.config.checkpoint_every)
        return rest == 0 and back < self.config.last_checkpoints

    def _start(self, name: str) -> dict[str, torch.Tensor]:
        """Return what a run's adapter is before its first step: the zoo's `lora_A` and head, or the multi-task adapter."""
        if not self.config.from_multitask or name == MULTITASK:
            return dict(self.lora_a)
        if (start := self.zoo.multitask()) is None:
            raise TrainingError(
                f"{self.zoo.folder} has no multi-task adapter yet, from which all runs start; "
                "begin with shard 0, which trains it, and start the others when it is there"
            )
        return dict(start.adapter().tensors)


def one_of(fine_tuning: FineTuning, tasks: Sequence[Any], seed: int) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield batches without end, each of one of the tasks, drawn at random; as lists of a batch and its task."""
    rng = random.Random(seed)
    streams = [(task, fine_tuning.batches(task, rng)) for task in tasks]
    while True:
        task, batches = streams[0] if len(streams) == 1 else rng.choice(streams)
        yield [next(batches)], [task]


def optimise(
    fine_tuning: FineTuning,
    config: CollectConfig,
    parameters: Sequence[torch.Tensor],
    drawn: Iterator[tuple[Sequence[Any], Sequence[Any]]],
    steps: int,
    rate: float,
    after_step: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Train parameters of the base model, or of what is attached to it, with the settings of a run.

    Args:
        fine_tuning: the base model and how it learns a task.
        config: precision, warm-up and weight decay.
        parameters: what moves. Of several adapters side by side, shape `(adapters, …)`.
        drawn: for every step a batch for each adapter, and their tasks.
        steps: of AdamW; `rate` rises linearly in the warm-up and falls by a cosine.
        after_step: is told the number of steps that are done.

    Returns:
        Each adapter's mean of the last 20 losses.

    Raises:
        TrainingError: a loss is not finite.
    """
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=config.weight_decay)
    warmup = max(1, round(config.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps, warmup))
    recent: list[list[float]] = []
    for step, (batches, tasks) in enumerate(itertools.islice(drawn, steps)):
        with mixed_precision(config.precision, parameters[0].device):
            losses = fine_tuning.losses(batches, tasks)
        values = losses.tolist()
        for task, value in zip(tasks, values, strict=True):
            if not math.isfinite(value):
                raise TrainingError(f"{task.name}: the loss is {value} at step {step}; lower the learning rate ({rate})")
        optimizer.zero_grad()
        with attention_backend(config.precision, parameters[0].device.type):  # for what is computed again on the way
            losses.sum().backward()
        _clip_gradients(parameters, len(values))
        optimizer.step()
        schedule.step()
        after_step(step + 1)
        recent = [*recent[-19:], values]
    return [sum(column) / len(column) for column in zip(*recent, strict=True)]


def _clip_gradients(parameters: Sequence[torch.Tensor], adapters: int, most: float = 1.0) -> None:
    """Scale each adapter's gradient to a norm of at most `most`."""
    if adapters == 1:
        nn.utils.clip_grad_norm_(parameters, most)
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    for gradient in gradients:
        gradient *= (most / (norms + 1e-6)).clamp(max=1).view(-1, *(1,) * (gradient.ndim - 1))
