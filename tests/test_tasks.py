from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cond_pdiff.errors import OutputExistsError, TaskDataError
from cond_pdiff.training.tasks.tasks import Row, Task, load_tasks, sample_rows, spread_over_labels, write_task

LABELS = ("kind", "unkind", "neither")
ROWS: list[Row] = [("good film", 0), ("bad film", 1), ('a "film"\nin two lines \\ \u2028', 2), ("хороший фильм 🎬", 0)]
PAIRS: list[Row] = [(("one", "two"), 0), (("drei", "четыре"), 2)]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return write_task(tmp_path / "films", "Is it kind?", LABELS, {"train": ROWS, "test": ROWS[:2]}, group="reviews", licence="CC0-1.0")


def replace_rows(task: Task, *lines: str) -> None:
    """Put `lines` in place of the training rows."""
    with gzip.open(task.folder / "train.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))


def replace_meta(task: Task, **entries: Any) -> None:
    path = task.folder / "meta.json"
    meta = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({name: value for name, value in meta.items() if value is not None}))


# --- round trip --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "task_type"), [(ROWS, "single-classification"), (PAIRS, "pair-classification")])
def test_what_is_written_is_read_back(tmp_path: Path, rows: list[Row], task_type: str) -> None:
    splits = {"train": rows, "validation": rows[::-1]}
    written = write_task(tmp_path / "films", "Is it kind?", LABELS, splits, group="reviews", licence="MIT")
    assert Task.load(written.folder) == written
    assert (written.name, written.description, written.labels) == ("films", "Is it kind?", LABELS)
    assert (written.group, written.licence, written.folder) == ("reviews", "MIT", tmp_path / "films")
    assert written.rows("train") == rows
    assert written.rows("validation") == rows[::-1]
    assert json.loads((written.folder / "meta.json").read_text())["task_type"] == task_type


SCORED: list[Row] = [(("one", "two"), 0.0), (("drei", "четыре"), 4.6), (("five", "six"), 2.5), (("same", "same"), 5.0)]


@pytest.fixture
def scored(tmp_path: Path) -> Task:
    """A regression task."""
    return write_task(tmp_path / "likeness", "How alike are they?", (), {"train": SCORED, "validation": SCORED[:2]}, label_range=(0, 5))


def test_a_regression_task_is_read_back_and_only_by_its_name(scored: Task) -> None:
    assert Task.load(scored.folder) == scored
    assert (scored.labels, scored.label_range) == ((), (0.0, 5.0))
    assert scored.rows("train") == SCORED
    assert [task.name for task in load_tasks(scored.folder.parent, ["likeness"])] == ["likeness"]
    with pytest.raises(TaskDataError, match="no classification tasks"):
        load_tasks(scored.folder.parent)


def test_the_examples_of_a_regression_task_have_whole_scores(scored: Task) -> None:
    prompt = scored.prompt(0, 4)
    assert prompt.labels == ("0", "1", "2", "3", "4", "5")
    assert dict(prompt.examples) == {("one", "two"): "0", ("drei", "четыре"): "5", ("five", "six"): "2", ("same", "same"): "5"}
    assert scored.prompt(0, 0).examples == ()


@pytest.mark.parametrize("value", [None, [0], [0, "5"], [5, 0], [0, 0.5], "05", [True, 5]])
def test_ranges_that_are_none_are_refused(scored: Task, value: Any) -> None:
    replace_meta(scored, label_range=value)
    with pytest.raises(TaskDataError, match="label_range"):
        Task.load(scored.folder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text_a": "a", "text_b": "b", "label": 5.1}, "label 5.1 is not a number from 0 to 5"),
        ({"text_a": "a", "text_b": "b", "label": "3"}, "label '3' is not a number"),
        ({"text_a": "a", "text_b": "b", "label": True}, "label True is not a number"),
        ({"text_a": "a", "text_b": " ", "label": 3}, "texts must be non-empty strings"),
        ({"text": "a", "label": 3}, "KeyError: 'text_a'"),
    ],
)
def test_bad_rows_of_a_regression_task_are_refused(scored: Task, row: dict[str, Any], message: str) -> None:
    replace_rows(scored, json.dumps(row))
    with pytest.raises(TaskDataError, match=message):
        scored.rows("train")


def test_plain_jsonl_is_read_too(task: Task) -> None:
    packed = task.folder / "train.jsonl.gz"
    (task.folder / "train.jsonl").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert task.rows("train") == ROWS


