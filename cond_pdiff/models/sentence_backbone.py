"""SentenceBackbone: a frozen transformers encoder with mean pooling, as sentence-transformers uses it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModel

from cond_pdiff.conditions.texts import Text
from cond_pdiff.hub import Backbone
from cond_pdiff.models.text_backbone import TextBackbone, load_text_model


class SentenceBackbone(TextBackbone):
    """A frozen encoder that turns texts (or pairs of texts) into unit-length embeddings.

    Args:
        model: a transformers encoder that returns `last_hidden_state`.
        tokenizer: its fast tokenizer.
    """

    @classmethod
    def load(cls, backbone: Backbone) -> SentenceBackbone:
        """Load a frozen backbone in evaluation mode, float32, on the CPU; raise `HubError` if that fails."""
        model, tokenizer, _ = load_text_model(backbone, AutoModel)
        return cls(model, tokenizer)

    @property
    def embedding_dim(self) -> int:
        """The length of an embedding."""
        return int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def forward(self, texts: Sequence[Text], max_length: int) -> torch.Tensor:
        """Embed one batch, with gradients if any are wanted. Longer texts are cut at `max_length` tokens.

        Returns:
            shape `(len(texts), embedding_dim)`, each row of length 1.
        """
        batch = self.tokenize(texts, max_length)
        hidden = self.run(batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return nn.functional.normalize(pooled, dim=-1)

    def forward_groups(self, groups: Sequence[Sequence[Text]], max_length: int) -> list[torch.Tensor]:
        """Run `forward` on several groups in one batch, in which every group has as many rows, as adapters `attached_to_groups` need it.

        Returns:
            for each group, shape `(its number of texts, embedding_dim)`.
        """
        size = max(map(len, groups))
        padded = [text for group in groups for text in [*group, *[group[0]] * (size - len(group))]]
        rows = self.forward(padded, max_length).unflatten(0, (len(groups), size))
        return [row[: len(group)] for row, group in zip(rows, groups, strict=True)]

    def embed(self, texts: Sequence[Text], max_length: int = 256, batch_size: int = 32) -> torch.Tensor:
        """Embed any number of texts, without gradients; batches are formed by length, the order is kept.

        Returns:
            shape `(len(texts), embedding_dim)`, each row of length 1.
        """
        return self.rows(texts, max_length, batch_size) if texts else torch.zeros(0, self.embedding_dim)
