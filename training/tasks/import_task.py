"""Import of tasks: a task folder from files of texts and labels, or from a data set of the Hub."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cond_pdiff.atomic import check_output_folder
from cond_pdiff.conditions.texts import Text
from cond_pdiff.errors import TaskDataError
from cond_pdiff.tables import TABLE_SUFFIXES, read_table, text_rows
from cond_pdiff.training.tasks.tasks import SPLITS, Task, write_task

LabelledText = tuple[Text, str]

UNLABELLED = (None, -1)
"""How data sets of the Hub mark rows without a label."""
SPLIT_WORDS = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
"""The words in a file's name that say which split it is."""
HELD_OUT_SHARE = 0.2
"""The share of each label's texts that become the test split, where data come without one."""
FEW_LABELS = 10
"""So many labels are not too many, however few rows there are, unless each row has its own."""
OTHER_FILES = (".parquet", ".arrow", ".xlsx", ".xls", ".ods", ".txt", ".gz", ".zip")
"""How names end, beside those of tables, that are surely a file's and not a data set's."""


@dataclass(frozen=True)
class ImportedTask:
    """A task folder that was made, and how.

    Args:
        task: the task.
        rows: split → its number of rows.
        notes: what was taken for granted or left out, a sentence each.
    """

    task: Task
    rows: Mapping[str, int]
    notes: tuple[str, ...]


def import_task(
    sources: Sequence[str | Path], folder: str | Path, description: str, text_columns: Sequence[str] = (), label_column: str | None = None
) -> ImportedTask:
    """Make a task folder from files of texts and labels, a folder of such files, or a data set of the Hub.

    What is a path, or looks like one, is never asked for on the Hub. Where there is neither a test nor a validation split, a fifth of
    each label's texts becomes the test split, the same ones every time.

    Args:
        sources: files (see `cond_pdiff.tables`), whose names say their split where there are several; or one folder of such files, or of
            Parquet files; or the name of one data set.
        folder: the task folder to create.
        description: what to decide.
        text_columns: one column, or two for pairs; none: see `text_rows`.
        label_column: the column of labels; None: see `text_rows`. Of a data set, "label".

    Raises:
        TaskDataError: they cannot be read, or are no task; says what was found and what to do.
        OutputExistsError: `folder` holds something.
    """
    check_output_folder(Path(folder), (), False)
    files = _files(sources)
    if files is not None:
        splits, labels, notes = _read_files(files, text_columns, label_column)
        origin = {}
    else:
        (name,) = sources
        splits, labels, notes = _read_dataset(str(name), text_columns or ("text",), label_column or "label")
        origin = {} if Path(name).exists() else {"dataset": str(name)}
    what = " and ".join(map(str, sources))
    _check_labels(splits["train"], labels, what)
    if len(splits) == 1:
        splits, note = _split(splits["train"], what)
        notes = [*notes, note]
    index = {label: number for number, label in enumerate(labels)}
    for split, rows in splits.items():
        unknown = next((label for _, label in rows if label not in index), None)
        if unknown is not None:
            raise TaskDataError(f"{what}: the {split} split has the label {unknown!r}, which the train split has not")
    numbered = {split: [(text, index[label]) for text, label in rows] for split, rows in splits.items()}
    task = write_task(folder, description, labels, numbered, None, **origin)
    return ImportedTask(task, {split: len(rows) for split, rows in splits.items()}, tuple(notes))


# --- files -------------------------------------------------------------------------------------------------------------------


def _files(sources: Sequence[str | Path]) -> dict[str, list[Path]] | None:
    """Return the files of each split; None: it is something for the package datasets."""
    paths = [Path(source) for source in sources]
    if len(paths) == 1 and paths[0].is_dir():
        found = sorted(path for path in paths[0].iterdir() if path.suffix.lower() in TABLE_SUFFIXES and path.is_file())
        if not found and any(paths[0].rglob("*.parquet")):
            return None
        if not found:
            raise TaskDataError(f"{paths[0]} holds no file that ends in {', '.join(TABLE_SUFFIXES)}")
        return _by_split(found, str(paths[0]))
    if len(sources) == 1 and not _looks_like_a_path(str(sources[0])):
        return None
    for path in paths:
        if not path.is_file():
            raise TaskDataError(f"{path} is {'a folder; give it alone' if path.is_dir() else 'neither a file nor a folder'}")
    return {"train": paths} if len(paths) == 1 else _by_split(paths, " and ".join(map(str, paths)))


def _looks_like_a_path(name: str) -> bool:
    """Is it there, named like a file, or in a folder that is there? Data sets are called `name` or `owner/name`."""
    path = Path(name)
    inside = path.parent != Path() and path.parent.is_dir()
    named = path.suffix.lower() in (*TABLE_SUFFIXES, *OTHER_FILES)
    return path.exists() or inside or named or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _by_split(files: Sequence[Path], what: str) -> dict[str, list[Path]]:
    """Sort files by the splits that their names say; where no name says one, all are one split."""
    said = {path: _split_of(path) for path in files}
    if not any(said.values()):
        return {"train": list(files)}
    splits: dict[str, list[Path]] = {}
    for path, split in said.items():
        if split is None:
            raise TaskDataError(f"which split is {path}? Others are named train, validation or test; name it so, or take it away")
        splits.setdefault(split, []).append(path)
    if "train" not in splits:
        raise TaskDataError(f"{what} has no train split; it has {sorted(splits)}")
    return {split: splits[split] for split in SPLITS if split in splits}