def test_numbers_are_reported_on_test_where_there_is_one(task: Task, tmp_path: Path) -> None:
    assert task.test_split == "test"
    assert task.test_rows(None) == ROWS[:2]
    other = write_task(tmp_path / "other", "Is it kind?", LABELS, {"train": ROWS, "validation": ROWS * 5})
    assert other.test_split == "validation"
    assert len(other.test_rows(7)) == 7
    assert other.test_rows(7) == other.test_rows(7)


def test_tasks_are_loaded_by_name_or_all_of_them(tasks_folder: Path) -> None:
    assert [task.name for task in load_tasks(tasks_folder)] == ["animals", "likeness", "moods"]
    assert [task.name for task in load_tasks(tasks_folder, ["moods", "animals"])] == ["moods", "animals"]


def test_other_kinds_of_tasks_are_passed_over(task: Task) -> None:
    write_task(task.folder.parent / "more", "Is it kind?", LABELS, {"train": ROWS})
    replace_meta(task, task_type="regression")
    assert [task.name for task in load_tasks(task.folder.parent)] == ["more"]
    with pytest.raises(TaskDataError, match="task_type is 'regression'"):
        load_tasks(task.folder.parent, ["films"])


# --- samples and prompts -----------------------------------------------------------------------------------------------------


def test_sampling_depends_on_the_seed_only_and_keeps_the_order() -> None:
    rows: list[Row] = [(str(index), 0) for index in range(50)]
    chosen = sample_rows(rows, 10, "a")
    assert len(set(chosen)) == 10
    assert chosen == sorted(chosen, key=rows.index) == sample_rows(rows, 10, "a")
    assert chosen != sample_rows(rows, 10, "b")
    assert sample_rows(rows, 50, "a") == sample_rows(rows, None, "a") == rows


@pytest.mark.parametrize("count", range(10))
def test_examples_are_spread_over_the_labels(count: int) -> None:
    rows: list[Row] = [*((f"a{index}", 0) for index in range(5)), ("b0", 1), *((f"c{index}", 2) for index in range(2))]
    examples = spread_over_labels(rows, count, LABELS)
    assert len(examples) == min(count, len(rows))
    assert len(set(examples)) == len(examples)
    assert [text for text, _ in examples] == ["a0", "b0", "c0", "a1", "c1", "a2", "a3", "a4"][:count]
    assert all({"a": "kind", "b": "unkind", "c": "neither"}[str(text)[0]] == label for text, label in examples)


@pytest.mark.parametrize(("name", "classes"), [("moods", 2), ("animals", 3), ("likeness", 2)])
@pytest.mark.parametrize("count", [0, 1, 2, 4, 7])
def test_prompts_hold_training_rows_of_as_many_classes_as_possible(tasks_folder: Path, name: str, classes: int, count: int) -> None:
    task = Task.load(tasks_folder / name)
    prompt = task.prompt(0, count)
    assert prompt.description == task.description
    assert prompt.labels == task.labels
    assert len(prompt.examples) == count
    assert len({label for _, label in prompt.examples}) == min(count, classes)
    rows = {(text, task.labels[label]) for text, label in task.rows("train")}
    assert set(prompt.examples) <= rows


def test_prompts_depend_on_their_seed(tasks_folder: Path) -> None:
    task = Task.load(tasks_folder / "moods")
    assert task.prompt(3, 4) == task.prompt(3, 4)
    assert len({task.prompt(seed, 4) for seed in range(10)}) > 5


