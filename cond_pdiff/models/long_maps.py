"""Layers on long feature maps of few channels, in the forms that a CPU computes fastest: the same weights and sums, in another order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

BLOCK = 16
"""Channels that a convolution should have at least: as many float32 numbers fit into one register of a wide CPU."""
MAP_TO_WEIGHTS = 4
"""Weights are rearranged for a map of at least so many times their number; for a shorter one that takes longer than it saves."""


def run_on_long_maps(layers: Iterable[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
    """Apply layers in turn, in evaluation mode; those that have another form, in that form.

    Args:
        layers: transposed convolutions, convolutions of stride 1 with padding "same", and what follows them. ELUs have the usual alpha, 1.
        hidden: shape `(batch, channels, length)`, on the CPU.

    Returns:
        what `nn.Sequential` returns, up to rounding. In memory the channels of one position may lie together.
    """
    for layer in layers:
        hidden = FORMS.get(type(layer), nn.Module.__call__)(layer, hidden)
    return hidden


def transposed_convolution(layer: nn.ConvTranspose1d, hidden: torch.Tensor) -> torch.Tensor:
    """Apply a transposed convolution: each of its `stride` phases is a convolution, and their outputs lie side by side as channels."""
    (stride,), (extra,), (kernel,), padding = layer.stride, layer.output_padding, layer.kernel_size, int(layer.padding[0])
    length = (hidden.shape[-1] - 1) * stride - 2 * padding + kernel + extra
    if layer.out_channels * length < MAP_TO_WEIGHTS * layer.weight.numel():
        return layer(hidden)
    return polyphase(hidden, layer.weight, layer.bias, stride, padding, length)


def convolution(layer: nn.Conv1d, hidden: torch.Tensor) -> torch.Tensor:
    """Apply a convolution of stride 1 with padding "same": backwards it is a transposed one, padded as far as it reaches to the right."""
    weight = layer.weight.transpose(0, 1).flip(-1)
    return polyphase(hidden, weight, layer.bias, 1, layer.kernel_size[0] // 2, hidden.shape[-1])


def polyphase(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, padding: int, length: int
) -> torch.Tensor:
    """Return a transposed convolution, made by an ordinary one whose windows give `stride` or more neighbouring outputs each.

    Args:
        hidden: shape `(batch, inputs, shorter)`.
        weight: shape `(inputs, outputs, kernel)`, as of `nn.ConvTranspose1d`.
        bias: shape `(outputs,)`.
        stride: outputs a position of `hidden`; at most `kernel`.
        padding: outputs that are left out in front.
        length: outputs that are kept behind those.

    Returns:
        shape `(batch, outputs, length)`.
    """
    outputs, kernel = weight.shape[1:]
    block = -(-BLOCK // (stride * outputs))  # positions that a window steps on
    reach = -(-kernel // stride) - 1  # positions before those that it sees, too
    made = stride * block
    tap = torch.arange(made)[:, None] - stride * (torch.arange(reach + block) - reach)  # that leads from a position to an output
    taps = functional.pad(weight.permute(2, 1, 0), (0, 0, 0, 0, 0, 1))  # behind the last: zeros, for pairs that do not meet
    kernels = taps[torch.where((tap >= 0) & (tap < kernel), tap, kernel)]  # (made, seen, outputs, inputs)
    kernels = kernels.permute(0, 2, 3, 1).flatten(0, 1)[:, :, None]
    biases = None if bias is None else bias.repeat(made)
    # As an image of height 1, as only images may have their channels together. One window more in front: padding is equal on both sides.
    windows = functional.conv2d(hidden[:, :, None], kernels, biases, stride=(1, block), padding=(0, reach + block))
    longer = windows[:, :, 0].transpose(1, 2).reshape(len(hidden), -1, outputs)
    return longer[:, made + padding :][:, :length].transpose(1, 2)


def batch_norm(layer: nn.BatchNorm1d, hidden: torch.Tensor) -> torch.Tensor:
    """Apply a batch norm, on an image of height 1, too."""
    image = hidden[:, :, None]
    return functional.batch_norm(image, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)[:, :, 0]


def elu(_: nn.ELU, hidden: torch.Tensor) -> torch.Tensor:
    """Apply an exponential linear unit by exp, a tenth of the time of torch's expm1; off by 1e-7 at most, in float32."""
    below = hidden.clamp(max=0).exp_().sub_(1)
    return torch.maximum(hidden, below, out=below)


FORMS: dict[type[nn.Module], Any] = {
    nn.ConvTranspose1d: transposed_convolution,
    nn.Conv1d: convolution,
    nn.BatchNorm1d: batch_norm,
    nn.ELU: elu,
}
"""The layers that have another form."""
