"""The sampling loop: one for the pipeline and for training, with classifier-free guidance inside; and checks of its numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cond_pdiff.errors import CondPDiffError

if TYPE_CHECKING:
    from cond_pdiff.models.denoisers import Denoiser

OnStep = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, bool]]


def denoise(
    denoiser: Denoiser,
    scheduler: Any,
    noise: torch.Tensor,
    condition: torch.Tensor,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    on_step: OnStep | None = None,
    *,
    condition_mask: torch.Tensor | None = None,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
) -> torch.Tensor:
    """Make latents from noise in some steps of a diffusers scheduler; gradients flow if they are wanted.

    Args:
        denoiser: predicts what the scheduler's `prediction_type` asks for.
        scheduler: any of diffusers'. It is stepped itself and keeps the call's `timesteps`, so one thread at a time may use it.
        noise: of unit variance, shape `(batch, channels, length)`; scaled here by the scheduler's `init_noise_sigma`.
        condition: embeddings, shape `(batch, condition_dim)`, or `(batch, tokens, condition_dim)` where the denoiser takes tokens.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 is none.
        generator: of schedulers that draw noise in each step; one, or one for each of the batch.
        on_step: called as `on_step(index, timestep, latents, condition)` after each step; returns the two tensors to go on with, and
            whether to go on.
        condition_mask: which tokens there are (true) and which only fill the batch, shape `(batch, tokens)`; None: all.
        timesteps: the scheduler's, falling, in the place of those that it would choose for `num_inference_steps`.
        sigmas: noise levels, falling, in the same way; Euler's end with 0.

    Returns:
        shape of `noise`.

    Raises:
        CondPDiffError: the scheduler does not take such timesteps, sigmas or number of steps.
    """
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import retrieve_timesteps  # with much of transformers

    try:
        schedule, _ = retrieve_timesteps(scheduler, num_inference_steps, noise.device, timesteps, sigmas)
    except (ValueError, IndexError) as error:
        raise CondPDiffError(
            f"the scheduler ({type(scheduler).__name__}) does not take these timesteps, sigmas or number of steps: {error}"
        ) from error
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    latents = noise * scheduler.init_noise_sigma
    for index, timestep in enumerate(schedule):
        scaled = scheduler.scale_model_input(latents, timestep)
        prediction = guided_prediction(denoiser, scaled, timestep, condition, guidance_scale, condition_mask)
        latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
        if on_step is not None:
            latents, condition, go_on = on_step(index, timestep, latents, condition)
            if not go_on:
                break
    return latents


def guided_prediction(
    denoiser: Denoiser,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    condition: torch.Tensor,
    guidance_scale: float,
    condition_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return a denoiser's prediction under classifier-free guidance, shape of `latents`; a guidance of 1 is none.

    Args:
        denoiser: its `config.guided_length` says how many of the latents' first columns are guided. Behind them stand the statistics of the
            normaliser, an update's size among them, which guidance would scale.
        latents: noisy, shape `(batch, channels, length)`.
        timestep: one for all.
        condition: embeddings, shape `(batch, condition_dim)` or `(batch, tokens, condition_dim)`; all zeros are "no condition".
        guidance_scale: the prediction lies so far on the way from the one without the condition (0) to the one with it (1), and beyond.
        condition_mask: see `denoise`.
    """
    guided = is_guided(guidance_scale)
    if guided:
        latents, condition = torch.cat([latents, latents]), torch.cat([torch.zeros_like(condition), condition])
    masks = {} if condition_mask is None else {"condition_mask": condition_mask.repeat(1 + guided, 1)}
    prediction: torch.Tensor = denoiser(latents, timestep, condition, **masks).sample
    if not guided:
        return prediction
    without, with_condition = prediction.chunk(2)
    end = denoiser.config.guided_length
    part = torch.lerp(without[..., :end], with_condition[..., :end], guidance_scale)
    return part if end is None else torch.cat([part, with_condition[..., end:]], dim=-1)


def is_guided(guidance_scale: float) -> bool:
    """Return whether this guidance asks the denoiser twice a step, with the condition and without it. A scale below 1 does, too."""
    return guidance_scale != 1


def check_count(name: str, value: object, most: int, least: int = 1) -> None:
    """Refuse what is no whole number from `least` to `most` with a `CondPDiffError` that calls it `name`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise CondPDiffError(f"{name} must be a whole number from {least} to {most}, got {value!r}")


def check_guidance(scale: object) -> None:
    """Refuse what is no number from 0 to 100 with a `CondPDiffError`."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale <= 100:
        raise CondPDiffError(f"guidance_scale must be a number from 0 to 100, got {scale!r}")


def seeded(seed: int, count: int) -> list[torch.Generator]:
    """Make a random generator for each of `count` candidates; that of candidate i has the seed `seed + i`."""
    return [torch.Generator().manual_seed(seed + index) for index in range(count)]