# --- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label": 3}', "label 3 is not an index into the 3 label names"),
        ('{"text": "a", "label": -1}', "label -1"),
        ('{"text": "a", "label": true}', "label True"),
        ('{"text": "a", "label": "kind"}', "label 'kind'"),
        ('{"text": "a", "label": 1.0}', r"label 1\.0"),
        ('{"text": "a"}', "KeyError: 'label'"),
        ('{"label": 0}', "KeyError: 'text_a'"),
        ('{"text_a": "a", "label": 0}', "KeyError: 'text_b'"),
        ('{"text": "", "label": 0}', "texts must be non-empty strings"),
        ('{"text": 5, "label": 0}', "texts must be non-empty strings"),
        ('{"text": null, "label": 0}', "texts must be non-empty strings"),
        ('{"text": [], "label": 0}', "texts must be non-empty strings"),
        ('{"text": ["a", "b", "c"], "label": 0}', "texts must be non-empty strings"),
        ('{"text": {"a": 1}, "label": 0}', "texts must be non-empty strings"),
        ('{"text_a": "a", "text_b": " ", "label": 0}', "texts must be non-empty strings"),
        ('{"text": "a", "label": 0', "JSONDecodeError"),
        ("[]", "TypeError"),
        ("null", "TypeError"),
        ("", "JSONDecodeError"),
    ],
)
def test_the_first_bad_line_is_named(task: Task, line: str, message: str) -> None:
    replace_rows(task, '{"text": "good", "label": 0}', '{"text_a": "good", "text_b": "bad", "label": 2}', line, '{"text": "", "label": 9}')
    with pytest.raises(TaskDataError, match=rf"train\.jsonl\.gz, line 3: .*{message}"):
        task.rows("train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b""), "has no rows"),
        (b"not gzip at all", r"train\.jsonl\.gz cannot be read"),
        (gzip.compress(b'{"text": "a", "label": 0}\n' * 999)[:-9], r"train\.jsonl\.gz cannot be read"),
        (gzip.compress(b'{"text": "\xff", "label": 0}\n'), r"train\.jsonl\.gz cannot be read"),
    ],
    ids=["empty", "not gzip", "truncated", "not utf-8"],
)
def test_broken_files_are_named(task: Task, content: bytes, message: str) -> None:
    (task.folder / "train.jsonl.gz").write_bytes(content)
    with pytest.raises(TaskDataError, match=message):
        task.rows("train")


def test_a_missing_split_is_named(task: Task) -> None:
    with pytest.raises(TaskDataError, match=r"no validation\.jsonl\.gz"):
        task.rows("validation")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"name": None}, "KeyError: 'name'"),
        ({"description": None}, "KeyError: 'description'"),
        ({"description": " "}, "description is empty"),
        ({"label_names": None}, "KeyError: 'label_names'"),
        ({"label_names": ["one"]}, "at least two labels"),
        ({"label_names": ["one", "one"]}, "'one' is given twice"),
        ({"label_names": "kind"}, "label_names"),
        ({"label_names": 3}, "label_names"),
        ({"task_type": "regression"}, "task_type is 'regression'"),
        ({"name": "../elsewhere"}, "name"),
    ],
)
def test_bad_meta_is_refused(task: Task, entries: dict[str, Any], message: str) -> None:
    replace_meta(task, **entries)
    with pytest.raises(TaskDataError, match=message):
        load_tasks(task.folder.parent, ["films"])


@pytest.mark.parametrize("content", ["", "[]", "null", "{'name': 1}"])
@pytest.mark.parametrize("names", [None, ["films"]])
def test_meta_that_is_no_json_object_is_refused(task: Task, content: str, names: list[str] | None) -> None:
    (task.folder / "meta.json").write_text(content)
    with pytest.raises(TaskDataError, match=r"films/meta\.json"):
        load_tasks(task.folder.parent, names)


def test_folders_without_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskDataError, match="is not a folder of tasks"):
        load_tasks(tmp_path / "nowhere")
    with pytest.raises(TaskDataError, match="no classification tasks below"):
        load_tasks(tmp_path)
    with pytest.raises(TaskDataError, match=r"films is not a task folder: meta\.json is missing"):
        load_tasks(tmp_path, ["films"])


@pytest.mark.parametrize(
    ("labels", "splits", "message"),
    [
        (["one"], {"train": ROWS}, "at least two labels"),
        (LABELS, {"dev": ROWS}, "'dev' is not one of the splits"),
        (LABELS, {"train": [("a", 3)]}, "line 1: .*label 3"),
        (LABELS, {"train": ROWS, "test": [("a", 0), ("", 0)]}, "line 2: .*non-empty"),
        (LABELS, {"train": []}, "has no rows"),
    ],
)
def test_write_task_writes_a_good_task_or_nothing(tmp_path: Path, labels: list[str], splits: dict[str, list[Row]], message: str) -> None:
    with pytest.raises(TaskDataError, match=message):
        write_task(tmp_path / "films", "Is it kind?", labels, splits)
    assert list(tmp_path.iterdir()) == []


def test_write_task_replaces_nothing(task: Task) -> None:
    with pytest.raises(OutputExistsError, match="not empty"):
        write_task(task.folder, "Is it kind?", LABELS, {"train": ROWS})
    assert task.rows("train") == ROWS
