"""Tables of texts as people have them: CSV, TSV and JSON Lines files in the encodings that spreadsheets write.

Cells are texts: "None", "NA", "null" and "12" are words like any other, and only a cell without a character in it is missing.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cond_pdiff.conditions.texts import Text
from cond_pdiff.errors import TaskDataError

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""What separates the cells of a line → its name."""
CSV_SUFFIXES, TSV_SUFFIXES, JSON_SUFFIXES = (".csv",), (".tsv", ".tab"), (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (*CSV_SUFFIXES, *TSV_SUFFIXES, *JSON_SUFFIXES)
"""How the names of files end that can be read."""
STDIN = "-"

SEPARATOR_LINE = re.compile(r'\A"?sep=([,;\t|])"?[,;\t|]*(?:\r\n|\r|\n)', re.IGNORECASE)
"""A first line by which Excel is told the separator; it names no columns."""
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0e-\x1b]")
"""Characters that no text has; a file with one of them is something else."""

TEXT_NAMES = (
    *("text", "texts", "sentence", "review", "comment", "content", "message", "body", "tweet", "post", "document"),
    *("utterance", "headline", "question", "query", "title"),
)  # fmt: skip
PAIR_NAMES = (("text_a", "text_b"), ("text1", "text2"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))
LABEL_NAMES = ("label", "labels", "class", "category", "sentiment", "intent", "topic", "tag", "target")
"""The names of columns that need not be told, in small letters."""


@dataclass(frozen=True)
class Table:
    """A table of cells.

    Args:
        source: the file's name, for messages.
        columns: the names in its first line, or of its JSON objects; columns without a name are left out.
        rows: the stripped cells of each row, in the order of `columns`; "" is a missing one.
        nested: columns with a JSON array or object in a cell, which is no text.
        notes: what was taken for granted in reading it, a sentence each.
    """

    source: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    nested: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def cells(self, column: str) -> list[str]:
        """Return a column's cells."""
        index = self.columns.index(column)
        return [row[index] for row in self.rows]


@dataclass(frozen=True)
class TextRows:
    """The texts of a table, and their labels if it is read for them.

    Args:
        texts: of every row of the table; None where one is missing.
        labels: of every row; "" where it is missing. None: not asked for.
        notes: what was taken for granted or will be left out, a sentence each.
    """

    texts: tuple[Text | None, ...]
    labels: tuple[str, ...] | None
    notes: tuple[str, ...]

    @property
    def labelled(self) -> list[tuple[Text, str]]:
        """The (text, label) pairs of the rows that have both."""
        return [(text, label) for text, label in zip(self.texts, self.labels or (), strict=True) if text is not None and label]


# --- reading files -----------------------------------------------------------------------------------------------------------


def read_table(path: str | Path) -> Table:
    """Read a table from a file, or from standard input (`-`: CSV or JSON Lines).

    The first line of a CSV or TSV file names the columns; what separates its cells is seen there. Encodings: UTF-8 and UTF-16 (with its
    mark); a file that is neither is taken for Windows-1252, which is noted.

    Raises:
        TaskDataError: no such file, not a table, or a broken one; says where.
    """
    if str(path) == STDIN:
        data, source, suffix = sys.stdin.buffer.read(), "the standard input", ""
    else:
        path = Path(path)
        source, suffix = str(path), path.suffix.lower()
        if path.is_file() and suffix not in TABLE_SUFFIXES:
            raise TaskDataError(f"{path} does not end in {', '.join(TABLE_SUFFIXES)}: save it as one of them (in Excel: CSV UTF-8)")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TaskDataError(f"{path} cannot be read: {error.strerror or error}") from error
    text, notes = _decode(data, source)
    if not text.strip():
        raise TaskDataError(f"{source} is empty; its first line must name the columns")
    if suffix in JSON_SUFFIXES or (not suffix and text.lstrip().startswith("{")):
        return _json_table(text, source, notes)
    return _csv_table(text, source, "\t" if suffix in TSV_SUFFIXES else ",", notes)


