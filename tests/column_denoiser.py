"""A denoiser that the library does not know: columns of the latents attend to each other and to the condition's tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_1d import UNet1DOutput
from torch import nn

from cond_pdiff.component import Component
from cond_pdiff.models.denoisers import register_denoiser


@register_denoiser
class ColumnDenoiser(Component):
    """One transformer block over columns of the latents, the time, and tokens of the condition; see `Denoiser`."""

    at_once = 64

    @register_to_config
    def __init__(
        self,
        sample_channels: int,
        sample_length: int,
        condition_dim: int,
        width: int = 16,
        unconditional: bool = True,
        guidance_scale: float = 1.5,
        guided_length: int | None = None,
    ) -> None:
        super().__init__()
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, width)
        self.place = nn.Parameter(torch.randn(sample_length, width))
        self.from_sample, self.from_condition = nn.Linear(sample_channels, width), nn.Linear(condition_dim, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.to_sample = nn.Linear(width, sample_channels)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Any,
        condition: torch.Tensor,
        condition_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet1DOutput | tuple[torch.Tensor]:
        """See `Denoiser`; a condition of shape `(batch, condition_dim)` is one token."""
        tokens = condition if condition.ndim == 3 else condition[:, None]
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        time = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))[:, None]
        columns = self.from_sample(sample.mT) + self.place
        row = torch.cat([columns, time, self.from_condition(tokens)], dim=1)
        hidden = None
        if condition_mask is not None:
            hidden = torch.cat([condition_mask.new_zeros((*row.shape[:1], columns.shape[1] + 1)), ~condition_mask], dim=1)
        made = self.to_sample(self.block(row, src_key_padding_mask=hidden)[:, : columns.shape[1]]).mT
        return UNet1DOutput(sample=made) if return_dict else (made,)
