"""Generators of adapters for language models, from a description to an answer: `train`, `generate`, `ask`, `evaluate`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HIDDEN, TINY_FIT, TINY_RECIPE, quiet, refused, told
from test_causal_lm import bases, collections, section, zoos

from cond_pdiff import CondPDiffPipeline, LoraAdapter, TaskPrompt
from cond_pdiff.conditions.instruction import Instruction
from cond_pdiff.errors import ConditionError, TrainingError
from cond_pdiff.few_shot import FewShotRequest, choose_by_answers
from cond_pdiff.generator_info import GeneratorInfo
from cond_pdiff.hub import Backbone
from cond_pdiff.training.config import CollectConfig, TuneConfig, parse
from cond_pdiff.training.evaluate.evaluate import evaluate
from cond_pdiff.training.evaluate.measure import EvaluateConfig
from cond_pdiff.training.recipe import read_recipe
from cond_pdiff.training.stages.check import check_generator
from cond_pdiff.training.stages.language_tune import LanguageTuneStage
from cond_pdiff.training.stages.loop import step_generator
from cond_pdiff.training.stages.train import train
from cond_pdiff.training.stages.tune import tune
from cond_pdiff.training.tasks.language import load_language_tasks
from cond_pdiff.training.zoo.collect import collect
from cond_pdiff.training.zoo.push import write_zoo_card
from cond_pdiff.training.zoo.zoo import Zoo

__all__ = ["bases", "collections", "section", "zoos"]

EXAMPLES = [("up", "down"), ("in", "out")]


@pytest.fixture(scope="module")
def generator(zoos: dict[str, Zoo], collections: Path, tiny_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoder = {"type": "SentenceConditionEncoder", "backbone": tiny_backbone.to_json(), "embedding_dim": HIDDEN}
    recipe = {**TINY_RECIPE, "unet": {**TINY_RECIPE["unet"], "condition_encoder": encoder}}
    return train(recipe, zoos["llama"].folder, collections, tmp_path_factory.mktemp("run"))


def test_a_generator_for_language_models(generator: Path, zoos: dict[str, Zoo], collections: Path, tmp_path: Path) -> None:
    assert check_generator(generator, zoos["llama"].folder, collections, generator.parent).generated == 2
    pipe = quiet(CondPDiffPipeline.from_pretrained(generator))
    prompt = TaskPrompt("Do opposites.", EXAMPLES, free=True)
    out = pipe(prompt, num_adapters=3, generator=torch.Generator().manual_seed(0))
    assert "labels     none: answers are free" in str(out.report)
    assert "on the given examples (base model" in str(out.report) or "chosen     the base model" in str(out.report)
    assert (out.adapter.metadata["labels"], out.adapter.family.name) == ([], "causal-lm")
    assert Instruction.recorded(out.adapter.metadata) == Instruction("Do opposites.")
    base = pipe.base_model()
    tokens = base.prompt_tokens("hello")
    with out.adapters[0].attached(base):
        inside = base.judge([tokens], [base.answer_tokens("x")])[0]
    with out.adapters[0].attached(base.model):
        assert torch.equal(base.judge([tokens], [base.answer_tokens("x")])[0], inside)
    assert not torch.equal(base.judge([tokens], [base.answer_tokens("x")])[0], inside)
    again = LoraAdapter.load(out.save_adapter(tmp_path / "adapter"))
    assert again.metadata["condition"]["free"] is True
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "    Do opposites.\n    Input: …" in card
    assert "AutoModelForCausalLM" in card


def test_labels_of_a_prompt_are_chosen_among(generator: Path) -> None:
    pipe = quiet(CondPDiffPipeline.from_pretrained(generator))
    out = pipe(TaskPrompt("Which side?", [("up", "left"), ("down", "left_most")]), num_adapters=2)
    assert out.report.labels == ("left", "left_most")
    assert out.report.choice is not None
    assert out.report.choice.base is not None
    assert pipe(TaskPrompt("Which side?", labels=["left", "left_most"])).report.choice is None


def test_the_adapter_with_the_likeliest_answers_is_chosen(zoos: dict[str, Zoo]) -> None:
    zoo = zoos["llama"]
    adapters = [zoo.runs(name)[0].adapter() for name in ("copies", "opposites")]
    base = zoo.family.load(zoo.base, adapters[0].spec)
    for strength in (1.0, -1.0):
        scaled = [adapter.scaled(strength) for adapter in adapters]
        choice = choose_by_answers(base, scaled, FewShotRequest((), EXAMPLES, 160), Instruction("Do opposites."))
        assert choice.index == min((0, 1), key=lambda place: choice.scores[place].loss)
        assert choice.strength == float(choice.scores[choice.index].loss <= choice.base.loss)
        assert choice.score == (choice.scores[choice.index] if choice.strength else choice.base)
    assert choice.strength == 0.0


def test_ask_answers_in_text_and_in_labels(run: Any, zoos: dict[str, Zoo], generator: Path, tmp_path: Path) -> None:
    zoo = zoos["llama"]
    folder = zoo.runs("opposites")[0].folder
    answer = told(run("ask", folder, "up", "--max-tokens", 5, "--json"))
    assert answer["text"] == "up"
    done = run("ask", folder, "up", "--max-tokens", 5)
    assert "\n".join(done.out).strip() == "\n".join(answer["answer"].splitlines()).strip()
    assert told(run("ask", folder, "up", "--max-tokens", 5, "--description", "Other words.", "--json")) != answer
    labelled = told(run("ask", zoo.runs("sides")[0].folder, "up", "--json"))
    assert labelled["answer"] in ("left", "left_most")
    assert sum(labelled["probabilities"].values()) == pytest.approx(1)
    done = run("ask", zoo.runs("sides")[0].folder, "up " * 100)
    assert done.err == ["note: the prompt is longer than 160 tokens; the end of the text is not read"]
    assert told(run("ask", folder, "up ||| down", "--label", "yes", "--label", "no", "--json"))["answer"] in ("yes", "no")
    options = ["--generator", generator, "--num-adapters", 2, "--example", "up=down", "--free-answers"]
    assert run("generate", "Do opposites.", *options, "--out", tmp_path / "made").status == 0
    assert LoraAdapter.load(tmp_path / "made").metadata["condition"]["examples"] == [["up", "down"]]
    assert told(run("ask", tmp_path / "made", "up", "--max-tokens", 3, "--json"))["text"] == "up"


def test_a_generation_task_brings_description_and_free_answers(run: Any, generator: Path, collections: Path, tmp_path: Path) -> None:
    options = ["--generator", generator, "--num-adapters", 2, "--max-examples", 5]
    assert run("generate", "--examples", collections / "generation" / "copies", *options, "--out", tmp_path / "a").status == 0
    made = LoraAdapter.load(tmp_path / "a").metadata
    assert (made["condition"]["description"], made["condition"]["free"], made["labels"]) == ("Do copies.", True, [])
    assert len(made["condition"]["examples"]) == 5
    assert all(text == answer for text, answer in made["condition"]["examples"])


def test_a_generator_says_that_it_makes_language_adapters(run: Any, generator: Path, zoos: dict[str, Zoo]) -> None:
    info = GeneratorInfo.read(generator)
    assert info.makes == info.to_json()["makes"] == "language"
    assert "makes      language adapters for" in str(info)
    assert "opposites" in write_zoo_card(zoos["llama"], "owner/zoo").read_text(encoding="utf-8")
    refused(run("classify", zoos["llama"].runs("sides")[0].folder, "up"), "not an adapter for texts")


def test_ask_refuses_what_it_cannot_do(run: Any, saved: Path, zoos: dict[str, Zoo]) -> None:
    refused(run("ask", saved, "up"), "is not an adapter for a language model")
    folder = zoos["llama"].runs("opposites")[0].folder
    refused(run("ask", folder, " "), "the text is empty")
    refused(run("ask", folder, "up", "--max-tokens", 0), "max_tokens")
    refused(run("ask", folder, "up", "--max-tokens", 600), "more than the 512 of the model")
    with pytest.raises(ConditionError, match="free answers have no labels"):
        TaskPrompt("Do.", labels=["a", "b"], free=True)
    assert TaskPrompt("Do.", [("a", "b")], free=True).examples == (("a", "b"),)


def test_generators_are_evaluated_by_exact_match(
    run: Any, generator: Path, zoos: dict[str, Zoo], collections: Path, tmp_path: Path
) -> None:
    zoo = zoos["llama"]
    evaluation = evaluate(generator, zoo.folder, collections, tmp_path / "evaluation", EvaluateConfig(samples=2, max_rows=3))
    assert evaluation is not None
    assert [result["task"] for result in evaluation["tasks"]] == ["opposites", "sides", "copies"]
    for result in evaluation["tasks"]:
        assert result["rows"] == 3
        assert all(value is None or 0 <= value <= 1 for value in result["exact_match"].values())
        assert result["exact_match"]["soup"] is None  # one run a task
    table = (tmp_path / "evaluation" / "evaluation.md").read_text(encoding="utf-8")
    assert "base, 3 in context" in table
    done = run("evaluate", generator, "--zoo", zoo.folder, "--tasks", collections, "--out", tmp_path / "evaluation", "--samples", 2,
               "--max-rows", 3, "--card")  # fmt: skip
    assert done.status == 0, done.err
    card = (generator / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-generation" in card
    assert "cond-pdiff ask my-adapter" in card


# --- the third stage ---------------------------------------------------------------------------------------------------------

TUNE: dict[str, Any] = {"fit": {**TINY_FIT, "steps": 20, "batch_size": 2, "learning_rate": 1e-2}, "examples": 6, "max_length": 160}


@pytest.fixture(scope="module")
def by_modules(zoos: dict[str, Zoo], collections: Path, tiny_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator with a code for each module, as the shipped recipe for language models has it."""
    encoder = {"type": "SentenceConditionEncoder", "backbone": tiny_backbone.to_json(), "embedding_dim": HIDDEN}
    denoiser = {"type": "TokenDenoiser", "width": 16, "depth": 1, "heads": 2}
    recipe = {
        "autoencoder": {"model": {"type": "ModuleBasis", "width": 2}, "normalizer": "none"},
        "unet": {**TINY_RECIPE["unet"], "denoiser": denoiser, "condition_encoder": encoder},
    }
    return train(recipe, zoos["llama"].folder, collections, tmp_path_factory.mktemp("modules"))


