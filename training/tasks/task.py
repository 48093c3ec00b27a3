"""ZooTask: what every kind of task can do that adapters are collected on and a generator is trained on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from cond_pdiff.conditions.condition import Condition


class ZooTask(ABC):
    """One task of a zoo: something to fine-tune an adapter on, and many ways to ask for that adapter.

    A family of base models reads its tasks (`Family.load_tasks`) and knows what else they hold.
    """

    condition_kind: ClassVar[type[Condition]]

    name: str
    group: str
    """The kind of task, for reports and for the threshold of a generator's index."""
    licence: str

    @abstractmethod
    def conditions(self, count: int) -> Sequence[Condition]:
        """Ways to ask for the task, the same ones every time; the first is the plainest."""

    def zoo_facts(self) -> dict[str, Any]:
        """What the zoo records of it; `source` names the task that it was made from, if there is one."""
        return {"group": self.group, "licence": self.licence}

    def adapter_facts(self) -> dict[str, Any]:
        """What an adapter records of it, beside its name."""
        return {}

    def index_facts(self) -> dict[str, Any]:
        """What a generator's index keeps of it."""
        return {"group": self.group}

    def preview(self) -> bytes | None:
        """A small WebP file that stands for it in a generator's index, if its kind of task has one."""
        return None
