"""A recipe for a number of tasks, and what it takes on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import refused, told

from cond_pdiff.training.config import AutoencoderConfig, CollectConfig, UNetConfig, parse
from cond_pdiff.training.recipe import read_recipe
from cond_pdiff.training.stages.suggest import RULE, scaled
from cond_pdiff.training.tasks.tasks import write_task


@pytest.mark.parametrize("count", [2, 7, 8, 20, 58, 200, 2000])
def test_a_recipe_is_scaled_to_the_number_of_tasks(count: int) -> None:
    recipe = scaled(read_recipe("minilm-text-tasks"), [f"task-{index}" for index in range(count)])
    collect = parse(CollectConfig, recipe["collect"], "collect")
    autoencoder = parse(AutoencoderConfig, recipe["autoencoder"], "autoencoder")
    unet = parse(UNetConfig, recipe["unet"], "unet")
    assert len(collect.tasks) + len(collect.unseen) == count
    assert len(collect.unseen) == (count // 8 if count >= 8 else 0) or count == 20
    assert not set(collect.tasks) & set(collect.unseen)
    assert 3 <= collect.runs <= 12
    assert len(collect.tasks) * collect.runs >= 60 or collect.runs == 12
    assert 400 <= autoencoder.fit.steps <= 8000
    assert 1000 <= unet.fit.steps <= 20_000
    assert autoencoder.model["latent_dim"] == (192 if count >= 200 else 96)
    assert unet.denoiser["block_out_channels"] == ([64, 128, 128, 5] if count >= 200 else [32, 64, 64, 5])
    assert scaled(read_recipe("minilm-text-tasks"), [f"task-{index}" for index in reversed(range(count))]) == recipe


def test_the_shipped_number_of_tasks_gives_about_the_shipped_recipe() -> None:
    shipped = read_recipe("minilm-text-tasks")
    recipe = scaled(shipped, [f"task-{index}" for index in range(66)])  # of which 8 are kept out
    assert (len(recipe["collect"]["tasks"]), recipe["collect"]["runs"]) == (58, 3)
    for stage in ("autoencoder", "unet"):
        assert recipe[stage]["fit"]["steps"] == pytest.approx(shipped[stage]["fit"]["steps"], rel=0.03)
    assert recipe["unet"]["conditions_per_task"] == shipped["unet"]["conditions_per_task"]


def test_a_suggested_recipe_is_written_timed_and_read(run: Any, recipe: dict[str, Any], tasks_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "start.json").write_text(json.dumps(recipe))
    options = ["recipe", "suggest", "--recipe", tmp_path / "start.json", "--tasks", tasks_folder, "--out", tmp_path / "mine.json"]
    facts = told(run(*options, "--json"))
    assert facts["adapters"] == 36
    assert set(facts["seconds"]) == {"collect", "conditions", "autoencoder", "unet", "total"}
    assert facts["seconds"]["total"] == pytest.approx(sum(value for name, value in facts["seconds"].items() if name != "total"), abs=0.3)
    assert facts["seconds"]["collect"] > 0
    assert facts["rule"] == RULE
    assert facts["machine"]["threads"] == 1
    written = read_recipe(tmp_path / "mine.json")
    assert written["collect"]["tasks"] == ["animals", "likeness", "moods"]
    assert written["collect"]["base"] == recipe["collect"]["base"]
    assert run("recipe", "show", tmp_path / "mine.json").status == 0
    refused(run(*options), "mine.json is already there")
    done = run(*options, "--force")
    assert [line.split()[0] for line in done.out] == ["zoo", "steps", "time", "measured", "sizes", "recipe"]


def test_tasks_that_cannot_be_collected_are_named_at_once(run: Any, tasks_folder: Path, tmp_path: Path) -> None:
    rows = [("good", 0), ("bad", 1)]
    write_task(tmp_path / "tasks" / "first", "Is it kind?", ["a", "b"], {"train": rows, "test": rows})
    options = ["recipe", "suggest", "--tasks", tmp_path / "tasks", "--out", tmp_path / "mine.json"]
    refused(run(*options), "has 1 task; a generator is trained on at least 2")
    write_task(tmp_path / "tasks" / "second", "Is it kind?", ["a", "b"], {"train": rows})
    refused(run(*options), "second has no validation.jsonl.gz; a task needs a test or validation split")
    collect = ["collect", "--tasks", tmp_path / "tasks", "--zoo", tmp_path / "zoo"]
    (tmp_path / "recipe.json").write_text('{"collect": {}}')
    refused(run(*collect, "--recipe", tmp_path / "recipe.json"), "second has no validation.jsonl.gz")
    assert not (tmp_path / "zoo").exists()
    assert not (tmp_path / "mine.json").exists()
