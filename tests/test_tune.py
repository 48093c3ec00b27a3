from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_FIT, interrupt_at, refused

from cond_pdiff import CondPDiffPipeline, TaskPrompt
from cond_pdiff.errors import TrainingError
from cond_pdiff.training.config import TuneConfig, parse, recorded
from cond_pdiff.training.stages.loop import step_generator
from cond_pdiff.training.stages.text_tune import TextTuneStage
from cond_pdiff.training.stages.tune import tune
from cond_pdiff.training.tasks.tasks import Task, load_tasks, write_task

SECTION: dict[str, Any] = {"fit": {**TINY_FIT, "steps": 30, "batch_size": 2, "learning_rate": 1e-2}, "examples": 12}


@pytest.fixture
def tasks(tasks_folder: Path) -> list[Task]:
    return load_tasks(tasks_folder, ["moods", "animals"])


@pytest.fixture
def stage(pipe: CondPDiffPipeline, tasks: list[Task]) -> TextTuneStage:
    return TextTuneStage(pipe, tasks, parse(TuneConfig, SECTION, "tune"))


@pytest.fixture(scope="module")
def tuned(tiny_generator: Path, tasks_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune({"tune": copy.deepcopy(SECTION)}, tiny_generator, tasks_folder, tmp_path_factory.mktemp("tune"))


def weights(generator: Path) -> dict[str, bytes]:
    return {str(path.relative_to(generator)): path.read_bytes() for path in sorted(generator.rglob("*.safetensors"))}


def test_only_the_unet_is_trained(tuned: Path, tiny_generator: Path) -> None:
    before, after = weights(tiny_generator), weights(tuned)
    assert list(before) == list(after)
    assert [name for name in before if before[name] != after[name]] == ["unet/diffusion_pytorch_model.safetensors"]
    assert (tuned / "README.md").is_file()


def test_what_was_measured_of_the_old_generator_does_not_come_along(
    tiny_generator: Path, tasks_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old"
    shutil.copytree(tiny_generator, old)
    for name in ("pictures/unseen.png", ".eval_results/evaluation.yaml"):
        (old / name).parent.mkdir()
        (old / name).write_text("measured")
    (old / "README.md").write_text("# Old")
    new = tune({"tune": {**SECTION, "fit": {**SECTION["fit"], "steps": 1}}}, old, tasks_folder, tmp_path / "tune")
    assert not (new / "pictures").exists()
    assert not (new / ".eval_results").exists()
    assert "Nothing has been measured" in (new / "README.md").read_text()


def test_the_decoder_is_trained_if_that_is_asked_for(pipe: CondPDiffPipeline, tasks: list[Task]) -> None:
    stage = TextTuneStage(pipe, tasks, parse(TuneConfig, {**SECTION, "decoder": True}, "tune"))
    rng = step_generator(0, 0)
    stage.loss(stage.module, stage.draw(2, rng), rng).backward()
    trained = {name.partition(".")[2].split(".")[0] for name, weight in stage.module.named_parameters() if weight.grad is not None}
    assert {"decoder", "from_latent"} <= trained
    assert not {"encoder", "to_latent"} & trained


def test_a_batch_of_episodes_has_the_mean_loss_of_its_episodes(stage: TextTuneStage) -> None:
    batch = stage.draw(3, step_generator(0, 1))
    noise = [torch.Generator().manual_seed(seed) for seed in range(3)]
    params = torch.cat([stage.module([episode.prompt], rng) for episode, rng in zip(batch, noise, strict=True)])
    together = stage.loss(lambda prompts, rng: params, batch, noise[0])  # type: ignore[arg-type]
    alone = [stage.loss(lambda prompts, rng, row=row: row[None], [one], noise[0]) for one, row in zip(batch, params, strict=True)]  # type: ignore[arg-type, misc]
    assert torch.allclose(together, torch.stack(alone).mean(), atol=1e-5)
    assert len({round(float(loss.detach()), 4) for loss in alone}) == 3


def test_it_may_be_trained_for_what_refining_makes_of_its_adapters(
    pipe: CondPDiffPipeline, tasks: list[Task], stage: TextTuneStage
) -> None:
    """The loss and its gradient are those of the refined adapters; the steps are on what the conditions hold."""
    refining = TextTuneStage(pipe, tasks, parse(TuneConfig, {**SECTION, "refine_steps": 3}, "tune"))
    assert recorded(stage.config) == {name: value for name, value in recorded(refining.config).items() if name != "refine_steps"}
    batches = (stage.draw(3, step_generator(0, step)) for step in range(20))
    batch = next(batch for batch in batches if len({bool(episode.prompt.examples) for episode in batch}) == 2)
    rng, template = step_generator(0, 0), pipe.codec.template
    params = stage.module([episode.prompt for episode in batch], rng).detach()
    start = torch.vmap(template.to_tensors)(params)
    refined = refining.refined(batch, start)
    for index, episode in enumerate(batch):
        moved = {key for key, tensor in refined.items() if not torch.equal(tensor[index], start[key][index])}
        assert moved == ({key for key in start if ".lora_B." in key} if episode.prompt.examples else set())
    gradients = []
    for own, tensors in ((refining, start), (stage, refined)):
        leaf = params.clone().requires_grad_()
        adapters = [template.adapter_of({key: tensor[index] for key, tensor in tensors.items()}) for index in range(3)]
        there = leaf + (torch.stack([template.to_params(adapter) for adapter in adapters]) - params)
        loss = own.loss(lambda prompts, rng, there=there: there, batch, rng)  # type: ignore[arg-type, misc]
        gradients.append((float(loss.detach()), torch.autograd.grad(loss, leaf)[0]))
    assert gradients[0][0] == pytest.approx(gradients[1][0], abs=1e-5)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], atol=1e-5, rtol=1e-3)


