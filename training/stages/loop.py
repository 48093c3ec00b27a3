"""The one training loop. Stages differ by their `Stage`, not by a copied file.

Resuming is exact: all randomness of a step comes from (seed, step, process), the learning rate is a function of the step,
and a checkpoint holds weights, optimiser, EMA and gradient scaler. Killing a run at any moment and giving the same command
again, with as many processes, ends in the same bits as an undisturbed run; all processes end in the same.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.errors import TrainingError
from cond_pdiff.training.config import FitConfig, recorded
from cond_pdiff.training.precision import attention_backend
from cond_pdiff.training.processes import average_norms, processes, take_from_main
from cond_pdiff.training.stages.checkpoint import load_checkpoint, remove_leftovers, save_checkpoint
from cond_pdiff.training.stages.sharding import gather, part_of, shard, unshard

METRICS_FILE = "metrics.jsonl"


class Stage(Protocol):
    """What the loop trains."""

    name: str
    module: nn.Module
    identity: dict[str, Any]
    """JSON-ready facts (settings, hashes of data and conditions) that must be equal for a checkpoint to be continued."""

    @property
    def at_once(self) -> int | None:
        """Samples that go through the network together, for memory's sake; a step sums up the gradients of its parts. None: all."""

    def draw(self, batch_size: int, rng: torch.Generator) -> Any:
        """Draw a batch. All randomness of a step comes from `rng`, a CPU generator."""

    def loss(self, module: nn.Module, batch: Any, rng: torch.Generator) -> torch.Tensor:
        """Return the loss of a batch under `module` (the wrapped form of `self.module`)."""

    def describe(self, batch: Any) -> str:
        """Say what is in the batch, for error messages."""


def fit(stage: Stage, config: FitConfig, folder: Path, tensorboard: bool = False) -> None:
    """Train `stage.module` in place and leave it with its EMA weights, in evaluation mode.

    Args:
        stage: what to train.
        config: see `FitConfig`.
        folder: for checkpoints and `metrics.jsonl`; a checkpoint found there is continued.
        tensorboard: also write tensorboard events below `folder`.

    Raises:
        TrainingError: the loss is not finite (names step and batch), the checkpoint is of another run, or the module cannot be sharded.
    """
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise TrainingError("tensorboard events need the package tensorboard: pip install 'cond-pdiff[train]'")
    processes()  # decides on the device before accelerate does
    AcceleratorState._reset_state()  # accelerate keeps one precision for the whole process; each stage has its own
    try:
        accelerator = Accelerator(mixed_precision=config.precision, log_with="tensorboard" if tensorboard else None, project_dir=folder)
    except ValueError as error:
        raise TrainingError(f"precision {config.precision!r} cannot be had on this machine: {error}") from error
    if config.precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would train in float32 without a word
        raise TrainingError("precision 'fp16' needs a GPU; choose 'bf16' or 'no'")
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(stage, config, folder, accelerator)
    start = run.restore()
    if tensorboard:
        accelerator.init_trackers(stage.name)
    steps = tqdm(range(start, config.steps), initial=start, total=config.steps, desc=stage.name, disable=not accelerator.is_main_process)
    for step in steps:
        loss = run.step(step)
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            row = {"step": step + 1, "loss": float(f"{loss:.6g}"), "learning_rate": learning_rate(config, step)}
            run.log(row)
            accelerator.log({"loss": row["loss"]}, step=step + 1)
            steps.set_postfix(loss=row["loss"])
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            run.save(step + 1)
    run.finish()
    for tracker in accelerator.trackers:  # `end_training` would also leave the other processes, which the next stage needs
        tracker.finish()


def rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Return the share of the learning rate with which a step is done: a linear warm-up, then a cosine to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps))


def learning_rate(config: FitConfig, step: int) -> float:
    """Return the learning rate of a step."""
    return config.learning_rate * rate_factor(step, config.steps, config.warmup_steps)


