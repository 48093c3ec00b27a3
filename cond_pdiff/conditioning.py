"""What a person gives: task prompts, checked. Encoders turn them into condition embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cond_pdiff.errors import ConditionError

Text = str | tuple[str, str]
"""A text, or a pair of texts (premise and hypothesis, question and answer …)."""

MAX_TEXT_CHARS = 200_000
"""Beyond this a single text is surely a mistake (a whole file); encoders have far smaller limits and report them."""


def check_text(text: object, what: str) -> Text:
    """`text` as a `str` or a pair of `str`, stripped; `ConditionError` naming `what` otherwise."""
    if isinstance(text, str):
        return _check_string(text, what)
    if isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(part, str) for part in text):
        return _check_string(text[0], f"{what}, part 1"), _check_string(text[1], f"{what}, part 2")
    raise ConditionError(f"{what} must be a string or a pair of strings, got {type(text).__name__}")


def _check_string(text: object, what: str) -> str:
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


@dataclass(frozen=True)
class TaskPrompt:
    """A classification task in words: a description, label names, and a few labelled examples.

    The paper's condition for language tasks is "a task description and two-shot examples" (section 3.3).

    Args:
        description: what to decide, in a sentence or two.
        examples: `(text, label)` pairs; a text is a string or a pair of strings. May be empty.
        labels: the label names. Default: the labels of the examples, in order of first appearance.

    Raises:
        ConditionError: an empty or over-long text, an example whose label is not among the labels, one label only.
    """

    description: str
    examples: Sequence[tuple[Text, str]] = ()
    labels: Sequence[str] = ()

    def __post_init__(self) -> None:
        description = _check_string(self.description, "the task description")
        if not isinstance(self.examples, Iterable):
            raise ConditionError(f"examples must be a list of (text, label) pairs, got {type(self.examples).__name__}")
        examples = tuple(_check_example(example, index) for index, example in enumerate(self.examples, 1))
        labels = check_labels(self.labels) if self.labels else tuple(dict.fromkeys(label for _, label in examples))
        for index, (_, label) in enumerate(examples, 1):
            if label not in labels:
                raise ConditionError(f"example {index} has the label {label!r}, which is not among the labels {list(labels)}")
        if len({isinstance(text, str) for text, _ in examples}) > 1:
            raise ConditionError("some examples are single texts and some are pairs; a task has one kind")
        if examples and len(labels) < 2:
            raise ConditionError(f"all examples have the label {labels[0]!r}; give an example of another label, or name all labels")
        object.__setattr__(self, "description", description)
        object.__setattr__(self, "examples", examples)
        object.__setattr__(self, "labels", labels)

    @classmethod
    def of(cls, condition: str | TaskPrompt) -> TaskPrompt:
        """A prompt from a plain string or a prompt."""
        if isinstance(condition, cls):
            return condition
        if isinstance(condition, str):
            return cls(condition)
        raise ConditionError(f"a condition is a string or a TaskPrompt, got {type(condition).__name__}")


def check_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Label names, stripped, at least two and all different; `ConditionError` otherwise."""
    if isinstance(labels, str):
        raise ConditionError(f"labels must be a list of names, got the single string {labels!r}")
    if not isinstance(labels, Iterable):
        raise ConditionError(f"labels must be a list of names, got {type(labels).__name__}")
    checked = [_check_string(label, f"label {index}") for index, label in enumerate(labels, 1)]
    if len(checked) < 2:
        raise ConditionError(f"a classification task needs at least two labels, got {checked}")
    repeated = sorted({name for name in checked if checked.count(name) > 1})
    if repeated:
        raise ConditionError(f"the label {repeated[0]!r} is given twice")
    return tuple(checked)


def label_text(label: str) -> str:
    """A label name as words: `not_paraphrase` → `not paraphrase`."""
    return label.replace("_", " ").replace("-", " ").strip()


def _check_example(example: object, index: int) -> tuple[Text, str]:
    if not isinstance(example, (tuple, list)) or len(example) != 2:
        raise ConditionError(f"example {index} must be a (text, label) pair, got {example!r:.80}")
    return check_text(example[0], f"the text of example {index}"), _check_string(example[1], f"the label of example {index}")
