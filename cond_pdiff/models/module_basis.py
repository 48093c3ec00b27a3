"""ModuleBasis: per module, the mean and the leading directions of a zoo, in the place of the paper's autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config

from cond_pdiff.component import ExactComponent, register_component
from cond_pdiff.models.module_code import CELL, ModuleCode


@register_component
class ModuleBasis(ModuleCode, ExactComponent):  # type: ignore[misc]  # config_name, as in Component
    """An autoencoder that is linear: a module's code are its coefficients along the zoo's principal directions of that module.

    Encoding is exact least squares, as directions are orthonormal (to rounding: they are kept in half precision). Decoding is linear, so
    sums of codes are sums of updates, and interpolation keeps its meaning. On disk a direction takes two bytes a number, the mean four.

    Args:
        spans: see `ModuleCode`.
        width: coefficients a module; a zoo of n adapters has n - 1 directions, and the coefficients of others are 0.
        scaling_factor: see `ParamAutoencoder`.
        file_sha256: of the file beside the weights; it belongs to what tells one generator from another.
    """

    @register_to_config
    def __init__(
        self, spans: Sequence[Sequence[int]], width: int = 64, scaling_factor: float = 1.0, file_sha256: str | None = None
    ) -> None:
        super().__init__(spans, width)

    def directions(self, index: int, start: int, stop: int) -> torch.Tensor:
        """Return the unit directions of a module, float32, of which values `start` to `stop`, shape `(directions, stop - start)`."""
        kept = self.file.read(direction_key(index), slice(None), slice(start, stop)).float()
        first, last = self.spans[index]
        return kept * (last - first) ** -0.5

    def encode_span(self, index: int, values: torch.Tensor) -> torch.Tensor:
        """See `ModuleCode`."""
        code = torch.zeros(self.config.width, dtype=torch.float64)
        for start in range(0, len(values), CELL):
            part = values[start : start + CELL]
            directions = self.directions(index, start, start + len(part))
            code[: len(directions)] += (directions @ part).double()
        return code.float()

    def decode_cell(self, index: int, codes: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """See `ModuleCode`."""
        directions = self.directions(index, start, stop)
        return torch.stack([code[: len(directions)] @ directions for code in codes])


def direction_key(index: int) -> str:
    """Return the name under which the file has a module's directions, each as long as the square root of its number of values."""
    return f"directions.{index:05d}"
