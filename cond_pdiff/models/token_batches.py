"""Rows of tokens: what they have in common, and batches of like length, which need little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Tokens = list[int]


def common_start(rows: Sequence[Tokens]) -> int:
    """Count the tokens that all rows begin with."""
    first, last = min(rows), max(rows)
    return next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), min(len(first), len(last)))


def batches_of_like_length(rows: Sequence[Tokens], size: int, groups: int = 1) -> Iterator[list[int]]:
    """Yield the places of about `size` rows of like length each, equally many of each group of neighbouring ones, until all are done."""
    count = len(rows) // groups
    for own in _by_length(rows[:count], max(1, size // groups)):
        yield [group * count + place for group in range(groups) for place in own]


def _by_length(rows: Sequence[Tokens], size: int) -> Iterator[list[int]]:
    """Yield the places of at most `size` rows of like length each, until all are done."""
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
