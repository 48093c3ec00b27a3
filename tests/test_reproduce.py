from __future__ import annotations

import copy
import json
import math
import random
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NOUNS, interrupt_at, refused, tiny_recipe
from PIL import Image
from transformers import MPNetConfig, MPNetModel

from cond_pdiff.conditions.style_image import STYLE_VIEWS
from cond_pdiff.errors import TrainingError
from cond_pdiff.hub import Backbone
from cond_pdiff.lora import LoraSpec, target_linears, update_shape
from cond_pdiff.training.evaluate.measure import mean_interval
from cond_pdiff.training.evaluate.similarity import ZooSpace
from cond_pdiff.training.evaluate.style_table import StyleTable
from cond_pdiff.training.jobs.run import Execution
from cond_pdiff.training.reproduce.ablations import Ablation, AblationRunner
from cond_pdiff.training.reproduce.cells import open_folder
from cond_pdiff.training.reproduce.config import Settings, merge, read_quick
from cond_pdiff.training.reproduce.experiment import Experiment
from cond_pdiff.training.reproduce.principal_code import PrincipalCode
from cond_pdiff.training.reproduce.reproduce import REPRODUCTIONS, SECTIONS, recorded, reproduce
from cond_pdiff.training.tasks.metrics import measure
from cond_pdiff.training.tasks.tasks import write_task

