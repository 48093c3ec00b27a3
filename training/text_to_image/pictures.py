"""Pictures as tensors: a pool of rendered scenes, and changes that make them look like anything but flat drawings.

The autoencoder is to serve pictures in styles that its training never shows. Everything here comes from random numbers:
no photo, no painting.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, grid_sample, interpolate, pad

from cond_pdiff.training.text_to_image.drawing import render
from cond_pdiff.training.text_to_image.scenes import Scene, scene_stream


def render_pool(count: int, seed: int, held_out: bool = False) -> tuple[list[Scene], torch.Tensor]:
    """Render the first scenes of a stream: the scenes and their pictures, uint8 of shape `(count, 3, 64, 64)`."""
    scenes, pictures = [], torch.empty((count, 3, 64, 64), dtype=torch.uint8)
    for index, (scene, rng) in enumerate(islice(scene_stream(seed, held_out), count)):
        scenes.append(scene)
        pictures[index] = torch.from_numpy(np.ascontiguousarray(render(scene, rng).transpose(2, 0, 1)))
    return scenes, pictures


def to_input(pictures: torch.Tensor) -> torch.Tensor:
    """Turn uint8 pictures into what networks read: float32 from -1 to 1."""
    return pictures.float() / 127.5 - 1


def effects(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Change each picture in ways that are drawn at random.

    Args:
        pictures: float32 from 0 to 1, shape `(batch, 3, height, width)`.

    Returns:
        The same shape and range.
    """
    for change, share in (
        (_mix_pictures, 0.2), (_displace, 0.35), (_flatten, 0.35), (_outline, 0.2), (_colour_matrix, 0.5), (_gradient_map, 0.25),
        (_strokes, 0.3), (_texture, 0.35), (_shade, 0.3), (_grain, 0.2),
    ):  # fmt: skip
        chosen = (torch.rand(len(pictures), generator=rng) < share).nonzero()[:, 0]
        if len(chosen):
            pictures = pictures.index_copy(0, chosen, change(pictures[chosen], rng).clamp(0, 1))
    return pictures


