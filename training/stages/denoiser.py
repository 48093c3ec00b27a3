"""Stage two: the conditional diffusion model over latents (paper, section 3.3)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import nn

from cond_pdiff.codec import AdapterCodec
from cond_pdiff.models.condition_encoder import ConditionEncoder
from cond_pdiff.models.condition_index import ConditionIndex
from cond_pdiff.models.denoisers import DENOISERS
from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.training.config import UNetConfig, build_typed
from cond_pdiff.training.objectives import denoising_loss, diffusion_target
from cond_pdiff.training.processes import from_main
from cond_pdiff.training.stages.condition_bank import ConditionBank
from cond_pdiff.training.zoo.params import ZooParams

GUIDANCE_SCALE = 1.5
"""The guidance scale with which a generator samples that was trained without a condition too."""


class ConditionedDenoiser(nn.Module):
    """The denoiser behind its condition encoder, where that one is trained with it."""

    def __init__(self, unet: nn.Module, encoder: ConditionEncoder | None) -> None:
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
            partner: index of each sample's mixup partner, with whose condition its own is mixed, shape `(batch,)`.
            ratio: 0 is its own condition, 1 its mixup partner's, shape `(batch, 1)`; below and above lie on the line through both.
            disturbance: condition noise, added to the embeddings, shape `(draws * batch, condition_dim)`.
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


class DenoiserStage:
    """The stage (see `cond_pdiff.training.stages.loop`) that trains a conditioned denoiser on the latents of a zoo.

    Args:
        codec: of the zoo, its autoencoder trained; its latents get their scale here.
        data: the zoo's params.
        bank: conditions of the same tasks.
        origin: the identity of the stage that made the codec.
        latents: of the zoo, as the codec encodes it.
    """

    name = "unet"

    def __init__(
        self, codec: AdapterCodec, data: ZooParams, bank: ConditionBank, config: UNetConfig, origin: dict[str, Any], latents: torch.Tensor
    ) -> None:
        self.codec, self.data, self.bank, self.config = codec, data, bank, config
        self.latents = codec.fit_scaling_factor(from_main(latents))
        torch.manual_seed(config.fit.seed)
        unconditional = config.cond_drop_prob > 0
        guidance = {"unconditional": unconditional, "guidance_scale": GUIDANCE_SCALE if unconditional else 1.0}
        guidance["guided_length"] = codec.guided_length
        sizes = (*codec.latent_shape, bank.encoder.condition_dim)
        accepted = inspect.signature(DENOISERS.get(config.denoiser["type"], object)).parameters
        places = {name: places for name, places in codec.token_places.items() if name in accepted}
        self.unet: Any = build_typed(DENOISERS, "unet, denoiser", config.denoiser, *sizes, **guidance, **places)
        self.at_once = max(1, self.unet.at_once // config.noise_draws)
        self.module: nn.Module = ConditionedDenoiser(self.unet, self.bank.trained_encoder)
        self.scheduler = DDPMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule=config.beta_schedule,
            prediction_type=config.prediction_type,
            clip_sample=False,
        )
        self.identity: dict[str, Any] = {"config": config.record(), "autoencoder": origin, "conditions": bank.sha256}

    def draw(self, batch_size: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw indices of tasks and an adapter of each. Adapters are equally likely: a recoloured style, of one run, comes less often."""
        adapters = torch.randint(len(self.latents), (batch_size,), generator=rng)
        return self.data.tasks[adapters], adapters

    def loss(self, module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], rng: torch.Generator) -> torch.Tensor:
        """Return the loss of equation 8, with one timestep a sample, some without a condition, and some mixtures of two tasks (mixup)."""
        tasks, adapters = batch
        config, size = self.config, len(tasks)
        total = size * config.noise_draws
        clean = self.latents[adapters]
        clean = clean + config.latent_jitter * torch.randn(clean.shape, generator=rng)
        chosen = torch.randint(self.bank.inputs.shape[1], (size,), generator=rng)
        condition = self.bank.inputs[tasks, chosen]
        disturbance = config.condition_noise * torch.randn(total, self.bank.encoder.condition_dim, generator=rng)
        keep = torch.rand(total, 1, generator=rng) >= config.cond_drop_prob
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
        """Return the names of the batch's adapters."""
        return ", ".join(self.data.names[index] for index in batch[1].tolist())

    def pipeline(self) -> CondPDiffPipeline:
        """Return the generator: all trained parts, with a few-step solver."""
        bank = self.bank
        sizes = [len(file) for file in bank.previews]
        index = ConditionIndex(bank.facts, bank.encoder.condition_dim, bank.names, **bank.encoder.index_options, preview_sizes=sizes)
        index.fit(bank.embeddings())
        if bank.previews:
            index.previews.copy_(torch.frombuffer(bytearray(b"".join(bank.previews)), dtype=torch.uint8))
        return CondPDiffPipeline(
            autoencoder=self.codec.autoencoder,
            unet=self.unet,
            # Steps that shrink in proportion end at little noise: adapters of one task lie close together (`benchmarks/spread.py`).
            scheduler=DPMSolverMultistepScheduler.from_config(
                self.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, use_exponential_sigmas=True
            ),
            condition_encoder=bank.encoder,
            normalizer=self.codec.normalizer,
            template=self.codec.template,
            condition_index=index,
        )
