"""Instruction: how a task and a text become one prompt for a language model, the same in training, in evaluation and in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cond_pdiff.conditions.texts import Text, label_text


@dataclass(frozen=True)
class Instruction:
    """An instruction to answer texts.

    Args:
        description: what to do; empty: a text stands alone.
        labels: label names, where the answer is one of them.
    """

    description: str = ""
    labels: Sequence[str] = ()

    @classmethod
    def recorded(cls, metadata: Mapping[str, Any]) -> Instruction:
        """Read an adapter's metadata: its task's description, or that of the condition which it was generated from, and its labels."""
        condition, labels = metadata.get("condition"), metadata.get("labels")
        asked = condition.get("description") if isinstance(condition, Mapping) else None
        description = metadata.get("description", asked)
        return cls(str(description or ""), tuple(map(str, labels)) if isinstance(labels, list) else ())

    @property
    def answers(self) -> tuple[str, ...]:
        """The label names as they are answered: as words, unless two would be the same or one would be nothing (such as "+" and "-")."""
        words = tuple(map(label_text, self.labels))
        return words if all(words) and len(set(words)) == len(words) else tuple(self.labels)

    def prompt(self, text: Text) -> str:
        """Return what the model is asked about a text or a pair: the text stands last, so that prompts of one task begin alike."""
        parts = [f"Input: {text}"] if isinstance(text, str) else [f"Input {place}: {part}" for place, part in enumerate(text, 1)]
        options = [f"Options: {', '.join(self.answers)}"] if self.labels else []
        head = [*([self.description] if self.description else []), *options]
        return "\n".join([*head, *parts]) if head or not isinstance(text, str) else text