def test_tuning_lowers_the_task_loss_of_other_episodes(tuned: Path, stage: TextTuneStage, tasks: list[Task]) -> None:
    after = TextTuneStage(CondPDiffPipeline.from_pretrained(tuned), tasks, stage.config)
    with torch.no_grad():
        losses = [
            sum(float(one.loss(one.module, one.draw(2, rng), rng)) for rng in (step_generator(1, step) for step in range(10)))
            for one in (stage, after)
        ]
    assert losses[1] < 0.9 * losses[0]


def test_an_adapter_of_the_stage_is_the_one_that_the_pipeline_makes(stage: TextTuneStage) -> None:
    prompt = TaskPrompt("Is the remark kind?", [("the good film", "positive"), ("the bad meal", "negative")])
    own = stage.module([prompt], torch.Generator().manual_seed(3))
    assert own.requires_grad
    assert torch.equal(own, stage.pipe(prompt, generator=torch.Generator().manual_seed(3), output_type="params"))


def test_episodes_are_small_tasks_whose_condition_holds_some_of_the_examples(stage: TextTuneStage) -> None:
    episodes = [episode for step in range(60) for episode in stage.draw(2, step_generator(0, step))]
    assert {episode.task.name for episode in episodes} == {"moods", "animals"}
    assert {len(episode.prompt.labels) for episode in episodes if episode.task.name == "animals"} == {2, 3}
    for episode in episodes:
        rows = {(text, episode.task.labels[label]) for text, label in episode.task.rows("train")}
        own = {(text, episode.prompt.labels[place]) for text, place in zip(episode.texts, episode.targets.tolist(), strict=True)}
        assert own <= rows
        assert set(episode.prompt.examples) <= own
        assert episode.targets.bincount().min() >= 2
        asked = [text for text, asked in zip(episode.texts, episode.asked.tolist(), strict=True) if asked]
        assert sorted(asked) == sorted(set(episode.texts) - {text for text, _ in episode.prompt.examples})
    shown = [len(episode.prompt.examples) / len(episode.texts) for episode in episodes]
    assert 0.1 < sum(share == 0 for share in shown) / len(shown) < 0.45
    assert 0.25 < sum(shown) / len(shown) < 0.5


def test_the_base_model_is_as_before(stage: TextTuneStage) -> None:
    before = {key: tensor.clone() for key, tensor in stage.pipe.base_model().model.state_dict().items()}
    rng = step_generator(0, 0)
    stage.loss(stage.module, stage.draw(2, rng), rng).backward()
    assert all(torch.equal(tensor, before[key]) for key, tensor in stage.pipe.base_model().model.state_dict().items())
    assert all(parameter.grad is None for parameter in stage.pipe.base_model().model.parameters())
    assert not any(module._forward_hooks for module in stage.pipe.base_model().model.modules())


@pytest.mark.parametrize("calls", [1, 21, 30])
def test_an_interrupted_run_ends_in_the_same_bits(
    tuned: Path, tiny_generator: Path, tasks_folder: Path, tmp_path: Path, calls: int
) -> None:
    recipe = {"tune": copy.deepcopy(SECTION)}
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, "torch.optim.AdamW.step", calls)
        with pytest.raises(KeyboardInterrupt):
            tune(recipe, tiny_generator, tasks_folder, tmp_path)
    assert weights(tune(recipe, tiny_generator, tasks_folder, tmp_path)) == weights(tuned)


def test_refusals(tiny_generator: Path, style_generator: Path, tasks_folder: Path, tuned: Path, tmp_path: Path, run: Any) -> None:
    recipe = {"tune": copy.deepcopy(SECTION)}
    with pytest.raises(TrainingError, match="adapters for causal-lm, sentence-encoder; this generator makes adapters for a text-to-image"):
        tune(recipe, style_generator, tasks_folder, tmp_path)
    with pytest.raises(TrainingError, match="tune: most_labels must be greater than or equal to 2, got 1"):
        tune({"tune": {**SECTION, "most_labels": 1}}, tiny_generator, tasks_folder, tmp_path)
    with pytest.raises(TrainingError, match="generator differ"):
        tune(recipe, tuned, tasks_folder, tuned.parent)
    for name in ("moods", "animals"):
        rows = [("a", 0), ("b", 0), ("c", 1)]
        write_task(tmp_path / "few" / name, "Which?", ["one", "two"], {"train": rows, "test": rows})
    done = run("tune", tiny_generator, "--tasks", tmp_path / "few", "--out", tmp_path / "run")
    refused(done, "two classes with at least two training rows")
    assert not (tmp_path / "run").exists()
