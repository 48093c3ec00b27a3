"""ZooTask: what every kind of task can do that adapters are collected on and a generator is trained on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from cond_pdiff.conditions.condition import Condition


class ZooTask(ABC):
    """One task of a zoo: something to fine-tune an adapter on, and many conditions to ask for that adapter.

    A family of base models reads its tasks (`Family.load_tasks`) and knows what else they hold.
    """

    condition_kind: ClassVar[type[Condition]]

    name: str
    group: str
    """The kind of task, for reports and for the threshold of a generator's index."""
    licence: str

    @abstractmethod
    def conditions(self, count: int) -> Sequence[Condition]:
        """Return conditions that ask for the task, the same ones every time; the first is the plainest."""

    def check(self) -> None:  # noqa: B027  # where nothing can be wrong, there is nothing to do
        """Raise `TaskDataError` for a task that no adapters can be collected on; what is only found in the end costs a whole run."""

    def zoo_facts(self) -> dict[str, Any]:
        """Return what the zoo records of it; `source` names the task that it was made from, if there is one."""
        return {"group": self.group, "licence": self.licence}

    def adapter_facts(self) -> dict[str, Any]:
        """Return what an adapter records of it, beside its name."""
        return {}

    def index_facts(self) -> dict[str, Any]:
        """Return what a generator's index keeps of it."""
        return {"group": self.group}

    def preview(self) -> bytes | None:
        """Return a small WebP file that stands for it in a generator's index, if its kind of task has one."""
        return None
