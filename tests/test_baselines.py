"""Baselines: what a generator has to beat."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression

from cond_pdiff import CondPDiffPipeline, LoraAdapter, PrototypeClassifier, TaskPrompt
from cond_pdiff.errors import TaskDataError
from cond_pdiff.hub import Backbone
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.training.config import CollectConfig, parse
from cond_pdiff.training.evaluate.baselines import RIDGES, KernelRegression, ZooBaselines, logistic_regression, multitask_adapter
from cond_pdiff.training.evaluate.measure import difference
from cond_pdiff.training.recipe import read_recipe
from cond_pdiff.training.tasks.tasks import Task
from cond_pdiff.training.zoo.collect import collect
from cond_pdiff.training.zoo.params import ZooParams
from cond_pdiff.training.zoo.zoo import RUN_FILE, Zoo

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def trained(zoo: Zoo) -> dict[str, list[LoraAdapter]]:
    return {name: [run.adapter() for run in zoo.runs(name)] for name in zoo.task_names}


@pytest.fixture
def baselines(pipe: CondPDiffPipeline, tiny_zoo: Path) -> ZooBaselines:
    return ZooBaselines(pipe, Zoo(tiny_zoo), trained(Zoo(tiny_zoo)))


# --- the multi-task adapter --------------------------------------------------------------------------------------------------


def test_a_weak_multitask_adapter_is_refused_and_collected_anew(
    tiny_backbone: Backbone, tiny_zoo: Path, tasks_folder: Path, tmp_path: Path
) -> None:
    """A zoo of 0.1.0 can be read, and continued with the same settings."""
    zoo = Zoo(shutil.copytree(tiny_zoo, tmp_path / "zoo"))
    strong = multitask_adapter(zoo)
    path = zoo.folder / "multitask" / RUN_FILE
    facts = json.loads(path.read_text())
    del facts["train_lora_a"]
    path.write_text(json.dumps(facts))
    with pytest.raises(TaskDataError, match=r"multitask trained lora_B only, which makes a weak baseline; .* delete that folder"):
        multitask_adapter(zoo)
    assert zoo.multitask() is not None
    shutil.rmtree(path.parent)
    assert multitask_adapter(zoo) is None
    config = parse(CollectConfig, tiny_recipe(tiny_backbone)["collect"], "collect")
    again = multitask_adapter(collect(config, tasks_folder, zoo.folder))
    assert strong is not None
    assert again is not None
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in strong.tensors.items())


@pytest.mark.parametrize("word", ["train_lora_a", "from_multitask"])
def test_older_zoos_whose_baseline_trained_both_factors_are_accepted(tiny_zoo: Path, tmp_path: Path, word: str) -> None:
    zoo = Zoo(shutil.copytree(tiny_zoo, tmp_path / "zoo"))
    path = zoo.folder / "multitask" / RUN_FILE
    path.write_text(json.dumps({name: fact for name, fact in json.loads(path.read_text()).items() if name != "train_lora_a"}))
    zoo.facts["collect"][word] = True
    assert multitask_adapter(zoo) is not None


# --- kernel regression -------------------------------------------------------------------------------------------------------


def random_zoo(tasks: int = 12, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditions, and params that depend on them."""
    rng = torch.Generator().manual_seed(0)
    conditions = torch.randn(tasks, 4, generator=rng)
    params = 3 + conditions @ torch.randn(4, 9, generator=rng) + noise * torch.randn(tasks, 9, generator=rng)
    return conditions, params


