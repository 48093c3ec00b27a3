from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import refused, tiny_recipe, told

from cond_pdiff.hub import Backbone
from cond_pdiff.training.tasks.tasks import Task


@pytest.fixture
def recipe(tiny_backbone: Backbone, tmp_path: Path) -> Path:
    """The tiny recipe, smaller still, as a file."""
    recipe = tiny_recipe(tiny_backbone)
    recipe["collect"].update(steps=2, runs=1)
    for stage in ("autoencoder", "unet"):
        recipe[stage]["fit"]["steps"] = 2
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def test_from_tasks_to_a_generator_with_a_card(run: Any, recipe: Path, tasks_folder: Path, tmp_path: Path) -> None:
    zoo, runs, results = tmp_path / "zoo", tmp_path / "run", tmp_path / "results"
    data = ["--tasks", tasks_folder, "--zoo", zoo]
    rest = "; 2 of 4 runs are missing, of other shards"
    for shard, count, left in (("1/2", 1, rest), ("0/2", 3, "")):  # 4 jobs: two tasks, one unseen; and the multi-task baseline
        done = run("collect", "--recipe", recipe, *data, "--shard", shard, "--together", count)
        assert done.status == 0
        assert done.out[-1].endswith(f" adapters in {zoo}{left}")
        assert len(list(zoo.glob("tasks/*/run-0/run.json"))) >= count
    assert done.out[-1].startswith("3 adapters")
    assert (zoo / "multitask" / "run.json").is_file()

    done = run("train", "--recipe", recipe, *data, "--out", runs)
    assert (done.status, done.out[-2]) == (0, f"generator  {runs / 'generator'}")
    assert done.out[-1].startswith("on its own  ")
    loud = [line for line in done.err if line.startswith("WARNING: THIS GENERATOR IS NO GOOD: ")]
    assert any("the autoencoder loses" in line for line in loud)  # after two steps
    done = run("evaluate", runs / "generator", *data, "--out", results, "--samples", 2, "--max-rows", 5, "--steps", 2, "--card")
    assert done.status == 0
    assert done.out[0] == "# Evaluation"
    assert done.out[-1] == f"card       {runs / 'generator' / 'README.md'}"
    assert json.loads((results / "evaluation.json").read_text())["settings"]["samples"] == 2
    done = run("generate", "Is the remark kind?", "--generator", runs / "generator", "--out", tmp_path / "a")
    assert done.status == 0

    # All of it again: nothing is left to do, and stdout holds nothing but JSON.
    facts = told(run("collect", "--recipe", recipe, *data, "--json"))
    assert facts == {"zoo": str(zoo), "adapters": 3, "runs": 4, "missing": 0}
    facts = told(run("train", "--recipe", recipe, *data, "--out", runs, "--json"))
    assert facts.pop("check")["warnings"] == [line.partition("GOOD: ")[2] for line in loud]
    assert facts == {"generator": str(runs / "generator")}
    again = ["--out", results, "--samples", 2, "--max-rows", 5, "--steps", 2, "--card", "--json"]
    evaluation = told(run("evaluate", runs / "generator", *data, *again))
    assert evaluation == {"finished": True, **json.loads((results / "evaluation.json").read_text())}


