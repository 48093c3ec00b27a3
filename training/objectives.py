"""Training objectives, one function an equation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def add_latent_noise(latents: torch.Tensor, amplitude: float, rng: torch.Generator) -> torch.Tensor:
    """Return Z + noise (equation 6b), with noise measured in standard deviations of the batch's latents.

    Relative to the batch: against noise of a fixed size an encoder just scales its latents up.
    """
    noise = torch.randn(latents.shape, generator=rng).to(latents)
    return latents + amplitude * latents.detach().std() * noise


def reconstruction_loss(values: torch.Tensor, reconstructed: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error between normalised params and their reconstruction (equation 7)."""
    return nn.functional.mse_loss(reconstructed.float(), values.float())


def diffusion_target(scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Return what the network is to predict, by the scheduler's `prediction_type`: the noise, the velocity, or the clean latents."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    return clean


def denoising_loss(target: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of the denoiser (equation 8)."""
    return nn.functional.mse_loss(predicted.float(), target.float())


def draw_noise_levels(count: int, shift: float, rng: torch.Generator) -> torch.Tensor:
    """Draw noise levels from 0 (clean) to 1 (noise), shape `(count,)`: sigmoids of N(shift, 1), and for a fifth of them uniform numbers.

    Middle levels are the hardest to learn; the uniform part keeps the ends, where sampling begins and stops, in view.
    """
    levels = torch.sigmoid(shift + torch.randn(count, generator=rng))
    uniform = torch.rand(count, generator=rng)
    return torch.where(torch.rand(count, generator=rng) < 0.2, uniform, levels)


def flow_pair(clean: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the point at a noise level on the straight line from `clean` to `noise`, and the velocity along it (rectified flow)."""
    levels = levels.view(-1, *(1,) * (clean.ndim - 1))
    return (1 - levels) * clean + levels * noise, noise - clean