def by_scikit_learn(conditions: torch.Tensor, params: torch.Tensor, asked: torch.Tensor, ridge: float) -> torch.Tensor:
    known, other = (rows.double() - conditions.double().mean(0) for rows in (conditions, asked))
    mean = params.double().mean(0)
    alpha = ridge * float(known.square().sum(1).mean())
    model = KernelRidge(alpha=alpha).fit(known.numpy(), (params.double() - mean).numpy())
    return (torch.from_numpy(model.predict(other.numpy())) + mean).float()


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_kernel_regression_is_kernel_ridge_with_an_intercept(ridge: float) -> None:
    conditions, params = random_zoo()
    asked = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    expected = by_scikit_learn(conditions, params, asked, ridge)
    torch.testing.assert_close(KernelRegression(conditions, params, ridge).predict(asked), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("noise", [0.01, 3.0])
def test_the_ridge_is_chosen_by_leaving_out_one_task_after_the_other(noise: float) -> None:
    conditions, params = random_zoo(noise=noise)

    def error(ridge: float) -> float:
        total = 0.0
        for task in range(len(params)):
            others = [other for other in range(len(params)) if other != task]
            made = by_scikit_learn(conditions[others], params[others], conditions[task : task + 1], ridge)[0]
            total += float((made - params[task]).square().sum())
        return total

    chosen = KernelRegression.fit(conditions, params).ridge
    assert chosen == min(RIDGES, key=error)
    assert chosen == RIDGES[0] if noise < 1 else chosen > RIDGES[0]


def test_much_ridge_gives_the_mean_and_little_the_own_soup() -> None:
    conditions, params = random_zoo(tasks=4)
    much, little = (KernelRegression(conditions, params, ridge).predict(conditions) for ridge in (1e6, 1e-9))
    torch.testing.assert_close(much, params.mean(0).expand(4, -1), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(little, params, atol=1e-3, rtol=1e-3)


def test_a_single_task_gives_its_soup() -> None:
    conditions, params = random_zoo(tasks=1)
    torch.testing.assert_close(KernelRegression.fit(conditions, params).predict(conditions + 1), params)


# --- of a zoo ----------------------------------------------------------------------------------------------------------------


def test_the_mean_of_the_zoo_is_the_mean_of_all_updates(baselines: ZooBaselines, tiny_zoo: Path) -> None:
    adapters = [adapter for own in trained(Zoo(tiny_zoo)).values() for adapter in own]
    for module in baselines.mean.modules:
        expected = torch.stack([adapter.delta(module) for adapter in adapters]).mean(0)
        torch.testing.assert_close(baselines.mean.delta(module), expected)


def test_a_regressed_adapter_depends_on_the_request(
    baselines: ZooBaselines, pipe: CondPDiffPipeline, tiny_zoo: Path, tasks_folder: Path, sentence_backbone: SentenceBackbone
) -> None:
    first, second = (Task.load(tasks_folder / name) for name in ("moods", "animals"))
    made = [baselines.regressed(TaskPrompt(task.description, labels=task.labels)) for task in (first, second)]
    embedding = pipe.encode_condition(TaskPrompt(first.description, labels=first.labels), 1)[0].float()
    expected = baselines.template.to_adapter(baselines.regression.predict(embedding)[0])
    for key, tensor in made[0].tensors.items():
        assert torch.equal(tensor, expected.tensors[key])
    assert any(not torch.equal(made[0].tensors[key], made[1].tensors[key]) for key in made[0].tensors)
    own = Zoo(tiny_zoo).runs("moods")[0].adapter()
    made[0].check_base(sentence_backbone.model)
    assert made[0].spec == own.spec
    assert all(torch.equal(made[0].factors(name)[0], own.factors(name)[0]) for name in own.modules)


def test_a_part_of_the_zoo_has_baselines_of_its_own(pipe: CondPDiffPipeline, tiny_zoo: Path) -> None:
    """As `evaluate` needs them, which takes a zoo of a part of the generator's tasks, and knows the unseen tasks' adapters too."""
    zoo, names = Zoo(tiny_zoo), pipe.condition_index.names
    own = trained(zoo)
    part = {name: own[name] for name in names[1:]}
    found = ZooBaselines(pipe, zoo, {**part, "unseen": own[names[0]]})
    assert torch.equal(found.regression.conditions, pipe.condition_index.embeddings[1:].float())
    assert all(torch.equal(found.mean.tensors[key], tensor) for key, tensor in ZooBaselines(pipe, zoo, part).mean.tensors.items())
    means = [torch.stack([found.template.to_params(adapter) for adapter in part[name]]).mean(0) for name in names[1:]]
    assert torch.equal(found.regression.params, torch.stack(means))


def test_what_is_regressed_are_mean_params_also_where_both_factors_were_trained(pipe: CondPDiffPipeline, tiny_zoo: Path) -> None:
    """Soups are in ΔW: without a shared `lora_A`, the factors of one task's have nothing to do with those of another's."""
    rng = torch.Generator().manual_seed(0)

    def moved(adapter: LoraAdapter) -> LoraAdapter:
        return replace(adapter, tensors={key: t + 0.1 * torch.randn(t.shape, generator=rng) for key, t in adapter.tensors.items()})

    adapters = {name: [moved(adapter) for adapter in own] for name, own in trained(Zoo(tiny_zoo)).items()}
    baselines = ZooBaselines(pipe, Zoo(tiny_zoo), adapters)
    for name, mean in zip(pipe.condition_index.names, baselines.regression.params, strict=True):
        torch.testing.assert_close(mean, torch.stack([baselines.template.to_params(adapter) for adapter in adapters[name]]).mean(0))


def test_an_unfinished_zoo_has_no_baselines(pipe: CondPDiffPipeline, tiny_zoo: Path) -> None:
    with pytest.raises(TaskDataError, match="has no adapter of 'moods'; run `cond-pdiff collect` to the end"):
        ZooBaselines(pipe, Zoo(tiny_zoo), {**trained(Zoo(tiny_zoo)), "moods": []})


# --- logistic regression -----------------------------------------------------------------------------------------------------


def test_names_are_further_examples(sentence_backbone: SentenceBackbone, tasks_folder: Path) -> None:
    task = Task.load(tasks_folder / "animals")
    texts = [text for text, _ in task.rows("test")]
    examples = task.prompt("0", 9).examples
    classifier = PrototypeClassifier(sentence_backbone, task.labels, max_length=16, examples=examples)
    rows = sentence_backbone.embed([*task.labels, *(text for text, _ in examples)], 16).numpy()
    classes = [*task.labels, *(label for _, label in examples)]
    model = LogisticRegression(C=3.0, max_iter=1000).fit(rows, classes, [2.0] * 3 + [1.0] * 9)
    found = [task.labels[index] for index in logistic_regression(classifier, texts).tolist()]
    assert found == model.predict(sentence_backbone.embed(texts, 16).numpy()).tolist()
    only_names = logistic_regression(PrototypeClassifier(sentence_backbone, task.labels, max_length=16), list(task.labels))
    assert only_names.tolist() == [0, 1, 2]  # a class without examples is told by its name


def test_differences_are_over_what_both_have() -> None:
    assert difference([(0.5, None), (None, 0.5)]) is None
    assert difference([(0.5, 0.25), (None, 0.5)]) == {"mean": 0.25, "standard_error": None, "interval": None}
    assert difference([(0.5, 0.3), (0.5, 0.2), (0.8, 0.4)]) == {"mean": 0.3, "standard_error": 0.0577, "interval": [0.2, 0.4]}


# --- the benchmarks that show them -------------------------------------------------------------------------------------------


def test_few_shot_puts_them_beside_the_generator(
    tiny_generator: Path, tiny_zoo: Path, tasks_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("few_shot")
    options = {"--tasks": tasks_folder, "--zoo": tiny_zoo, "--out": tmp_path, "--generator": tiny_generator, "--shots": 2, "--seeds": 2}
    arguments = [str(word) for option in options.items() for word in option]
    monkeypatch.setattr(sys, "argv", ["few_shot.py", *arguments, "--setfit-labels", "0"])
    module.main()
    summary = json.loads((tmp_path / "summary.json").read_text())
    table = capsys.readouterr().out
    for half, more in (("names only", set()), ("with examples", {"one", "raw", "logistic", "refined", "cold"})):
        columns = {"base", "generated", "multi-task", "mean", "kernel", "retrieval", "trained", "shuffled"} | more
        values = summary[half]["tasks"]["likeness"]
        assert set(values) == set(summary[half]["means"]) == set(summary[half]["generated minus"]) | {"generated"} == columns
        assert all(0 <= value <= 1 for value in values.values())
        for name, found in summary[half]["generated minus"].items():
            assert found["mean"] == pytest.approx(values["generated"] - values[name], abs=1e-4)
            assert name in table
    assert f"{100 * summary['with examples']['means']['logistic']:.1f}" in table


def test_the_curve_over_examples_has_all_its_columns(
    tiny_generator: Path, tiny_zoo: Path, tasks_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    few_shot, curves = (importlib.import_module(name) for name in ("few_shot", "unseen_curves"))
    bench, task = few_shot.TaskMeasurer(str(tiny_generator), Zoo(tiny_zoo)), Task.load(tasks_folder / "likeness")
    assert set(curves.with_examples(bench, task, 2)) == set(curves.COLUMNS["examples"]) <= set(curves.LOOKS)


def test_the_curve_over_tasks_trains_on_complete_parts_of_the_zoo(
    tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    part = importlib.import_module("unseen_curves").part_of(Zoo(tiny_zoo), ["animals", "moods"], tmp_path)
    assert ZooParams.load(part, tmp_path / "params").names == ["animals/run-0", "moods/run-0"]


def test_refining_is_measured_on_tasks_that_were_kept_out(
    tiny_generator: Path, tiny_zoo: Path, tasks_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("refinement")
    options = {"--tasks": tasks_folder, "--zoo": tiny_zoo, "--out": tmp_path, "--generator": tiny_generator, "--shots": 2}
    monkeypatch.setattr(module, "reported_tasks", lambda: ["likeness", "moods"])
    monkeypatch.setattr(sys, "argv", ["refinement.py", *(str(word) for option in options.items() for word in option)])
    module.main()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert module.table(summary) in capsys.readouterr().out
    assert (summary["tasks"], summary["sources"]) == (2, 2)
    for column in module.COLUMNS:
        values = [result["accuracy"][column] for result in summary["results"]]
        assert summary["means"][column] == pytest.approx(sum(values) / 2, abs=1e-4)
        others = [result["accuracy"]["base"] for result in summary["results"]]
        assert summary["minus the base"][column]["mean"] == pytest.approx((sum(values) - sum(others)) / 2, abs=1e-4)


def test_far_tasks_are_apart_by_source_from_those_that_settings_were_chosen_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = json.loads((Path(BENCHMARKS) / "unseen_tasks.json").read_text())
    reported = [name for names in lists["reported"].values() for name in names]
    assert len(reported) == len(set(reported)) >= 60
    assert len(lists["reported"]) >= 35
    collected = read_recipe("minilm-text-tasks")["collect"]
    assert not {*reported} & {*lists["development"], *collected["tasks"], *collected["unseen"]}
    monkeypatch.syspath_prepend(BENCHMARKS)
    own = importlib.import_module("refinement").reported_tasks()
    assert sorted(own) == sorted(reported)
    assert {names[0] for names in lists["reported"].values()} == {*own[: len(lists["reported"])]}
