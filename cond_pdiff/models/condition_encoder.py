"""ConditionEncoder: what every condition encoder can do, whatever kind of condition it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from cond_pdiff.component import COMPONENTS, Component
from cond_pdiff.conditions.condition import Condition
from cond_pdiff.conditions.texts import Text
from cond_pdiff.hub import Backbone


@dataclass(frozen=True)
class EncoderReport:
    """A report of what an encoder read of a condition."""

    condition_kind: ClassVar[type[Condition]]

    def to_json(self) -> dict[str, int]:
        """Return a JSON-ready description."""
        return asdict(self)

    @property
    def cuts(self) -> str:
        """The parts that were left out for want of room, in words; empty if nothing was."""
        return ""


class ConditionEncoder(Component):
    """An encoder that turns conditions of one kind into condition embeddings (paper, section 3.3).

    A subclass is made known by `register_component`; recipes and saved generators then name it.
    """

    condition_kind: ClassVar[type[Condition]]
    index_options: Mapping[str, Any] = {}
    """The arguments of `ConditionIndex` that say how it compares the encoder's embeddings."""
    is_trained: ClassVar[bool] = False
    """Whether it is trained together with the denoiser: then it has a `forward` over what `read` gives."""

    @property
    def text_model(self) -> Backbone | None:
        """The frozen model whose text embeddings `encode_with_texts` gives; None: it gives none."""
        return None

    @property
    def condition_dim(self) -> int:
        """The length of a condition embedding."""
        return int(self.config.condition_dim)

    def encode(self, conditions: Sequence[Any]) -> tuple[torch.Tensor, Sequence[EncoderReport]]:
        """Return condition embeddings, shape `(len(conditions), condition_dim)`, and a report for each.

        Raises:
            ConditionError: a condition of another kind, or one that is too long.
        """
        raise NotImplementedError

    def encode_with_texts(self, conditions: Sequence[Any]) -> tuple[torch.Tensor, Sequence[EncoderReport], Mapping[Text, torch.Tensor]]:
        """Encode as `encode` does, and return the embedding of every text that `text_model` read whole for it, shape `(embedding_dim,)`."""
        return *self.encode(conditions), {}

    def encode_apart(self, conditions: Sequence[Any]) -> tuple[torch.Tensor, Sequence[EncoderReport]]:
        """Encode as `encode` does, where not even the last bit of an embedding may depend on what other conditions there are."""
        encoded = [self.encode([condition]) for condition in conditions]
        return torch.cat([rows for rows, _ in encoded]), [report for _, (report,) in encoded]

    def fit_center(self, conditions: Sequence[Any]) -> None:
        """Measure what the encoder needs to know of the training conditions, one of each task; most need nothing."""

    def read(self, condition: Any) -> torch.Tensor:
        """Read a condition as numbers, uint8 of one shape for all; the encoder's `forward` takes a batch of them as floats from 0 to 1."""
        raise NotImplementedError


def condition_encoders() -> dict[str, type[ConditionEncoder]]:
    """Return every condition encoder that is known, by name."""
    from cond_pdiff.models import prompt_encoders, style_encoders, vector_encoder  # noqa: F401  # registers them

    return {name: kind for name, kind in COMPONENTS.items() if issubclass(kind, ConditionEncoder)}
