"""The tokenizer of captions: a T5 tokenizer whose pieces are whole words."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import T5Tokenizer

WORD_START = "▁"
SPECIAL = ("<pad>", "</s>", "<unk>")
PUNCTUATION = (",", ".", "!", "?")
MAX_TOKENS = 120
"""The number of tokens that PixArt's pipeline reads of a prompt."""


def build_tokenizer(words: Sequence[str]) -> T5Tokenizer:
    """Build a tokenizer that knows `words` and four punctuation marks; each other word is `<unk>`."""
    pieces = [*SPECIAL, *PUNCTUATION, *(WORD_START + word for word in (*PUNCTUATION, *words))]
    vocabulary = [(piece, 0.0 if piece in SPECIAL else -1.0) for piece in pieces]
    return T5Tokenizer(vocabulary, extra_ids=0, model_max_length=MAX_TOKENS)
