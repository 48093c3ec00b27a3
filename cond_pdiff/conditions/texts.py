"""Texts as people give them, checked: single ones and pairs, label names, labelled examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cond_pdiff.errors import ConditionError

Text = str | tuple[str, str]
"""A single text, or a pair of texts (premise and hypothesis, question and answer …)."""

MAX_TEXT_CHARS = 200_000
"""The most characters of a single text: more are surely a mistake (a whole file); encoders have far smaller limits and report them."""


def check_text(text: object, what: str) -> Text:
    """Return `text` as a `str` or a pair of `str`, stripped; raise `ConditionError` naming `what` otherwise."""
    if isinstance(text, str):
        return check_string(text, what)
    if isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(part, str) for part in text):
        return check_string(text[0], f"{what}, part 1"), check_string(text[1], f"{what}, part 2")
    raise ConditionError(f"{what} must be a string or a pair of strings, got {type(text).__name__}")


def check_string(text: object, what: str) -> str:
    """Return `text`, stripped, if it is one string of an acceptable length; raise `ConditionError` naming `what` otherwise."""
    if not isinstance(text, str):
        raise ConditionError(f"{what} must be one string, got {type(text).__name__}")
    stripped = text.strip()
    try:
        stripped.encode()
    except UnicodeEncodeError as error:
        raise ConditionError(f"{what} holds characters that no text can have (lone surrogates): {error.reason}") from error
    if not stripped:
        raise ConditionError(f"{what} is empty; give at least one word")
    if len(stripped) > MAX_TEXT_CHARS:
        raise ConditionError(f"{what} has {len(stripped)} characters; at most {MAX_TEXT_CHARS} are accepted")
    return stripped


def check_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return label names, stripped, at least two and all different; raise `ConditionError` otherwise."""
    if isinstance(labels, str):
        raise ConditionError(f"labels must be a list of names, got the single string {labels!r}")
    if not isinstance(labels, Iterable):
        raise ConditionError(f"labels must be a list of names, got {type(labels).__name__}")
    checked = [check_string(label, f"label {index}") for index, label in enumerate(labels, 1)]
    if len(checked) < 2:
        raise ConditionError(f"a classification task needs at least two labels, got {checked}")
    repeated = sorted({name for name in checked if checked.count(name) > 1})
    if repeated:
        raise ConditionError(f"the label {repeated[0]!r} is given twice")
    return tuple(checked)


def check_described(
    labels: Iterable[str] | Mapping[str, Any], descriptions: Mapping[str, Any] | None = None
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Return label names, and of those that are described the descriptions; raise `ConditionError` for other things.

    Args:
        labels: names, or name → its description, a list of several, or nothing (None or "") for a name that says all.
        descriptions: the same beside names.
    """
    if isinstance(labels, Mapping):
        descriptions = {**(descriptions or {}), **labels}
    names, given = check_labels(labels), {check_string(name, "a label"): texts for name, texts in (descriptions or {}).items()}
    if unknown := [name for name in given if name not in names]:
        raise ConditionError(f"there is a description of {unknown[0]!r}, which is not among the labels {list(names)}")
    found: dict[str, tuple[str, ...]] = {}
    for name, texts in given.items():
        what = f"the description of the label {name!r}"
        if texts and not isinstance(texts, (str, list, tuple)):
            raise ConditionError(f"{what} must be a string or a list of strings, got {type(texts).__name__}")
        if texts:
            found[name] = tuple(check_string(one, what) for one in ([texts] if isinstance(texts, str) else texts))
    return names, found


def with_descriptions(labels: Iterable[str], descriptions: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Return each label name with its descriptions, of which it may have none."""
    return {label: descriptions.get(label, ()) for label in labels}


def label_text(label: str) -> str:
    """Write a label name as words: `not_paraphrase` → `not paraphrase`."""
    return label.replace("_", " ").replace("-", " ").strip()


def check_examples(examples: Iterable[tuple[Text, str]], labels: Sequence[str] | None = None) -> tuple[tuple[Text, str], ...]:
    """Return labelled examples, stripped, all single texts or all pairs, of the given labels; raise `ConditionError` otherwise."""
    if not isinstance(examples, Iterable):
        raise ConditionError(f"examples must be a list of (text, label) pairs, got {type(examples).__name__}")
    checked = tuple(_check_example(example, index) for index, example in enumerate(examples, 1))
    for index, (_, label) in enumerate(checked, 1):
        if labels is not None and label not in labels:
            raise ConditionError(f"example {index} has the label {label!r}, which is not among the labels {list(labels)}")
    if len({isinstance(text, str) for text, _ in checked}) > 1:
        raise ConditionError("some examples are single texts and some are pairs; a task has one kind")
    return checked


def _check_example(example: object, index: int) -> tuple[Text, str]:
    if not isinstance(example, (tuple, list)) or len(example) != 2:
        raise ConditionError(f"example {index} must be a (text, label) pair, got {example!r:.80}")
    return check_text(example[0], f"the text of example {index}"), check_string(example[1], f"the label of example {index}")


def check_refinable_examples(examples: Sequence[tuple[Text, str]]) -> None:
    """Refuse labelled examples on which no steps can be taken."""
    if max(Counter(label for _, label in examples).values(), default=0) < 2:
        raise ConditionError("refining needs two examples of at least one class: each is told apart by the others of its class")