def _split_of(path: Path) -> str | None:
    words = "".join(letter if letter.isalnum() else " " for letter in path.stem.lower()).split()
    found = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def _read_files(
    files: Mapping[str, Sequence[Path]], text_columns: Sequence[str], label_column: str | None
) -> tuple[dict[str, list[LabelledText]], list[str], list[str]]:
    """Return the rows of each split, the label names, and notes."""
    splits: dict[str, list[LabelledText]] = {}
    notes: list[str] = []
    for split, paths in files.items():
        for path in paths:
            rows = text_rows(read_table(path), text_columns, label_column)
            splits.setdefault(split, []).extend(rows.labelled)
            notes += rows.notes
    return splits, _sorted_labels({label for _, label in splits["train"]}), notes


def _sorted_labels(labels: set[str]) -> list[str]:
    """Sort label names, numbers by their size."""
    try:
        return sorted(labels, key=lambda label: (float(label), label))
    except ValueError:
        return sorted(labels)


# --- data sets ---------------------------------------------------------------------------------------------------------------


def _read_dataset(
    dataset: str, text_columns: Sequence[str], label_column: str
) -> tuple[dict[str, list[LabelledText]], list[str], list[str]]:
    """Return the rows of each split, the label names, and notes, of what `datasets.load_dataset` reads.

    That is a Hub name or a folder of Parquet files. Rows without a label (None or -1) or without a text are left out.
    """
    try:
        from datasets import ClassLabel, load_dataset
    except ImportError as error:
        raise TaskDataError("importing data sets needs the package datasets: pip install 'cond-pdiff[train]'") from error
    try:
        loaded = load_dataset(dataset)
    except Exception as error:  # datasets has a few dozen of its own, and passes on those of every reader
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise TaskDataError(f"{dataset} cannot be read as a data set: {type(error).__name__}: {error}{cause}") from error
    if "train" not in loaded:
        raise TaskDataError(f"{dataset} has no train split; it has {sorted(loaded)}")
    for column, option in (*((name, "--text-column") for name in text_columns), (label_column, "--label-column")):
        if column not in loaded["train"].column_names:
            raise TaskDataError(f"{dataset} has no column {column!r}; it has {loaded['train'].column_names}: name one with {option}")
    feature = loaded["train"].features[label_column]
    named = list(feature.names) if isinstance(feature, ClassLabel) else None
    splits: dict[str, list[LabelledText]] = {}
    notes = []
    for split in (name for name in SPLITS if name in loaded):
        kept = [row for row in loaded[split] if row[label_column] not in UNLABELLED and all(_has_text(row[name]) for name in text_columns)]
        if len(kept) < len(loaded[split]):
            left_out = len(loaded[split]) - len(kept)
            notes.append(f"{split} split: {left_out} of {len(loaded[split])} rows left out, which have no text or no label")
        if kept:
            splits[split] = [(_text(row, text_columns), _label(row[label_column], named)) for row in kept]
    if "train" not in splits:
        raise TaskDataError(f"{dataset}: no row of the train split has a text in {list(text_columns)} and a label in {label_column!r}")
    return splits, named or _sorted_labels({label for _, label in splits["train"]}), notes


def _label(value: Any, named: Sequence[str] | None) -> str:
    return named[value] if named else str(value).strip()


def _text(row: Mapping[str, Any], columns: Sequence[str]) -> Text:
    parts = [str(row[column]) for column in columns]
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def _has_text(value: object) -> bool:
    return value is not None and bool(str(value).strip())


# --- labels and splits -------------------------------------------------------------------------------------------------------


def _check_labels(rows: Sequence[LabelledText], labels: Sequence[str], what: str) -> None:
    """Refuse labels of one class only, and what is no classes: a column of numbers or of names, nearly all of them different."""
    used = {label for _, label in rows}
    if len(labels) < 2:
        raise TaskDataError(f"{what}: all {len(rows)} rows have the label {labels[0]!r}; add rows of another label")
    many = len(used) == len(rows) if len(used) <= FEW_LABELS else len(used) > len(rows) / 2
    if len(used) > 2 and many:
        shown = ", ".join(repr(label)[:40] for label in sorted(used)[:3])
        found = f"{len(used)} different labels in {len(rows)} rows ({shown}, …)"
        raise TaskDataError(f"{what}: {found}: are these classes? Name the column of labels with --label-column")


def _split(rows: Sequence[LabelledText], what: str) -> tuple[dict[str, list[LabelledText]], str]:
    """Set a share of each label's texts aside as the test split, and say so; a text is on one side only."""
    by_label: dict[str, list[Text]] = {}
    for text, label in rows:
        by_label.setdefault(label, []).append(text)
    held_out: set[Text] = set()
    for label, texts in sorted(by_label.items()):
        different = list(dict.fromkeys(texts))
        random.Random(f"split/{label}").shuffle(different)
        held_out.update(different[: max(1, round(HELD_OUT_SHARE * len(different)))] if len(different) > 1 else ())
    parts = {
        "train": [row for row in rows if row[0] not in held_out],
        "test": [row for row in rows if row[0] in held_out],
    }
    lost = sorted(set(by_label) - {label for _, label in parts["train"]})
    if lost or not parts["test"]:
        why = f"all texts of the label {lost[0]!r} are also ones of another label" if lost else "no label has two different texts"
        raise TaskDataError(f"{what} has no test split, and none can be made: {why}; add rows, or give a file with test in its name")
    return parts, (
        f"no test or validation split: {len(parts['test'])} of {len(rows)} rows became the test split "
        f"({HELD_OUT_SHARE:.0%} of each label's texts, the same ones every time)"
    )