def tune_stage(generator: Path, collections: Path) -> LanguageTuneStage:
    pipe = quiet(CondPDiffPipeline.from_pretrained(generator))
    return LanguageTuneStage(pipe, load_language_tasks(collections, ["opposites", "sides"]), parse(TuneConfig, TUNE, "tune"))


def test_tuning_makes_right_answers_likelier(generator: Path, collections: Path, tmp_path: Path) -> None:
    tuned = tune({"tune": {**copy.deepcopy(TUNE), "decoder": True}}, generator, collections, tmp_path)
    before, after = (tune_stage(folder, collections) for folder in (generator, tuned))
    with torch.no_grad():
        losses = [
            sum(float(stage.loss(stage.module, stage.draw(2, rng), rng)) for rng in (step_generator(1, step) for step in range(8)))
            for stage in (before, after)
        ]
    assert losses[1] < 0.95 * losses[0]
    adapter = quiet(CondPDiffPipeline.from_pretrained(tuned))(TaskPrompt("Do opposites.", free=True)).adapter
    assert adapter.family.name == "causal-lm"


def test_episodes_of_language_tasks(by_modules: Path, collections: Path) -> None:
    stage = tune_stage(by_modules, collections)
    episodes = [episode for step in range(30) for episode in stage.draw(2, step_generator(0, step))]
    assert {episode.task.name for episode in episodes} == {"opposites", "sides"}
    assert {len(episode.asked) for episode in episodes} == {3}
    assert {len(episode.prompt.examples) for episode in episodes} == {0, 3}
    for episode in episodes:
        free = episode.task.name == "opposites"
        assert (episode.prompt.free, episode.prompt.labels) == (free, () if free else ("left", "left_most"))
        assert set(episode.prompt.examples) <= set(episode.task.examples("train"))
        assert set(episode.asked) <= set(episode.task.exchanges("train"))
        assert not {text for text, _ in episode.prompt.examples} & {exchange.text for exchange in episode.asked}


