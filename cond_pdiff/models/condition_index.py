"""ConditionIndex: the conditions that a generator was trained on, to say how near a request is to any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

from cond_pdiff.component import Component
from cond_pdiff.errors import CondPDiffError


@dataclass(frozen=True)
class Neighbour:
    """A trained task and its similarity to a request (1: the same; about 0: unrelated)."""

    task: str
    similarity: float


class ConditionIndex(Component):
    """Condition embeddings of the trained tasks, and the similarity below which a request is out of distribution.

    Args:
        tasks: name → facts (`description`, `labels`, …) of every trained task.
        condition_dim: size of a condition embedding.
        names: the tasks in the order of the embeddings; default: the order of `tasks`. (A saved config sorts its keys.)
    """

    __module__ = "cond_pdiff"

    embeddings: torch.Tensor
    threshold: torch.Tensor

    @register_to_config
    def __init__(self, tasks: Mapping[str, Mapping[str, Any]], condition_dim: int, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.register_to_config(names=list(names or tasks))
        self.register_buffer("embeddings", torch.zeros(len(tasks), condition_dim))
        self.register_buffer("threshold", torch.zeros(1))

    @property
    def names(self) -> list[str]:
        """Names of the trained tasks, in the order of the embeddings."""
        return list(self.config.names)

    def similarities(self, conditions: torch.Tensor) -> torch.Tensor:
        """Similarity of each condition to each trained task, shape `(batch, num_tasks)`.

        The mean cosine over those parts of the embedding that the condition has: parts are unit vectors, so the
        condition's squared length counts them.
        """
        parts = conditions.square().sum(1, keepdim=True).clamp_min(1e-8)
        return conditions @ self.embeddings.to(conditions.dtype).T / parts

    def nearest(self, condition: torch.Tensor, count: int = 3) -> list[Neighbour]:
        """The `count` most similar trained tasks of one condition, shape `(condition_dim,)`, most similar first."""
        values, order = self.similarities(condition[None])[0].float().sort(descending=True, stable=True)
        return [
            Neighbour(self.names[index], round(value, 4))
            for index, value in zip(order[:count].tolist(), values[:count].tolist(), strict=True)
        ]

    def in_distribution(self, similarity: float) -> bool:
        """Is a request whose nearest task has this similarity like what was trained?"""
        return similarity >= float(self.threshold)

    def fit(self, own: torch.Tensor) -> None:
        """Measure the index on prompts of the trained tasks.

        The threshold separates best (by balanced accuracy) how similar prompts are to their own task from how similar they
        are to the nearest other one: the latter is what a request for an untrained task looks like.

        Args:
            own: condition embeddings of several prompts of each task, shape `(num_tasks, num_prompts, condition_dim)`.
        """
        if own.ndim != 3 or own.shape[0] != len(self.names) or own.shape[2] != self.config.condition_dim:
            raise CondPDiffError(f"expected ({len(self.names)}, prompts, {self.config.condition_dim}) conditions, got {tuple(own.shape)}")
        # Means over the prompts that have a part, so that prompts without examples do not dilute it.
        complete = own.square().sum(2) > own.square().sum(2).amax(1, keepdim=True) - 1e-3
        weights = complete.to(own.dtype)[..., None]
        self.embeddings.copy_((own * weights).sum(1) / weights.sum(1))
        if len(self.names) < 2:
            return
        similarities = torch.stack([self.similarities(prompts) for prompts in own])
        mask = torch.eye(len(self.names), dtype=torch.bool)[:, None].expand_as(similarities)
        to_own = similarities[mask]
        to_other = similarities.masked_fill(mask, -torch.inf).amax(2).flatten()
        candidates = torch.cat([to_own, to_other]).sort().values
        middles = (candidates[1:] + candidates[:-1]) / 2
        accuracy = torch.stack([(to_own >= middle).float().mean() + (to_other < middle).float().mean() for middle in middles])
        self.threshold.fill_(float(middles[accuracy.argmax()]))
