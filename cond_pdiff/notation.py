"""The notation of texts, pairs of texts and labelled examples on one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cond_pdiff.errors import ConditionError

if TYPE_CHECKING:
    from cond_pdiff.conditions.texts import Text

PAIR_SEPARATOR = "|||"


def parse_text(text: str) -> Text:
    """Read a text, or a pair written 'A ||| B'; its parts are stripped where they are checked.

    Raises:
        ConditionError: more than two parts.
    """
    parts = text.split(PAIR_SEPARATOR)
    if len(parts) > 2:
        raise ConditionError(f"a pair has two parts, got {len(parts)} in {text!r:.80}")
    return (parts[0], parts[1]) if len(parts) == 2 else text


def parse_example(example: str) -> tuple[Text, str]:
    """Read a labelled example written 'TEXT=LABEL'; the last = counts.

    Raises:
        ConditionError: there is no =, or see `parse_text`.
    """
    text, separator, label = example.rpartition("=")
    if not separator:
        raise ConditionError(f"an example is written TEXT=LABEL, got {example!r:.80}")
    return parse_text(text), label


def parse_description(written: str) -> tuple[str, str]:
    """Read a label's description written 'NAME=TEXT'; the first = counts.

    Raises:
        ConditionError: there is no =.
    """
    name, separator, text = written.partition("=")
    if not separator:
        raise ConditionError(f"a label's description is written NAME=TEXT, got {written!r:.80}")
    return name.strip(), text