def _decode(data: bytes, source: str) -> tuple[str, tuple[str, ...]]:
    """Return a file's text, and a note where its encoding was guessed."""
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    notes: tuple[str, ...] = ()
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f"byte 0x{data[error.start]:02x} in line {line}"
        convert = "if it is in another encoding: iconv -f ENCODING -t UTF-8"
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError:
            raise TaskDataError(f"{source} is not UTF-8 ({where}), nor a text file in Windows-1252; {convert}") from error
        notes = (f"{source} is not UTF-8 ({where}) and was read as Windows-1252; {convert}",)
    if found := CONTROL_CHARACTERS.search(text):
        what = "a text file" if encoding == "utf-16" else "a text file (or UTF-16 without its mark)"
        raise TaskDataError(f"{source} is not {what}: it holds the character {found[0]!r}; save it as CSV UTF-8")
    return text, notes


def _csv_table(text: str, source: str, usual: str, notes: tuple[str, ...]) -> Table:
    """Read a text whose first line names the columns; `usual` is what should separate its cells."""
    if told := SEPARATOR_LINE.match(text):
        text, usual = text[told.end() :], told[1]
    first = 2 if told else 1
    separator = max(sorted(SEPARATORS, key=lambda one: one != usual), key=lambda one: len(_header(text, one)))
    if separator != usual:
        notes += (f"the cells of {source} are separated by {SEPARATORS[separator]}",)
    records = _records(text, separator, source, first)
    _, names = next(records, (0, []))
    names = [name.strip() for name in names]
    named = [index for index, name in enumerate(names) if name]
    repeated = [name for name, count in Counter(names[index] for index in named).items() if count > 1]
    if not named:
        raise TaskDataError(f"the first line of {source} names no columns; write their names there, such as text{separator}label")
    if repeated:
        raise TaskDataError(f"{source} has two columns called {repeated[0]!r}, of {names}; give them different names in the first line")
    rows = []
    for line, cells in records:
        if len(cells) < len(names) or any(cell.strip() for cell in cells[len(names) :]):
            raise TaskDataError(
                f"{source}, line {line}: {_count(len(cells), 'cell')}, but the first line names {_count(len(names), 'column')}; "
                f"cells with {SEPARATORS[separator]} in them stand between double quotes"
            )
        rows.append(tuple(cells[index].strip() for index in named))
    return Table(source, tuple(names[index] for index in named), tuple(rows), notes=notes)


def _header(text: str, separator: str) -> list[str]:
    """Return the first line's cells, if it is separated so."""
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), [])
    except csv.Error:
        return []


