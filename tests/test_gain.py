"""The model of gains: bounded, with an interval that holds; fitted to what is measured."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPT

from cond_pdiff import CondPDiffPipeline
from cond_pdiff.errors import CondPDiffError, TaskDataError
from cond_pdiff.gain import Evidence, GainModel
from cond_pdiff.training.config import parse
from cond_pdiff.training.evaluate.calibrate import CalibrateConfig, calibrate, write_gain_model
from cond_pdiff.training.evaluate.gain_fit import GainRow, check, fit_gain_model
from cond_pdiff.training.tasks.tasks import write_task

MODEL = GainModel()


def test_what_is_predicted_stays_within_the_possible() -> None:
    """The base model right on 32 of 32 examples: +16 points were promised once."""
    for hits, count in ((0, 0), (0, 32), (16, 32), (32, 32), (320, 320)):
        for separation in (-5.0, 0.0, 5.0):
            estimate = MODEL.predict(Evidence(2, 0.9, False, count, hits, separation))
            assert estimate.low <= estimate.gain <= estimate.high
            assert 0 <= estimate.base_accuracy + estimate.gain <= 1
            assert estimate.high <= 1 - (estimate.base_accuracy - 0.5) * 0.5
    sure = MODEL.predict(Evidence(2, 0.9, False, 320, 320))
    assert sure.base_accuracy > 0.9
    assert sure.gain < 0.05


def test_examples_move_the_prediction_and_narrow_it() -> None:
    none = MODEL.predict(Evidence(3, 0.4))
    better, worse = (MODEL.predict(Evidence(3, 0.4, False, 24, 12, separation)) for separation in (0.5, -0.5))
    assert worse.gain < better.gain
    assert worse.probability < 0.5 < better.probability
    assert none.prior_share == 1
    assert 0 < better.prior_share < 1
    many = MODEL.predict(Evidence(3, 0.4, False, 240, 120, 0.5))
    assert many.high - many.low < better.high - better.low
    assert many.prior_share < better.prior_share


def test_the_best_of_many_is_believed_less_than_the_mean_of_many() -> None:
    of_mean = MODEL.predict(Evidence(3, 0.4, False, 24, 12, separation=0.3))
    of_best = MODEL.predict(Evidence(3, 0.4, False, 24, 12, separation=0.0, own_separation=0.3))
    assert of_best.gain - MODEL.predict(Evidence(3, 0.4, False, 24, 12)).gain > 0
    assert of_best.gain < of_mean.gain


def test_a_known_task_gains_what_trained_tasks_gain() -> None:
    assert MODEL.predict(Evidence(2, 0.95, known=True)).gain > MODEL.predict(Evidence(2, 0.95)).gain + 0.05


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"gain": float("nan")}, "gain must be a finite number"),
        ({"gain_noise": -1.0}, "gain_noise must not be negative"),
        ({"take": 1.0}, "take must be a probability"),
        ({"take": None}, "missing entry 'take'"),
        ({"gain_of": 1.0}, "unknown entry 'gain_of'"),
        ({"gain": "0"}, "gain must be a finite number"),
    ],
)
def test_a_model_that_makes_no_sense_is_refused(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(CondPDiffError, match=message):
        GainModel.from_json({name: value for name, value in {**MODEL.to_json(), **entries}.items() if value is not None})


# --- fitting -------------------------------------------------------------------------------------------------------------------

TRUTH = replace(MODEL, gain=-0.4, gain_similarity=1.5, gain_separation=2.0, gain_own=0.5, gain_variance=0.2, gain_noise=0.01)


def drawn(model: GainModel, tasks: int, seed: int = 0) -> list[GainRow]:
    """Rows as a model says that they come about."""
    rng, rows = random.Random(seed), []
    for task in range(tasks):
        similarity, labels, beta = rng.random(), rng.choice([2, 3, 6]), rng.gauss(model.base_mean, 0.7)
        base = 1 / (1 + 2.718 ** -beta)
        for draw in range(3):
            count, separation, own = 8 * labels, rng.gauss(0, 0.5), abs(rng.gauss(0, 0.3))
            weight = count / (count + model.gain_examples)
            mean = model.gain + model.gain_similarity * similarity + weight * (model.gain_separation * separation + model.gain_own * own)
            delta = rng.gauss(mean, (model.gain_variance * (1 - weight) + model.gain_noise) ** 0.5)
            gain = 1 / (1 + 2.718 ** -(beta + delta)) - base
            hits = sum(rng.random() < base for _ in range(count))
            evidence = Evidence(labels, similarity, False, count, hits, separation, own)
            noise = rng.gauss(0, (0.2 / 400) ** 0.5)
            rows.append(GainRow(f"t{task}", f"s{task}", draw, 8, 8, evidence, 400, base, gain + noise, 0.2))
    return rows


@pytest.fixture(scope="module")
def fitted() -> GainModel:
    return fit_gain_model(drawn(TRUTH, 120))


def test_fitting_finds_what_the_rows_were_drawn_from(fitted: GainModel) -> None:
    assert fitted.gain_similarity == pytest.approx(TRUTH.gain_similarity, abs=0.4)
    assert fitted.gain + 0.5 * fitted.gain_similarity == pytest.approx(TRUTH.gain + 0.5 * TRUTH.gain_similarity, abs=0.15)
    assert fitted.gain_own < fitted.gain_separation


def test_the_interval_holds_and_what_is_returned_is_seldom_worse(fitted: GainModel) -> None:
    found = check([fitted, fitted], drawn(TRUTH, 120, seed=1))["8"]
    assert (found["tasks"], found["draws"]) == (120, 360)
    assert 0.72 <= found["inside"] <= 0.88
    assert min(found["rank"]) > 0.5
    assert found["below"] <= 0.1 < found["below_unjudged"]
    assert found["returned"] > found["unjudged"]
    boastful = replace(fitted, gain=fitted.gain + 2)
    assert check([boastful, boastful], drawn(TRUTH, 120, seed=1))["8"]["inside"] < 0.5


def test_few_tasks_are_refused() -> None:
    with pytest.raises(TaskDataError, match="4 tasks that the generator was not trained on are too few"):
        fit_gain_model(drawn(TRUTH, 4))


# --- the command ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many_tasks(tasks_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zoo's tasks, and twelve of other sources."""
    folder = shutil.copytree(tasks_folder, tmp_path_factory.mktemp("calibrate") / "tasks")
    words = ("film", "meal", "book", "room", "song", "good", "bad", "kitten", "puppy", "feather", "nest", "bark")
    for word in words:
        rows = [(f"the {word if label else other} {other}", label) for label in (0, 1) for other in words if other != word]
        splits = {"train": rows, "test": rows[::2]}
        write_task(folder / f"about-{word}", f"Is it about a {word}?", ["no", word], splits, source=f"owner/{word} : file")
    write_task(folder / "scores", "How alike?", [], {"train": [(("a", "b"), 1.0)], "test": [(("a", "b"), 1.0)]}, label_range=(0, 5))
    return folder


