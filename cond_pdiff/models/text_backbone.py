"""TextBackbone: a frozen transformers model that reads texts, with its tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from cond_pdiff.conditions.texts import Text
from cond_pdiff.errors import HubError
from cond_pdiff.hub import Backbone
from cond_pdiff.locks import lock_of
from cond_pdiff.models.frozen import BROKEN_MODEL, load_frozen

TOGETHER = 8
"""The number of texts in a forward pass of `rows_apart`."""


def load_text_model(backbone: Backbone, auto_model: Any, **options: Any) -> tuple[nn.Module, PreTrainedTokenizerBase, Path, set[str]]:
    """Load a model as `load_frozen` does, with its tokenizer beside it.

    A tokenizer without a padding token (GPT-2's, LLaMA's) pads with its end-of-text token, which no attention mask lets through.

    Raises:
        HubError: not to be had, or the tokenizer has neither token.
    """
    model, folder, missing = load_frozen(backbone, auto_model, **options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except BROKEN_MODEL as error:
        raise HubError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise HubError(f"the tokenizer in {folder} has neither a padding token nor an end-of-text token; set its pad_token and save it")
    return model, tokenizer, folder, missing


class TextBackbone(ABC):
    """A frozen model that turns texts (or pairs of texts) into one row of numbers each.

    Args:
        model: a transformers model.
        tokenizer: its fast tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @property
    def max_tokens(self) -> int:
        """The longest input that both model and tokenizer are made for: RoBERTa has two more positions than it can use."""
        return min(int(self.model.config.max_position_embeddings), self.tokenizer.model_max_length)  # type: ignore[union-attr, arg-type]

    def count_tokens(self, text: Text) -> int:
        """Count the tokens of one text or pair, special tokens included, before any cut."""
        return self.token_counts([text])[0]

    def token_counts(self, texts: Sequence[Text]) -> list[int]:
        """Count the tokens of each text or pair, as `count_tokens` does."""
        if not texts:
            return []
        with lock_of(self.tokenizer):  # a call sets how it cuts and pads
            return [len(tokens) for tokens in self.tokenizer(list(texts), verbose=False)["input_ids"]]

    def tokenize(self, texts: Sequence[Text], max_length: int) -> BatchEncoding:
        """Make a padded batch of texts on the model's device. Longer texts are cut at `max_length` tokens."""
        # A pair is cut at its longer half first ("longest_first"), so the shorter text of a pair is never lost.
        cut = min(max_length, self.max_tokens)
        with lock_of(self.tokenizer):
            batch = self.tokenizer(list(texts), padding=True, truncation="longest_first", max_length=cut, return_tensors="pt")
        return batch.to(next(self.model.parameters()).device)

    def run(self, batch: BatchEncoding) -> Any:
        """Run the model on a batch, with the adapters that this thread has attached, and no other thread's."""
        with lock_of(self.model):
            return self.model(**batch)

    def to(self, device: torch.device) -> None:
        """Move the model, once no other thread is using it."""
        with lock_of(self.model):
            self.model.to(device)

    @abstractmethod
    def forward(self, texts: Sequence[Text], max_length: int) -> torch.Tensor:
        """Turn one batch into rows, with gradients if any are wanted, shape `(len(texts), size of a row)`."""

    @torch.no_grad()
    def rows(self, texts: Sequence[Text], max_length: int, batch_size: int) -> torch.Tensor:
        """Turn at least one text into rows, without gradients; batches are formed by length, the order is kept."""
        order = sorted(range(len(texts)), key=lambda index: -text_length(texts[index]))
        pieces = [
            self.forward([texts[index] for index in order[start : start + batch_size]], max_length)
            for start in range(0, len(order), batch_size)
        ]
        rows = torch.cat(pieces)
        return rows[torch.tensor(order).argsort().to(rows.device)]

    @torch.no_grad()
    def rows_apart(self, texts: Sequence[Text], max_length: int) -> torch.Tensor:
        """Turn texts into rows as `rows` does but for rounding, which here does not depend on what other texts there are.

        Matrix products of other shapes round differently, so each is of `TOGETHER` texts of equally many tokens, the first repeated where
        there are too few.
        """
        places: dict[int, list[int]] = {}
        for place, tokens in enumerate(self.token_counts(texts)):
            places.setdefault(min(tokens, max_length, self.max_tokens), []).append(place)
        parts = [alike[start : start + TOGETHER] for alike in places.values() for start in range(0, len(alike), TOGETHER)]
        pieces = []
        for part in parts:
            filled = [*part, *[part[0]] * (TOGETHER - len(part))]
            pieces.append(self.forward([texts[place] for place in filled], max_length)[: len(part)])
        rows = torch.cat(pieces)
        return rows[torch.tensor([place for part in parts for place in part]).argsort().to(rows.device)]


def text_length(text: Text) -> int:
    """Count the characters of a text or a pair, for sorting by length."""
    return len(text) if isinstance(text, str) else sum(map(len, text))
