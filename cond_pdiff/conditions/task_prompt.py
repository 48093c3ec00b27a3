"""TaskPrompt: a task in words, of classification or of writing answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from cond_pdiff.conditions.condition import FREE_ANSWERS, Condition, Files, Labels, register_condition
from cond_pdiff.conditions.texts import Text, check_described, check_examples, check_refinable_examples, check_string
from cond_pdiff.errors import ConditionError


@register_condition
@dataclass(frozen=True)
class TaskPrompt(Condition):
    """A task in words: a description, and for classification label names and a few labelled examples, else a few texts with answers.

    The paper's condition for language tasks is "a task description and two-shot examples" (section 3.3).

    Args:
        description: what to decide, in a sentence or two.
        examples: `(text, label)` pairs; a text is a string or a pair of strings. May be empty: zero-shot (names only), else k-shot (with
            examples).
        labels: a sequence of label names, or name → its description (or a list of several), for names that say little: a class's prototype
            then holds them, too. Default: the labels of the examples, in order of first appearance.
        free: is each example's answer a text of its own (an antonym, a translation), and no label? Then there are no labels.
        descriptions: the same beside a sequence of names; where both are given, those of `labels` count.

    Raises:
        ConditionError: an empty or over-long text, an example whose label is not among the labels, one label only; labels of free answers.
    """

    name: ClassVar[str] = "task-prompt"
    noun: ClassVar[str] = "task"
    adapters: ClassVar[str] = "text"
    names_classes: ClassVar[bool] = True
    keyword: ClassVar[str] = "prompt"
    own_key: ClassVar[str | None] = "description"
    column: ClassVar[str] = "text"

    description: str
    examples: Sequence[tuple[Text, str]] = ()
    labels: Any = ()
    free: bool = False
    descriptions: Mapping[str, Sequence[str]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        description = check_string(self.description, "the task description")
        if self.free and (self.labels or self.descriptions):
            raise ConditionError(f"free answers have no labels, got {list(self.labels)!r:.120}; leave one of the two out")
        labels, descriptions = check_described(self.labels, self.descriptions) if self.labels else (None, self.descriptions)
        examples = check_examples(self.examples, labels)
        if self.free:
            labels = ()
        elif labels is None:
            labels = tuple(dict.fromkeys(label for _, label in examples))
            if descriptions:
                labels, descriptions = check_described(labels, descriptions)
        if examples and len(labels) < 2 and not self.free:
            raise ConditionError(f"all examples have the label {labels[0]!r}; give an example of another label, or name all labels")
        object.__setattr__(self, "description", description)
        object.__setattr__(self, "examples", examples)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "descriptions", descriptions)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready facts, kept with the adapters that are made from this prompt."""
        facts = {"description": self.description, "examples": [list(example) for example in self.examples], "labels": list(self.labels)}
        later = {"free": self.free, "descriptions": {name: list(texts) for name, texts in self.descriptions.items()}}
        return {**facts, **{name: fact for name, fact in later.items() if fact}}  # words that came later

    @classmethod
    def from_json(cls, data: Mapping[str, Any], file: Files | None = None) -> TaskPrompt:
        """Read what `to_json` wrote, which is all of it."""
        try:
            examples = [(tuple(text) if isinstance(text, list) else text, label) for text, label in data["examples"]]
            return cls(data["description"], examples, data["labels"], data.get("free", False), data.get("descriptions", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise ConditionError(f"not a recorded task prompt: {type(error).__name__}: {error}") from error

    @classmethod
    def from_request(cls, record: Mapping[str, Any], folder: Path) -> TaskPrompt:
        """Read the entries `description`, and where there are some `examples` (pairs of text and label) and `labels` (or label → text)."""
        if "description" not in record or not set(record) <= {"description", "examples", "labels"}:
            raise ConditionError(f"a request for this generator has a description, and may have examples and labels; got {sorted(record)}")
        return cls.from_json({"examples": [], "labels": [], **record})

    @classmethod
    def of(cls, given: Any) -> TaskPrompt:
        """Make a prompt from a plain string or a prompt."""
        if isinstance(given, cls):
            return given
        if isinstance(given, str):
            return cls(given)
        if isinstance(given, (list, tuple)):
            raise ConditionError("one condition a call, please; num_adapters gives several adapters for it")
        raise ConditionError(f"this generator reads a task description (a string or a TaskPrompt), got a {type(given).__name__}")

    @classmethod
    def describe(cls, record: Mapping[str, Any]) -> str:
        """Quote description and examples, indented, as code, so that nothing in them is read as Markdown."""
        lines = [str(record.get("description"))]
        for example in record["examples"] if isinstance(record.get("examples"), list) else []:
            if isinstance(example, list) and len(example) == 2:
                text = " ||| ".join(map(str, example[0])) if isinstance(example[0], list) else str(example[0])
                lines.append(f"{text} = {example[1]}")
        quoted = "\n".join("    " + " ".join(line.split()) for line in lines)
        return f"Generated by a diffusion model over network weights from this description and these examples:\n\n{quoted}"

    refined_in_time = True

    def refined_on(self) -> str:
        """Return the number of labelled examples; there must be two of at least one class."""
        if not self.labels or not self.examples:
            raise ConditionError("training steps are taken on labelled examples; give some with --example or --examples (examples=…)")
        check_refinable_examples(self.examples)
        return f"{len(self.examples)} examples"

    def classes(self, trained: Sequence[str], in_trained_order: bool) -> Labels:
        """Return the prompt's own label names; where it has none, those of the nearest trained task, unless its answers are free."""
        if self.free:
            return (), FREE_ANSWERS
        if not self.labels:
            return tuple(trained), "nearest trained task" if trained else "nowhere"
        return tuple(trained if in_trained_order and sorted(trained) == sorted(self.labels) else self.labels), "prompt"
