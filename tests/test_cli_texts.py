"""Commands that read texts from files: `generate --examples`, `classify --file`, `test`."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import refused, told

from cond_pdiff import LoraAdapter, PrototypeClassifier
from cond_pdiff.scores import INTERVALS, compare
from cond_pdiff.training.tasks.tasks import Task

ROWS = [(f"the {word} {noun}", label) for label, words in (("positive", ("good", "fine")), ("negative", ("bad", "dull")))
        for word in words for noun in ("film", "meal", "room")]  # fmt: skip


@pytest.fixture
def adapter(tiny_adapter: LoraAdapter, tmp_path: Path) -> Path:
    return tiny_adapter.save(tmp_path / "adapter")


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Twelve labelled rows, and one without a text."""
    path = tmp_path / "labelled.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("review", "id", "sentiment"), *((text, 7, label) for text, label in ROWS), ("", 8, "positive")])
    return path


# --- generate ----------------------------------------------------------------------------------------------------------------


def test_examples_come_from_a_file(run: Any, labelled: Path, tiny_generator: Path, tmp_path: Path) -> None:
    options = ["generate", "Is the remark kind?", "--examples", labelled, "--generator", tiny_generator, "--num-adapters", 2]
    done = run(*options, "--out", tmp_path / "a")
    assert done.status == 0
    assert done.err == [
        f"note: {labelled}: texts from 'review', labels from 'sentiment'",
        f"note: {labelled}: 1 row without a text left out, of 13",
    ]
    condition = LoraAdapter.load(tmp_path / "a").metadata["condition"]
    assert sorted(map(tuple, condition["examples"])) == sorted(ROWS)
    assert condition["labels"] == ["positive", "negative"]

    more = ["--max-examples", 4, "--example", "the cat=neither"]
    done = run(*options, *more, "--out", tmp_path / "b")
    assert done.err[-1] == f"note: 4 of 12 rows of {labelled} are the examples, spread over the labels; --max-examples takes more"
    condition = LoraAdapter.load(tmp_path / "b").metadata["condition"]
    assert [label for _, label in condition["examples"]].count("positive") == 2
    assert condition["examples"][4:] == [["the cat", "neither"]]
    assert condition["labels"] == ["positive", "negative", "neither"]


def test_a_task_folder_brings_its_description_too(run: Any, tasks_folder: Path, tiny_generator: Path, tmp_path: Path) -> None:
    options = ["--max-examples", 6, "--generator", tiny_generator, "--num-adapters", 2]
    assert run("generate", "--examples", tasks_folder / "animals", *options, "--out", tmp_path / "a").status == 0
    made, task = LoraAdapter.load(tmp_path / "a").metadata, Task.load(tasks_folder / "animals")
    assert made["condition"]["description"] == task.description
    assert sorted(made["labels"]) == sorted(task.labels)
    rows = {(text, task.labels[label]) for text, label in task.rows("train")}
    assert {tuple(example) for example in made["condition"]["examples"]} <= rows
    done = run("test", tmp_path / "a", tasks_folder / "animals", "--json")
    test_rows = {(text, task.labels[label]) for text, label in task.rows("test")}
    assert told(done)["rows"] == len(test_rows - {tuple(example) for example in made["condition"]["examples"]})


def test_files_of_examples_that_cannot_be_used_are_refused(run: Any, labelled: Path, tiny_generator: Path, tmp_path: Path) -> None:
    options = ["--generator", tiny_generator, "--out", tmp_path / "a"]
    refused(run("generate", "Is it?", "--examples", tmp_path / "gone.csv", *options), "gone.csv cannot be read")
    refused(run("generate", "Is it?", "--examples", labelled, "--text-column", "body", *options), "no column 'body'")
    refused(run("generate", "Is it?", "--examples", tmp_path, *options), "is not a task folder")
    done = run("generate", "--examples", labelled, *options)
    assert done.err[-1] == "cond-pdiff: error: say what to decide, or show a style: give a description, or --image FILE"
    done = run("generate", "Is it?", "--examples", labelled, "--max-examples", 0, *options)
    assert "max_examples must be" in done.err[-1]
    assert not (tmp_path / "a").exists()


# --- classify ----------------------------------------------------------------------------------------------------------------


