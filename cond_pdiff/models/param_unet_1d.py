"""ParamUNet1D: the conditional 1D U-Net that denoises latents (paper, section 3.3, equation 8, and appendix B.1)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_1d import UNet1DOutput
from torch import nn

from cond_pdiff.component import Component, register_component
from cond_pdiff.errors import CondPDiffError
from cond_pdiff.models.param_autoencoder import NUMBERS_AT_ONCE, activation

ConditionMode = Literal["add", "concat"]


@register_component
class ParamUNet1D(Component):
    """A U-Net of unstrided 1D convolutions with additive skips and a linear layer over the flattened bottom.

    The paper's networks change the number of channels, not the length: neighbouring latents have no spatial meaning, and the
    linear bottom is what mixes positions.

    - `condition_mode="add"` (style half): the condition is added to every stage's channels, and to the flattened bottom.
    - `condition_mode="concat"` (language half): the sample is flattened and the condition is appended to it along the length.

    Args:
        sample_channels: channels of the latents.
        sample_length: length of the latents (with the statistics of the normaliser).
        condition_dim: size of the condition embedding. All zeros means "no condition".
        block_out_channels: output channels of each stage.
        kernel_size: odd.
        embedding_dim: width of the time and condition embeddings.
        condition_mode: see above.
        bottom_linear: a linear layer over the flattened bottom.
        final_linear: a linear layer over the flattened output; needed for "concat", whose output is longer than the sample.
        act_fn: activation of the convolutions.
        condition_scale: condition embeddings are multiplied by it. They have unit length; with the square root of `condition_dim`
            their entries have unit size, which a linear layer learns from sooner.
        unconditional: was it trained without a condition too? Else there is nothing that guidance could lead away from.
        guidance_scale: classifier-free guidance unless a call says otherwise; 1 is none.
        guided_length: guidance acts on so many of the sample's first columns; None: on all, as in generators of 0.1.0.

    In training, no more than `at_once` samples should go through the network together: memory grows with them.
    """

    @register_to_config
    def __init__(
        self,
        sample_channels: int,
        sample_length: int,
        condition_dim: int,
        block_out_channels: Sequence[int] = (32, 64, 64, 8),
        kernel_size: int = 3,
        embedding_dim: int = 256,
        condition_mode: ConditionMode = "add",
        bottom_linear: bool = True,
        final_linear: bool = False,
        act_fn: str = "silu",
        condition_scale: float = 1.0,
        unconditional: bool = True,
        guidance_scale: float = 1.5,
        guided_length: int | None = None,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise CondPDiffError(f"kernel_size must be odd, got {kernel_size}")
        if condition_mode not in get_args(ConditionMode):
            raise CondPDiffError(f"condition_mode must be one of {get_args(ConditionMode)}, got {condition_mode!r}")
        if condition_mode == "concat" and not final_linear:
            raise CondPDiffError('condition_mode "concat" needs final_linear=True')
        concat = condition_mode == "concat"
        channels = 1 if concat else sample_channels
        length = sample_channels * sample_length + condition_dim if concat else sample_length
        self.act = activation(act_fn)

        self.time_proj = Timesteps(embedding_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(embedding_dim, embedding_dim)
        bottom = block_out_channels[-1] * length if bottom_linear else block_out_channels[-1]
        self.time_to_bottom = nn.Linear(embedding_dim, bottom)

        self.condition_embedding = (
            None
            if concat
            else nn.Sequential(
                nn.Linear(condition_dim, embedding_dim), activation(act_fn), nn.Linear(embedding_dim, embedding_dim), activation(act_fn)
            )
        )
        stages = () if concat else block_out_channels
        self.condition_to_down = nn.ModuleList(nn.Linear(embedding_dim, width) for width in stages)
        self.condition_to_up = nn.ModuleList(nn.Linear(embedding_dim, width) for width in reversed(stages))
        self.condition_to_bottom = None if concat else nn.Linear(embedding_dim, bottom)

        widths = (channels, *block_out_channels)
        self.at_once = max(1, NUMBERS_AT_ONCE // (max(widths) * length))
        self.down = nn.ModuleList(nn.Conv1d(inputs, outputs, kernel_size, padding="same") for inputs, outputs in itertools.pairwise(widths))
        self.bottom = nn.Linear(bottom, bottom) if bottom_linear else None
        self.up = nn.ModuleList(
            nn.Conv1d(inputs, outputs, kernel_size, padding="same") for inputs, outputs in itertools.pairwise(reversed(widths))
        )
        self.final = nn.Linear(channels * length, sample_channels * sample_length) if final_linear else None

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float, condition: torch.Tensor, return_dict: bool = True
    ) -> UNet1DOutput | tuple[torch.Tensor]:
        """Predict what the scheduler's `prediction_type` asks for.

        Args:
            sample: noisy latents, shape `(batch, sample_channels, sample_length)`.
            timestep: one for all, or one a sample, shape `(batch,)`.
            condition: condition embeddings, shape `(batch, condition_dim)`; zeros for none.

        Returns:
            `UNet1DOutput` with `sample` of the input's shape.
        """
        expected = (self.config.sample_channels, self.config.sample_length)
        if tuple(sample.shape[1:]) != expected or condition.shape != (len(sample), self.config.condition_dim):
            raise CondPDiffError(
                f"expected a sample of shape (batch, {expected[0]}, {expected[1]}) and a condition of shape "
                f"(batch, {self.config.condition_dim}), got {tuple(sample.shape)} and {tuple(condition.shape)}"
            )
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        if len(timesteps) not in (1, len(sample)):
            raise CondPDiffError(f"expected one timestep, or one for each of {len(sample)} samples, got {len(timesteps)}")
        timesteps = timesteps.expand(len(sample))
        time = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))

        hidden = sample
        condition = condition * self.config.condition_scale
        embedding = None
        if self.condition_embedding is not None:
            embedding = self.condition_embedding(condition)
        else:
            hidden = torch.cat([sample.flatten(1), condition], dim=1)[:, None]

        skips = []
        for index, conv in enumerate(self.down):
            hidden = self.act(conv(hidden))
            if embedding is not None:
                hidden = hidden + self.condition_to_down[index](embedding)[..., None]
            skips.append(hidden)

        shift = self.time_to_bottom(time)
        if self.condition_to_bottom is not None:
            shift = shift + self.condition_to_bottom(embedding)
        if self.bottom is not None:
            flat = hidden.flatten(1) + shift
            hidden = self.act(self.bottom(self.act(flat))).reshape_as(hidden)
        else:
            hidden = hidden + shift[..., None]

        for index, conv in enumerate(self.up):
            hidden = hidden + skips.pop()
            if embedding is not None:
                hidden = hidden + self.condition_to_up[index](embedding)[..., None]
            hidden = conv(hidden if index == 0 else self.act(hidden))

        if self.final is not None:
            hidden = self.final(hidden.flatten(1)).reshape_as(sample)
        return UNet1DOutput(sample=hidden) if return_dict else (hidden,)