def recolour(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Put each picture into wholly other colours: its channels exchanged and mixed, or its brightness as a way through random colours.

    Args:
        pictures: float32 from 0 to 1, shape `(batch, 3, height, width)`.

    Returns:
        The same shape and range.
    """
    orders = torch.tensor([(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
    order = orders[torch.randint(len(orders), (len(pictures),), generator=rng)]
    exchanged = _mix_channels(pictures, torch.eye(3)[order], 0.25, rng)
    return torch.where(_uniform(len(pictures), 0, 1, rng) < 0.7, exchanged, _gradient_map(pictures, rng)).clamp(0, 1)


def patterns(batch_size: int, size: int, rng: torch.Generator) -> torch.Tensor:
    """Draw coloured noise at several scales, float32 from 0 to 1, shape `(batch_size, 3, size, size)`."""
    levels = cloud(batch_size, 3, size, rng, _uniform(batch_size, 0.5, 1.4, rng))
    return (0.5 + 0.3 * levels).clamp(0, 1)


def cloud(batch_size: int, channels: int, size: int, rng: torch.Generator, fall: torch.Tensor) -> torch.Tensor:
    """Draw noise of unit variance whose amplitude grows with the scale as `scale ** fall`; `fall` has the shape `(batch_size, 1, 1, 1)`."""
    total = torch.zeros(batch_size, channels, size, size)
    scale = 1
    while scale <= size // 2:
        noise = torch.randn(batch_size, channels, size // scale, size // scale, generator=rng)
        total = total + scale**fall * interpolate(noise, size=(size, size), mode="bilinear", align_corners=False)
        scale *= 2
    return total / total.std(dim=(1, 2, 3), keepdim=True)


def _uniform(count: int, low: float, high: float, rng: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(count, 1, 1, 1, generator=rng)


def _mix_pictures(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Put parts of another picture into each, cut by a mask of soft noise."""
    mask = torch.sigmoid(6 * cloud(len(pictures), 1, pictures.shape[-1], rng, _uniform(len(pictures), 0.8, 1.6, rng)))
    return torch.lerp(pictures, pictures.roll(1, 0), mask)


def _displace(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Take pixels from near by: bent and frayed shapes."""
    size = pictures.shape[-1]
    axis = torch.linspace(-1, 1, size)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    shift = cloud(len(pictures), 2, size, rng, _uniform(len(pictures), 0.2, 1.0, rng)).movedim(1, -1)
    return grid_sample(pictures, grid + _uniform(len(pictures), 0.01, 0.06, rng) * shift, padding_mode="border", align_corners=True)


def _flatten(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Apply Kuwahara's filter: each pixel becomes the mean of the calmest of the four squares that touch it, as in thick paint."""
    side = 3 if torch.rand(1, generator=rng) < 0.6 else 5
    size = pictures.shape[-1]
    padded = pad(pictures, (side - 1,) * 4, mode="replicate")
    mean = avg_pool2d(padded, side, 1)
    spread = (avg_pool2d(padded.square(), side, 1) - mean.square()).sum(1, keepdim=True)
    corners = [(top, left) for top in (0, side - 1) for left in (0, side - 1)]
    means = torch.stack([mean[..., top : top + size, left : left + size] for top, left in corners])
    spreads = torch.stack([spread[..., top : top + size, left : left + size] for top, left in corners])
    return means.gather(0, spreads.argmin(0, keepdim=True).expand(1, *pictures.shape))[0]


def _outline(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Draw dark or light lines along edges."""
    grey = pad(pictures.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across, down = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2], grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    edges = (across.square() + down.square()).sqrt() * _uniform(len(pictures), 0.5, 2.5, rng)
    return pictures + edges * torch.where(_uniform(len(pictures), 0, 1, rng) < 0.7, -1.0, 1.0)


def _colour_matrix(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Mix channels at random, with another brightness and contrast."""
    return _mix_channels(pictures, torch.eye(3), 0.45, rng)


def _mix_channels(pictures: torch.Tensor, matrix: torch.Tensor, spread: float, rng: torch.Generator) -> torch.Tensor:
    matrix = matrix + spread * torch.randn(len(pictures), 3, 3, generator=rng)
    mixed = torch.einsum("nij,njhw->nihw", matrix, pictures - 0.5)
    return 0.5 + _uniform(len(pictures), -0.15, 0.15, rng) + mixed


def _gradient_map(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Make brightness a way through five random colours."""
    palette = torch.rand(len(pictures), 3, 5, generator=rng)
    place = pictures.mean(1).clamp(0, 1) * 3.999
    lower = place.long()
    share = (place - lower)[:, None]
    below, above = (palette.gather(2, (lower + step).flatten(1)[:, None].expand(-1, 3, -1)).view_as(pictures) for step in (0, 1))
    return torch.lerp(below, above, share)


def _strokes(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Smear noise along a direction that changes slowly: the marks of a brush."""
    count, size = len(pictures), pictures.shape[-1]
    angle = 2 * cloud(count, 1, size, rng, torch.full((count, 1, 1, 1), 1.5)) + _uniform(count, 0, 3.14, rng)
    step = torch.cat((angle.cos(), angle.sin()), 1).movedim(1, -1) * 2 / size
    axis = torch.linspace(-1, 1, size)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    noise = torch.randn(count, 3, size, size, generator=rng)
    noise = torch.lerp(noise.mean(1, keepdim=True).expand_as(noise) * 1.7, noise, _uniform(count, 0, 0.6, rng))
    places = [grid + offset * step for offset in range(-2, 3)]
    smeared = torch.stack([grid_sample(noise, place, padding_mode="reflection", align_corners=True) for place in places]).sum(0)
    return pictures + _uniform(count, 0.02, 0.11, rng) * smeared


def _texture(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Add noise at several scales to the picture."""
    noise = cloud(len(pictures), 3, pictures.shape[-1], rng, _uniform(len(pictures), -0.3, 0.8, rng))
    return pictures + _uniform(len(pictures), 0.02, 0.12, rng) * noise


def _shade(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Let light fall from one side."""
    axis = torch.linspace(-1, 1, pictures.shape[-1])
    tilt = torch.randn(2, len(pictures), 3, 1, 1, generator=rng) * 0.2
    return pictures + tilt[0] * axis + tilt[1] * axis[:, None]


def _grain(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Add noise to every pixel."""
    return pictures + _uniform(len(pictures), 0.01, 0.08, rng) * torch.randn(pictures.shape, generator=rng)
