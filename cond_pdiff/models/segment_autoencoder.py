"""SegmentAutoencoder: one small network, shared by all modules, over segments of fixed length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from cond_pdiff.component import register_component
from cond_pdiff.errors import CondPDiffError
from cond_pdiff.models.module_code import CELL, ModuleCode


@register_component
class SegmentAutoencoder(ModuleCode):
    """An autoencoder that reads and writes a module's values in segments; embeddings tell it which module, which layer and where in it.

    A module's code is the mean over its segments of what the encoder makes of each; the decoder makes a segment of the code and its place.
    The network's size depends neither on the zoo nor, but for an embedding a module, on the adapters; only the zoo's mean is as long as
    they are. Values are divided by their root mean square in the zoo before they are encoded, each module's by its own.

    Args:
        spans: see `ModuleCode`.
        width: numbers of the code of one module.
        segment: values that go through the network together; a divisor of 16,384.
        hidden: width of the network.
        depth: hidden layers of encoder and decoder.
        frequencies: a segment's place in its module is told by so many sines and cosines, each of twice the frequency of the one before.
        scaling_factor, file_sha256: see `ModuleBasis`.
    """

    sizes: torch.Tensor

    @register_to_config
    def __init__(
        self,
        spans: Sequence[Sequence[int]],
        width: int = 64,
        segment: int = 1024,
        hidden: int = 512,
        depth: int = 2,
        frequencies: int = 10,
        scaling_factor: float = 1.0,
        file_sha256: str | None = None,
    ) -> None:
        super().__init__(spans, width)
        if segment < 1 or CELL % segment or min(hidden, depth, frequencies) < 1:
            raise CondPDiffError(f"segment must divide {CELL}, and hidden, depth and frequencies be at least 1, got {segment}, {hidden}, …")
        self.register_buffer("sizes", torch.ones(len(spans)))  # root mean square of each module's values
        self.module_embedding = nn.Embedding(len(spans), hidden)
        self.place_to_hidden = nn.Linear(2 * frequencies, hidden)
        self.from_segment, self.from_code = nn.Linear(segment, hidden), nn.Linear(width, hidden)
        self.encoder, self.decoder = (nn.Sequential(*(_Layer(hidden) for _ in range(depth))) for _ in range(2))
        self.to_code, self.to_segment = nn.Linear(hidden, width), nn.Linear(hidden, segment)

    def place(self, index: int, segments: torch.Tensor) -> torch.Tensor:
        """Embed the places of segments, by their numbers in a module, shape `(len(segments), hidden)`."""
        start, stop = self.spans[index]
        share = (segments.to(self.to_code.weight) + 0.5) * (self.config.segment / (stop - start))
        angles = math.pi * share[:, None] * 2 ** torch.arange(self.config.frequencies).to(share)
        where = self.place_to_hidden(torch.cat([angles.sin(), angles.cos()], dim=1))
        return where + self.module_embedding(torch.tensor(index, device=where.device))

    def encode_segments(self, index: int, values: torch.Tensor) -> torch.Tensor:
        """Encode all values of a module, without their mean and divided by their size, shape `(length,)`, into `(width,)`."""
        padded = nn.functional.pad(values, (0, -len(values) % self.config.segment)).unflatten(0, (-1, self.config.segment))
        places = self.place(index, torch.arange(len(padded), device=padded.device))
        code: torch.Tensor = self.to_code(self.encoder(self.from_segment(padded) * (1 + places))).mean(0)
        return code

    def decode_segments(self, index: int, code: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        """Decode segments of a module, by their numbers, of the code, shape `(width,)`, into `(len(segments), segment)`."""
        made: torch.Tensor = self.to_segment(self.decoder(self.from_code(code) * (1 + self.place(index, segments))))
        return made

    def forward(
        self, index: int, values: torch.Tensor, segments: torch.Tensor, disturb: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Reconstruct some segments of a module, shape `(len(segments), segment)`; `disturb` may add noise to the code (equation 6b)."""
        return self.decode_segments(index, disturb(self.encode_segments(index, values)), segments)

    def encode_span(self, index: int, values: torch.Tensor) -> torch.Tensor:
        """See `ModuleCode`."""
        weight = self.to_code.weight
        code = self.encode_segments(index, (values.to(weight.device) / self.sizes[index].float()).to(weight.dtype))
        return code.float().cpu()

    def decode_cell(self, index: int, codes: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """See `ModuleCode`."""
        segment, weight = self.config.segment, self.to_code.weight
        segments = torch.arange(start // segment, -(-stop // segment), device=weight.device)
        made = [self.decode_segments(index, code.to(weight), segments).flatten()[: stop - start] for code in codes]
        return torch.stack(made).float().cpu() * self.sizes[index].float().cpu()


class _Layer(nn.Module):
    """A residual layer with a normalised input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.linear(nn.functional.gelu(self.norm(hidden)))
