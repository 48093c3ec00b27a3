from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NOUNS, interrupt_at, tiny_recipe
from torch import nn

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import PrototypeClassifier
from cond_pdiff.errors import AdapterError, OutputExistsError, TaskDataError, TrainingError
from cond_pdiff.hub import Backbone
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.peft_files import WEIGHTS_FILE
from cond_pdiff.pipelines.provenance import machine_facts
from cond_pdiff.training.config import CollectConfig, parse
from cond_pdiff.training.finetuning.text_fine_tuning import TextFineTuning
from cond_pdiff.training.jobs.run import Execution
from cond_pdiff.training.tasks.metrics import measure
from cond_pdiff.training.tasks.tasks import Row, Task, write_task
from cond_pdiff.training.zoo.collect import _clip_gradients, collect
from cond_pdiff.training.zoo.zoo import Zoo, ZooRun, soup

JOBS = [("moods", 0), ("animals", 0), ("likeness", 0), ("moods", 1), ("animals", 1)]


@pytest.fixture(scope="module")
def config(tiny_backbone: Backbone) -> CollectConfig:
    return parse(CollectConfig, tiny_recipe(tiny_backbone)["collect"], "collect")


@pytest.fixture(scope="module")
def zoo(tiny_zoo: Path) -> Zoo:
    return Zoo(tiny_zoo)


@pytest.fixture
def copied(zoo: Zoo, tmp_path: Path) -> Zoo:
    """A copy, for tests that change it."""
    return Zoo(shutil.copytree(zoo.folder, tmp_path / "zoo"))


def all_runs(zoo: Zoo) -> list[ZooRun]:
    return [run for name in (*zoo.task_names, *zoo.unseen_names) for run in zoo.runs(name)]


