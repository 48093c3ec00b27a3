"""TokenDenoiser: a small transformer over module tokens, for adapters of which each module has a code of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_1d import UNet1DOutput
from torch import nn

from cond_pdiff.component import Component, register_component
from cond_pdiff.errors import CondPDiffError
from cond_pdiff.models.param_autoencoder import NUMBERS_AT_ONCE


@register_component
class TokenDenoiser(Component):
    """A transformer in which every column of the latents is a token, and time and condition scale and shift every layer (as in DiT).

    A step costs what the number of modules and the width make it cost, however long the modules' updates are. Latents have unit variance
    at every noise level of a variance-preserving schedule, and so has the target of "v_prediction": with that prediction type input and
    output are preconditioned as in EDM (Karras and others, 2022, table 1), without factors of the network's own.

    Args:
        sample_channels: numbers of a module's code.
        sample_length: modules.
        condition_dim: size of the condition embedding. All zeros means "no condition".
        width: of the tokens; a multiple of `heads`.
        depth: transformer blocks.
        heads: of the attention.
        token_layers: number of each module's layer in the base model; default: all are in one.
        token_modules: number of each module's kind within a layer; default: each is of its own kind.
        condition_scale: condition embeddings, which have unit length, are multiplied by it; default: the square root of `condition_dim`,
            which makes their numbers about as large as everything else that the network reads.
        unconditional, guidance_scale, guided_length: see `Denoiser`.
    """

    @register_to_config
    def __init__(
        self,
        sample_channels: int,
        sample_length: int,
        condition_dim: int,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        token_layers: Sequence[int] | None = None,
        token_modules: Sequence[int] | None = None,
        condition_scale: float | None = None,
        unconditional: bool = True,
        guidance_scale: float = 1.5,
        guided_length: int | None = None,
    ) -> None:
        super().__init__()
        if min(width, depth, heads) < 1 or width % heads:
            raise CondPDiffError(f"width, depth and heads must be at least 1 and width a multiple of heads, got {width}, {depth}, {heads}")
        layers = list(token_layers if token_layers is not None else [0] * sample_length)
        modules = list(token_modules if token_modules is not None else range(sample_length))
        if len(layers) != sample_length or len(modules) != sample_length:
            raise CondPDiffError(f"expected the layer and the module of each of {sample_length} tokens, got {len(layers)}, {len(modules)}")
        self.register_buffer("layer_of_token", torch.tensor(layers), persistent=False)
        self.register_buffer("module_of_token", torch.tensor(modules), persistent=False)
        self.condition_scale = condition_dim**0.5 if condition_scale is None else condition_scale
        self.layer_embedding, self.module_embedding = nn.Embedding(max(layers) + 1, width), nn.Embedding(max(modules) + 1, width)
        # Directions of different modules have nothing in common, so each module has projections of its own.
        self.from_sample = nn.Parameter(torch.randn(sample_length, sample_channels, width) * sample_channels**-0.5)
        self.to_sample = nn.Parameter(torch.zeros(sample_length, width, sample_channels))
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, width)
        self.condition_embedding = nn.Sequential(nn.Linear(condition_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                width,
                heads,
                width // heads,
                activation_fn="gelu-approximate",
                attention_bias=True,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.at_once = max(1, NUMBERS_AT_ONCE // (sample_length * width * 6 * depth))

    def forward(
        self, sample: torch.Tensor, timestep: Any, condition: torch.Tensor, return_dict: bool = True
    ) -> UNet1DOutput | tuple[torch.Tensor]:
        """See `Denoiser`."""
        expected = (self.config.sample_channels, self.config.sample_length)
        if tuple(sample.shape[1:]) != expected or condition.shape != (len(sample), self.config.condition_dim):
            raise CondPDiffError(
                f"expected a sample of shape (batch, {expected[0]}, {expected[1]}) and a condition of shape "
                f"(batch, {self.config.condition_dim}), got {tuple(sample.shape)} and {tuple(condition.shape)}"
            )
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        time = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))
        modulation = self.modulation(time + self.condition_embedding(condition * self.condition_scale))
        places = self.layer_embedding(self.layer_of_token) + self.module_embedding(self.module_of_token)
        hidden = torch.einsum("bkm,mkw->bmw", sample, self.from_sample) + places
        for block in self.blocks:
            hidden = block(hidden, timestep=modulation)
        predicted = torch.einsum("bmw,mwk->bkm", self.norm(hidden), self.to_sample)
        return UNet1DOutput(sample=predicted) if return_dict else (predicted,)
