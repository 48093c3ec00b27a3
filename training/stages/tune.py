"""`tune`: stage three. A generator learns what its adapters are for: the loss of the base model with them, over many tasks.

The diffusion of stage two reconstructs trained adapters, which says little about tasks that were not trained on. Here latents are
denoised by the few-step sampler with gradients, decoded, and the base model with the adapter is asked to do examples of the
task; the generator learns from its mistakes. (Text-to-LoRA found such training to generalise better than reconstruction.)
"""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cond_pdiff.attach import attached_to_groups
from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.errors import TrainingError
from cond_pdiff.families.family import families
from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.sampling import denoise
from cond_pdiff.training.config import TuneConfig, parse, recorded
from cond_pdiff.training.evaluate.measure import weights_sha256
from cond_pdiff.training.processes import processes
from cond_pdiff.training.stages.loop import fit
from cond_pdiff.training.stages.train import save_generator
from cond_pdiff.training.tasks.tasks import WORD_DROPOUT


class ParamsGenerator(nn.Module):
    """The part of a generator that writes params from prompts, with gradients to the parts that are trained.

    Args:
        pipe: the generator; its U-Net is trained in place, and its decoder if the settings say so.
    """

    def __init__(self, pipe: CondPDiffPipeline, config: TuneConfig) -> None:
        super().__init__()
        autoencoder: Any = pipe.codec.autoencoder
        self.unet, self.autoencoder, self.config = pipe.unet, autoencoder, config
        self._pipe = (pipe,)  # in a tuple: what else belongs to the pipeline is not this module's
        if config.decoder and autoencoder.spans is not None:
            raise TrainingError(f"tune: the decoder of a {type(autoencoder).__name__} is not trained; leave \"decoder\" out")
        decoder = (autoencoder.from_latent, autoencoder.decoder) if config.decoder else ()
        self.requires_grad_(False)
        for part in (self.unet, *decoder):
            if part is not None:
                part.requires_grad_(True)

    def train(self, mode: bool = True) -> ParamsGenerator:
        """Stay in evaluation mode whatever is asked: norms stay as they are in use."""
        return super().train(False)

    def forward(self, prompts: Sequence[TaskPrompt], rng: torch.Generator) -> torch.Tensor:
        """Generate params for each prompt by the pipeline's own steps, fewer of them; shape `(len(prompts), num_params)`."""
        (pipe,), config = self._pipe, self.config
        if pipe.codec.normalizer.device != self.unet.device:
            pipe.to(self.unet.device)
        condition = pipe.condition_encoder.encode(prompts)[0]
        noise = pipe.prepare_latents(len(prompts), rng, None)
        steps, guidance = config.num_inference_steps, self.unet.config.guidance_scale
        return pipe.codec.decode(denoise(self.unet, pipe.scheduler, noise, condition, steps, guidance, rng))


class TuneStage(ABC):
    """The stage (see `cond_pdiff.training.stages.loop`) that trains a generator of adapters for tasks on the loss of its adapters.

    Families differ in what an episode is and in its loss (see `Family.tuning`).

    Args:
        pipe: the generator, which is trained in place.
        tasks: whose training rows the episodes are drawn from.
    """

    name = "tune"
    at_once = None

    def __init__(self, pipe: CondPDiffPipeline, tasks: Sequence[Any], config: TuneConfig) -> None:
        self.pipe, self.tasks, self.config = pipe, list(tasks), config
        self.rows = [self.read(task) for task in tasks]
        self.identity: dict[str, Any] = {
            "config": recorded(config),
            "generator": weights_sha256(pipe),
            "tasks": [task.name for task in tasks],
            "rows": self._sha256(),
        }
        self.module: nn.Module = ParamsGenerator(pipe, config)

    @abstractmethod
    def read(self, task: Any) -> Any:
        """Return a task's training rows, JSON-ready; raise `TrainingError` if they are too few."""

    @abstractmethod
    def episode(self, rng: random.Random, index: int) -> Any:
        """Draw an episode of the index-th task; it has a `task`, and a `prompt` that its adapter is generated from."""

    @abstractmethod
    def episodes_loss(self, batch: Sequence[Any]) -> torch.Tensor:
        """Return the mean loss of episodes by the base model, to which the adapter of each is attached, for equally many rows of it."""

    def _sha256(self) -> str:
        """Return the sha256 of all that episodes are drawn from."""
        digest = hashlib.sha256()
        for task, rows in zip(self.tasks, self.rows, strict=True):
            digest.update(json.dumps([task.description, task.index_facts()["labels"], rows], sort_keys=True).encode())
        return digest.hexdigest()

    def draw(self, batch_size: int, rng: torch.Generator) -> list[Any]:
        """Draw `batch_size` episodes of tasks that are all equally likely."""
        choice = random.Random(int(torch.randint(2**31, (1,), generator=rng)))
        return [self.episode(choice, index) for index in choice.choices(range(len(self.tasks)), k=batch_size)]

    def loss(self, module: nn.Module, batch: list[Any], rng: torch.Generator) -> torch.Tensor:
        """Return the mean loss of episodes under adapters that are generated from their prompts."""
        template = self.pipe.codec.template
        tensors = torch.vmap(template.to_tensors)(module([episode.prompt for episode in batch], rng))
        with attached_to_groups(self.pipe.base_model().model, template.spec, self.refined(batch, tensors)):
            return self.episodes_loss(batch)

    def refined(self, batch: Sequence[Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return adapters, shape `(episodes, *shape)` of each tensor, after the settings' `refine_steps`."""
        if self.config.refine_steps:
            raise TrainingError("tune: refine_steps are for sentence encoders, whose adapters are refined; leave them out")
        return tensors

    def describe(self, batch: list[Any]) -> str:
        """Return the names of the episodes' tasks."""
        return ", ".join(episode.task.name for episode in batch)


def with_words_left_out(description: str, rng: random.Random) -> str:
    """Return some words of a description, or all of them if none were left."""
    words = description.split()
    return " ".join([word for word in words if rng.random() >= WORD_DROPOUT] or words)


def tune(
    recipe: dict[str, Any], generator: str | Path, tasks_folder: str | Path, run_folder: str | Path, tensorboard: bool = False
) -> Path:
    """Train a finished generator on the loss of its own tasks.

    Args:
        recipe: its `tune` section (see `TuneConfig`).
        generator: bundled name, folder, or Hub repository.
        tasks_folder: a task collection with the tasks that the generator was trained on.
        run_folder: gets `tune/` (checkpoints, metrics.jsonl) and `generator/`.
        tensorboard: also write tensorboard events.

    Returns:
        The tuned generator's folder. Its U-Net is stored in half precision (and loaded in float32 by default).

    Raises:
        TrainingError: the generator's family has no task loss here, or the run folder holds a run with other settings.
        TaskDataError: a task is missing or malformed.
    """
    run_folder = Path(run_folder)
    config = parse(TuneConfig, recipe.get("tune", {}), "tune")
    pipe = CondPDiffPipeline.from_pretrained(generator)
    stage_class = pipe.family.tuning()
    if stage_class is None:
        able = ", ".join(sorted(name for name, family in families().items() if family.tuning()))
        raise TrainingError(f"tune knows the task loss of adapters for {able}; this generator makes adapters for a {pipe.family.name}")
    tasks = pipe.family.load_tasks(tasks_folder, list(pipe.condition_index.config.tasks))
    stage = stage_class(pipe, tasks, config)
    fit(stage, config.fit, run_folder / "tune", tensorboard)
    if processes().is_main_process:
        save_generator(pipe, run_folder / "generator")
    processes().wait_for_everyone()
    return run_folder / "generator"
