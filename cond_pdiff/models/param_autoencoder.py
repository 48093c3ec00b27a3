"""ParamAutoencoder: the 1D-CNN autoencoder that compresses flattened adapters (paper, section 3.2, equations 6 and 7)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.activations import ACT2CLS, get_activation
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from cond_pdiff.component import Component, register_component
from cond_pdiff.errors import CondPDiffError
from cond_pdiff.models.long_maps import run_on_long_maps

Norm = Literal["batch", "instance", "none"]
NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm1d, "instance": nn.InstanceNorm1d, "none": nn.Identity}
NUMBERS_AT_ONCE = 2**25
"""The most numbers in the widest feature maps of adapters that go through the network together: 134 MB in float32; a few are alive."""
LONG_ADAPTER = 2**17
"""From so many params on, a decoder in use (in evaluation mode, without gradients, float32 on a CPU) computes in the forms of `long_maps`,
which round differently. Shorter adapters, as the bundled generators' of 36,864 params, keep the bits of earlier versions."""
ACTIVATIONS = {"leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "tanh": nn.Tanh}


def activation(name: str) -> nn.Module:
    """Return an activation by name: the paper's own, else any that diffusers knows."""
    try:
        return ACTIVATIONS[name]() if name in ACTIVATIONS else get_activation(name)
    except ValueError as error:
        raise CondPDiffError(f"no activation is called {name!r}; there are {[*ACTIVATIONS, *ACT2CLS]}") from error


@register_component
class ParamAutoencoder(Component):
    """An autoencoder of strided 1D convolutions down to a code, and transposed convolutions back up.

    Two families, after the paper's two halves:

    - with `latent_dim`: the last feature map is flattened and mapped to `latent_dim` numbers by a linear layer; latents have
      shape `(batch, 1, latent_dim)` (the style half, appendix B.1);
    - without: the last feature map is the latent, `(batch, encoder_channels[-1], length)` (the language half).

    Args:
        num_params: length of the input.
        encoder_channels: output channels of each strided convolution.
        decoder_channels: output channels of each transposed convolution; as many as `encoder_channels`. A last convolution
            maps to one channel.
        decoder_bottom_channels: channels of the decoder's first feature map, behind the linear layer. Default: the
            encoder's last. Only with `latent_dim`.
        kernel_size: of all convolutions; at least `stride`.
        stride: of each stage.
        latent_dim: size of the linear bottleneck, or None.
        norm: after every convolution but the last.
        encoder_activation: "leaky_relu", "elu", "tanh" or any name that diffusers knows.
        decoder_activation: the same, for the decoder.
        scaling_factor: latents are multiplied by it after encoding, so that a zoo's latents have unit variance.

    In evaluation mode a large batch goes through the network in parts of `at_once` adapters, so that memory does not grow with it.
    """

    spans = None  # every column of the code is of all params

    @register_to_config
    def __init__(
        self,
        num_params: int,
        encoder_channels: Sequence[int] = (4, 8, 8),
        decoder_channels: Sequence[int] = (16, 4, 4),
        decoder_bottom_channels: int | None = None,
        kernel_size: int = 9,
        stride: int = 4,
        latent_dim: int | None = 96,
        norm: Norm = "none",
        encoder_activation: str = "leaky_relu",
        decoder_activation: str = "elu",
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if len(encoder_channels) != len(decoder_channels) or not encoder_channels:
            raise CondPDiffError(f"encoder and decoder need equally many stages, got {len(encoder_channels)} and {len(decoder_channels)}")
        if not 1 <= stride <= kernel_size:
            raise CondPDiffError(
                f"a kernel of {kernel_size} with stride {stride} would skip parameters; use a stride from 1 to the kernel's size"
            )
        if decoder_bottom_channels is not None and latent_dim is None:
            raise CondPDiffError("decoder_bottom_channels needs a linear bottleneck (latent_dim)")
        if norm not in NORMS:
            raise CondPDiffError(f"norm must be one of {list(NORMS)}, got {norm!r}")
        padding = (kernel_size - stride + 1) // 2
        lengths = [num_params]
        for _ in encoder_channels:
            lengths.append((lengths[-1] + 2 * padding - kernel_size) // stride + 1)
        if lengths[-1] < 1:
            raise CondPDiffError(f"{num_params} params are too few for {len(encoder_channels)} stages of stride {stride}")
        widths = [channels * length for channels, length in zip(encoder_channels, lengths[1:], strict=True)]
        widths += [channels * length for channels, length in zip(decoder_channels, lengths[-2::-1], strict=True)]
        self.at_once = max(1, NUMBERS_AT_ONCE // max(widths))
        self.bottom_length = lengths[-1]
        self.bottom_channels = decoder_bottom_channels or encoder_channels[-1]

        self.encoder = nn.Sequential()
        for inputs, outputs in zip((1, *encoder_channels), encoder_channels, strict=False):
            self.encoder.extend(
                [nn.Conv1d(inputs, outputs, kernel_size, stride, padding), NORMS[norm](outputs), activation(encoder_activation)]
            )
        self.to_latent = nn.Linear(encoder_channels[-1] * self.bottom_length, latent_dim) if latent_dim else None
        self.from_latent = nn.Linear(latent_dim, self.bottom_channels * self.bottom_length) if latent_dim else None

        self.decoder = nn.Sequential()
        for stage, (inputs, outputs) in enumerate(zip((self.bottom_channels, *decoder_channels), decoder_channels, strict=False)):
            short, long = lengths[-1 - stage], lengths[-2 - stage]
            # What the strided convolution rounded away on this stage is given back, so the lengths mirror exactly.
            output_padding = long - ((short - 1) * stride - 2 * padding + kernel_size)
            self.decoder.extend(
                [
                    nn.ConvTranspose1d(inputs, outputs, kernel_size, stride, padding, output_padding),
                    NORMS[norm](outputs),
                    activation(decoder_activation),
                ]
            )
        # "same" padding for even kernels too.
        self.decoder.append(nn.Conv1d(decoder_channels[-1], 1, kernel_size, padding="same"))

    @property
    def latent_shape(self) -> tuple[int, int]:
        """The shape (channels, length) of the latents of one adapter."""
        if self.config.latent_dim:
            return 1, self.config.latent_dim
        return self.config.encoder_channels[-1], self.bottom_length

    @apply_forward_hook
    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Encode normalised params, shape `(batch, num_params)`, into scaled latents, shape `(batch, *latent_shape)` (equation 6a)."""
        if values.ndim != 2 or values.shape[1] != self.config.num_params:
            raise CondPDiffError(f"expected values of shape (batch, {self.config.num_params}), got {tuple(values.shape)}")
        return self._in_parts(self._encode, values)

    def _encode(self, values: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(values[:, None])
        if self.to_latent is not None:
            hidden = self.to_latent(hidden.flatten(1))[:, None]
        return hidden * self.config.scaling_factor

    @apply_forward_hook
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents, shape `(batch, *latent_shape)`, into normalised params, shape `(batch, num_params)` (equation 6b)."""
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise CondPDiffError(
                f"expected latents of shape (batch, {self.latent_shape[0]}, {self.latent_shape[1]}), got {tuple(latents.shape)}"
            )
        return self._in_parts(self._decode, latents)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        hidden = latents / self.config.scaling_factor
        if self.from_latent is not None:
            hidden = self.from_latent(hidden[:, 0]).unflatten(1, (self.bottom_channels, self.bottom_length))
        in_use = not self.training and not torch.is_grad_enabled()
        if in_use and self.config.num_params >= LONG_ADAPTER and hidden.device.type == "cpu" and hidden.dtype == torch.float32:
            return run_on_long_maps(self.decoder, hidden)[:, 0]
        return self.decoder(hidden)[:, 0]

    def _in_parts(self, function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        """Apply a function to a batch; in use, where adapters do not see each other, to `at_once` of them together."""
        if self.training or len(batch) <= self.at_once:
            return function(batch)
        return torch.cat([function(part) for part in batch.split(self.at_once)])

    def forward(self, values: torch.Tensor, disturb: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """Reconstruct values, shape `(batch, num_params)`; `disturb` may add noise to the latents on the way (equation 6b)."""
        latents = self.encode(values)
        return self.decode(disturb(latents) if disturb else latents)

    def fit_scaling_factor(self, latents: torch.Tensor) -> torch.Tensor:
        """Change `scaling_factor` so that `latents`, which were encoded with it, get unit variance (root mean square); return those."""
        return to_unit_variance(self, latents)


def to_unit_variance(autoencoder: Component, latents: torch.Tensor) -> torch.Tensor:
    """Return latents with a root mean square of 1, and change the `scaling_factor` of the autoencoder that made them accordingly."""
    spread = float(latents.detach().double().square().mean().sqrt())
    if not math.isfinite(spread) or spread == 0:
        raise CondPDiffError(f"latents have size {spread}; the autoencoder is not trained, or all adapters are alike")
    autoencoder.register_to_config(scaling_factor=autoencoder.config.scaling_factor / spread)
    return latents / spread