def step_generator(seed: int, step: int, process: int = 0) -> torch.Generator:
    """Return the random numbers of one step of one process."""
    digest = hashlib.sha256(f"{seed}/{step}/{process}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class _Run:
    """Module, optimiser and EMA of one run, and how they go to disk and back."""

    def __init__(self, stage: Stage, config: FitConfig, folder: Path, accelerator: Accelerator) -> None:
        self.stage, self.config, self.folder, self.accelerator = stage, config, folder, accelerator
        self.identity = json.loads(json.dumps({"fit": recorded(config), "processes": accelerator.num_processes, **stage.identity}))
        self.sharded = config.sharded and accelerator.num_processes > 1
        self.trained = shard(stage.module.train(), accelerator.device) if self.sharded else stage.module.train()
        optimizer = torch.optim.AdamW(self.trained.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        if self.sharded:  # accelerate adds autocast, and leaves the processes to `fully_shard`
            self.module = accelerator.prepare_model(self.trained, device_placement=False, evaluation_mode=True)
            self.optimizer = accelerator.prepare(optimizer)
        else:
            self.module, self.optimizer = accelerator.prepare(self.trained, optimizer)
        self.ema = EMAModel(self.trained.parameters(), decay=config.ema_decay)
        self.ema.to(accelerator.device)

    def step(self, step: int) -> float:
        stage, config, accelerator = self.stage, self.config, self.accelerator
        rng = step_generator(config.seed, step, accelerator.process_index)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        total, at_once = 0.0, stage.at_once or config.batch_size
        for done in range(0, config.batch_size, at_once):
            size = min(at_once, config.batch_size - done)
            last = done + size == config.batch_size
            # Processes tell each other a step's whole gradients; sharded ones, those of each part, of which none holds all.
            with nullcontext() if last or self.sharded else accelerator.no_sync(self.module):
                batch = stage.draw(size, rng)
                with accelerator.autocast(), attention_backend(config.precision, accelerator.device.type):
                    loss = stage.loss(self.module, batch, rng)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise TrainingError(
                        f"{stage.name}: the loss is {value} at step {step}; the batch was {stage.describe(batch)}. "
                        "The last checkpoint is kept; check these adapters, or lower the learning rate."
                    )
                accelerator.backward(loss * (size / config.batch_size))
            total += value * size / config.batch_size
        accelerator.clip_grad_norm_(self.module.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.optimizer.step_was_skipped:  # as the gradient scaler of fp16 does where gradients overflow
            self.ema.step(self.trained.parameters())
        average_norms(self.trained)
        return total

    def save(self, step: int) -> None:
        optimizer_state = self.optimizer.state_dict()["state"]
        groups = {
            "model": self.trained.state_dict(),
            "optimizer": {f"{index}.{name}": value for index, entry in optimizer_state.items() for name, value in entry.items()},
            "ema": {str(index): value for index, value in enumerate(self.ema.shadow_params)},
        }
        whole = {group: gather(tensors) for group, tensors in groups.items()}
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {"identity": self.identity, "ema_steps": self.ema.optimization_step, "scaler": scaler.state_dict() if scaler else None}
        save_checkpoint(self.folder, step, whole, state)

    def restore(self) -> int:
        """Load the newest checkpoint, if any, and return the number of finished steps."""
        if self.accelerator.is_main_process:
            remove_leftovers(self.folder)
        found = load_checkpoint(self.folder)
        step = 0
        if found is not None:
            step, tensors, state = found
            # Without one, the checkpoint is damaged: `_load` says so. What 0.1.0 did not record yet counts as the same.
            new = {name: self.identity[name] for name in ("conditions", "rows") if name in self.identity}
            identity = {"processes": 1, **new, **state.get("identity", self.identity)}
            different = sorted(name for name in identity.keys() | self.identity.keys() if identity.get(name) != self.identity.get(name))
            if different:
                raise TrainingError(
                    f"{self.folder} holds a run with other settings or data ({', '.join(different)} differ); choose another folder"
                )
            try:
                self._load(tensors, state)
            except (LookupError, ValueError, TypeError, RuntimeError) as error:
                why = " ".join(str(error).split())
                raise TrainingError(f"the checkpoint in {self.folder} is damaged ({why}); delete it to start this stage again") from error
        self._cut_log(step)
        return step

    def _load(self, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]) -> None:
        own = self.trained.state_dict()
        self.trained.load_state_dict({name: part_of(value, own.get(name, value)) for name, value in tensors["model"].items()})
        packed, parameters = self.optimizer.state_dict(), list(self.trained.parameters())
        entries: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors["optimizer"].items():
            index, name = key.split(".", 1)
            entries.setdefault(int(index), {})[name] = part_of(value, parameters[int(index)])
        self.optimizer.load_state_dict({**packed, "state": entries})
        averages = [
            part_of(tensors["ema"][str(index)], like).to(self.accelerator.device) for index, like in enumerate(self.ema.shadow_params)
        ]
        if [average.shape for average in averages] != [average.shape for average in self.ema.shadow_params]:
            raise ValueError("the averaged weights have other shapes")
        self.ema.shadow_params = averages
        self.ema.optimization_step = state["ema_steps"]
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def log(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _cut_log(self, step: int) -> None:
        """Drop the lines that a killed run wrote after its last checkpoint (the very last may be a fragment)."""
        path = self.folder / METRICS_FILE
        if not self.accelerator.is_main_process or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:
                break
        write_text(path, "".join(line + "\n" for line in kept))

    def finish(self) -> None:
        # Mixed precision wraps the module's forward; what is kept must not depend on accelerate.
        self.accelerator.unwrap_model(self.module, keep_fp32_wrapper=False)
        self.ema.copy_to(self.trained.parameters())
        if self.sharded:
            unshard(self.trained, self.stage.module)
        take_from_main(self.stage.module)
        self.stage.module.to("cpu").eval()
        if self.accelerator.is_main_process:
            write_text(self.folder / "run.json", dump_json({"identity": self.identity, "steps": self.config.steps}))
