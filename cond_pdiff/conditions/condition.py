"""Condition: what every kind of condition can do, and the register of kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from cond_pdiff.conditions.texts import Text
from cond_pdiff.errors import ConditionError, CondPDiffError

Labels = tuple[tuple[str, ...], str]
"""The label names of an adapter, and where they are from."""

Files = str | Path | Sequence[str | Path]
"""A file, or several."""

FREE_ANSWERS = "free answers"
"""Where no label names are from if answers are texts of their own."""


class Condition(ABC):
    """What a person gives for an adapter (the paper's "conditions", section 3.3), checked when it is made.

    A kind of condition is a subclass that `register_condition` knows; condition encoders say which kind they read.
    """

    name: ClassVar[str]
    """The kind's name in recipes, zoos and records, such as "task-prompt"."""
    noun: ClassVar[str]
    """The word for one trained condition of the kind in reports, in the singular."""
    adapters: ClassVar[str]
    """The word in front of "adapters" for what is made from it, and in the name of the demo's variable (`publish.push_space`)."""
    names_classes: ClassVar[bool] = False
    """Whether it can name classes, and hold labelled examples of them."""
    own_key: ClassVar[str | None] = None
    """An entry that no other kind's records have; for the kinds that came first, whose records do not say their `type`."""
    keyword: ClassVar[str] = ""
    """The argument of the pipeline that it may be given by beside `condition`: "prompt" or "image", diffusers' words; empty: none."""
    file_option: ClassVar[str] = ""
    """The option that `cond-pdiff verify` needs beside the adapter, where the record does not hold the whole condition."""

    column: ClassVar[str] = ""
    """The column for it in a table of adapters and their conditions; empty: a table cannot hold it."""
    column_names_files: ClassVar[bool] = False
    """Whether that column holds names of files."""

    examples: Sequence[tuple[Text, str]] = ()
    labels: Sequence[str] = ()
    descriptions: Mapping[str, Sequence[str]] = MappingProxyType({})
    """Of those labels that are described in further words, label → texts."""

    @property
    def form(self) -> str:
        """What all conditions of one generator have in common, in words."""
        return self.name

    @classmethod
    @abstractmethod
    def of(cls, given: Any) -> Condition:
        """Make a condition from what people pass in its place, or from itself; `ConditionError` says what is read.

        A list is one condition, or refused.
        """

    @classmethod
    def from_request(cls, record: Mapping[str, Any], folder: Path) -> Condition:
        """Read the condition of a request in a file, whose entry for it is `column`.

        Args:
            record: the request's entries, but for those that all kinds have.
            folder: of the file; files that requests name are below it.

        Raises:
            ConditionError: another entry, or a condition that cannot be used.
        """
        if not cls.column:
            raise ConditionError(f"a {cls.noun} cannot be written into a file of requests")
        if set(record) != {cls.column}:
            raise ConditionError(f"a request for this generator has an entry {cls.column!r}, and no {sorted(set(record) - {cls.column})}")

        def found(value: Any) -> Any:
            return folder / value if cls.column_names_files and isinstance(value, str) else value

        value = record[cls.column]
        return cls.of([found(one) for one in value] if isinstance(value, list) else found(value))

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready facts, kept with the adapters that are made from it; `type` is the kind's name."""

    @classmethod
    @abstractmethod
    def from_json(cls, data: Mapping[str, Any], file: Files | None = None) -> Condition:
        """Read what `to_json` wrote.

        Args:
            file: of what the record does not hold, such as a picture; or several.

        Raises:
            ConditionError: the record is malformed, or `file` is missing or another one.
        """

    @classmethod
    @abstractmethod
    def describe(cls, record: Mapping[str, Any]) -> str:
        """Say where an adapter comes from, in Markdown, as its card tells it; a record that is malformed gives what it has."""

    def file(self) -> tuple[str, bytes] | None:
        """Return the ending and the bytes of a file with what the record does not hold, for `from_json`; None: it holds all."""
        return None

    def views(self) -> Sequence[Condition]:
        """Return further forms of the same condition, which an out-of-distribution request is asked about too; the same ones every time."""
        return ()

    refined_in_time: ClassVar[bool] = False
    """May these training steps be limited by seconds?"""

    def refined_on(self) -> str:
        """Return what the training steps of `Family.refine` are taken on, in words.

        Raises:
            ConditionError: there is nothing, or not enough.
        """
        raise ConditionError(f"a {self.noun} given as a {self.name} shows nothing that training steps could be taken on")

    def classes(self, trained: Sequence[str], in_trained_order: bool) -> Labels | None:
        """Return the label names that go with an adapter, and where they are from; None for a kind that names no classes.

        Args:
            trained: those of the nearest trained task, if the request is in distribution.
            in_trained_order: an adapter's head has its outputs in the order of its task's labels.
        """
        return None


CONDITIONS: dict[str, type[Condition]] = {}
"""The registered kinds of conditions, by name."""

Kind = TypeVar("Kind", bound=type[Condition])


def register_condition(kind: Kind) -> Kind:
    """Make a kind of condition known by its name; a decorator.

    Raises:
        CondPDiffError: another class has its name; records that are there would be read by it.
    """
    if CONDITIONS.setdefault(kind.name, kind) is not kind:
        raise CondPDiffError(f"there is a kind of condition {kind.name!r} already; give that of {kind.__module__} another name")
    return kind


def condition_kind(record: Mapping[str, Any]) -> type[Condition]:
    """Return the kind of a recorded condition.

    Raises:
        ConditionError: it is of no kind that is known here.
    """
    named = CONDITIONS.get(str(record.get("type")))
    kind = named or next((kind for kind in CONDITIONS.values() if "type" not in record and kind.own_key in record), None)
    if kind is None:
        raise ConditionError(f"not a recorded condition of a kind that is known here ({', '.join(CONDITIONS)}): {dict(record)!r:.120}")
    return kind