def test_the_loss_of_episodes_side_by_side_is_their_mean(by_modules: Path, collections: Path) -> None:
    stage = tune_stage(by_modules, collections)
    batch = stage.draw(3, step_generator(0, 1))
    noise = [torch.Generator().manual_seed(seed) for seed in range(3)]
    params = torch.cat([stage.module([episode.prompt], rng) for episode, rng in zip(batch, noise, strict=True)])
    together = stage.loss(lambda prompts, rng: params, batch, noise[0])  # type: ignore[arg-type]
    alone = [stage.loss(lambda prompts, rng, row=row: row[None], [one], noise[0]) for one, row in zip(batch, params, strict=True)]  # type: ignore[arg-type, misc]
    assert torch.allclose(together, torch.stack(alone).mean(), atol=1e-4)
    together.backward(retain_graph=True)
    assert stage.pipe.unet.to_sample.grad.abs().max() > 0
    base = stage.pipe.base_model()
    episode, adapter = batch[0], stage.pipe.codec.to_adapter(params[0].detach())
    with adapter.attached(base):
        asked = [base.prompt_tokens(episode.task.instruction.prompt(text)) for text, _ in episode.asked]
        answers = [base.answer_tokens(answers[0]) for _, answers in episode.asked]
        found = base.judge(asked, answers)[0]
    assert float(alone[0].detach()) == pytest.approx(-float(found.sum()) / sum(map(len, answers)), abs=1e-4)