ROWS = 12
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tasks(tasks_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three tasks, and one that asks how alike two texts are."""
    folder = tmp_path_factory.mktemp("with-scores") / "tasks"
    shutil.copytree(tasks_folder, folder)
    rng = random.Random(0)
    pairs = [(f"the {rng.choice(NOUNS)}", f"the {rng.choice(NOUNS)}") for _ in range(60)]
    rows = [(pair, 5.0 if pair[0] == pair[1] else round(rng.uniform(0, 3), 1)) for pair in pairs]
    write_task(folder / "closeness", "How alike are the texts?", (), {"train": rows, "validation": rows[:20]}, label_range=(0, 5))
    return folder


@pytest.fixture(scope="module")
def recipe(tiny_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = tiny_recipe(tiny_backbone)
    recipe["collect"] |= {"tasks": ["moods", "animals", "closeness"], "unseen": [], "steps": 6, "multitask_steps": 3}
    for stage in ("autoencoder", "unet"):
        recipe[stage]["fit"]["steps"] = 4
    recipe["reproduce"] = {
        "ranks": [2, 1], "alphas": {"1": 8, "2": 8},
        "zoos": {
            "runs": {},
            "checkpoints": {"runs": 1, "train_lora_a": True, "last_checkpoints": 4, "checkpoint_every": 1, "multitask_steps": 0},
        },
        "table_zoos": ["runs", "checkpoints"], "max_rows": ROWS, "samples": 3, "reported_samples": 2, "selection_rows": 6,
        "num_inference_steps": 2, "figure_rank": 2, "noise_sizes": [0, 1],
        "distribution_tasks": ["moods"], "performance_tasks": ["animals"],
    }  # fmt: skip
    recipe["ablation"] = {
        "tasks": ["moods", "closeness"], "seeds": 2, "samples": 2, "max_rows": 6, "unet": {"fit": {"steps": 3}},
        "ablations": [
            {"group": "all", "name": "as it is"},
            {"group": "generator", "name": "diffusion"},
            {"group": "checkpoints", "name": "1", "zoo": "checkpoints", "adapters": 1},
            {"group": "condition", "name": "one-hot", "condition": ["one-hot"]},
            {"group": "condition", "name": "examples", "condition": ["examples"], "num_inference_steps": 1},
            {"group": "code", "name": "pca", "pca": True},
            {"group": "scheduler", "name": "DDPM", "scheduler": "DDPMScheduler"},
            {"group": "blocks", "name": "half", "blocks": 0.5, "guidance_scale": 1.0},
            *({"group": "generator", "name": name, "sampler": name} for name in ("gaussian", "retrieval", "conditional mean")),
        ],
    }  # fmt: skip
    recipe["quick"] = {"reproduce": {"ranks": [1], "max_rows": 4}}
    path = tmp_path_factory.mktemp("recipe") / "tiny.json"
    path.write_text(json.dumps(recipe))
    return path


@pytest.fixture(scope="module")
def out(recipe: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished table 1. Only to be read."""
    folder = tmp_path_factory.mktemp("reproduced") / "out"
    reproduce("table1", tasks, folder, recipe)
    return folder


def test_table1_has_every_rank_way_task_and_column(out: Path) -> None:
    result = json.loads((out / "table1.json").read_text())
    assert [(row["rank"], row["zoo"]) for row in result["means"]] == [(r, way) for r in (1, 2) for way in ("runs", "checkpoints")]
    assert len(result["rows"]) == 4 * 3
    for row in result["rows"]:
        assert row["rows"] == ROWS
        assert row["metric"] == ("spearman" if row["task"] == "closeness" else "accuracy")
        for column in ("base", "full", "retrieval", "original", "soup", "generated", "generated_best", "noise", "soup_noise"):
            assert -1 <= row[column] <= 1
        assert (row["multitask"] is None) == (row["zoo"] == "checkpoints")
    for means in result["means"]:
        own = [row for row in result["rows"] if (row["rank"], row["zoo"]) == (means["rank"], means["zoo"])]
        assert math.isclose(means["soup"], sum(row["soup"] for row in own) / 3, abs_tol=1e-4)
        assert means["routing_samples"] == 15
        assert means["novelty_distance"] > 0
    text = (out / "table1.md").read_text()
    assert result["command"] in text
    assert text.count("closeness") == 4


def test_a_table1_that_is_cut_short_tells_what_is_complete(
    recipe: Path, tasks: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(out, tmp_path / "out")
    cells = tmp_path / "out" / "cells" / "table1"
    for name in ("moods", "closeness"):
        (cells / "runs-2" / f"{name}.json").unlink()
    shutil.rmtree(cells / "checkpoints-1")
    interrupt_at(monkeypatch, "cond_pdiff.training.reproduce.table1._adapters", 3)
    with pytest.raises(KeyboardInterrupt):
        reproduce("table1", tasks, tmp_path / "out", recipe)
    whole, part = (json.loads((folder / "table1.json").read_text()) for folder in (out, tmp_path / "out"))
    assert part["missing"] == ["rank 1, runs", "rank 1, checkpoints", "rank 2, checkpoints"]
    assert part["means"] == [row for row in whole["means"] if (row["rank"], row["zoo"]) == (2, "runs")]
    assert "Not measured yet: rank 1, runs; " in (tmp_path / "out" / "table1.md").read_text()
    assert whole["missing"] == []


def test_table3_makes_adapters_of_the_task_that_is_asked_for(recipe: Path, tasks: Path, out: Path) -> None:
    runner = AblationRunner(Experiment(Settings.read(recipe, False), tasks, out))
    data = runner.zoo(Ablation("generator", "retrieval", sampler="retrieval"))
    assert [runner.bank.names[index] for index in data.tasks] == [name.partition("/")[0] for name in data.names]
    assert [task.name for task in runner.tasks] == runner.bank.names != list(runner.experiment.tasks)


def test_a_scheduler_is_its_variants_alone(recipe: Path, tasks: Path, out: Path) -> None:
    runner = AblationRunner(Experiment(Settings.read(recipe, False), tasks, out))
    plain, other = Ablation("scheduler", "its own"), Ablation("scheduler", "DDPM", scheduler="DDPMScheduler")
    first, noisy, again = (runner.params(variant, runner.experiment.tasks["moods"], 0) for variant in (plain, other, plain))
    assert torch.equal(first, again)
    assert not torch.equal(first, noisy)


def test_table3_has_every_variant_with_its_deviation(recipe: Path, tasks: Path, out: Path) -> None:
    result = reproduce("table3", tasks, out, recipe)
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 11
    for row in rows.values():
        assert math.isclose(row["mean"], (row["moods"] + row["closeness"]) / 2, abs_tol=1e-4)
        assert row["mean_deviation"] >= 0
        assert 0 <= row["routing"] <= 1
    assert {name: rows["as it is"][name] for name in ("moods", "mean")} == {name: rows["diffusion"][name] for name in ("moods", "mean")}
    assert rows["retrieval"]["routing"] == 1.0
    assert len(list((out / "cells" / "table3").iterdir())) == 2 * 10  # two variants share their cells
    assert len(list((out / "ablations").iterdir())) == 2 * 5  # and so do trained generators
    assert (out / "table3.md").read_text().count("±") == 11 * 3 + 1
    with Image.open(out / "table3.png") as picture:
        assert picture.getpixel((0, 0)) == (255, 255, 255, 255)


def test_figures_are_drawn_from_their_numbers(recipe: Path, tasks: Path, out: Path) -> None:
    result = reproduce("figures", tasks, out, recipe)
    points = result["performance"]["animals"]["points"]
    assert {kind: len(found) for kind, found in points.items()} == {"original": 2, "generated": 3, "soup": 1, "noise": 2}
    assert all(-1 <= similarity <= 1 for found in points.values() for similarity, _ in found)
    assert {kind: len(found) for kind, found in result["distribution"]["moods"].items()} == {"original": 4, "generated": 3, "soup": 1}
    ways = result["trajectories"]["moods"]["trajectories"]
    assert [len(way) for way in ways] == [2] * 5
    assert [row["size"] for row in result["noise"]["animals"]] == [0, 1]
    text = (out / "figures.md").read_text()
    for name in ("figure3e", "figure3f", "figure4a", "errors", "noise", "table1"):
        path = out / f"{name}.png"
        assert path.stat().st_size <= 150_000
        assert name == "table1" or f"({name}.png)" in text
        with Image.open(path) as picture:
            assert picture.getpixel((0, 0)) == (255, 255, 255, 255)  # opaque: legible on a dark page too


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"sampler": "magic"}, "sampler must be 'diffusion', "),
        ({"condition": ["title"]}, "condition: entry 0 must be 'description', "),
        ({"condition": []}, "condition must be some of"),
        ({"blocks": 0.0}, "blocks must be greater than 0"),
        ({"scheduler": "Magic"}, "scheduler must be a class of diffusers.schedulers"),
        ({"autoencoder": {"model": {"latent_dims": 4}}}, "latent_dims"),
        ({"wey": "runs"}, "ablation, ablations, 1: unknown entry 'wey'"),
        ({"zoo": "walk"}, "no zoo 'walk'"),
    ],
)
def test_variants_that_mean_nothing_are_refused(recipe: Path, tasks: Path, tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    changed = json.loads(recipe.read_text())
    changed["ablation"]["ablations"] = [{"group": "a", "name": "b", **entries}]
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    with pytest.raises(TrainingError, match=message):
        reproduce("table3", tasks, tmp_path / "out", tmp_path / "changed.json", quick=True)


def test_principal_components_keep_a_zoo_that_they_can_span() -> None:
    values = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    code = PrincipalCode(values, most=8)
    latents = code.fit_scaling_factor(code.encode(values))
    torch.testing.assert_close(code.encode(values), latents)
    assert latents.shape == (4, *code.latent_shape) == (4, 1, 3)
    assert math.isclose(float(latents.square().mean()), 1.0, rel_tol=1e-5)
    torch.testing.assert_close(code.decode(latents), values, rtol=0, atol=1e-5)


def test_a_folder_that_was_begun_with_a_recipe_of_the_first_release_goes_on(tmp_path: Path) -> None:
    old, new = {"unet": {"model": {"width": 8}}}, {"unet": {"denoiser": {"type": "ParamUNet1D", "width": 8}}}
    for recipe in (old, new):
        open_folder(tmp_path / "out", recorded(recipe, SECTIONS))
    with pytest.raises(TrainingError, match="other settings"):
        open_folder(tmp_path / "out", recorded({"unet": {"denoiser": {"width": 9}}}, SECTIONS))


def test_a_killed_run_goes_on_and_the_same_seed_gives_the_same_bytes(
    recipe: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = tmp_path / "undisturbed"
    reproduce("table1", tasks, undisturbed, recipe, quick=True)
    killed = tmp_path / "killed"
    with monkeypatch.context() as patch:
        interrupt_at(patch, "cond_pdiff.training.reproduce.table1.noise_controls", 2)
        with pytest.raises(KeyboardInterrupt):
            reproduce("table1", tasks, killed, recipe, quick=True)
    assert not (killed / "table1.json").exists()
    before = {path: path.stat().st_mtime_ns for path in killed.glob("cells/**/*.json")}
    assert len(before) == 4
    reproduce("table1", tasks, killed, recipe, quick=True)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in killed.glob("cells/**/*.json")}.items()
    assert (killed / "table1.json").read_bytes() == (undisturbed / "table1.json").read_bytes()
    (killed / "table1.json").unlink()
    monkeypatch.setattr("cond_pdiff.training.reproduce.experiment.Experiment.predict", None)  # whatever measures would fail
    monkeypatch.setattr("cond_pdiff.training.reproduce.experiment.Experiment.with_generator", None)
    reproduce("table1", tasks, killed, recipe, quick=True)
    assert (killed / "table1.json").read_bytes() == (undisturbed / "table1.json").read_bytes()
    monkeypatch.undo()
    reproduce("table1", tasks, tmp_path / "processes", recipe, quick=True, execution=Execution(workers=2))
    assert (tmp_path / "processes" / "table1.json").read_bytes() == (undisturbed / "table1.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "was begun with other settings"),
        ({"reproduce": None}, "has no section 'reproduce'"),
        ({"reproduce": {"rank": 1}}, "reproduce: unknown entry 'rank'"),
        ({"reproduce": {"reported_samples": 9}}, "reported_samples must be from 1 to samples (3), got 9"),
        ({"reproduce": {"ranks": [2, 3]}}, "alphas must name every rank; 3 is missing of ['1', '2']"),
        ({"reproduce": {"table_zoos": ["walks"]}}, "no zoo 'walks'; there are"),
        ({"reproduce": {"zoos": {"runs": {"stepz": 5}}}}, "reproduce, zoos, runs: unknown entry 'stepz'"),
        ({"reproduce": {"figure_rank": 8}}, "alphas must name every rank; 8 is"),
        ({"reproduce": {"performance_tasks": ["gone"]}}, "'gone' is to be measured, but it is not among the tasks"),
        ({"collect": {"tasks": ["moods", "animals", "closeness", "gone"]}}, "gone is not a task folder"),
        ({"unet": {"steps": 5}}, "unet: unknown entry 'steps'"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(
    run: Any, recipe: Path, tasks: Path, out: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    changed = merge(json.loads(recipe.read_text()), change)
    changed = {name: section for name, section in changed.items() if section is not None}
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    folder = tmp_path / "out" if change else out
    options = ["--tasks", tasks, "--out", folder, "--recipe", tmp_path / "changed.json", *([] if change else ["--quick"])]
    refused(run("reproduce", "table1", *options), message)
    assert change == {} or not folder.exists()


def test_names_and_folders_that_mean_nothing_are_refused(run: Any, recipe: Path, tasks: Path, out: Path, tmp_path: Path) -> None:
    options = ["--tasks", tasks, "--recipe", recipe, "--quick"]
    refused(run("reproduce", "table9", *options, "--out", tmp_path / "out"), "no reproduction 'table9'; there are [")
    refused(run("reproduce", "table1", *options, "--out", tasks), "is not empty")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "settings.json").write_text("{")
    refused(run("reproduce", "table1", *options, "--out", tmp_path / "damaged"), "settings.json is not valid JSON")


@pytest.mark.parametrize(
    ("metric", "predicted", "labels", "expected"),
    [
        ("accuracy", [0, 1, 1, 1], [0, 1, 0, 1], 0.75),
        ("f1", [0, 1, 1, 1], [0, 1, 0, 1], 0.8),
        ("f1", [0, 0], [0, 0], 0.0),
        ("matthews", [0, 1, 1, 1], [0, 1, 0, 1], 1 / math.sqrt(3)),
        ("matthews", [1, 1], [0, 1], 0.0),
        ("spearman", [0.1, 0.2, 0.9], [1.0, 2.0, 3.0], 1.0),
        ("spearman", [0.9, 0.2, 0.1, 0.2], [1.0, 2.0, 3.0, 2.0], -1.0),
        ("spearman", [0.5, 0.5], [1.0, 2.0], 0.0),
    ],
)
def test_metrics(metric: str, predicted: list[float], labels: list[float], expected: float) -> None:
    assert math.isclose(measure(metric, torch.tensor(predicted), torch.tensor(labels)), expected, abs_tol=1e-9)


@pytest.mark.parametrize("quick", [False, True])
def test_the_shipped_recipe_can_be_used(quick: bool) -> None:
    settings = Settings.read("reproduce-minilm", quick)
    assert settings.reproduce.table_zoos == ("runs", "checkpoints")
    assert list(settings.reproduce.ranks) == ([4] if quick else [4, 1, 2, 16])
    assert settings.reproduce.max_rows == (100 if quick else 0)


def test_table2_collects_trains_and_measures_styles_once(
    style_recipe: dict[str, Any], styles_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**copy.deepcopy(style_recipe), "reproduce": {"samples": 2, "max_rows": 2}, "quick": {"reproduce": {"max_rows": 1}}}
    (tmp_path / "tiny.json").write_text(json.dumps(recipe))
    result = reproduce("table2", styles_folder, tmp_path / "out", tmp_path / "tiny.json")
    assert result["command"] == "cond-pdiff reproduce table2 --tasks styles --out results/tiny --recipe tiny.json"
    assert [(row["style"], row["seen"]) for row in result["rows"]] == [("embers", True), ("lagoon", True), ("moss", False)]
    assert set(result["zoo"]["frechet"]) == set(StyleTable.columns)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    monkeypatch.setattr("torch.optim.AdamW.step", None)  # nothing is trained again
    assert reproduce("table2", styles_folder, tmp_path / "out", tmp_path / "tiny.json") == result
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    with pytest.raises(TrainingError, match="begun with other settings"):
        reproduce("table2", styles_folder, tmp_path / "out", tmp_path / "tiny.json", quick=True)
    assert read_quick("pixart-mini-styles", quick=True)["reproduce"]["max_rows"] == 4


def test_mpnet_has_the_size_of_the_papers_bert() -> None:
    settings = Settings.read("reproduce-minilm+mpnet", False)
    (rank,) = settings.reproduce.ranks
    for way in settings.reproduce.table_zoos:
        config = settings.collect(way, rank)
        spec = LoraSpec("base", rank, config.alpha, config.target_modules)
        with torch.device("meta"):
            linears = target_linears(MPNetModel(MPNetConfig()), spec)
        assert sum(sum(update_shape(linear)) for linear in linears.values()) == 73_728


def test_noise_takes_an_adapter_as_far_away_as_is_asked(recipe: Path, tasks: Path, out: Path) -> None:
    """In ΔW, also for adapters whose factors are scaled otherwise, as those of a soup are."""
    trained_zoo = Experiment(Settings.read(recipe, False), tasks, out).with_generator("checkpoints", 2)
    adapter = trained_zoo.trained["moods"][0]
    tensors = {key: tensor * (4.0 if ".lora_B." in key else 0.25) for key, tensor in adapter.tensors.items()}
    for one in (adapter, replace(adapter, tensors=tensors)):
        space = ZooSpace([one], ["moods"])
        for share in (0.0, 0.5, 2.0):
            distance = float(space.distances([trained_zoo.with_noise(one, share * float(space.norms), seed=1)]) / space.norms)
            assert distance == pytest.approx(share, abs=1e-3)


# --- docs/paper.md -----------------------------------------------------------------------------------------------------------


STYLE_PAGE = ROOT / "docs" / "style_numbers.md"
DOCUMENTS = {name: made.to_markdown for name, made in REPRODUCTIONS.items()}


def missing_from(document: str, name: str, results: Path) -> list[str]:
    """Lines that a document should have: the tables of a result, or that there is none yet."""
    path, unmeasured = results / f"{name}.json", f"`results/{name}.json`: not measured yet"
    if not path.exists():
        return [] if unmeasured in document else [unmeasured]
    result = json.loads(path.read_text())
    assert not result["quick"]
    made = DOCUMENTS[name](result, "").splitlines()
    lines = document.splitlines()
    return [line for line in made if line.startswith("|") and line not in lines] + ([unmeasured] if unmeasured in document else [])


OF_THE_RECIPE = [(name, ROOT / "results") for name in DOCUMENTS]
OF_VARIANTS = [(path.stem, path.parent) for path in sorted((ROOT / "results").glob("*/*.json"))]


@pytest.mark.parametrize(("name", "results"), OF_THE_RECIPE + OF_VARIANTS)
def test_the_document_has_the_numbers_of_the_results(name: str, results: Path) -> None:
    assert missing_from((ROOT / "docs" / "paper.md").read_text(encoding="utf-8"), name, results) == []


@pytest.mark.parametrize("document", ["docs/style_numbers.md", "docs/paper.md", "cond_pdiff/bundled/pixart-mini-styles/README.md"])
def test_documents_have_the_numbers_of_styles(document: str) -> None:
    part = StyleTable().means_table(json.loads((ROOT / "results" / "style_part.json").read_text())).splitlines()
    assert len(part) == 14
    assert set(part) <= set((ROOT / document).read_text(encoding="utf-8").splitlines())


def test_the_card_has_the_numbers_of_each_style() -> None:
    result, table = json.loads((ROOT / "results" / "style_part.json").read_text()), StyleTable()
    card = (ROOT / "cond_pdiff" / "bundled" / "pixart-mini-styles" / "README.md").read_text(encoding="utf-8").splitlines()
    for row in result["rows"]:
        columns = table.seen_columns if row["seen"] else table.unseen_columns
        cells = "".join(f" {table.show(row['frechet'][column])} |" for column in columns)
        assert [line for line in card if line.startswith(f"| {row['style']} |") and cells in line]


def test_the_page_has_the_numbers_of_the_floor() -> None:
    styles = json.loads((ROOT / "results" / "style_floor.json").read_text())["styles"]
    words = " ".join(STYLE_PAGE.read_text(encoding="utf-8").split())
    for column in ("generated", "base"):
        values = [style[column]["kid"] for style in styles if not style["seen"]]
        low, high = mean_interval(values) or (0, 0)
        assert f"{statistics.fmean(values):.3g} ({low:.3g} to {high:.3g})" in words
    assert {(f"{style['base_floor']['frechet']:.1f}", f"{style['base_floor']['kid']:.2f}") for style in styles} == {("11.6", "-0.07")}
    assert "it is 11.6, and the unbiased kernel distance −0.07" in words


def test_the_page_has_the_gain_of_many_views() -> None:
    styles = json.loads((ROOT / "results" / "style_views.json").read_text())["styles"]
    words = " ".join(STYLE_PAGE.read_text(encoding="utf-8").split())
    for metric in ("kid", "frechet"):
        gains = [style[metric]["1"] - style[metric][str(STYLE_VIEWS)] for style in styles]
        low, high = mean_interval(gains) or (0, 0)
        assert f"{statistics.fmean(gains):.1f} ({low:.1f} to {high:.1f})" in words
        means = {views: statistics.fmean(style[metric][views] for style in styles) for views in styles[0][metric]}
        assert min(means, key=means.__getitem__) == str(STYLE_VIEWS)


def test_other_numbers_are_noticed(out: Path, tmp_path: Path) -> None:
    text, result = (out / "table1.md").read_text(), json.loads((out / "table1.json").read_text())
    (tmp_path / "table1.json").write_text(json.dumps(result))
    assert missing_from(text, "table1", tmp_path) == []
    result["means"][0]["soup"] += 0.01
    (tmp_path / "table1.json").write_text(json.dumps(result))
    (line,) = missing_from(text, "table1", tmp_path)
    assert line.startswith("| 1 | runs |")
    assert missing_from(text, "figures", tmp_path) == ["`results/figures.json`: not measured yet"]


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("*.*")), ids=lambda path: path.name)
def test_results_are_small(path: Path) -> None:
    assert path.stat().st_size <= (150_000 if path.suffix == ".png" else 100_000)
