"""What commands read texts from: tables, and splits of task folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cond_pdiff.cli.output import note

if TYPE_CHECKING:
    from cond_pdiff.conditions.texts import Text


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with labels.

    Args:
        rows: (text, label) pairs.
        labels: all label names.
        description: of the task, where the texts are a task folder's.
        free: are the labels texts of their own, and no names of classes? Then there are as many as differ.
    """

    rows: list[tuple[Text, str]]
    labels: tuple[str, ...]
    description: str | None = None
    free: bool = False


def read_labelled(path: Path, split: str, text_columns: Sequence[str], label_column: str | None) -> LabelledTexts:
    """Read all labelled rows of a table (see `cond_pdiff.tables`), or a split of a task folder, and note what was taken for granted.

    Args:
        split: "train" or "test": of a task folder; its validation split where it has no test split.
    """
    if path.is_dir():
        from cond_pdiff.conditions.texts import check_text
        from cond_pdiff.training.tasks.language import load_language_task

        task = load_language_task(path)
        rows = task.examples(task.reported_split if split == "test" else split)
        checked = [(check_text(text, f"text {index}"), answer) for index, (text, answer) in enumerate(rows, 1)]
        labels = task.instruction.labels
        return LabelledTexts(
            checked, tuple(labels or dict.fromkeys(answer for _, answer in checked)), task.description, free=not labels
        )

    from cond_pdiff.tables import read_table, text_rows

    found = text_rows(read_table(path), text_columns, label_column)
    for told in found.notes:
        note(told)
    return LabelledTexts(found.labelled, tuple(dict.fromkeys(label for _, label in found.labelled)))


def read_descriptions(path: Path) -> dict[str, list[str]]:
    """Read labels with their descriptions from a table with the columns `label` and `description`, in its order.

    A label may have several rows, and no description.

    Raises:
        TaskDataError: see `cond_pdiff.tables.read_table`, or another column is meant.
    """
    from cond_pdiff.errors import TaskDataError
    from cond_pdiff.tables import read_table

    found, columns = read_table(path), ("label", "description")
    if missing := [column for column in columns if column not in found.columns]:
        raise TaskDataError(f"{path} has no column {missing[0]!r}; expected {' and '.join(columns)}, got {', '.join(found.columns)}")
    described: dict[str, list[str]] = {}
    for label, text in zip(*map(found.cells, columns), strict=True):
        described.setdefault(label, []).extend([text] if text else [])
    return described


def spread(texts: LabelledTexts, count: int) -> list[tuple[Text, str]]:
    """Choose up to `count` examples, in turn of every label, the same ones every time."""
    import random

    from cond_pdiff.training.tasks.tasks import spread_over_labels

    rows = [(text, texts.labels.index(label)) for text, label in texts.rows]
    random.Random("examples").shuffle(rows)
    return spread_over_labels(rows, count, texts.labels)