def test_tune_needs_rows_for_an_episode(by_modules: Path, collections: Path) -> None:
    pipe = CondPDiffPipeline.from_pretrained(by_modules)
    with pytest.raises(TrainingError, match=r"opposites: tune draws 13 training rows an episode \(examples\), and there are 12"):
        LanguageTuneStage(pipe, load_language_tasks(collections, ["opposites"]), parse(TuneConfig, {**TUNE, "examples": 13}, "tune"))


@pytest.mark.parametrize("name", ["smollm2-tasks", "smollm2-tasks+longer"])
def test_the_recipe_for_language_models_runs(
    name: str, bases: dict[str, Path], collections: Path, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    recipe = read_recipe(name)
    short = {"tasks": ["opposites", "sides"], "unseen": ["copies"], "steps": 2, "multitask_steps": 1, "metric_rows": 2, "precision": "no"}
    config = parse(CollectConfig, {**recipe["collect"], **short, "base": Backbone(str(bases["llama"])).to_json()}, "collect")
    zoo = collect(config, collections, tmp_path / "zoo")
    encoder = {"type": "SentenceConditionEncoder", "backbone": tiny_backbone.to_json(), "embedding_dim": HIDDEN}
    recipe["unet"] |= {"condition_encoder": encoder, "conditions_per_task": 2}
    recipe["unet"]["fit"]["steps"] = recipe["tune"]["fit"]["steps"] = 2
    recipe["tune"] |= {"examples": 6, "fit": {**recipe["tune"]["fit"], "precision": "no"}}
    made = train(recipe, zoo.folder, collections, tmp_path / "run")
    tuned = quiet(CondPDiffPipeline.from_pretrained(tune(recipe, made, collections, tmp_path / "tune")))
    assert tuned.template.layout.num_params == 2 * 2 * (16 + 32 + 32)  # lora_B alone: two layers' v, o and down projections
    assert len(tuned("Do opposites.", num_inference_steps=2).adapter.modules) == 6
