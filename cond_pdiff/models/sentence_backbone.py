"""SentenceBackbone: a frozen transformers encoder with mean pooling, as sentence-transformers uses it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from cond_pdiff.conditioning import Text
from cond_pdiff.errors import HubError
from cond_pdiff.hub import Backbone, find_backbone


class SentenceBackbone:
    """Texts (or pairs of texts) → unit-length embeddings.

    Args:
        model: a transformers encoder that returns `last_hidden_state`.
        tokenizer: its fast tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, backbone: Backbone) -> SentenceBackbone:
        """Load a frozen backbone in evaluation mode, float32, on the CPU; `HubError` if that fails."""
        folder = find_backbone(backbone)
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            model = AutoModel.from_pretrained(folder, use_safetensors=True, local_files_only=True, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise HubError(f"{folder} cannot be loaded as {backbone.repo_id}: {error}") from error
        finally:
            if bars:
                transformers_logging.enable_progress_bar()
        return cls(model.requires_grad_(False).eval(), tokenizer)

    @property
    def embedding_dim(self) -> int:
        """The length of an embedding."""
        return int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def max_tokens(self) -> int:
        """The longest input that the model has positions for."""
        return int(self.model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]

    def count_tokens(self, text: Text) -> int:
        """The number of tokens of one text or pair, special tokens included, before any cut."""
        return len(self.tokenizer([text], verbose=False)["input_ids"][0])

    def forward(self, texts: Sequence[Text], max_length: int) -> torch.Tensor:
        """Embed one batch, with gradients if any are wanted. Longer texts are cut at `max_length` tokens.

        Returns:
            shape `(len(texts), embedding_dim)`, each row of length 1.
        """
        max_length = min(max_length, self.max_tokens)
        # A pair is cut at its longer half first ("longest_first"), so the shorter text of a pair is never lost.
        batch = self.tokenizer(list(texts), padding=True, truncation="longest_first", max_length=max_length, return_tensors="pt")
        batch = batch.to(next(self.model.parameters()).device)
        hidden = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return nn.functional.normalize(pooled, dim=-1)

    @torch.no_grad()
    def embed(self, texts: Sequence[Text], max_length: int = 256, batch_size: int = 32) -> torch.Tensor:
        """Embed any number of texts, without gradients; batches are formed by length, the order is kept.

        Returns:
            shape `(len(texts), embedding_dim)`, each row of length 1.
        """
        if not texts:
            return torch.zeros(0, self.embedding_dim)
        order = sorted(range(len(texts)), key=lambda index: -text_length(texts[index]))
        pieces = [
            self.forward([texts[index] for index in order[start : start + batch_size]], max_length)
            for start in range(0, len(order), batch_size)
        ]
        embeddings = torch.cat(pieces)
        return embeddings[torch.tensor(order).argsort().to(embeddings.device)]


def text_length(text: Text) -> int:
    """Characters of a text or a pair, for sorting by length."""
    return len(text) if isinstance(text, str) else sum(map(len, text))
