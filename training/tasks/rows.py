"""The rows of a task folder: one JSON object a line, a file a split."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cond_pdiff.errors import TaskDataError

SPLITS = ("train", "validation", "test")

Read = TypeVar("Read")


def read_split(folder: Path, split: str, row: Callable[[Mapping[str, Any]], Read]) -> list[Read]:
    """Read all rows of a split, `<split>.jsonl.gz` or `.jsonl`; `TaskDataError` names the first bad line.

    Args:
        row: makes one of a line's object; what it raises (KeyError, ValueError, TypeError) is said of that line.
    """
    path = next((path for path in _files(folder, split) if path.exists()), None)
    if path is None:
        raise TaskDataError(f"{folder} has no {split}.jsonl.gz")
    opener = gzip.open if path.suffix == ".gz" else open
    rows = []
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    rows.append(row(json.loads(line)))
                except (KeyError, ValueError, TypeError) as error:
                    raise TaskDataError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise TaskDataError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not rows:
        raise TaskDataError(f"{path} has no rows")
    return rows


def test_split(folder: Path) -> str:
    """Return the name of the test split, or of the validation split where there is none."""
    return "test" if any(path.exists() for path in _files(folder, "test")) else "validation"


def check_splits(folder: Path) -> None:
    """Raise `TaskDataError` for a task without training rows, or without any rows to report numbers on."""
    for split in ("train", test_split(folder)):
        if not any(path.exists() for path in _files(folder, split)):
            needed = "training rows" if split == "train" else "a test or validation split (`cond-pdiff import-task` makes one)"
            raise TaskDataError(f"{folder} has no {split}.jsonl.gz; a task needs {needed}")


def _files(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / f"{split}.jsonl.gz", folder / f"{split}.jsonl"
