"""ConditionEncoder: what every condition encoder can do, whatever kind of condition it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from cond_pdiff.component import COMPONENTS, Component
from cond_pdiff.conditions.condition import Condition


@dataclass(frozen=True)
class EncoderReport:
    """What an encoder read of a condition."""

    condition_kind: ClassVar[type[Condition]]

    def to_json(self) -> dict[str, int]:
        """A JSON-ready description."""
        return asdict(self)

    @property
    def cuts(self) -> str:
        """What was left out for want of room, in words; empty if nothing was."""
        return ""


class ConditionEncoder(Component):
    """Conditions of one kind → condition embeddings (paper, section 3.3).

    A subclass is made known by `register_component`; recipes and saved generators then name it.
    """

    condition_kind: ClassVar[type[Condition]]
    index_options: Mapping[str, Any] = {}
    """How a `ConditionIndex` compares its embeddings."""
    is_trained: ClassVar[bool] = False
    """Is it trained together with the denoiser? Then it has a `forward` over what `read` gives."""

    @property
    def condition_dim(self) -> int:
        """The length of a condition embedding."""
        return int(self.config.condition_dim)

    def encode(self, conditions: Sequence[Any]) -> tuple[torch.Tensor, Sequence[EncoderReport]]:
        """Condition embeddings, shape `(len(conditions), condition_dim)`, and a report for each.

        Raises:
            ConditionError: a condition of another kind, or one that is too long.
        """
        raise NotImplementedError

    def fit_center(self, conditions: Sequence[Any]) -> None:
        """Measure what it needs to know of the training conditions, one of each task; most need nothing."""

    def read(self, condition: Any) -> torch.Tensor:
        """A condition as numbers, uint8 of one shape for all; the encoder's `forward` takes a batch of them as floats from 0 to 1."""
        raise NotImplementedError


def condition_encoders() -> dict[str, type[ConditionEncoder]]:
    """Every condition encoder that is known, by name."""
    from cond_pdiff.models import prompt_encoders, style_encoders  # noqa: F401  # registers them

    return {name: kind for name, kind in COMPONENTS.items() if issubclass(kind, ConditionEncoder)}
