from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_adapter, make_bert
from huggingface_hub import ModelCard, parse_eval_result_entries

from cond_pdiff import CondPDiffPipeline, LoraAdapter, PrototypeClassifier
from cond_pdiff.errors import HubError, TaskDataError, TrainingError
from cond_pdiff.hub import BUNDLED_FOLDER
from cond_pdiff.models.sentence_backbone import SentenceBackbone
from cond_pdiff.training.config import parse
from cond_pdiff.training.evaluate.baselines import ZooBaselines
from cond_pdiff.training.evaluate.card import write_generator_card
from cond_pdiff.training.evaluate.evaluate import evaluate
from cond_pdiff.training.evaluate.measure import EvaluateConfig, mean_interval
from cond_pdiff.training.evaluate.similarity import ZooSpace, common_errors, delta_gram
from cond_pdiff.training.evaluate.text_table import TextTable
from cond_pdiff.training.evaluate.texts import TextEvaluator
from cond_pdiff.training.tasks.tasks import Task
from cond_pdiff.training.zoo.zoo import Zoo, soup, write_run

TABLE = TextTable()
CONFIG = EvaluateConfig(samples=3, max_rows=12, num_inference_steps=4)


@pytest.fixture(scope="module")
def out(tiny_generator: Path, tiny_zoo: Path, tasks_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one evaluation of the tiny generator. Only to be read."""
    folder = tmp_path_factory.mktemp("evaluation")
    assert evaluate(tiny_generator, tiny_zoo, tasks_folder, folder, CONFIG)
    return folder


@pytest.fixture
def evaluation(out: Path) -> dict[str, Any]:
    return json.loads((out / "evaluation.json").read_text())


# --- distances ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters() -> list[LoraAdapter]:
    """Random A and B, so ΔW has both."""
    model = make_bert()
    return [make_adapter(model, "tiny", seed) for seed in range(4)]


def explicit(left: LoraAdapter, right: LoraAdapter) -> float:
    return sum(float((left.delta(module) * right.delta(module)).double().sum()) for module in left.modules)


def test_inner_products_are_those_of_the_whole_updates(adapters: list[LoraAdapter]) -> None:
    gram = delta_gram(adapters[:3], adapters)
    expected = torch.tensor([[explicit(left, right) for right in adapters] for left in adapters[:3]], dtype=torch.float64)
    torch.testing.assert_close(gram, expected, atol=1e-4, rtol=1e-4)
    assert float(expected.diagonal().min()) > 0.1


def scaled(adapter: LoraAdapter, size: float) -> LoraAdapter:
    return replace(adapter, tensors={key: tensor * (size if "lora_B" in key else 1) for key, tensor in adapter.tensors.items()})


def test_distances_are_those_of_the_whole_updates(adapters: list[LoraAdapter]) -> None:
    first, second, other, _ = adapters
    space = ZooSpace([first, second], ["a", "b"])
    double = scaled(first, 2)
    distances = space.distances([first, second, double, other])
    torch.testing.assert_close(distances.diagonal(), torch.zeros(2, dtype=torch.float64), atol=1e-3, rtol=0)
    assert float(distances[2, 0]) == pytest.approx(explicit(first, first) ** 0.5, rel=1e-4)
    difference = explicit(other, other) + explicit(second, second) - 2 * explicit(other, second)
    assert float(distances[3, 1]) == pytest.approx(difference**0.5, rel=1e-4)
    assert [index for index, _ in space.nearest([second, first, double])] == [1, 0, 0]
    assert space.nearest([double])[0][1] == pytest.approx(1, abs=1e-4)


def test_a_large_adapter_is_not_nearest_for_its_size(adapters: list[LoraAdapter]) -> None:
    """0.7 away from one of size 0.3, and 1 away from one of size 2: the first is nearer, though by a larger share of its size."""
    space = ZooSpace([scaled(adapters[0], 2), scaled(adapters[0], 0.3)], ["large", "small"])
    ((index, distance),) = space.nearest(adapters[:1])
    assert space.tasks[index] == "small"
    assert distance == pytest.approx(0.7 / 0.3, rel=1e-4)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0, 0, 0], [0, 0, 0], None),
        ([0, 0, 0], [1, 1, 0], 0),
        ([1, 0, 0], [0, 1, 0], 0),
        ([1, 1, 0], [2, 0, 1], 1 / 3),
        ([1, 0, 2], [1, 0, 1], 1),
    ],
)
def test_common_errors(first: list[int], second: list[int], expected: float | None) -> None:
    targets = torch.zeros(3, dtype=torch.long)
    assert common_errors(torch.tensor(first), torch.tensor(second), targets) == (None if expected is None else pytest.approx(expected))


# --- the evaluation ----------------------------------------------------------------------------------------------------------


def test_every_task_has_every_column(out: Path, evaluation: dict[str, Any]) -> None:
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "evaluation.json", "evaluation.md",
        *(f"receipts/tasks/{name}.json.json" for name in ("animals", "likeness", "moods")),
        "tasks/animals.json", "tasks/likeness.json", "tasks/moods.json",
    ]  # fmt: skip
    results = {result["task"]: result for result in evaluation["tasks"]}
    assert {name: result["seen"] for name, result in results.items()} == {"animals": True, "moods": True, "likeness": False}
    for name, result in results.items():
        assert list(map(set, (result["accuracy"], TABLE.columns))) == [set(TABLE.columns)] * 2
        assert [key for key, value in result["accuracy"].items() if value is None] == (["soup"] if name == "likeness" else [])
        assert all(0 <= value <= 1 for value in result["accuracy"].values() if value is not None)
        assert result == json.loads((out / "tasks" / f"{name}.json").read_text())
        assert (result["rows"], result["split"], result["licence"], result["group"]) == (12, "test", "CC0-1.0", "toy")
        assert result["retrieved"] in ("animals", "moods")
        assert 1 <= result["distinct"] <= CONFIG.samples
        assert result["novelty"]["distance"] > 0
        assert result["routed"] is None if name == "likeness" else len(result["routed"]) == 5
    assert (results["animals"]["retrieved"], results["moods"]["retrieved"]) == ("animals", "moods")


def test_the_numbers_are_those_that_can_be_measured_by_hand(
    evaluation: dict[str, Any], tiny_zoo: Path, tasks_folder: Path, sentence_backbone: SentenceBackbone, pipe: CondPDiffPipeline
) -> None:
    zoo = Zoo(tiny_zoo)
    adapters = {name: [run.adapter() for run in zoo.runs(name)] for name in zoo.task_names}
    baselines = ZooBaselines(pipe, zoo, adapters)
    for result in evaluation["tasks"]:
        task = Task.load(tasks_folder / result["task"])
        rows = task.test_rows(CONFIG.max_rows)
        classifier = PrototypeClassifier(sentence_backbone, task.labels, max_length=16)

        def accuracy(adapter: LoraAdapter | None, rows: Any = rows, classifier: PrototypeClassifier = classifier) -> float:
            predicted = classifier.with_adapter(adapter).predict([text for text, _ in rows])
            return sum(label == classifier.labels[index] for label, (_, index) in zip(predicted, rows, strict=True)) / len(rows)

        trained = [run.adapter() for run in zoo.runs(task.name)]
        expected = {
            "base": accuracy(None),
            "trained": sum(map(accuracy, trained)) / len(trained),
            "soup": accuracy(soup(trained)) if len(trained) > 1 else None,
            "multitask": accuracy(zoo.multitask().adapter()),
            "zoo_mean": accuracy(soup([adapter for own in adapters.values() for adapter in own])),
            "kernel_regression": accuracy(baselines.regressed(task.prompt(f"evaluate/{CONFIG.seed}", 32))),
            "retrieval": accuracy(soup([run.adapter() for run in zoo.runs(result["retrieved"])])),
        }
        assert {name: result["accuracy"][name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_means_are_over_the_tasks(evaluation: dict[str, Any]) -> None:
    seen = [result for result in evaluation["tasks"] if result["seen"]]
    assert (evaluation["zoo"]["tasks"], evaluation["unseen"]["tasks"]) == (2, 1)
    for name in TABLE.columns:
        assert evaluation["zoo"]["accuracy"][name] == pytest.approx(sum(result["accuracy"][name] for result in seen) / 2, abs=1e-4)
        differences = [result["accuracy"]["generated_best"] - result["accuracy"][name] for result in seen]
        if name != "generated_best":
            found = evaluation["zoo"]["differences"]["accuracy"][name]
            assert found["mean"] == pytest.approx(sum(differences) / 2, abs=1e-4)
            assert found["standard_error"] == pytest.approx(abs(differences[0] - differences[1]) / 2, abs=1e-4)
    assert evaluation["unseen"]["differences"]["accuracy"]["soup"] is None
    hits = [hit for result in seen for hit in result["routed"]]
    assert evaluation["zoo"]["routing_samples"] == len(hits) == 10
    assert evaluation["zoo"]["routing"] == pytest.approx(sum(hits) / 10, abs=1e-4)
    assert evaluation["unseen"]["routing"] is None


def test_intervals_of_means_hold_what_they_promise() -> None:
    rng = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(200):
        values = (3 + torch.randn(30, generator=rng)).tolist()
        interval = mean_interval(values, 0.8)
        assert interval == mean_interval([None, *values], 0.8)
        held += interval[0] <= 3 <= interval[1]
    assert 0.7 <= held / 200 <= 0.88
    wide, narrow = mean_interval(values), mean_interval(values, 0.8)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert mean_interval([1.0]) is mean_interval([None, 1.0]) is mean_interval([]) is None


def test_means_and_differences_have_intervals(evaluation: dict[str, Any]) -> None:
    results = copy.deepcopy(evaluation["tasks"])
    for index, result in enumerate(results):
        result["seen"] = True
        result["accuracy"].update(generated_best=0.5 + 0.1 * index, trained=0.4 + 0.1 * index, multitask=None)
    evaluation = TABLE.summarize(results, evaluation["settings"])
    means = evaluation["zoo"]
    assert means["intervals"]["accuracy"]["generated_best"] == [0.5, 0.7]  # three values: all that is known is their range
    assert means["intervals"]["accuracy"]["multitask"] is None
    gain = means["differences"]["accuracy"]["trained"]
    assert (gain["mean"], gain["interval"]) == (pytest.approx(0.1), [pytest.approx(0.1)] * 2)
    assert "60.0 (50.0 to 70.0)" in TABLE.means_table(evaluation)
    assert "| +10.0 (10.0 to 10.0) |" in TABLE.means_table(evaluation)


def test_the_report_shows_every_task_and_column(out: Path, evaluation: dict[str, Any]) -> None:
    lines = (out / "evaluation.md").read_text().splitlines()
    assert TABLE.to_markdown(evaluation).splitlines() == lines
    header = next(line for line in lines if line.startswith("| task |"))
    for result in evaluation["tasks"]:
        (row,) = (line for line in lines if line.startswith(f"| {result['task']} |"))
        assert row.count("|") == header.count("|")
        cells = dict(zip(header.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
        assert cells["seen"] == ("yes" if result["seen"] else "no")
        assert {title: cells[title] for title in TABLE.columns.values()} == {
            title: TABLE.show(result["accuracy"][name]) for name, title in TABLE.columns.items()
        }
    assert "None" not in "\n".join(lines)
    means = lines.index(next(line for line in lines if line.startswith("| mean over ")))
    heads, seen, differences = ([cell.strip() for cell in lines[means + row].strip("|").split("|")] for row in (0, 2, 3))
    assert (seen[0], differences[0]) == ("2 tasks of the zoo", "… *generated, best* minus it")
    found = evaluation["zoo"]["differences"]["accuracy"]["kernel_regression"]
    low, high = (100 * end for end in found["interval"])
    sign = "+" if found["mean"] > 0 else ""
    assert differences[heads.index("kernel regression")] == f"{sign}{100 * found['mean']:.1f} ({low:.1f} to {high:.1f})".replace("-", "−")
    assert differences[heads.index("generated, best")] == ""


def test_another_multitask_adapter_is_measured(
    out: Path, tiny_generator: Path, tiny_zoo: Path, tasks_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextEvaluator, "measure", lambda self, task: pytest.fail("measured"))
    shutil.copytree(out, tmp_path / "out")
    shutil.copytree(tiny_zoo, tmp_path / "zoo")
    other, facts = Zoo(tiny_zoo).runs("moods")[0], Zoo(tiny_zoo).multitask().facts
    shutil.rmtree(tmp_path / "zoo" / "multitask")
    write_run(tmp_path / "zoo" / "multitask", other.adapter(), facts)
    with pytest.raises(pytest.fail.Exception, match="measured"):
        evaluate(tiny_generator, tmp_path / "zoo", tasks_folder, tmp_path / "out", CONFIG)


def test_what_is_measured_is_not_measured_again(
    out: Path,
    evaluation: dict[str, Any],
    tiny_generator: Path,
    tiny_zoo: Path,
    tasks_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[str] = []
    original = TextEvaluator.measure
    monkeypatch.setattr(TextEvaluator, "measure", lambda self, task: measured.append(task.name) or original(self, task))
    shutil.copytree(out, tmp_path / "out")
    assert evaluate(tiny_generator, tiny_zoo, tasks_folder, tmp_path / "out", CONFIG) == evaluation
    assert measured == []
    (tmp_path / "out" / "tasks" / "moods.json").unlink()
    again = evaluate(tiny_generator, tiny_zoo, tasks_folder, tmp_path / "out", CONFIG)
    assert measured == ["moods"]
    assert without_times(again) == without_times(evaluation)


def without_times(evaluation: dict[str, Any] | None) -> dict[str, Any]:
    evaluation = copy.deepcopy(evaluation or {})
    for part in (evaluation["zoo"], evaluation["unseen"], *evaluation["tasks"]):
        del part["seconds_per_adapter"]
    return evaluation


def test_shards_combine(evaluation: dict[str, Any], tiny_generator: Path, tiny_zoo: Path, tasks_folder: Path, tmp_path: Path) -> None:
    assert evaluate(tiny_generator, tiny_zoo, tasks_folder, tmp_path, CONFIG, (1, 2)) is None
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == ["moods.json"]
    assert not (tmp_path / "evaluation.json").exists()
    combined = evaluate(tiny_generator, tiny_zoo, tasks_folder, tmp_path, CONFIG, (0, 2))
    assert without_times(combined) == without_times(evaluation)


@pytest.mark.parametrize("change", ["settings", "weights", "scaling"])
def test_another_generator_or_setting_is_measured_afresh(
    out: Path, tiny_generator: Path, tiny_zoo: Path, tasks_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(TextEvaluator, "measure", lambda self, task: pytest.fail("measured"))
    shutil.copytree(out, tmp_path / "out")
    config, generator = CONFIG, tiny_generator
    if change == "settings":
        config = EvaluateConfig(samples=3, max_rows=12, num_inference_steps=4, guidance_scale=2.0)
    else:
        pipe = CondPDiffPipeline.from_pretrained(tiny_generator)
        if change == "weights":
            pipe.unet.down[0].bias.data += 1
        else:
            pipe.autoencoder.register_to_config(scaling_factor=9.0)
        pipe.save_pretrained(tmp_path / "generator")
        generator = tmp_path / "generator"
    with pytest.raises(pytest.fail.Exception, match="measured"):
        evaluate(generator, tiny_zoo, tasks_folder, tmp_path / "out", config)


def test_an_unfinished_zoo_is_refused(tiny_generator: Path, tiny_zoo: Path, tasks_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_zoo, tmp_path / "zoo")
    shutil.rmtree(tmp_path / "zoo" / "tasks" / "likeness")
    with pytest.raises(TaskDataError, match=r"is not complete: 1 of \d+ runs are missing \(run 0 of 'likeness'\)"):
        evaluate(tiny_generator, tmp_path / "zoo", tasks_folder, tmp_path / "out", CONFIG, (2, 3))


def test_a_zoo_of_other_tasks_is_refused(tiny_generator: Path, tiny_zoo: Path, tasks_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_zoo, tmp_path / "zoo")
    facts = json.loads((tmp_path / "zoo" / "zoo.json").read_text())
    facts["unseen"]["moods"] = facts["tasks"].pop("moods")
    (tmp_path / "zoo" / "zoo.json").write_text(json.dumps(facts))
    with pytest.raises(TaskDataError, match="the generator was trained on other tasks"):
        evaluate(tiny_generator, tmp_path / "zoo", tasks_folder, tmp_path / "out", CONFIG)


def test_a_regression_task_is_refused(tiny_generator: Path, tiny_zoo: Path, tasks_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tasks_folder, tmp_path / "tasks")
    meta = tmp_path / "tasks" / "likeness" / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "task_type": "pair-regression", "label_range": [0, 1]}))
    with pytest.raises(TaskDataError, match="likeness is a regression task, which has no accuracy"):
        evaluate(tiny_generator, tiny_zoo, tmp_path / "tasks", tmp_path / "out", CONFIG)


@pytest.mark.parametrize("change", [{"samples": 0}, {"max_rows": 0}, {"max_rows": -1}, {"num_inference_steps": 0}, {"guidance_scale": -1}])
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=rf"evaluate: {next(iter(change))} must be greater than"):
        parse(EvaluateConfig, {**asdict(CONFIG), **change}, "evaluate")


def test_tables_can_be_made_where_numbers_are_missing(evaluation: dict[str, Any]) -> None:
    """No errors at all, no multi-task baseline, no unseen tasks."""
    results = copy.deepcopy(evaluation["tasks"])
    for result in results:
        result["novelty"].update(common_errors=None, common_errors_between_runs=None)
        result["accuracy"]["multitask"] = None
    for some in (results, [result for result in results if result["seen"]]):
        text = TABLE.to_markdown(TABLE.summarize(some, evaluation["settings"]))
        assert "None" not in text
        assert "| – |" in text


# --- the card ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def card(evaluation: dict[str, Any], tiny_generator: Path, tiny_zoo: Path, tmp_path: Path) -> Path:
    generator = Path(shutil.copytree(tiny_generator, tmp_path / "tiny-text-tasks"))
    return write_generator_card(generator, tiny_zoo, evaluation)


def test_the_card_is_complete(card: Path, evaluation: dict[str, Any]) -> None:
    text = card.read_text()
    assert card.name == "README.md"
    for leftover in ("$", "None", "nan", "@@"):
        assert leftover not in text
    for result in evaluation["tasks"]:
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {result['task']} |"))
        hidden = {"multitask", "zoo_mean", "kernel_regression", "retrieval"} if result["seen"] else {"soup", "generated_mean"}
        shown = set(TABLE.columns) - hidden
        assert all(f" {TABLE.show(result['accuracy'][name])} |" in row for name in shown)
        assert ("CC0-1.0" if result["seen"] else f"{result['retrieved']} (") in row
    assert 'from_pretrained("tiny-text-tasks")' in text  # it is not one of the bundled ones
    assert 'prompt = TaskPrompt(\n    "Is the remark kind?",\n    labels=["positive", "negative"],\n)' in text  # its own task
    assert "| adapter | LoRA, rank 2, alpha 8, on `attention.output.dense`, `key`, `query`, `value`: 1,024 parameters |" in text
    assert "| modelled | 512 parameters (`lora_B` only" in text
    assert "4 adapters of 2 tasks (2 runs a task" in text
    assert "latents 1×8, normaliser `task`" in text
    assert "sampled with DPMSolverMultistepScheduler" in text


def test_the_cards_head_is_what_the_hub_reads(card: Path, evaluation: dict[str, Any], tiny_zoo: Path) -> None:
    data = ModelCard.load(card).data
    assert (data.library_name, data.license) == ("cond-pdiff", None)  # whose data it was trained on, nobody here knows
    assert data.base_model is None  # a folder, which the text calls by its name alone
    base = Zoo(tiny_zoo).base.repo_id
    assert f"`{Path(base).name}`" in card.read_text(encoding="utf-8")
    assert base not in card.read_text(encoding="utf-8")
    assert {"lora", "cond-pdiff"} <= set(data.tags)
    told = {(result.dataset_type, result.metric_name): result.metric_value for result in data.eval_results}
    for where in ("zoo", "unseen"):
        value = told[f"cond-pdiff/{where}", "accuracy in percent, generated, best"]
        assert value == pytest.approx(100 * evaluation[where]["accuracy"]["generated_best"], abs=0.06)


def test_results_on_data_sets_of_the_hub_are_told_in_its_own_form(
    evaluation: dict[str, Any], tiny_generator: Path, tiny_zoo: Path, tmp_path: Path
) -> None:
    generator = Path(shutil.copytree(tiny_generator, tmp_path / "tiny-text-tasks"))
    write_generator_card(generator, tiny_zoo, evaluation)
    assert not (generator / ".eval_results").exists()  # these tasks come from nowhere
    tasks = [{**result, "dataset": "someone/moods" if result["task"] == "moods" else ""} for result in evaluation["tasks"]]
    write_generator_card(generator, tiny_zoo, {**evaluation, "tasks": tasks})
    (entry,) = parse_eval_result_entries(yaml.safe_load((generator / ".eval_results" / "evaluation.yaml").read_text()))
    best = next(result["accuracy"]["generated_best"] for result in tasks if result["dataset"])
    assert (entry.dataset_id, entry.task_id) == ("someone/moods", "default")
    assert entry.value == pytest.approx(100 * best, abs=0.06)
    assert "accuracy in percent, generated, best" in entry.notes


def test_the_cards_code_is_python(card: Path) -> None:
    blocks = card.read_text().split("```python\n")[1:]
    assert blocks
    for block in blocks:
        compile(block.split("```")[0], "card", "exec")


def test_a_licence_that_the_owner_has_chosen_stays(card: Path, evaluation: dict[str, Any], tiny_zoo: Path) -> None:
    chosen = "license: other\nlicense_name: mine\n"
    card.write_text(card.read_text().replace("tags:\n", chosen + "tags:\n", 1))
    text = write_generator_card(card.parent, tiny_zoo, evaluation).read_text()
    assert ModelCard(text).data.license == "other"
    assert chosen in text
    card.write_text("no head at all")
    assert "license" not in write_generator_card(card.parent, tiny_zoo, evaluation).read_text().split("---\n")[1]
    for name in ("minilm-text-tasks", "pixart-mini-styles"):
        assert ModelCard.load(BUNDLED_FOLDER / name / "README.md").data.license == "apache-2.0"


def test_a_generator_with_a_card_still_loads(card: Path, evaluation: dict[str, Any], tiny_zoo: Path) -> None:
    assert CondPDiffPipeline.from_pretrained(card.parent).condition_index.names
    before = card.read_text()
    assert write_generator_card(card.parent, tiny_zoo, evaluation).read_text() == before


@pytest.mark.parametrize("name", ["nobody/gone", "cond-pdiff/minilm-text-tasks"])
def test_only_a_local_generator_gets_a_card(evaluation: dict[str, Any], tiny_zoo: Path, name: str) -> None:
    with pytest.raises(HubError, match="is not a local generator folder"):
        write_generator_card(Path(name), tiny_zoo, evaluation)