def test_a_part_of_the_evaluation_says_so(run: Any, tiny_generator: Path, tiny_zoo: Path, tasks_folder: Path, tmp_path: Path) -> None:
    options = ["--zoo", tiny_zoo, "--tasks", tasks_folder, "--out", tmp_path, "--samples", 1, "--max-rows", 2, "--steps", 1]
    done = run("evaluate", tiny_generator, *options, "--shard", "2/3")
    assert (done.status, len(done.out)) == (0, 1)
    assert done.out[0].startswith("this shard is done; tasks of other shards are missing")
    assert told(run("evaluate", tiny_generator, *options, "--shard", "2/3", "--json")) == {"finished": False}
    refused(run("evaluate", "cond-pdiff/minilm-text-tasks", *options, "--card"), "is not a local generator folder")
    refused(run("evaluate", tiny_generator, *options, "--card", "--only", "moods"), "not both")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["collect", "--recipe", "nonsense", "--tasks", "TASKS", "--zoo", "NEW"], "no recipe 'nonsense'"),
        (["collect", "--tasks", "GONE", "--zoo", "NEW"], "is not a folder of tasks"),
        (["collect", "--tasks", "TASKS", "--zoo", "NEW"], "is not a task folder: meta.json is missing"),
        (["collect", "--recipe", "RECIPE", "--tasks", "TASKS", "--zoo", "TASKS"], "is not ours to replace"),
        (["collect", "--recipe", "RECIPE", "--tasks", "TASKS", "--zoo", "NEW", "--together", "0"], "together must be at least 1"),
        (["train", "--recipe", "RECIPE", "--tasks", "TASKS", "--zoo", "GONE", "--out", "NEW"], "is not a zoo: zoo.json is missing"),
        (["train", "--recipe", "RECIPE", "--tasks", "TASKS", "--zoo", "BAD", "--out", "NEW"], "must hold a JSON object with base, lora,"),
        (["train", "--recipe", "RECIPE", "--tasks", "GONE", "--zoo", "ZOO", "--out", "NEW"], "is not a folder of tasks"),
        (["evaluate", "nobody/gone", "--tasks", "TASKS", "--zoo", "ZOO", "--out", "NEW"], "nobody/gone is not in the cache"),
        (["evaluate", "GENERATOR", "--tasks", "TASKS", "--zoo", "GONE", "--out", "NEW"], "is not a zoo"),
        (["evaluate", "GENERATOR", "--tasks", "GONE", "--zoo", "ZOO", "--out", "NEW"], "is not a folder of tasks"),
        (["evaluate", "GENERATOR", "--tasks", "TASKS", "--zoo", "ZOO", "--out", "NEW", "--max-rows", "0"], "max_rows must be"),
        (["import-task", "GONE", "--description", "Is it?", "--text-column", "text", "--out", "NEW"], "gone"),
        (["import-task", "TASKS", "--description", "Is it?", "--text-column", "body", "--out", "NEW"], "TASKS"),
    ],
)
def test_other_commands_refuse_and_write_nothing(
    run: Any,
    recipe: Path,
    tiny_generator: Path,
    tiny_zoo: Path,
    tasks_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    new, gone, bad = tmp_path / "new", tmp_path / "gone", tmp_path / "bad"
    bad.mkdir()
    (bad / "zoo.json").write_text('{"base": {}}')
    places = {"RECIPE": recipe, "TASKS": tasks_folder, "ZOO": tiny_zoo, "GENERATOR": tiny_generator, "NEW": new, "GONE": gone, "BAD": bad}
    done = run(*(places.get(argument, argument) for argument in arguments))
    assert (done.status, done.out) == (1, [])
    assert [line for line in done.err if line.startswith("cond-pdiff: error: ")] == done.err[-1:]
    assert str(places.get(message, message)) in done.err[-1]
    assert not new.exists()
    assert not gone.exists()


def test_import_task_makes_a_task_folder(run: Any, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "train.csv").write_text("text,other,mood\ngood,x,kind\nbad,y,unkind\n")
    (tmp_path / "source" / "test.csv").write_text("text,other,mood\nfine,x,kind\n")
    options = ["import-task", tmp_path / "source", "--description", "Is it kind?", "--text-column", "text", "--label-column", "mood"]
    done = run(*options, "--out", tmp_path / "tasks" / "films")
    assert (done.status, done.err) == (0, [])
    assert done.out == [f"task       {tmp_path / 'tasks' / 'films'} with the labels kind, unkind", "rows       2 train rows, 1 test rows"]
    assert Task.load(tmp_path / "tasks" / "films").rows("test") == [("fine", 0)]
    refused(run(*options, "--out", tmp_path / "tasks" / "films"), "is not empty")
    pairs = run(*options, "--text-column", "other", "--out", tmp_path / "tasks" / "pairs")
    assert pairs.status == 0
    assert Task.load(tmp_path / "tasks" / "pairs").rows("train")[0] == (("good", "x"), 0)