def test_a_file_is_classified_into_a_file(run: Any, adapter: Path, labelled: Path, tmp_path: Path) -> None:
    done = run("classify", adapter, "--file", labelled, "--out", tmp_path / "answers.csv")
    assert done.status == 0
    assert done.out[-1] == f"written    {tmp_path / 'answers.csv'}"
    with (tmp_path / "answers.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["review", "id", "sentiment", "predicted", "probability"]
    classifier = PrototypeClassifier.load(adapter)
    assert [row[3] for row in rows] == [*classifier.predict([text for text, _ in ROWS]), ""]
    shares = classifier.logits([text for text, _ in ROWS]).softmax(1).amax(1)
    assert [float(row[4]) for row in rows[:-1]] == pytest.approx(shares.tolist(), abs=1e-4)
    assert [row[0] for row in rows] == [*(text for text, _ in ROWS), ""]
    refused(run("classify", adapter, "--file", labelled, "--out", tmp_path / "answers.csv"), "is already there")
    assert run("classify", adapter, "--file", labelled, "--out", tmp_path / "answers.csv", "--force").status == 0
    again = run("classify", adapter, "--file", tmp_path / "answers.csv", "--out", tmp_path / "more.csv")
    refused(again, "has a column 'predicted' already")


def test_a_file_is_classified_into_json_and_lines(run: Any, adapter: Path, labelled: Path) -> None:
    facts = told(run("classify", adapter, "--file", labelled, "--json"))
    assert [fact["text"] for fact in facts] == [*(text for text, _ in ROWS), None]
    assert facts[-1] == {"text": None, "label": None, "probabilities": {}}
    lines = run("classify", adapter, "--file", labelled).out
    assert [line.split()[0] for line in lines] == [fact["label"] for fact in facts[:-1]]


def test_pairs_and_standard_input(run: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"text_a": "the film", "text_b": "a cat"}, {"text_a": "the room", "text_b": "None"}]

    class Stdin:
        buffer = io.BytesIO("\n".join(map(json.dumps, records)).encode())

    monkeypatch.setattr("sys.stdin", Stdin)
    done = run("classify", adapter, "--file", "-", "--json")
    assert [fact["text"] for fact in told(done)] == [["the film", "a cat"], ["the room", "None"]]
    assert done.err == ["note: the standard input: texts from 'text_a' and 'text_b'"]


def test_ways_to_call_classify_that_make_no_sense(run: Any, adapter: Path, labelled: Path, tmp_path: Path) -> None:
    refused(run("classify", adapter), "give texts, or --file FILE")
    refused(run("classify", adapter, "good", "--file", labelled), "one of the two")
    refused(run("classify", adapter, "good", "--out", tmp_path / "a.csv"), "give one")
    refused(run("classify", adapter, "--file", labelled, "--out", tmp_path / "a.xlsx"), "ends in .csv")
    refused(run("classify", adapter, "--file", tmp_path / "gone.csv"), "cannot be read: No such file")


# --- test --------------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_tested_beside_its_base(run: Any, adapter: Path, labelled: Path) -> None:
    facts = told(run("test", adapter, labelled, "--json"))
    expected = compare(PrototypeClassifier.load(adapter), ROWS)
    assert facts == json.loads(json.dumps({**asdict(expected), "intervals": INTERVALS}))
    done = run("test", adapter, labelled)
    assert done.out[0].split("  ")[0] == "12 rows, in %"
    assert [line.split("  ")[0] for line in done.out[1:3]] == ["accuracy", "macro F1"]
    assert f"{100 * expected.adapter.accuracy.value:.1f} (" in done.out[1]
    assert [line.split()[0] for line in done.out[5:7]] == ["positive", "negative"]
    assert done.out[-1] == f"intervals  {INTERVALS}"


def test_an_adapters_own_examples_are_no_test(run: Any, labelled: Path, tiny_generator: Path, tmp_path: Path) -> None:
    options = ["--examples", labelled, "--generator", tiny_generator, "--num-adapters", 1, "--max-examples", 4]
    assert run("generate", "Is the remark kind?", *options, "--out", tmp_path / "a").status == 0
    done = run("test", tmp_path / "a", labelled, "--json")
    assert told(done)["rows"] == 8
    assert done.err[-1] == "note: 4 of 12 rows left out, which are examples that the adapter was made from"
    assert run("generate", "Is the remark kind?", *options[:-1], 64, "--out", tmp_path / "b").status == 0
    assert run("test", tmp_path / "b", labelled).err[-1].endswith("error: there are no labelled texts to test on")


def test_labels_that_do_not_fit_are_named(run: Any, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\ngood,kind\nbad,negative\n")
    done = run("test", adapter, tmp_path / "a.csv")
    assert (done.status, done.out) == (1, [])
    assert "the label 'kind', which the adapter has not; it has ['positive', 'negative']" in done.err[-1]
    assert not any("no row has the label" in line for line in done.err)
    (tmp_path / "b.csv").write_text("text,label\ngood,positive\nfine,positive\n")
    assert run("test", adapter, tmp_path / "b.csv").err[-1] == "note: no row has the label 'negative'"