def _records(text: str, separator: str, source: str, first: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the line at which each record begins, counted from `first`, and its cells; empty lines are none."""
    reader, start = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), first
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + first
    except csv.Error as error:
        raise TaskDataError(
            f"{source}, record at line {start}: {error}; a double quote that is never closed? (inside a quoted cell, write it twice)"
        ) from error


def _json_table(text: str, source: str, notes: tuple[str, ...]) -> Table:
    """Read a JSON object a line, or one array of objects."""
    records: list[Any] = []
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            for line in text.split("\n"):
                records += [json.loads(line)] if line.strip() else [None]
    except (ValueError, RecursionError) as error:
        raise TaskDataError(f"{source}, record {len(records) + 1}: not valid JSON: {error}") from error
    wrong = next((number for number, one in enumerate(records, 1) if one is not None and not isinstance(one, dict)), None)
    if wrong:
        raise TaskDataError(f'{source}, record {wrong}: expected a JSON object like {{"text": "…", "label": "…"}}')
    records = [one for one in records if one is not None]
    columns = tuple(dict.fromkeys(key for one in records for key in one))
    nested = frozenset(key for one in records for key, value in one.items() if isinstance(value, (list, dict)))
    rows = tuple(tuple(_json_cell(one.get(column)) for column in columns) for one in records)
    return Table(source, columns, rows, nested, notes)


def _json_cell(value: Any) -> str:
    """Write a JSON value as a cell: strings as they are, null as a missing one, numbers as JSON has them."""
    return value.strip() if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


# --- texts and labels --------------------------------------------------------------------------------------------------------


def text_rows(table: Table, text_columns: Sequence[str] = (), label_column: str | None = None, labelled: bool = True) -> TextRows:
    """Read the texts of a table, and their labels.

    Args:
        text_columns: one column, or two for pairs. None named: the only one with a name that texts usually have (`TEXT_NAMES`,
            `PAIR_NAMES`), or of two columns the one that is not the labels'.
        label_column: not named: found in the same way (`LABEL_NAMES`).
        labelled: whether labels are read at all.

    Raises:
        TaskDataError: there is no such column, no column or several could be meant, or there are no rows with a text (and a label).
    """
    texts, label, notes = _choose_columns(table, text_columns, label_column, labelled)
    for column in (*texts, *([label] if label else [])):
        if column in table.nested:
            raise TaskDataError(f"{table.source}: the column {column!r} holds arrays or objects; expected texts or numbers")
    parts = [table.cells(column) for column in texts]
    found = [(cells[0] if len(cells) == 1 else tuple(cells)) if all(cells) else None for cells in zip(*parts, strict=True)]
    labels = tuple(table.cells(label)) if label else None
    without_text = sum(text is None for text in found)
    without_label = sum(text is not None and not name for text, name in zip(found, labels, strict=True)) if labels is not None else 0
    if without_text + without_label == len(found):
        missing = "text and label" if label else "text"
        raise TaskDataError(f"{table.source} has no row with {missing}: {len(found)} rows, {without_text} of them without a text")
    notes += [f"{table.source}: {_count(count, 'row')} without a {what} left out, of {len(found)}"
              for what, count in (("text", without_text), ("label", without_label)) if count]  # fmt: skip
    return TextRows(tuple(found), labels, (*table.notes, *notes))


def _choose_columns(
    table: Table, text_columns: Sequence[str], label_column: str | None, labelled: bool
) -> tuple[tuple[str, ...], str | None, list[str]]:
    """Return the columns of texts and labels, and a note about those that were guessed."""
    given = {**dict.fromkeys(text_columns, "--text-column"), **({label_column: "--label-column"} if label_column else {})}
    for column, option in given.items():
        if column not in table.columns:
            raise TaskDataError(f"{table.source} has no column {column!r}; it has {list(table.columns)}: name one with {option}")
    if len(text_columns) > 2 or len(given) != len(text_columns) + bool(label_column):
        raise TaskDataError(f"expected one column of texts, or two for pairs, and another of labels; got {[*text_columns, label_column]}")
    texts = tuple(text_columns) or _usual_pair(table.columns)
    label = label_column or (_usual(table.columns, LABEL_NAMES, texts) if labelled else None)
    texts = texts or tuple(filter(None, [_usual(table.columns, TEXT_NAMES, [label])]))
    if labelled and len(table.columns) == 2:  # one of two is known: so is the other
        texts = texts or tuple(column for column in table.columns if label and column != label)
        label = label or next((column for column in table.columns if texts and column not in texts), None)
    if not labelled and len(table.columns) == 1:
        texts = texts or table.columns
    for found, what, option in ((texts, "texts", "--text-column"), (label or not labelled, "labels", "--label-column")):
        if not found:
            raise TaskDataError(
                f"{table.source}: which column holds the {what}? It has {list(table.columns)} (from its first line); name one with {option}"
            )
    guessed = [f"texts from {' and '.join(map(repr, texts))}"] if not text_columns else []
    guessed += [f"labels from {label!r}"] if labelled and not label_column else []
    return texts, label, [f"{table.source}: {', '.join(guessed)}"] if guessed else []


def _usual(columns: Sequence[str], names: Sequence[str], taken: Iterable[str | None]) -> str | None:
    """Return the column with a usual name, if there is one only; of several, the one that is called by the first name of all."""
    found = [column for column in columns if column.lower() in names and column not in taken]
    plain = [column for column in found if column.lower() == names[0]]
    return (plain or found)[0] if len(plain or found) == 1 else None


def _usual_pair(columns: Sequence[str]) -> tuple[str, ...]:
    small = {column.lower(): column for column in columns}
    return next((tuple(small[name] for name in pair) for pair in PAIR_NAMES if all(name in small for name in pair)), ())
