"""Stage one of the base model: the variational autoencoder between pictures and latents."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from cond_pdiff.errors import TrainingError
from cond_pdiff.training.config import build, recorded
from cond_pdiff.training.text_to_image.config import ImageAutoencoderConfig
from cond_pdiff.training.text_to_image.pictures import effects, patterns, render_pool, to_input


class ReconstructedPictures(nn.Module):
    """An autoencoder as training sees it: pictures in, their reconstruction and the latents' distribution out."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, pictures: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the reconstruction from latents drawn with standard normal `noise`, and the latents' mean and log variance."""
        posterior = self.autoencoder.encode(pictures).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.autoencoder.decode(latents).sample, posterior.mean, posterior.logvar


def _initialise(autoencoder: AutoencoderKL, logvar: float) -> None:
    """Let convolutions keep the variance of their input, residual branches begin at zero, and latents have little noise.

    With diffusers' own beginning the signal fades from layer to layer, and training takes several times as many steps.
    """
    for module in autoencoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    for module in autoencoder.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
    _bias(autoencoder.post_quant_conv)  # a missing one is refused now, not after training
    nn.init.constant_(_bias(autoencoder.quant_conv).chunk(2)[1], logvar)


def _bias(convolution: nn.Conv2d | None) -> torch.Tensor:
    if convolution is None or convolution.bias is None:  # `fit_latent_statistics` needs it
        raise TrainingError("image_autoencoder, model: use_quant_conv and use_post_quant_conv must be true")
    return convolution.bias


class ImageAutoencoderStage:
    """The stage (see `cond_pdiff.training.stages.loop`) that trains the variational autoencoder on rendered scenes."""

    name = "image_autoencoder"
    at_once = None

    def __init__(self, config: ImageAutoencoderConfig) -> None:
        self.config = config
        torch.manual_seed(config.fit.seed)
        self.autoencoder = build(AutoencoderKL, "image_autoencoder, model", **config.model)
        _initialise(self.autoencoder, config.initial_logvar)
        self.module: nn.Module = ReconstructedPictures(self.autoencoder)
        self.identity: dict[str, Any] = {"config": recorded(config)}

    @cached_property
    def pictures(self) -> torch.Tensor:
        """Training scenes, uint8 of shape `(num_scenes, 3, 64, 64)`, rendered when they are first needed."""
        return render_pool(self.config.scenes, self.config.fit.seed)[1]

    def draw(self, batch_size: int, rng: torch.Generator) -> torch.Tensor:
        """Draw pictures, float32 from 0 to 1: scenes as they are, changed scenes, and patterns."""
        plain = self.pictures[torch.randint(len(self.pictures), (batch_size,), generator=rng)].float() / 255
        kinds = torch.rand(batch_size, 1, 1, 1, generator=rng)
        config = self.config
        other = torch.where(kinds > 1 - config.pattern_share, patterns(batch_size, plain.shape[-1], rng), plain)
        return torch.where(kinds < config.plain_share, plain, effects(other, rng))

    def loss(self, module: nn.Module, batch: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """Return the absolute error of pixels at several scales and of neighbours' differences, plus latents' divergence from N(0, 1)."""
        pictures = batch * 2 - 1
        config = self.autoencoder.config
        side = pictures.shape[-1] // 2 ** (len(config.block_out_channels) - 1)
        noise = torch.randn(len(batch), config.latent_channels, side, side, generator=rng)
        device = next(module.parameters()).device
        pictures = pictures.to(device)
        reconstructed, mean, logvar = module(pictures, noise.to(device))
        error = (reconstructed - pictures).float()
        pixels = torch.stack([nn.functional.avg_pool2d(error, 2**scale).abs().mean() for scale in range(self.config.scales)]).sum()
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return pixels + self.config.edge_weight * edges + self.config.kl_weight * divergence

    def describe(self, batch: torch.Tensor) -> str:
        """Say how many pictures there are."""
        return f"{len(batch)} rendered pictures"

    @torch.no_grad()
    def fit_latent_statistics(self) -> None:
        """Give the latents of rendered scenes the mean 0 in every channel and, through `scaling_factor`, the variance 1 altogether.

        PixArt's pipeline knows no shift, so the means are moved into the two 1x1 convolutions around the latents; what the
        autoencoder reconstructs stays the same.
        """
        pictures = to_input(render_pool(min(512, self.config.scenes), self.config.fit.seed)[1])
        latents = torch.cat([self.autoencoder.encode(part).latent_dist.mean for part in pictures.split(32)])
        means = latents.mean(dim=(0, 2, 3))
        _bias(self.autoencoder.quant_conv)[: len(means)] -= means
        after = self.autoencoder.post_quant_conv
        _bias(after).add_(after.weight[:, :, 0, 0] @ means)
        spread = (latents - means[:, None, None]).std()
        self.autoencoder.register_to_config(scaling_factor=float(f"{1 / spread:.6g}"))