def weights(zoo: Zoo) -> dict[str, str]:
    """Every adapter's folder and the hash of its weights, as they are on disk."""
    paths = sorted(zoo.folder.rglob(WEIGHTS_FILE))
    return {str(path.parent.relative_to(zoo.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def accuracy(classifier: PrototypeClassifier, task: Task, rows: Sequence[Row]) -> float:
    predicted = classifier.predict([text for text, _ in rows])
    return sum(label == task.labels[index] for label, (_, index) in zip(predicted, rows, strict=True)) / len(rows)


# --- what a zoo is -----------------------------------------------------------------------------------------------------------


def test_every_job_is_done_and_stands_in_the_manifest(zoo: Zoo, config: CollectConfig, tasks_folder: Path) -> None:
    assert set(weights(zoo)) == {*(f"tasks/{name}/run-{run}" for name, run in JOBS), "multitask"}
    assert [path.name for path in zoo.folder.rglob(".*")] == []
    manifest = json.loads((zoo.folder / "manifest.json").read_text())
    assert manifest["zoo"] == zoo.facts
    assert sorted((row["task"], row["run"]) for row in manifest["runs"]) == sorted(JOBS)
    for row in manifest["runs"]:
        assert row["sha256"] == weights(zoo)[f"tasks/{row['task']}/run-{row['run']}"]
        assert row["learning_rate"] == config.learning_rates[row["run"]]
        assert (row["steps"], row["split"]) == (20, "test")
        assert 0 <= row["accuracy"] <= 1
    assert len({row["seed"] for row in manifest["runs"]}) == len(JOBS)
    assert sorted(zoo.task_names) == ["animals", "moods"]
    assert zoo.unseen_names == ["likeness"]
    assert zoo.base == Backbone(**config.base)
    assert all(run.facts["machine"] == machine_facts(torch.device("cpu")) for run in all_runs(zoo))
    assert zoo.facts["tasks"]["animals"]["labels"] == list(Task.load(tasks_folder / "animals").labels)


def test_all_adapters_share_lora_a_and_differ_in_lora_b(zoo: Zoo, sentence_backbone: SentenceBackbone, tasks_folder: Path) -> None:
    runs = all_runs(zoo)
    first, *others = adapters = [run.adapter() for run in runs]
    for other in others:
        assert other.spec == first.spec
        for name in first.modules:
            assert torch.equal(other.factors(name)[0], first.factors(name)[0])
            assert not torch.equal(other.factors(name)[1], first.factors(name)[1])
    for run, adapter in zip(runs, adapters, strict=True):
        adapter.check_base(sentence_backbone.model)
        assert adapter.metadata["labels"] == list(Task.load(tasks_folder / run.task).labels)
        assert adapter.metadata["task"] == run.task


def test_trained_adapters_know_their_task(zoo: Zoo, tasks_folder: Path, sentence_backbone: SentenceBackbone) -> None:
    for name, least in (("moods", 0.9), ("animals", 0.6)):
        task, run = Task.load(tasks_folder / name), zoo.runs(name)[0]
        rows = task.rows("train")
        classifier = PrototypeClassifier(sentence_backbone, task.labels)
        trained = accuracy(classifier.with_adapter(run.adapter()), task, rows)
        assert trained >= least > 1.5 / len(task.labels)
        assert trained > accuracy(classifier, task, rows) + 0.1


def test_the_reported_accuracy_is_that_of_the_saved_adapter(zoo: Zoo, tasks_folder: Path) -> None:
    for run in zoo.runs("animals"):
        task = Task.load(tasks_folder / "animals")
        rows = task.test_rows(10)
        assert round(accuracy(PrototypeClassifier.load(run.folder), task, rows), 4) == run.facts["accuracy"]


@pytest.mark.parametrize("train_lora_a", [False, True])
def test_adapters_trained_side_by_side_are_those_trained_alone(
    config: CollectConfig, tasks_folder: Path, tmp_path: Path, train_lora_a: bool
) -> None:
    """Classification tasks with different numbers of labels and a regression task in one batch, two checkpoints each."""
    small = replace(config, train_lora_a=train_lora_a, steps=4, last_checkpoints=2, checkpoint_every=1, multitask_steps=2)
    alone, together = (collect(small, tasks_folder, tmp_path / f"{count}", together=count) for count in (1, 3))
    assert [path.name for path in sorted(together.folder.rglob("step-*"))] == [path.name for path in sorted(alone.folder.rglob("step-*"))]
    pairs = list(zip(all_runs(alone), all_runs(together), strict=True))
    assert len(pairs) == len(JOBS)
    for one, other in pairs:
        assert {name: one.facts[name] for name in ("task", "run", "seed", "steps", "learning_rate", "split")} == {
            name: other.facts[name] for name in ("task", "run", "seed", "steps", "learning_rate", "split")
        }
        assert abs(one.facts["loss"] - other.facts["loss"]) < 0.01
        for first, second in zip(one.adapters(), other.adapters(), strict=True):
            assert first.metadata == second.metadata
            for key, tensor in first.tensors.items():
                torch.testing.assert_close(second.tensors[key], tensor, rtol=0.01, atol=1e-4)


def test_a_gradient_is_clipped_for_each_adapter_by_itself() -> None:
    alone = [torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 2, requires_grad=True)]
    gradients = [torch.tensor([[[3.0, 4, 0]] * 2, [[0.1, 0, 0]] * 2]), torch.tensor([[[1.0, 2]] * 2, [[0.2, 0]] * 2])]
    stacked = [torch.zeros(gradient.shape, requires_grad=True) for gradient in gradients]
    for parameter, gradient in zip(stacked, gradients, strict=True):
        parameter.grad = gradient.clone()
    _clip_gradients(stacked, 2)
    for index in range(2):
        for parameter, gradient in zip(alone, gradients, strict=True):
            parameter.grad = gradient[index].clone()
        _clip_gradients(alone, 1)
        for one, all_ in zip(alone, stacked, strict=True):
            torch.testing.assert_close(all_.grad[index], one.grad)  # type: ignore[index]


def test_side_by_side_needs_plain_adapters(config: CollectConfig, tasks_folder: Path, tmp_path: Path) -> None:
    for settings, together in ((config, 0), (replace(config, lora_dropout=0.1), 2)):
        with pytest.raises(TrainingError, match="together must be at least 1"):
            collect(settings, tasks_folder, tmp_path / "zoo", together=together)
    assert not (tmp_path / "zoo").exists()


def test_training_both_factors_moves_lora_a(config: CollectConfig, tasks_folder: Path, zoo: Zoo, tmp_path: Path) -> None:
    small = replace(config, train_lora_a=True, tasks=("moods",), unseen=(), runs=1, steps=2, multitask_steps=0)
    (run,) = all_runs(collect(small, tasks_folder, tmp_path / "zoo"))
    moved, frozen = run.adapter(), zoo.runs("moods")[0].adapter()
    assert not any(torch.equal(moved.factors(name)[0], frozen.factors(name)[0]) for name in moved.modules)


def test_runs_can_start_from_the_multitask_adapter(config: CollectConfig, tasks_folder: Path, zoo: Zoo, tmp_path: Path) -> None:
    small = replace(config, from_multitask=True, runs=1, steps=2, multitask_steps=4, multitask_learning_rate=0.001)
    with pytest.raises(TrainingError, match="begin with shard 0"):
        collect(small, tasks_folder, tmp_path / "zoo", (1, 2))
    collect(small, tasks_folder, tmp_path / "zoo", (0, 2))
    made = collect(small, tasks_folder, tmp_path / "zoo")
    multitask, plain, first = made.multitask(), zoo.multitask(), zoo.runs("moods")[0].adapter()
    assert multitask is not None
    assert plain is not None
    assert (multitask.facts["learning_rate"], plain.facts["learning_rate"]) == (0.001, config.learning_rates[0] / 4)
    start = multitask.adapter()
    for run in all_runs(made):
        adapter = run.adapter()
        for name in adapter.modules:
            (lora_a, lora_b), (start_a, start_b) = adapter.factors(name), start.factors(name)
            assert torch.equal(lora_a, start_a)
            assert not torch.equal(lora_a, first.factors(name)[0])
            assert not torch.equal(lora_b, start_b)
    with pytest.raises(TrainingError, match="collect: from_multitask needs multitask_steps"):
        parse(CollectConfig, {"from_multitask": True, "multitask_steps": 0}, "collect")


def test_the_multitask_baseline_trains_both_factors(zoo: Zoo, config: CollectConfig) -> None:
    """At a quarter of the learning rate that fits a frozen `lora_A`, unless another is named, or the runs train both too."""
    baseline, run = zoo.multitask(), zoo.runs("moods")[0]
    assert baseline is not None
    for name in run.adapter().modules:
        (own_a, own_b), (frozen_a, _) = baseline.adapter().factors(name), run.adapter().factors(name)
        assert not torch.equal(own_a, frozen_a)
        assert own_b.any()
    assert (baseline.facts["train_lora_a"], run.facts["train_lora_a"]) == (True, False)
    assert baseline.facts["learning_rate"] == config.learning_rates[0] / 4
    assert replace(config, multitask_learning_rate=0.5).multitask_rate == 0.5
    assert replace(config, train_lora_a=True).multitask_rate == config.learning_rates[0]


def test_the_soup_is_the_mean(zoo: Zoo) -> None:
    first, second = (run.adapter() for run in zoo.runs("moods"))
    for key, tensor in soup([first, second]).tensors.items():
        torch.testing.assert_close(tensor, (first.tensors[key] + second.tensors[key]) / 2)
        assert "lora_B" in key or torch.equal(tensor, first.tensors[key])


# --- going on ----------------------------------------------------------------------------------------------------------------


def test_a_finished_zoo_is_left_as_it_is(copied: Zoo, config: CollectConfig, tasks_folder: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in copied.folder.rglob(WEIGHTS_FILE)}
    manifest = (copied.folder / "manifest.json").read_bytes()
    collect(config, tasks_folder, copied.folder)
    assert {path: path.stat().st_mtime_ns for path in copied.folder.rglob(WEIGHTS_FILE)} == times
    assert (copied.folder / "manifest.json").read_bytes() == manifest


def test_a_lost_run_comes_back_bit_for_bit(copied: Zoo, config: CollectConfig, tasks_folder: Path) -> None:
    before = weights(copied)
    for folder in ("tasks/animals/run-1", "multitask"):
        shutil.rmtree(copied.folder / folder)
    collect(config, tasks_folder, copied.folder)
    assert weights(copied) == before


@pytest.mark.parametrize(
    ("where", "calls"),
    [("torch.optim.AdamW.step", 30), ("cond_pdiff.adapter.LoraAdapter.save", 2), ("cond_pdiff.training.zoo.zoo.dump_json", 2)],
    ids=["in the second training", "before the second save", "between adapter and run.json"],
)
def test_an_interrupted_job_leaves_nothing_and_is_done_again(
    zoo: Zoo, config: CollectConfig, tasks_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, calls: int
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, where, calls)
        with pytest.raises(KeyboardInterrupt):
            collect(config, tasks_folder, tmp_path / "zoo")
    stopped = Zoo(tmp_path / "zoo")
    assert weights(stopped) == {"tasks/moods/run-0": weights(zoo)["tasks/moods/run-0"]}
    assert [path.name for path in (stopped.folder / "tasks").rglob("*") if path.name.startswith(".")] == []
    assert [run.task for run in all_runs(stopped)] == ["moods"]
    collect(config, tasks_folder, stopped.folder)
    assert weights(stopped) == weights(zoo)


def test_shards_cover_all_jobs_and_give_the_same_adapters(zoo: Zoo, config: CollectConfig, tasks_folder: Path, tmp_path: Path) -> None:
    done: list[set[str]] = []
    for index in range(3):
        shard = collect(config, tasks_folder, tmp_path / "zoo", (index, 3))
        done.append(set(weights(shard)) - set().union(*done))
    assert [len(names) for names in done] == [2, 2, 2]
    assert weights(shard) == weights(zoo)
    assert len(json.loads((shard.folder / "manifest.json").read_text())["runs"]) == len(JOBS)


def test_processes_give_the_same_adapters(zoo: Zoo, config: CollectConfig, tasks_folder: Path, tmp_path: Path) -> None:
    where = Execution(workers=2, store=f"file://{tmp_path / 'store'}")  # the jobs' way on a cluster, without one
    made = collect(config, tasks_folder, tmp_path / "zoo", execution=where)
    assert weights(made) == weights(zoo)
    assert weights(Zoo(tmp_path / "store")) == weights(zoo)
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"lora_a.safetensors", "multitask", "receipts", "tasks", "zoo.json"}


def test_a_job_that_fails_is_set_aside_and_the_others_are_done(config: CollectConfig, tasks_folder: Path, tmp_path: Path) -> None:
    broken = replace(config, learning_rates=(1e30, config.learning_rates[0]), multitask_learning_rate=config.learning_rates[0])
    with pytest.raises(TrainingError, match=r"3 of 6 jobs failed and were set aside, tasks/\w+/run-0 among them: .*the loss is nan"):
        collect(broken, tasks_folder, tmp_path / "zoo")
    made = Zoo(tmp_path / "zoo")
    assert [(run.task, run.facts["run"]) for run in all_runs(made)] == [("animals", 1), ("moods", 1)]
    assert made.multitask() is not None
    assert json.loads((made.folder / "manifest.json").read_text())["complete"] is False


# --- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 21}, r"\(collect differ\)"),
        ({"seed": 1}, r"\(collect differ\)"),
        ({"rank": 3}, r"\(collect, lora differ\)"),
        ({"tasks": ("moods",)}, r"\(tasks differ\)"),
        ({"unseen": ()}, r"\(unseen differ\)"),
    ],
)
def test_other_settings_are_refused(copied: Zoo, config: CollectConfig, tasks_folder: Path, change: dict[str, Any], message: str) -> None:
    before = weights(copied)
    with pytest.raises(TrainingError, match=rf"other settings {message}"):
        collect(replace(config, **change), tasks_folder, copied.folder)
    assert weights(copied) == before


