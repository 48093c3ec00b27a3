"""The condition encoder for vectors: nothing is learnt, the numbers are brought to one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from cond_pdiff.component import ExactComponent, register_component
from cond_pdiff.conditions.vector import Vector
from cond_pdiff.errors import ConditionError
from cond_pdiff.models.condition_encoder import ConditionEncoder, EncoderReport


@dataclass(frozen=True)
class VectorReport(EncoderReport):
    """A report of a vector that was read: there is nothing to tell."""

    condition_kind: ClassVar[type[Vector]] = Vector


@register_component
class VectorConditionEncoder(ExactComponent, ConditionEncoder):  # type: ignore[misc]  # as in `Component`
    """An encoder that standardises each number over the training vectors, and brings the whole to length one.

    Args:
        condition_dim: numbers of a vector.
    """

    condition_kind = Vector
    center: torch.Tensor
    spread: torch.Tensor

    @register_to_config
    def __init__(self, condition_dim: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(condition_dim))
        self.register_buffer("spread", torch.ones(condition_dim))

    def fit_center(self, conditions: Sequence[Any]) -> None:
        """Measure mean and standard deviation of each number; one that never varies counts as it is."""
        rows = self._rows(conditions)
        spread = rows.std(0, correction=0)
        self.center.copy_(rows.mean(0))
        self.spread.copy_(torch.where(spread > 1e-6 * rows.abs().amax(0).clamp_min(1e-30), spread, torch.ones_like(spread)))

    def encode(self, conditions: Sequence[Any]) -> tuple[torch.Tensor, Sequence[EncoderReport]]:
        """Return condition embeddings, shape `(len(conditions), condition_dim)`, and a report for each.

        Raises:
            ConditionError: not a vector, or one of another length.
        """
        rows = (self._rows(conditions).to(self.center.device) - self.center) / self.spread
        return nn.functional.normalize(rows, dim=1), [VectorReport() for _ in conditions]

    def _rows(self, conditions: Sequence[Any]) -> torch.Tensor:
        vectors = [Vector.of(condition).numbers for condition in conditions]
        if wrong := [len(numbers) for numbers in vectors if len(numbers) != len(self.center)]:
            raise ConditionError(f"this generator reads vectors of {len(self.center)} numbers, got {wrong[0]}")
        return torch.stack(vectors)
