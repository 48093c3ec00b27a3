"""ConditionIndex: the conditions that a generator was trained on, to say how near a request is to any of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from PIL import Image

from cond_pdiff.component import ExactComponent, register_component
from cond_pdiff.errors import CondPDiffError
from cond_pdiff.gain import GainModel


@dataclass(frozen=True)
class Neighbour:
    """A trained task and its similarity to a request (1: the same; about 0: unrelated)."""

    task: str
    similarity: float


@register_component
class ConditionIndex(ExactComponent):
    """The condition embeddings of the trained tasks, and the similarity below which a request is out of distribution.

    Args:
        tasks: name → facts (`description`, `labels`, …) of every trained task.
        condition_dim: size of a condition embedding.
        names: the tasks in the order of the embeddings; default: the order of `tasks`. (A saved config sorts its keys.)
        num_parts: unit vectors that an embedding consists of, side by side.
        last_is_evidence: the last part can only add to a similarity. Two short examples look like no task's rows; they are
            no reason to doubt what description and label names say.
        gain_model: `GainModel.to_json()`, fitted to the generator by `cond-pdiff calibrate`; None: it was not fitted.
        preview_sizes: bytes of the small WebP picture that stands for each task, in the order of the embeddings; none: there are none.
    """

    embeddings: torch.Tensor
    threshold: torch.Tensor
    previews: torch.Tensor

    @register_to_config
    def __init__(
        self,
        tasks: Mapping[str, Mapping[str, Any]],
        condition_dim: int,
        names: Sequence[str] | None = None,
        num_parts: int = 1,
        last_is_evidence: bool = False,
        preview_sizes: Sequence[int] = (),
        gain_model: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.gain_model = None if gain_model is None else GainModel.from_json(gain_model)
        self.register_to_config(names=list(names or tasks))
        self.register_buffer("embeddings", torch.zeros(len(tasks), condition_dim))
        self.register_buffer("threshold", torch.zeros(1))
        if preview_sizes:
            self.register_buffer("previews", torch.zeros(sum(preview_sizes), dtype=torch.uint8))  # all files, one after the other

    @property
    def names(self) -> list[str]:
        """The names of the trained tasks, in the order of the embeddings."""
        return list(self.config.names)

    def similarities(self, conditions: torch.Tensor) -> torch.Tensor:
        """Return the similarity of each condition to each trained task, shape `(batch, num_tasks)`.

        It is the mean cosine over the parts that the condition has; with `last_is_evidence`, without the last part where that is more.
        """
        parts = conditions.unflatten(1, (self.config.num_parts, -1))
        cosines = torch.einsum("bpd,tpd->btp", parts, self.embeddings.to(parts).unflatten(1, (self.config.num_parts, -1)))
        present = (parts.norm(dim=2) > 0.5).to(parts)[:, None]
        similarities = (cosines * present).sum(2) / present.sum(2).clamp_min(1)
        if self.config.last_is_evidence:
            cosines, present = cosines[..., :-1], present[..., :-1]
            similarities = torch.maximum(similarities, (cosines * present).sum(2) / present.sum(2).clamp_min(1))
        return similarities

    def nearest(self, condition: torch.Tensor, count: int = 3) -> list[Neighbour]:
        """Return the `count` most similar trained tasks of one condition, shape `(condition_dim,)`, most similar first."""
        values, order = self.similarities(condition[None])[0].float().sort(descending=True, stable=True)
        return [
            Neighbour(self.names[index], round(value, 4))
            for index, value in zip(order[:count].tolist(), values[:count].tolist(), strict=True)
        ]

    def in_distribution(self, similarity: float) -> bool:
        """Return whether a request whose nearest task has this similarity is like what was trained."""
        return similarity > float(self.threshold)

    def preview(self, task: str) -> Image.Image | None:
        """Return a picture that stands for a trained task, if the generator has such."""
        sizes, place = list(self.config.preview_sizes), self.names.index(task)
        if not sizes:
            return None
        start = sum(sizes[:place])
        file = self.previews[start : start + sizes[place]].cpu().numpy().tobytes()
        return Image.open(io.BytesIO(file), formats=["WEBP"]).convert("RGB")

    def fit(self, own: torch.Tensor) -> None:
        """Measure the index on prompts of the trained tasks.

        The threshold is what nine of ten prompts do not reach with any task of another `group`: a request that reaches it is
        more like one of the trained tasks than tasks of different kinds are like each other. Where tasks lie so close together that
        this would call their own prompts foreign, as styles do, it is what nine of ten of these reach with any task.

        Args:
            own: condition embeddings of several prompts of each task, shape `(num_tasks, num_prompts, condition_dim)`.
        """
        if own.ndim != 3 or own.shape[0] != len(self.names) or own.shape[2] != self.config.condition_dim:
            raise CondPDiffError(f"expected ({len(self.names)}, prompts, {self.config.condition_dim}) conditions, got {tuple(own.shape)}")
        # Task by task: what is computed of all prompts and all tasks together does not fit into memory for thousands of them.
        for row, prompts in enumerate(own):
            # Means over the prompts that have a part, so that prompts without examples do not dilute it.
            lengths = prompts.square().sum(1)
            weights = (lengths > lengths.amax() - 1e-3).to(own.dtype)[:, None]
            self.embeddings[row] = (prompts * weights).sum(0) / weights.sum(0)
        if len(self.names) < 2:
            return
        groups = [self.config.tasks[name].get("group") or name for name in self.names]
        if len(set(groups)) == 1:
            groups = self.names
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        group_of = torch.tensor([numbers[group] for group in groups])
        to_other, to_any = torch.empty(2, *own.shape[:2])
        for row, prompts in enumerate(own):
            similarities = self.similarities(prompts).float()
            to_any[row] = similarities.amax(1)
            to_other[row] = similarities.masked_fill_(group_of == group_of[row], -torch.inf).amax(1)
        self.threshold.fill_(min(_quantile(to_other, 0.9), _quantile(to_any, 0.1)))


def _quantile(values: torch.Tensor, share: float) -> float:
    """Return a quantile of all values, with linear interpolation; `torch.quantile` takes 16 million at most."""
    return float(np.quantile(values.numpy(), share))
