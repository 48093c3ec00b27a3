"""SentenceBackbone: a frozen transformers encoder with the pooling that sentence-transformers keeps beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModel, BatchEncoding, PreTrainedTokenizerBase

from cond_pdiff.conditions.texts import Text
from cond_pdiff.errors import HubError
from cond_pdiff.hub import Backbone
from cond_pdiff.models.pooling import Pooling
from cond_pdiff.models.text_backbone import TextBackbone, load_text_model

ROWS_UNDER = 64
"""The most rows of a batch of `embed_under`: on a CPU more take no less time, and less alike in length are the texts."""


class SentenceBackbone(TextBackbone):
    """A frozen encoder that turns texts (or pairs of texts) into unit-length embeddings.

    Args:
        model: a transformers encoder that returns `last_hidden_state`.
        tokenizer: its fast tokenizer, which is set to pad on the right: texts then embed alike whatever stands beside them, also where a
            model counts positions from the left or pools the last token.
        pooling: of its last hidden states; default: the mean.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, pooling: Pooling | None = None) -> None:
        super().__init__(model, tokenizer)
        self.tokenizer.padding_side = "right"
        self.pooling = pooling or Pooling()

    @classmethod
    def load(cls, backbone: Backbone) -> SentenceBackbone:
        """Load a frozen backbone in evaluation mode, float32, on the CPU, with its own pooling (see `Pooling.load`).

        Raises:
            HubError: not to be had, no encoder, or one whose embeddings would be others than sentence-transformers'.
        """
        model, tokenizer, folder, _ = load_text_model(backbone, AutoModel)
        if getattr(model.config, "is_encoder_decoder", False):
            raise HubError(f"{backbone.repo_id} has an encoder and a decoder ({type(model).__name__}); expected one of the two")
        return cls(model, tokenizer, Pooling.load(folder))

    @property
    def embedding_dim(self) -> int:
        """The length of an embedding."""
        return self.pooling.embedding_dim(int(self.model.config.hidden_size))  # type: ignore[union-attr, arg-type]

    def forward(self, texts: Sequence[Text], max_length: int) -> torch.Tensor:
        """Embed one batch, with gradients if any are wanted. Longer texts are cut at `max_length` tokens.

        Returns:
            shape `(len(texts), embedding_dim)`, each row of length 1.
        """
        return self.embed_batch(self.tokenize(texts, max_length))

    def embed_batch(self, batch: BatchEncoding) -> torch.Tensor:
        """Embed what `tokenize` made, with gradients if any are wanted, shape `(number of texts, embedding_dim)`."""
        embeddings: torch.Tensor = self.pooling(self.run(batch).last_hidden_state, batch["attention_mask"])
        return embeddings

    def forward_groups(self, groups: Sequence[Sequence[Text]], max_length: int) -> list[torch.Tensor]:
        """Run `forward` on several groups in one batch, in which every group has as many rows, as adapters `attached_to_groups` need it.

        Returns:
            for each group, shape `(its number of texts, embedding_dim)`.
        """
        size = max(map(len, groups))
        padded = [text for group in groups for text in [*group, *[group[0]] * (size - len(group))]]
        rows = self.forward(padded, max_length).unflatten(0, (len(groups), size))
        return [row[: len(group)] for row, group in zip(rows, groups, strict=True)]

    @torch.no_grad()
    def embed_under(self, groups: int, texts: Sequence[Text], max_length: int) -> torch.Tensor:
        """Embed the same texts under each of several adapters that are `attached_to_groups`, without gradients.

        Returns:
            shape `(groups, len(texts), embedding_dim)`.
        """
        tokens = self.token_counts(texts)
        order = sorted(range(len(texts)), key=lambda place: min(tokens[place], max_length))
        rows = max(1, ROWS_UNDER // groups)
        pieces = []
        for start in range(0, len(order), rows):
            batch = self.tokenize([texts[place] for place in order[start : start + rows]], max_length)
            repeated = BatchEncoding({name: values.repeat(groups, 1) for name, values in batch.items()})
            pieces.append(self.embed_batch(repeated).unflatten(0, (groups, -1)))
        embeddings = torch.cat(pieces, 1)
        return embeddings[:, torch.tensor(order).argsort().to(embeddings.device)]

    def embed(self, texts: Sequence[Text], max_length: int = 256, batch_size: int = 32) -> torch.Tensor:
        """Embed any number of texts, without gradients; batches are formed by length, the order is kept.

        Returns:
            shape `(len(texts), embedding_dim)`, each row of length 1.
        """
        return self.rows(texts, max_length, batch_size) if texts else torch.zeros(0, self.embedding_dim)

    def embed_apart(self, texts: Sequence[Text], max_length: int = 256) -> torch.Tensor:
        """Embed texts as `embed` does; the last bits of an embedding do not depend on the other texts (see `rows_apart`)."""
        return self.rows_apart(texts, max_length) if texts else torch.zeros(0, self.embedding_dim)
