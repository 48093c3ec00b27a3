"""Tasks from what people have: files of texts and labels, and data sets."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import refused, told

from cond_pdiff.errors import OutputExistsError, TaskDataError
from cond_pdiff.tables import read_table, text_rows
from cond_pdiff.training.tasks.import_task import ImportedTask, import_task
from cond_pdiff.training.tasks.tasks import Task


@pytest.fixture
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    assert datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write_csv(path: Path, rows: list[tuple[object, ...]], encoding: str = "utf-8", **dialect: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, **dialect).writerows(rows)
    return path


def some_rows(*columns: str) -> list[tuple[object, ...]]:
    """A header, and ten rows of each of two labels."""
    return [columns or ("text", "label"), *((f"text number {index}, of {'ab'[index % 2]}", "ab"[index % 2]) for index in range(20))]


def make(tmp_path: Path, *sources: Path, **columns: Any) -> ImportedTask:
    return import_task(sources, tmp_path / "tasks" / "films", "Is it kind?", **columns)


# --- words, numbers, empty cells ---------------------------------------------------------------------------------------------


WORDS = ("None", "NA", "N/A", "null", "nan", "NaN", "", "#N/A", "true", "-1", "0.10", "007", "1e5")


def test_words_that_other_readers_take_for_missing_values_are_texts_and_labels(tmp_path: Path) -> None:
    pairs = [*((word, "None") for word in WORDS), *(("go", word) for word in WORDS)]
    path = write_csv(tmp_path / "stance.csv", [("text", "label"), *pairs])
    rows = text_rows(read_table(path))
    kept = [word for word in WORDS if word]
    assert rows.labelled == [*((word, "None") for word in kept), *(("go", word) for word in kept)]
    assert rows.notes[1:] == (f"{path}: 1 row without a text left out, of 26", f"{path}: 1 row without a label left out, of 26")


def test_a_class_called_none_is_kept(tmp_path: Path) -> None:
    rows = [("text", "label"), *((f"{label} {index}", label) for label in ("For", "None", "NA") for index in range(5))]
    made = make(tmp_path, write_csv(tmp_path / "stance.csv", rows))
    assert made.task.labels == ("For", "NA", "None")
    assert Counter(label for split in made.rows for _, label in made.task.rows(split)) == {0: 5, 1: 5, 2: 5}


def test_numbers_are_texts_and_labels_in_their_order(tmp_path: Path) -> None:
    rows = [("text", "label"), *((index, (2, 10, -1)[index % 3]) for index in range(30))]
    made = make(tmp_path, write_csv(tmp_path / "numbers.csv", rows))
    assert made.task.labels == ("-1", "2", "10")  # -1 is a class here, not a sign of none
    assert {text for split in made.rows for text, _ in made.task.rows(split)} == {str(index) for index in range(30)}


def test_json_lines_have_numbers_nulls_and_line_separators_in_texts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    records = [{"text": 12, "label": 1}, {"text": "null", "label": 0.5}, {"text": None, "label": 1}]
    records += [{"text": "a\u2028b", "label": True}, {"text": "x"}]
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n", encoding="utf-8")
    rows = text_rows(read_table(path))
    assert rows.labelled == [("12", "1"), ("null", "0.5"), ("a\u2028b", "true")]
    assert [note for note in rows.notes if "left out" in note] == [
        f"{path}: 1 row without a text left out, of 5",
        f"{path}: 1 row without a label left out, of 5",
    ]
    (tmp_path / "rows.json").write_text(json.dumps(records), encoding="utf-8")
    assert text_rows(read_table(tmp_path / "rows.json")).labelled == rows.labelled


# --- encodings and separators ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["sep=;", '"sep=;"', "SEP=;;"])
def test_a_line_that_tells_excel_the_separator_names_no_columns(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f"{line}\r\ntext;label\r\ngood, really;yes\r\n".encode("utf-8-sig"))
    assert text_rows(read_table(path)).labelled == [("good, really", "yes")]
    path.write_bytes(f"{line}\r\ntext;label\r\ngood\r\n".encode())
    with pytest.raises(TaskDataError, match="line 3: 1 cell, but the first line names 2 columns"):
        read_table(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("line_end", ["\r\n", "\n", "\r"])
def test_what_spreadsheets_write_is_read(tmp_path: Path, encoding: str, separator: str, line_end: str) -> None:
    texts = ["Möbel – „schön“, oder; nicht|?", 'sie sagte "nein"', "zwei\nZeilen\tund, mehr"]
    path = tmp_path / "möbel.csv"
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    path.write_bytes(mark.encode(encoding))
    with path.open("a", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=separator, lineterminator=line_end, quoting=csv.QUOTE_ALL)
        writer.writerows([("Text", "Label", ""), *((text, "gut", "") for text in texts)])
    table = read_table(path)
    assert table.columns == ("Text", "Label")
    assert text_rows(table).labelled == [(text, "gut") for text in texts]
    assert [note for note in table.notes if "separated" in note] == ([f"the cells of {path} are separated by "
        + {";": "semicolons", "\t": "tabs", "|": "bars"}[separator]] if separator != "," else [])  # fmt: skip
    guessed = [note for note in table.notes if "Windows-1252" in note]
    assert [note.startswith(f"{path} is not UTF-8 (byte 0xf6 in line") for note in guessed] == [True] * (encoding == "cp1252")


def test_tabs_are_expected_of_tsv(tmp_path: Path) -> None:
    assert read_table(write_csv(tmp_path / "a.tsv", some_rows(), delimiter="\t")).notes == ()
    assert read_table(write_csv(tmp_path / "b.tsv", some_rows())).notes == (f"the cells of {tmp_path / 'b.tsv'} are separated by commas",)


# --- columns -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "texts", "label"),
    [
        (("id", "text", "label"), ["text"], "label"),
        (("Review", "Sentiment"), ["Review"], "Sentiment"),
        (("body", "mood"), ["body"], "mood"),  # of two columns, one is known
        (("words", "class"), ["words"], "class"),
        (("title", "text", "category"), ["text"], "category"),
        (("premise", "hypothesis", "label"), ["premise", "hypothesis"], "label"),
        (("Sentence1", "Sentence2", "class", "id"), ["Sentence1", "Sentence2"], "class"),
    ],
)
def test_columns_are_found_by_usual_names_and_that_is_told(tmp_path: Path, columns: tuple[str, ...], texts: list[str], label: str) -> None:
    path = write_csv(tmp_path / "a.csv", [columns, tuple(f"of {column}" for column in columns)])
    rows = text_rows(read_table(path))
    expected = tuple(f"of {column}" for column in texts)
    assert rows.labelled == [(expected if len(texts) == 2 else expected[0], f"of {label}")]
    assert rows.notes == (f"{path}: texts from {' and '.join(map(repr, texts))}, labels from {label!r}",)


@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        (("review", "comment", "label"), {}, r"which column holds the texts\? It has .*--text-column"),
        (("text", "class", "category"), {}, r"which column holds the labels\? .*--label-column"),
        (("a", "b"), {}, "which column holds the texts"),
        (("text", "label"), {"text_columns": ["body"]}, r"no column 'body'; it has \['text', 'label'\]: name one with --text-column"),
        (("text", "label"), {"label_column": "mood"}, r"no column 'mood'; it has \['text', 'label'\]: name one with --label-column"),
        (("text", "label"), {"text_columns": ["text"], "label_column": "text"}, "another of labels"),
        (("a", "b", "c", "label"), {"text_columns": ["a", "b", "c"]}, "two for pairs"),
        (("a", "b", "c", "label"), {"text_columns": ["a", "a"]}, "two for pairs"),
    ],
)
def test_columns_that_are_not_obvious_are_asked_for(tmp_path: Path, columns: tuple[str, ...], given: Any, message: str) -> None:
    path = write_csv(tmp_path / "a.csv", [columns, columns])
    with pytest.raises(TaskDataError, match=message):
        text_rows(read_table(path), **given)


# --- splits ------------------------------------------------------------------------------------------------------------------


def test_a_split_is_made_where_there_is_none_stratified_and_always_the_same(tmp_path: Path) -> None:
    rows = [("text", "label"), *((f"text {index}", "common") for index in range(30)), *((f"rare {index}", "rare") for index in range(5))]
    made = make(tmp_path, write_csv(tmp_path / "a.csv", [*rows, *rows[1:]]))  # every row twice
    assert made.rows == {"train": 56, "test": 14}
    assert Counter(label for _, label in made.task.rows("test")) == {0: 12, 1: 2}
    assert not {text for text, _ in made.task.rows("train")} & {text for text, _ in made.task.rows("test")}
    assert made.notes[-1].startswith("no test or validation split: 14 of 70 rows became the test split (20% of each label's texts")
    again = import_task([tmp_path / "a.csv"], tmp_path / "again", "Is it kind?")
    assert again.task.rows("test") == made.task.rows("test")


def test_names_of_files_say_their_splits(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("my-train.csv", "dev.csv", "films_TEST.csv"):
        write_csv(source / name, [*some_rows()[:5], (name, "a")])
    (source / "README.md").write_text("about")
    made = make(tmp_path, source)
    assert made.rows == {"train": 5, "validation": 5, "test": 5}
    assert made.task.rows("validation")[-1] == ("dev.csv", 0)
    files = [source / "films_TEST.csv", source / "my-train.csv"]
    assert import_task(files, tmp_path / "other", "Is it kind?").rows == {"train": 5, "test": 5}
    write_csv(source / "more.csv", some_rows())
    with pytest.raises(TaskDataError, match=r"which split is .*more\.csv"):
        import_task([source], tmp_path / "third", "Is it kind?")


def test_several_files_without_such_names_are_one_table(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "a.csv", some_rows())
    second = write_csv(tmp_path / "b.csv", [("Label", "Text"), ("a", "one"), ("b", "two")])
    assert sum(make(tmp_path, first, second).rows.values()) == 22


# --- refusals ----------------------------------------------------------------------------------------------------------------

WRONG = {
    "no-header": (b"i like it,yes\ni do not,no\nnever again,no\n", "It has ['i like it', 'yes'] (from its first line)"),
    "no-label": (b"text,id,when\na,1,x\nb,2,y\n", "which column holds the labels? It has ['text', 'id', 'when']"),
    "one-class": (b"text,label\na,yes\nb,yes\n", "all 2 rows have the label 'yes'"),
    "empty": (b"", "is empty; its first line must name the columns"),
    "header-only": (b"text,label\n", "has no row with text and label: 0 rows"),
    "only-empty-cells": (b"text,label\n,yes\n  ,no\n", "2 rows, 2 of them without a text"),
    "binary": (b"PK\x03\x04\x14\x00\x08\x08" + bytes(range(256)), "is not UTF-8 (byte 0x80 in line"),
    "zeros": (b"text,label\n\x00\x00,a\n", "is not a text file"),
    "open-quote": (b'text,label\n"a,yes\nb,no\n' + b"c,no\n" * 20, "record at line 2: unexpected end of data; a double quote that is"),
    "stray-quote": (b'text,label\nfine,yes\n"a" b,no\n', "record at line 3: ',' expected after '\"'"),
    "huge-cell": (b"text,label\n" + b"a" * 10**7 + b",yes\n", "record at line 2: field larger than field limit"),
    "bare-commas": (b"text,label\ngood, really,yes\n", "line 2: 3 cells, but the first line names 2 columns; cells with commas"),
    "short-row": (b"text,label\ngood,yes\n\nbad\n", "line 4: 1 cell, but the first line names 2 columns"),
    "other-separator": (b"text:label\na:yes\nb:no\n", "which column holds the texts? It has ['text:label']"),
    "twice": (b"text,label,text\na,yes,b\nc,no,d\n", "two columns called 'text'"),
    "all-different": (b"text,label\na,l1\nb,l2\nc,l3\nd,l4\n", "4 different labels in 4 rows ('l1', 'l2', 'l3', …)"),
    "many-labels": (b"text,label\n" + b"".join(b"a,%d\n" % (index * index % 83) for index in range(60)), "42 different labels in 60 rows"),
    "no-second-text": (b"text,label\na,yes\nb,no\n", "has no test split, and none can be made"),
    "nothing-named": (b",,\n1,2,3\n", "names no columns"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused_clearly_and_nothing_is_written(run: Any, tmp_path: Path, name: str) -> None:
    content, message = WRONG[name]
    path = tmp_path / f"{name}.csv"
    path.write_bytes(content)
    done = run("import-task", path, "--description", "Is it kind?", "--out", tmp_path / "task")
    refused(done, message)
    assert str(path) in done.err[0]
    assert not (tmp_path / "task").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": 1}\n{"text": "b"', "record 2: not valid JSON"),
        ("[1, 2]", "record 1: expected a JSON object"),
        ('{"text": "a", "label": 1}\n5\n', "record 2: expected a JSON object"),
        ('{"text": ["a", "b"], "label": 1}\n', "the column 'text' holds arrays or objects"),
        ("[" * 100_000, "record 1: not valid JSON"),
    ],
)
def test_wrong_json_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(TaskDataError, match=message):
        text_rows(read_table(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["gone.csv", "gone/deep/er", "./gone", "data/gone", "gone.parquet", "gone.xlsx", "C:\\texts\\gone"])
def test_a_path_is_never_asked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(TaskDataError, match="is neither a file nor a folder"):
        import_task([name], tmp_path / "task", "Is it kind?")
    (tmp_path / "sheet.xlsx").write_bytes(b"PK")
    with pytest.raises(TaskDataError, match=r"save it as one of them \(in Excel: CSV UTF-8\)"):
        import_task(["sheet.xlsx"], tmp_path / "task", "Is it kind?")
    with pytest.raises(TaskDataError, match=r"holds no file that ends in \.csv"):
        import_task(["data"], tmp_path / "task", "Is it kind?")


def test_a_refusal_needs_no_large_package(tmp_path: Path) -> None:
    """So that it comes at once."""
    (tmp_path / "a.csv").write_bytes(WRONG["open-quote"][0])
    code = (
        "import sys; from cond_pdiff.cli import main; "
        f"assert main(['import-task', {str(tmp_path / 'a.csv')!r}, '--description', 'x', '--out', {str(tmp_path / 'b')!r}]) == 1; "
        "assert not {'torch', 'datasets', 'pandas', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_command_tells_what_it_took_for_granted(run: Any, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [*some_rows("Review", "mood"), ("", "a")], delimiter=";", encoding="utf-8-sig")
    options = ["import-task", path, "--description", "Is it kind?", "--out"]
    done = run(*options, tmp_path / "task")
    assert done.status == 0
    assert done.out == [f"task       {tmp_path / 'task'} with the labels a, b", "rows       16 train rows, 4 test rows"]
    notes = [line.removeprefix("note: ") for line in done.err]
    assert notes[:3] == [
        f"the cells of {path} are separated by semicolons",
        f"{path}: texts from 'Review', labels from 'mood'",
        f"{path}: 1 row without a text left out, of 21",
    ]
    assert len(notes) == 4
    facts = told(run(*options, tmp_path / "other", "--json"))
    assert facts == {"task": str(tmp_path / "other"), "labels": ["a", "b"], "rows": {"train": 16, "test": 4}, "notes": notes}


# --- folders and data sets ---------------------------------------------------------------------------------------------------


def test_import_of_a_folder_of_csv(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_csv(
        source / "train.csv",
        [("body", "mood"), ("good", "kind"), ("bad, very", "unkind"), ("", "kind"), ("  ", "kind"), ("fine ü", "kind")],
    )
    write_csv(source / "test.csv", [("body", "mood"), ("awful", "unkind"), ("what", "")])
    made = import_task([source], tmp_path / "films", "Is it kind?", ["body"], "mood")
    task = made.task
    assert task == Task.load(tmp_path / "films")
    assert task.labels == ("kind", "unkind")
    assert task.rows("train") == [("good", 0), ("bad, very", 1), ("fine ü", 0)]
    assert task.rows("test") == [("awful", 1)]
    assert task.dataset == ""  # it is not the Hub's


def test_import_refuses_a_label_that_training_never_shows(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_csv(source / "train.csv", [("body", "mood"), ("good", "kind"), ("bad", "unkind")])
    write_csv(source / "test.csv", [("body", "mood"), ("what", "strange")])
    with pytest.raises(TaskDataError, match="the test split has the label 'strange', which the train split has not"):
        import_task([source], tmp_path / "films", "Is it kind?", ["body"], "mood")
    assert not (tmp_path / "films").exists()


def test_import_of_pairs_with_number_labels(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_csv(source / "train.csv", [("a", "b", "label"), ("one", "two", 10), ("three", "four", 2)])
    write_csv(source / "test.csv", [("a", "b", "label"), ("five", "six", 10)])
    task = import_task([source], tmp_path / "pairs", "Is it kind?", ["a", "b"]).task
    assert task.labels == ("2", "10")
    assert task.rows("train") == [(("one", "two"), 1), (("three", "four"), 0)]


@pytest.mark.usefixtures("_private_cache")
def test_import_takes_label_names_from_a_class_label_column(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    columns = {"text": ["good", "bad", "unlabelled"], "label": [1, 0, -1]}
    features = Features({"text": Value("string"), "label": ClassLabel(names=["unkind", "kind"])})
    (tmp_path / "source").mkdir()
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "source" / "train.parquet")
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "source" / "test.parquet")
    made = import_task([tmp_path / "source"], tmp_path / "films", "Is it kind?", ["text"])
    task = made.task
    assert task.labels == ("unkind", "kind")
    assert task.rows("train") == [("good", 1), ("bad", 0)]
    assert made.notes[0] == "train split: 1 of 3 rows left out, which have no text or no label"


@pytest.mark.parametrize(("columns", "label", "missing"), [(["text"], "mood", "text"), (["body"], "label", "label")])
def test_import_names_a_missing_column(tmp_path: Path, columns: list[str], label: str, missing: str) -> None:
    write_csv(tmp_path / "source" / "train.csv", [("body", "mood"), ("good", "kind"), ("bad", "unkind")])
    with pytest.raises(TaskDataError, match=rf"no column '{missing}'; it has \['body', 'mood'\]"):
        import_task([tmp_path / "source"], tmp_path / "films", "Is it kind?", columns, label)


def test_import_needs_training_rows(tmp_path: Path) -> None:
    write_csv(tmp_path / "source" / "test.csv", [("body", "mood"), ("good", "kind"), ("bad", "unkind")])
    with pytest.raises(TaskDataError, match="train"):
        import_task([tmp_path / "source"], tmp_path / "films", "Is it kind?", ["body"], "mood")


@pytest.mark.usefixtures("_private_cache")
def test_a_data_set_without_a_test_split_gets_one_and_its_numbers_become_texts(tmp_path: Path) -> None:
    from datasets import Dataset

    (tmp_path / "source").mkdir()
    columns = {"text": list(range(20)), "label": [index % 2 for index in range(20)]}
    Dataset.from_dict(columns).to_parquet(tmp_path / "source" / "train.parquet")
    made = import_task([tmp_path / "source"], tmp_path / "films", "Is it kind?")
    assert (made.rows, made.task.labels) == ({"train": 16, "test": 4}, ("0", "1"))
    assert all(isinstance(text, str) for text, _ in made.task.rows("train"))
    with pytest.raises(OutputExistsError):
        import_task([tmp_path / "source"], tmp_path / "films", "Is it kind?")
