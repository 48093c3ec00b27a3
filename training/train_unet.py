"""Stage two: the conditional diffusion model over latents (paper, section 3.3)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import nn

from cond_pdiff.conditioning import TaskPrompt
from cond_pdiff.errors import TrainingError
from cond_pdiff.models.condition_encoders import ClipConditionEncoder, SentenceConditionEncoder
from cond_pdiff.models.condition_index import ConditionIndex
from cond_pdiff.models.param_unet_1d import ParamUNet1D
from cond_pdiff.normalization import join_statistics
from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.training.config import UNetConfig, build
from cond_pdiff.training.objectives import denoising_loss, diffusion_target
from cond_pdiff.training.tasks import Task
from cond_pdiff.training.train_autoencoder import AutoencoderStage

CONDITION_ENCODERS = {"SentenceConditionEncoder": SentenceConditionEncoder, "ClipConditionEncoder": ClipConditionEncoder}
EXAMPLE_COUNTS = (0, 2, 4, 8, 16)
WORD_DROPOUT = 0.15


def prompt_variant(task: Task, index: int) -> TaskPrompt:
    """The index-th way to ask for a task: the full prompt, then with other examples, fewer parts, and words left out.

    People word a task in their own way and give what they have; a generator that has only seen one wording takes everything
    else for another task.
    """
    if index == 0:
        return task.prompt("variant/0", EXAMPLE_COUNTS[-1])
    rng = random.Random(f"{task.name}/variant/{index}")
    prompt = task.prompt(f"variant/{index}", rng.choice(EXAMPLE_COUNTS))
    words = prompt.description.split()
    kept = [word for word in words if rng.random() >= WORD_DROPOUT] or words
    description = " ".join(words if index % 3 == 0 else kept)
    if not prompt.examples and rng.random() < 0.5:
        return TaskPrompt(description)
    return TaskPrompt(description, prompt.examples, prompt.labels)


class UNetStage:
    """See `cond_pdiff.training.loop.Stage`. Needs a trained autoencoder stage."""

    name = "unet"

    def __init__(self, autoencoder: AutoencoderStage, tasks: Sequence[Task], config: UNetConfig) -> None:
        self.autoencoder, self.tasks, self.config = autoencoder, list(tasks), config
        data = autoencoder.data
        autoencoder.module.fit_scaling_factor(autoencoder.values)
        with torch.no_grad():
            self.latents = join_statistics(autoencoder.module.encode(autoencoder.values), autoencoder.statistics)
        self.encoder = _condition_encoder(config.condition_encoder)
        self.conditions = self._encode_prompts()
        self.adapters_of = [(data.tasks == index).nonzero()[:, 0] for index in range(len(self.tasks))]
        torch.manual_seed(config.fit.seed)
        sizes = (self.latents.shape[1], self.latents.shape[2], self.encoder.condition_dim)
        self.module = build(ParamUNet1D, "unet, model", *sizes, **config.model)
        self.scheduler = DDPMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule=config.beta_schedule,
            prediction_type=config.prediction_type,
            clip_sample=False,
        )
        self.identity: dict[str, Any] = {"config": asdict(config), "autoencoder": autoencoder.identity}

    @torch.no_grad()
    def _encode_prompts(self) -> torch.Tensor:
        """Condition embeddings of all prompt variants, shape `(num_tasks, prompts_per_task, condition_dim)`."""
        if isinstance(self.encoder, SentenceConditionEncoder):
            self.encoder.fit_center([prompt_variant(task, 0) for task in self.tasks])
        count = self.config.prompts_per_task
        return torch.stack([self.encoder.encode([prompt_variant(task, index) for index in range(count)])[0] for task in self.tasks])

    def draw(self, batch_size: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of tasks, all equally likely, and of one of each task's adapters."""
        tasks = torch.randint(len(self.tasks), (batch_size,), generator=rng)
        picks = torch.rand(batch_size, generator=rng)
        adapters = torch.stack(
            [
                self.adapters_of[task][int(pick * len(self.adapters_of[task]))]
                for task, pick in zip(tasks.tolist(), picks.tolist(), strict=True)
            ]
        )
        return tasks, adapters

    def loss(self, module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], rng: torch.Generator) -> torch.Tensor:
        """Equation 8, with one timestep a sample, and some samples without a condition."""
        tasks, adapters = batch
        config, size = self.config, len(tasks)
        clean = self.latents[adapters]
        clean = clean + config.latent_jitter * torch.randn(clean.shape, generator=rng)
        variants = torch.randint(self.conditions.shape[1], (size,), generator=rng)
        condition = self.conditions[tasks, variants]
        condition = condition + config.condition_noise * torch.randn(condition.shape, generator=rng)
        condition = condition * (torch.rand(size, 1, generator=rng) >= config.condition_dropout)
        noise = torch.randn(clean.shape, generator=rng)
        timesteps = torch.randint(config.num_train_timesteps, (size,), generator=rng)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        target = diffusion_target(self.scheduler, clean, noise, timesteps)
        device = next(module.parameters()).device
        predicted = module(noisy.to(device), timesteps.to(device), condition.to(device)).sample
        return denoising_loss(target.to(device), predicted)

    def describe(self, batch: tuple[torch.Tensor, torch.Tensor]) -> str:
        """Names of the batch's adapters."""
        return ", ".join(self.autoencoder.data.names[index] for index in batch[1].tolist())

    def pipeline(self) -> CondPDiffPipeline:
        """The generator: all trained parts, with a few-step solver."""
        facts = {task.name: {"description": task.description, "labels": list(task.labels), "group": task.group} for task in self.tasks}
        index = ConditionIndex(facts, self.encoder.condition_dim, **self.encoder.index_options)
        index.fit(self.conditions)
        return CondPDiffPipeline(
            autoencoder=self.autoencoder.module,
            unet=self.module,
            scheduler=DPMSolverMultistepScheduler.from_config(self.scheduler.config, algorithm_type="dpmsolver++", solver_order=2),
            condition_encoder=self.encoder,
            normalizer=self.autoencoder.normalizer,
            template=self.autoencoder.data.template,
            condition_index=index,
        )


def _condition_encoder(settings: dict[str, Any]) -> SentenceConditionEncoder | ClipConditionEncoder:
    arguments = dict(settings)
    name = arguments.pop("type", None)
    if name not in CONDITION_ENCODERS:
        raise TrainingError(f"condition_encoder's type must be one of {sorted(CONDITION_ENCODERS)}, got {name!r}")
    return build(CONDITION_ENCODERS[name], "unet, condition_encoder", **arguments)
