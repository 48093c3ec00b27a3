"""Stage two: the conditional diffusion model over latents (paper, section 3.3)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import nn

from cond_pdiff.models.condition_encoder import ConditionEncoder
from cond_pdiff.models.condition_index import ConditionIndex
from cond_pdiff.models.param_unet_1d import ParamUNet1D
from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.training.config import UNetConfig, build
from cond_pdiff.training.objectives import denoising_loss, diffusion_target
from cond_pdiff.training.stages.autoencoder import AutoencoderStage
from cond_pdiff.training.stages.condition_bank import ConditionBank

GUIDANCE_SCALE = 1.5
"""With which a generator samples that was trained without a condition too."""


class Denoiser(nn.Module):
    """The U-Net behind its condition encoder, where that one is trained with it."""

    def __init__(self, unet: ParamUNet1D, encoder: ConditionEncoder | None) -> None:
        super().__init__()
        self.unet, self.encoder = unet, encoder

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        condition: torch.Tensor,
        partner: torch.Tensor,
        ratio: torch.Tensor,
        disturbance: torch.Tensor,
        keep: torch.Tensor,
    ) -> torch.Tensor:
        """Predict what the scheduler asks for, shape of `noisy`.

        Args:
            noisy: latents of `draws` times the batch: all samples, then all of them again with other noise …
            timesteps: of each, shape `(draws * batch,)`.
            condition: embeddings, or the trained encoder's inputs (uint8), of the batch.
            partner: with whose condition each sample's is mixed, shape `(batch,)`.
            ratio: 0 is its own condition, 1 its partner's, shape `(batch, 1)`; below and above lie on the line through both.
            disturbance: added to the embeddings, shape `(draws * batch, condition_dim)`.
            keep: False where a sample is trained without its condition, shape `(draws * batch, 1)`.
        """
        if self.encoder is not None:
            condition = self.encoder(condition.to(noisy.dtype) / 255).to(noisy.dtype)  # autocast may have made it half
        length = condition.norm(dim=1, keepdim=True)
        length = torch.lerp(length, length[partner], ratio)
        condition = torch.lerp(condition, condition[partner], ratio)
        condition = condition * (length / condition.norm(dim=1, keepdim=True).clamp(min=1e-6))  # between two tasks, not shorter
        condition = condition.repeat(len(noisy) // len(condition), 1)
        sample: torch.Tensor = self.unet(noisy, timesteps, (condition + disturbance) * keep).sample
        return sample


class UNetStage:
    """See `cond_pdiff.training.stages.loop.Stage`. Needs a trained autoencoder stage, and the conditions of the same tasks."""

    name = "unet"

    def __init__(self, autoencoder: AutoencoderStage, bank: ConditionBank, config: UNetConfig) -> None:
        self.autoencoder, self.bank, self.config = autoencoder, bank, config
        self.latents = autoencoder.encode()
        torch.manual_seed(config.fit.seed)
        sizes = (self.latents.shape[1], self.latents.shape[2], self.bank.encoder.condition_dim)
        unconditional = config.condition_dropout > 0
        guidance = {"unconditional": unconditional, "guidance_scale": GUIDANCE_SCALE if unconditional else 1.0}
        guidance["guided_length"] = autoencoder.module.latent_shape[1]
        self.unet = build(ParamUNet1D, "unet, model", *sizes, **config.model, **guidance)
        self.at_once = max(1, self.unet.at_once // config.noise_draws)
        self.module: nn.Module = Denoiser(self.unet, self.bank.trained_encoder)
        self.scheduler = DDPMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule=config.beta_schedule,
            prediction_type=config.prediction_type,
            clip_sample=False,
        )
        self.identity: dict[str, Any] = {"config": asdict(config), "autoencoder": autoencoder.identity, "conditions": bank.sha256}

    def draw(self, batch_size: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of tasks and of one adapter of each. Adapters are equally likely: a recoloured style, of one run, is drawn less often."""
        adapters = torch.randint(len(self.latents), (batch_size,), generator=rng)
        return self.autoencoder.data.tasks[adapters], adapters

    def loss(self, module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], rng: torch.Generator) -> torch.Tensor:
        """Equation 8, with one timestep a sample, some samples without a condition, and some that are mixtures of two tasks."""
        tasks, adapters = batch
        config, size = self.config, len(tasks)
        total = size * config.noise_draws
        clean = self.latents[adapters]
        clean = clean + config.latent_jitter * torch.randn(clean.shape, generator=rng)
        variants = torch.randint(self.bank.inputs.shape[1], (size,), generator=rng)
        condition = self.bank.inputs[tasks, variants]
        disturbance = config.condition_noise * torch.randn(total, self.bank.encoder.condition_dim, generator=rng)
        keep = torch.rand(total, 1, generator=rng) >= config.condition_dropout
        noise = torch.randn(total, *clean.shape[1:], generator=rng)
        timesteps = torch.randint(config.num_train_timesteps, (total,), generator=rng)
        partner, ratio = torch.arange(size), torch.zeros(size, 1)
        if config.mixing:
            partner = torch.randperm(size, generator=rng)
            beyond, between = config.mixing_beyond, torch.rand(size, 1, generator=rng)
            mixed = torch.rand(size, 1, generator=rng) < config.mixing
            ratio = torch.where(mixed, (1 + 2 * beyond) * between - beyond, 0)
            clean = torch.lerp(clean, clean[partner], ratio[..., None])
        clean = clean.repeat(config.noise_draws, 1, 1)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        target = diffusion_target(self.scheduler, clean, noise, timesteps)
        device = next(module.parameters()).device
        inputs = (noisy, timesteps, condition, partner, ratio, disturbance, keep)
        predicted = module(*(tensor.to(device) for tensor in inputs))
        return denoising_loss(target.to(device), predicted)

    def describe(self, batch: tuple[torch.Tensor, torch.Tensor]) -> str:
        """Names of the batch's adapters."""
        return ", ".join(self.autoencoder.data.names[index] for index in batch[1].tolist())

    def pipeline(self) -> CondPDiffPipeline:
        """The generator: all trained parts, with a few-step solver."""
        bank = self.bank
        sizes = [len(file) for file in bank.previews]
        index = ConditionIndex(bank.facts, bank.encoder.condition_dim, bank.names, **bank.encoder.index_options, preview_sizes=sizes)
        index.fit(bank.embeddings())
        if bank.previews:
            index.previews.copy_(torch.frombuffer(bytearray(b"".join(bank.previews)), dtype=torch.uint8))
        return CondPDiffPipeline(
            autoencoder=self.autoencoder.module,
            unet=self.unet,
            # Steps that shrink in proportion end at little noise: adapters of one task lie close together (`benchmarks/spread.py`).
            scheduler=DPMSolverMultistepScheduler.from_config(
                self.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, use_exponential_sigmas=True
            ),
            condition_encoder=bank.encoder,
            normalizer=self.autoencoder.normalizer,
            template=self.autoencoder.data.template,
            condition_index=index,
        )
