"""Upper blocks: texts that are embedded again and again while nothing changes but the adapters of a model's upper blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BatchEncoding

from cond_pdiff.conditions.texts import Text
from cond_pdiff.models.sentence_backbone import SentenceBackbone

ROWS = 16
"""The number of texts of a batch: few, so that they are of nearly one length and little is padded."""


def blocks_of(model: nn.Module, modules: Collection[str]) -> list[nn.Module]:
    """Return the blocks that a model runs one after the other, if all adapted modules are in blocks; else none.

    Args:
        modules: names of the adapted modules.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and all(one.startswith(f"{name}.") for one in modules):
            return list(module)
    return []


class FixedTexts:
    """Texts in batches that are put together once, with what the lower blocks make of them.

    What is attached to the model when this is made goes into the lower blocks' states for good; `embed` runs the blocks above them with
    what is attached then. Without lower blocks, it runs the whole model.

    Args:
        backbone: the base model.
        texts: any number.
        max_length: texts are cut at this many tokens.
        lower: the first of the model's blocks (see `blocks_of`).

    Attributes:
        parts: for each batch the places of its texts.
        embeddings: of all texts under what was attached, shape `(len(texts), embedding_dim)`.
    """

    def __init__(self, backbone: SentenceBackbone, texts: Sequence[Text], max_length: int, lower: Sequence[nn.Module] = ()) -> None:
        self.backbone, self._lower = backbone, lower
        tokens = backbone.token_counts(texts)
        order = sorted(range(len(texts)), key=lambda place: min(tokens[place], max_length))
        self.parts = [order[start : start + ROWS] for start in range(0, len(order), ROWS)]
        self._batches = [backbone.tokenize([texts[place] for place in part], max_length) for part in self.parts]
        self._states: list[Any] = []
        with torch.no_grad():
            rows = [self._first_run(batch) for batch in self._batches]
        empty = torch.zeros(0, backbone.embedding_dim, device=next(backbone.model.parameters()).device)
        self.embeddings = torch.cat([empty, *rows])[self._back(range(len(self.parts)))]

    def embed(self, parts: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed some batches (default: all) with gradients, if any are wanted.

        Returns:
            unit-length embeddings, shape `(number of texts, embedding_dim)`, and the place of each text, shape `(number of texts,)`.
        """
        chosen = range(len(self.parts)) if parts is None else parts
        rows = torch.cat([self._upper_run(part) for part in chosen])
        return rows, torch.tensor([place for part in chosen for place in self.parts[part]], device=rows.device)

    def _back(self, parts: Sequence[int]) -> torch.Tensor:
        return torch.tensor([place for part in parts for place in self.parts[part]], dtype=torch.long).argsort()

    def _first_run(self, batch: BatchEncoding) -> torch.Tensor:
        """Run the whole model, and keep what the last of the lower blocks gives."""
        if not self._lower:
            return self.backbone.embed_batch(batch)
        handle = self._lower[-1].register_forward_hook(lambda module, args, output: self._states.append(output))
        try:
            return self.backbone.embed_batch(batch)
        finally:
            handle.remove()

    def _upper_run(self, part: int) -> torch.Tensor:
        with skipped(self._lower, self._states[part] if self._lower else None):
            return self.backbone.embed_batch(self._batches[part])


@contextlib.contextmanager
def skipped(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Let blocks give an output that is there already, instead of running; one thread has the model to itself inside."""
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        vars(block)["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = forward
