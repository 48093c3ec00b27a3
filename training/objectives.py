"""Training objectives, one function an equation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def add_latent_noise(latents: torch.Tensor, amplitude: float, rng: torch.Generator) -> torch.Tensor:
    """Z + noise (equation 6b), with noise measured in standard deviations of the batch's latents.

    Relative to the batch: against noise of a fixed size an encoder just scales its latents up.
    """
    noise = torch.randn(latents.shape, generator=rng).to(latents)
    return latents + amplitude * latents.detach().std() * noise


def reconstruction_loss(values: torch.Tensor, reconstructed: torch.Tensor) -> torch.Tensor:
    """Mean squared error between normalised params and their reconstruction (equation 7)."""
    return nn.functional.mse_loss(reconstructed.float(), values.float())


def diffusion_target(scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the network is to predict, by the scheduler's `prediction_type`: the noise, the velocity, or the clean latents."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    return clean


def denoising_loss(target: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the denoiser (equation 8)."""
    return nn.functional.mse_loss(predicted.float(), target.float())