def test_another_task_description_is_refused(copied: Zoo, config: CollectConfig, tasks_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tasks_folder, tmp_path / "tasks")
    meta = json.loads((other / "moods" / "meta.json").read_text())
    (other / "moods" / "meta.json").write_text(json.dumps({**meta, "description": "Something else?"}))
    with pytest.raises(TrainingError, match=r"\(tasks differ\)"):
        collect(config, other, copied.folder)


def test_a_folder_with_other_things_is_refused(config: CollectConfig, tasks_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"thesis\.doc"):
        collect(config, tasks_folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.doc"]


def test_missing_tasks_and_targets_are_refused_before_writing(config: CollectConfig, tasks_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskDataError, match="weather is not a task folder"):
        collect(replace(config, unseen=("weather",)), tasks_folder, tmp_path / "zoo")
    with pytest.raises(AdapterError, match="no module named"):
        collect(replace(config, target_modules=("to_q",)), tasks_folder, tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


def test_half_precision_trains_nearly_the_same_adapter(config: CollectConfig, tasks_folder: Path, tmp_path: Path) -> None:
    few = replace(config, tasks=("moods",), unseen=(), runs=1, multitask_steps=0)
    exact, rounded = (
        collect(replace(few, precision=precision), tasks_folder, tmp_path / precision).runs("moods")[0].adapter().tensors
        for precision in ("no", "bf16")
    )
    assert {tensor.dtype for tensor in rounded.values()} == {torch.float32}
    both = [torch.cat([tensors[key].flatten() for key in sorted(exact) if ".lora_B." in key]) for tensors in (exact, rounded)]
    assert not torch.equal(*both)
    assert torch.cosine_similarity(*both, dim=0) > 0.9
    with pytest.raises(TrainingError, match="precision must be 'no' or 'bf16', got 'fp16'"):
        parse(CollectConfig, {"precision": "fp16"}, "collect")


def test_a_task_is_trained_on_or_unseen(config: CollectConfig, tasks_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="'moods' is named both as a task to train on and as unseen"):
        collect(replace(config, tasks=("animals", "moods"), unseen=("moods",)), tasks_folder, tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


def test_a_loss_that_is_not_finite_stops_the_run(config: CollectConfig, tasks_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"moods: the loss is (nan|inf) at step \d+; lower the learning rate"):
        collect(replace(config, learning_rates=(1e30,)), tasks_folder, tmp_path / "zoo")
    assert weights(Zoo(tmp_path / "zoo")) == {}


@pytest.mark.parametrize("steps", [1, 2])
def test_very_short_runs_work(config: CollectConfig, tasks_folder: Path, tmp_path: Path, steps: int) -> None:
    tiny = replace(config, tasks=("moods",), unseen=(), runs=1, steps=steps, multitask_steps=0)
    assert [run.facts["steps"] for run in all_runs(collect(tiny, tasks_folder, tmp_path / "zoo"))] == [steps]


def test_changed_weights_are_noticed(copied: Zoo) -> None:
    run = copied.runs("moods")[0]
    shutil.copy(copied.runs("moods")[1].folder / WEIGHTS_FILE, run.folder / WEIGHTS_FILE)
    LoraAdapter.load(run.folder)
    with pytest.raises(TaskDataError, match="has changed since it was collected"):
        run.adapter()


def test_what_is_no_zoo_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskDataError, match=r"zoo\.json is missing"):
        Zoo(tmp_path)
    (tmp_path / "zoo.json").write_text("{")
    with pytest.raises(TaskDataError, match="not valid JSON"):
        Zoo(tmp_path)
    parts: dict[str, Any] = {"base": {}, "lora": {}, "tasks": {}, "unseen": {}}
    for collect_facts in ({"kind": "sound"}, {"kind": ["text"]}, {"family": 5}):
        (tmp_path / "zoo.json").write_text(json.dumps({**parts, "collect": collect_facts}))
        with pytest.raises(TaskDataError, match="collect names no family of base models"):
            Zoo(tmp_path)


def test_runs_come_in_their_order(copied: Zoo) -> None:
    first = copied.runs("moods")[0]
    for number in (2, 10, 11):
        folder = shutil.copytree(first.folder, copied.run_folder("moods", number))
        (folder / "run.json").write_text(json.dumps({**first.facts, "run": number}))
    assert [run.facts["run"] for run in copied.runs("moods")] == [0, 1, 2, 10, 11]
    assert copied.runs("nothing") == []


def test_a_regression_task_is_learnt_as_a_cosine(config: CollectConfig, tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [((f"the {a}", f"the {b}"), 5.0 if a == b else 0.0) for a, b in ((rng.choice(NOUNS), rng.choice(NOUNS)) for _ in range(80))]
    task = write_task(tmp_path / "tasks" / "closeness", "Are they the same?", (), {"train": rows, "test": rows[:40]}, label_range=(0, 5))
    small = replace(config, tasks=("closeness",), unseen=(), runs=1, multitask_steps=0, metric_rows=40)
    (run,) = all_runs(collect(small, tmp_path / "tasks", tmp_path / "zoo"))
    fine_tuning = TextFineTuning(small)
    texts, labels = [text for text, _ in rows], torch.tensor([label for _, label in rows])
    before, after = (fine_tuning.outputs(adapter, task, texts) for adapter in (None, run.adapter()))
    assert nn.functional.mse_loss(after, labels) < 0.5 * nn.functional.mse_loss(before, labels)
    assert run.facts["spearman"] == round(measure("spearman", after[:40], labels[:40]), 4) > 0.4
    assert "accuracy" not in run.facts
