"""FineTuning: how an adapter for a base model learns a task."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from cond_pdiff.adapter import LoraAdapter

Row = TypeVar("Row")


class FineTuning(Protocol):
    """A base model, and how an adapter for it learns a kind of task; what `Family.fine_tuning` gives."""

    model: nn.Module
    """The model that adapters are attached to, on the device that trains."""
    task_type: str | None
    """The `task_type` of peft's configuration, if it has one."""

    def batches(self, task: Any, rng: random.Random) -> Iterator[Any]:
        """Yield training batches without end."""

    def losses(self, batches: Sequence[Any], tasks: Sequence[Any]) -> torch.Tensor:
        """Return the loss of each task's batch, shape `(len(tasks),)`. The base model reads equally many neighbouring rows for each."""

    def metrics(self, adapter: LoraAdapter, task: Any) -> dict[str, Any]:
        """Measure the quality on rows that are not trained on, for the manifest."""


def batches_by_length(rows: Sequence[Row], size: int, rng: random.Random, length: Callable[[Row], int]) -> Iterator[list[Row]]:
    """Yield batches of rows drawn at random, without end; rows of like length share a batch, which halves the padding."""
    while True:
        pool = sorted((rng.choice(rows) for _ in range(8 * size)), key=length)
        batches = [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(batches)
        yield from batches