def test_one_command_measures_fits_and_goes_on(
    run: Any, tiny_generator: Path, many_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(tiny_generator, tmp_path / "generator")
    done = run("calibrate", own, "--tasks", many_tasks, "--out", tmp_path / "out", "--draws", 1, "--rows", 12, "--write")
    assert done.status == 0
    result = json.loads((tmp_path / "out" / "gain_model.json").read_text())
    assert json.loads("\n".join(done.out)) == result
    assert set(result["check"]) == {"1", "8"}
    measured = json.loads((tmp_path / "out" / "tasks" / "about-film.json").read_text())["rows"]
    assert [(row["shots"], row["candidates"]) for row in measured] == [(1, 1), (2, 1), (4, 1), (8, 1), (8, 8)]
    assert measured[0]["source"] == "owner/film"
    assert measured[0]["evidence"]["examples"] == 2
    assert "another generator's numbers" not in CondPDiffPipeline.from_pretrained(own)(PROMPT).report.choice.gain
    assert "another generator's numbers" in CondPDiffPipeline.from_pretrained(tiny_generator)(PROMPT).report.choice.gain
    trained = json.loads((tmp_path / "out" / "tasks" / "moods.json").read_text())["rows"]
    assert trained[0]["evidence"]["similarity"] > measured[0]["evidence"]["similarity"]
    assert not (tmp_path / "out" / "tasks" / "scores.json").exists()
    pipe = CondPDiffPipeline.from_pretrained(own)
    assert pipe.condition_index.gain_model == GainModel.from_json(result["model"])
    assert CondPDiffPipeline.from_pretrained(tiny_generator).condition_index.gain_model is None
    monkeypatch.setattr("cond_pdiff.training.evaluate.calibrate.Calibrator.measure", lambda *_: pytest.fail("measured again"))
    config = parse(CalibrateConfig, {"draws": 1, "rows": 12}, "calibrate")
    assert calibrate(own, many_tasks, tmp_path / "out", config) == result
    meta = many_tasks / "about-film" / "meta.json"
    before = meta.read_text()
    meta.write_text(before.replace("Is it about a film?", "Does it mention a film?"))
    try:
        with pytest.raises(pytest.fail.Exception, match="measured again"):
            calibrate(own, many_tasks, tmp_path / "out", config)
    finally:
        meta.write_text(before)


def test_only_a_folder_can_be_written_to() -> None:
    with pytest.raises(TaskDataError, match="not the folder of a generator"):
        write_gain_model("cond-pdiff/minilm-text-tasks", MODEL.to_json())


def test_what_is_measured_is_what_the_pipeline_says(tiny_generator: Path, many_tasks: Path, tmp_path: Path) -> None:
    from cond_pdiff.training.evaluate.calibrate import Calibrator
    from cond_pdiff.training.tasks.tasks import Task

    calibrator = Calibrator(tiny_generator, parse(CalibrateConfig, {"draws": 1, "rows": 10}, "calibrate"))
    task = Task.load(many_tasks / "about-song")
    best = calibrator.measure(task)[-1]
    seeds = [torch.Generator().manual_seed(seed) for seed in range(8)]
    choice = calibrator.pipe(task.prompt("shots/0", 16), num_adapters=8, generator=seeds).report.choice
    assert GainModel().predict(best.evidence) == choice.estimate
