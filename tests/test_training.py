from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import HIDDEN, TINY_RECIPE, interrupt_at, tiny_recipe
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from cond_pdiff import AdapterTemplate, CondPDiffPipeline, LoraAdapter, LoraSpec, ParamUNet1D
from cond_pdiff.adapter import FACTORS, KEY_PREFIX, target_linears
from cond_pdiff.errors import TaskDataError, TrainingError
from cond_pdiff.hub import Backbone
from cond_pdiff.models.param_autoencoder import ParamAutoencoder
from cond_pdiff.training.conditions import prompt_variant
from cond_pdiff.training.config import RECIPES_FOLDER, AutoencoderConfig, CollectConfig, FitConfig, UNetConfig, parse, read_recipe
from cond_pdiff.training.loop import _Run, fit, learning_rate, step_generator
from cond_pdiff.training.styles import load_styles
from cond_pdiff.training.tasks import Task, load_tasks
from cond_pdiff.training.train import train
from cond_pdiff.training.train_autoencoder import AutoencoderStage, ZooParams
from cond_pdiff.training.train_unet import UNetStage
from cond_pdiff.training.zoo import Zoo

AE_STEPS, UNET_STEPS = (TINY_RECIPE[stage]["fit"]["steps"] for stage in ("autoencoder", "unet"))
TINY_AE = TINY_RECIPE["autoencoder"]["model"]


@pytest.fixture
def recipe(tiny_backbone: Backbone) -> dict[str, Any]:
    return tiny_recipe(tiny_backbone)


@pytest.fixture
def finished(tiny_generator: Path, tmp_path: Path) -> Path:
    """A copy of the run folder of the tiny generator."""
    return Path(shutil.copytree(tiny_generator.parent, tmp_path / "run"))


@pytest.fixture(scope="session")
def data(tiny_zoo: Path) -> ZooParams:
    return ZooParams.load(Zoo(tiny_zoo))


def bits(run: Path) -> dict[str, str]:
    """Hashes of all that a run ends in: checkpoints, metrics and the generator."""
    paths = [path for path in run.rglob("*") if path.suffix in (".safetensors", ".jsonl", ".json")]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def logged_steps(run: Path, stage: str) -> list[int]:
    return [json.loads(line)["step"] for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


# --- what training leaves ----------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_generator_one_checkpoint_a_stage_and_metrics(tiny_generator: Path) -> None:
    run = tiny_generator.parent
    for stage, steps in (("autoencoder", AE_STEPS), ("unet", UNET_STEPS)):
        assert [path.name for path in (run / stage).glob("checkpoint-*")] == [f"checkpoint-{steps:08d}"]
        assert logged_steps(run, stage) == list(range(5, steps + 1, 5))
        assert json.loads((run / stage / "run.json").read_text())["steps"] == steps
    assert {path.suffix for path in run.rglob("*") if path.is_file()} == {".json", ".jsonl", ".safetensors"}
    assert list(run.rglob(".*")) == []


def test_training_learns(tiny_generator: Path) -> None:
    for stage in ("autoencoder", "unet"):
        rows = [json.loads(line) for line in (tiny_generator.parent / stage / "metrics.jsonl").read_text().splitlines()]
        config = parse(FitConfig, TINY_RECIPE[stage]["fit"], "fit")
        assert rows[-1]["loss"] < 0.85 * rows[0]["loss"]
        assert [row["learning_rate"] for row in rows] == [learning_rate(config, row["step"] - 1) for row in rows]


def test_networks_are_stored_in_half_precision_and_load_in_single(tiny_generator: Path) -> None:
    for name, dtype in (("autoencoder", torch.float16), ("unet", torch.float16), ("normalizer", torch.float32), ("template", torch.int32)):
        tensors = load_file(tiny_generator / name / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    pipe = CondPDiffPipeline.from_pretrained(tiny_generator)
    assert pipe.unet.dtype == pipe.autoencoder.dtype == torch.float32


def test_the_kept_weights_are_the_averaged_ones(tiny_generator: Path) -> None:
    folder = tiny_generator.parent / "unet" / f"checkpoint-{UNET_STEPS:08d}"
    averaged = list(load_file(folder / "ema.safetensors").items())
    kept = CondPDiffPipeline.from_pretrained(tiny_generator).unet.parameters()
    for (_, average), parameter in zip(sorted(averaged, key=lambda item: int(item[0])), kept, strict=True):
        assert torch.equal(average.half().float(), parameter)


def test_a_finished_run_is_not_trained_again(
    finished: Path, recipe: dict[str, Any], tiny_zoo: Path, tasks_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bits(finished)
    interrupt_at(monkeypatch, "torch.optim.AdamW.step", 1)
    assert train(recipe, tiny_zoo, tasks_folder, finished) == finished / "generator"
    assert bits(finished) == before


# --- going on after an interruption ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        *(("step", calls) for calls in (1, 7, 20, 21, 30, 31, 50, 51, 68, 90)),  # of 30 + 60 optimiser steps, checkpoints every 20
        *(("log", calls) for calls in (1, 4, 6, 7)),
        *(("save_checkpoint", calls) for calls in (1, 2, 3)),
        ("rmtree", 1),  # the new checkpoint is there, the old one still is
        ("save_generator", 1),
    ],
)
def test_an_interrupted_run_ends_in_the_same_bits(
    tiny_generator: Path, recipe: dict[str, Any], tiny_zoo: Path, tasks_folder: Path, tmp_path: Path, name: str, calls: int
) -> None:
    places = {
        "step": "torch.optim.AdamW.step",
        "log": "cond_pdiff.training.loop._Run.log",
        "save_checkpoint": "cond_pdiff.training.loop.save_checkpoint",
        "rmtree": "cond_pdiff.training.checkpoint.shutil.rmtree",
        "save_generator": "cond_pdiff.training.train.save_generator",
    }
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, places[name], calls)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tiny_zoo, tasks_folder, tmp_path / "run")
    train(recipe, tiny_zoo, tasks_folder, tmp_path / "run")
    assert bits(tmp_path / "run") == bits(tiny_generator.parent)
    assert list((tmp_path / "run").rglob(".*")) == []


KILLED_AGAIN_AND_AGAIN = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from cond_pdiff.training.train import train

recipe, zoo, tasks, run = json.loads(sys.argv[1])
killed, rng = 0, random.Random(0)
for lines in (0, 2, 5, 7, 10, 14):  # of the 6 + 12 lines that both stages log
    child = os.fork()
    if not child:
        train(recipe, zoo, tasks, run)
        os._exit(0)
    while sum(path.read_bytes().count(b"\\n") for path in Path(run).glob("*/metrics.jsonl")) < lines:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child ended by itself"
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.04))
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
train(recipe, zoo, tasks, run)
print("killed", killed)
"""


def test_a_run_killed_at_random_moments_ends_in_the_same_bits(
    tiny_generator: Path, recipe: dict[str, Any], tiny_zoo: Path, tasks_folder: Path, tmp_path: Path
) -> None:
    """SIGKILL of real processes. They are forked from one that has imported everything, so that kills fall into training."""
    arguments = json.dumps([recipe, str(tiny_zoo), str(tasks_folder), str(tmp_path / "run")])
    command = [sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, arguments]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 4
    complete = {name: sha256 for name, sha256 in bits(tmp_path / "run").items() if "/." not in name}  # a kill leaves what lay aside
    assert complete == bits(tiny_generator.parent)
    assert logged_steps(tmp_path / "run", "unet") == list(range(5, UNET_STEPS + 1, 5))


def test_a_torn_last_line_of_the_metrics_is_dropped(
    finished: Path, tiny_generator: Path, recipe: dict[str, Any], tiny_zoo: Path, tasks_folder: Path
) -> None:
    with (finished / "unet" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 65, "loss": 0.5}\n{"step": 7')
    train(recipe, tiny_zoo, tasks_folder, finished)
    assert bits(finished) == bits(tiny_generator.parent)


# --- refusals ----------------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)


def halve(path: Path) -> None:
    save_file({name: tensor[: len(tensor) // 2] if tensor.ndim else tensor for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("stage", ["autoencoder", "unet"])
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((f"{group}.safetensors", damage) for group in ("model", "optimizer", "ema") for damage in (truncate, Path.unlink)),
        *((f"{group}.safetensors", damage) for group in ("model", "ema") for damage in (without_a_tensor, halve)),
        *(("state.json", lambda path, text=text: path.write_text(text)) for text in ("", "{", "[]", "5", "{}")),
        ("state.json", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    finished: Path, recipe: dict[str, Any], tiny_zoo: Path, tasks_folder: Path, stage: str, name: str, damage: Callable[[Path], object]
) -> None:
    (checkpoint,) = (finished / stage).glob("checkpoint-*")
    damage(checkpoint / name)
    with pytest.raises(TrainingError, match=rf"{finished / stage}.* is damaged .*delete it to start this stage again"):
        train(recipe, tiny_zoo, tasks_folder, finished)


@pytest.mark.parametrize(
    ("stage", "change", "differ"),
    [
        ("autoencoder", {"fit": {"steps": 40}}, "config, fit"),
        ("autoencoder", {"fit": {"seed": 1}}, "config, fit"),
        ("autoencoder", {"latent_noise": 0.2}, "config"),
        ("autoencoder", {"normalizer": "batch"}, "config"),
        ("autoencoder", {"model": {"latent_dim": 9}}, "config"),
        ("unet", {"fit": {"learning_rate": 1e-3}}, "config, fit"),
        ("unet", {"condition_dropout": 0.2}, "config"),
        ("unet", {"prediction_type": "epsilon"}, "config"),
    ],
)
def test_other_settings_are_refused(
    finished: Path, recipe: dict[str, Any], tiny_zoo: Path, tasks_folder: Path, stage: str, change: dict[str, Any], differ: str
) -> None:
    before = bits(finished)
    for name, value in change.items():
        recipe[stage][name] = {**recipe[stage][name], **value} if isinstance(value, dict) else value
    with pytest.raises(TrainingError, match=rf"{finished / stage} holds a run with other settings or data \({differ} differ\)"):
        train(recipe, tiny_zoo, tasks_folder, finished)
    assert bits(finished) == before


def test_other_data_is_refused(finished: Path, recipe: dict[str, Any], tiny_zoo: Path, tasks_folder: Path, tmp_path: Path) -> None:
    smaller = Path(shutil.copytree(tiny_zoo, tmp_path / "zoo"))
    shutil.rmtree(smaller / "tasks" / "moods" / "run-1")
    with pytest.raises(TrainingError, match=r"other settings or data \(data differ\)"):
        train(recipe, smaller, tasks_folder, finished)


def test_a_zoo_without_adapters_of_a_task_is_refused(recipe: dict[str, Any], tiny_zoo: Path, tasks_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_zoo, tmp_path / "zoo")
    shutil.rmtree(tmp_path / "zoo" / "tasks" / "animals")
    with pytest.raises(TaskDataError, match="no adapter of 'animals' yet; run `cond-pdiff collect` to the end"):
        train(recipe, tmp_path / "zoo", tasks_folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def tiny_config(mode: str = "task", **settings: Any) -> AutoencoderConfig:
    return AutoencoderConfig(TINY_AE, FitConfig(**{"steps": 30, "batch_size": 1, "warmup_steps": 3, **settings}), mode)


def test_an_adapter_that_is_not_finite_is_named_with_its_step(data: ZooParams, tmp_path: Path) -> None:
    params = data.params.clone()
    params[2, 100] = float("nan")
    stage = AutoencoderStage(replace(data, params=params), tiny_config(checkpoint_every=1))
    drawn = [int(stage.draw(1, step_generator(0, step))) for step in range(30)]
    first = drawn.index(2)
    assert 0 < first < 29
    message = rf"autoencoder: the loss is nan at step {first}; the batch was {data.names[2]}\. The last checkpoint is kept"
    with pytest.raises(TrainingError, match=message):
        fit(stage, stage.config.fit, tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{first:08d}"]
    for path in tmp_path.rglob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())


@pytest.mark.parametrize("mode", ["none", "batch", "tensor", "task"])
def test_no_normaliser_hides_what_is_not_finite(data: ZooParams, tmp_path: Path, mode: str) -> None:
    params = data.params.clone()
    params[2, 100] = float("inf")
    stage = AutoencoderStage(replace(data, params=params), tiny_config(mode, batch_size=4))
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+; the batch was .*/run-"):
        fit(stage, stage.config.fit, tmp_path)


@pytest.fixture
def unet_stage(data: ZooParams, recipe: dict[str, Any], tasks_folder: Path, tiny_zoo: Path) -> UNetStage:
    """On an untrained autoencoder."""
    autoencoder = AutoencoderStage(data, tiny_config())
    autoencoder.module.eval()
    return UNetStage(autoencoder, load_tasks(tasks_folder, Zoo(tiny_zoo).task_names), parse(UNetConfig, recipe["unet"], "unet"))


def test_latents_that_are_not_finite_are_named_too(unet_stage: UNetStage, data: ZooParams, tmp_path: Path) -> None:
    unet_stage.latents[1] = float("nan")
    with pytest.raises(TrainingError, match=rf"unet: the loss is nan at step \d+; the batch was .*{data.names[1]}"):
        fit(unet_stage, unet_stage.config.fit, tmp_path)


# --- the loop ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (100, 0), (100, 1), (3, 10), (1, 0), (10, 10)])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero(steps: int, warmup: int) -> None:
    config = FitConfig(steps=steps, warmup_steps=warmup, learning_rate=2.0)
    rates = [learning_rate(config, step) for step in range(steps)]
    peak = min(warmup, steps)
    assert all(0 < rate <= 2 for rate in rates)
    assert rates[:peak] == pytest.approx([2 * (step + 1) / warmup for step in range(peak)])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if warmup < steps:
        assert rates[warmup] == 2
        assert learning_rate(config, steps) == pytest.approx(0, abs=1e-12)
        assert learning_rate(config, (steps + warmup) // 2) == pytest.approx(1, abs=0.2) or steps < 3


def test_each_step_has_random_numbers_of_its_own() -> None:
    places = ((0, 0), (0, 1), (1, 0), (0, 0, 1), (1, 1), (0, 10), (0, 1, 0))
    assert len({float(torch.rand(1, generator=step_generator(*place))) for place in places}) == 6  # (0, 1) is (0, 1, 0)


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_every_precision_trains_and_resumes_with_any_other_before_it(data: ZooParams, tmp_path: Path, precision: str) -> None:
    config = tiny_config(precision=precision, steps=4, batch_size=4, checkpoint_every=2, log_every=1)
    for name, calls in (("whole", 99), ("resumed", 4)):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, "torch.optim.AdamW.step", calls)
            stage = AutoencoderStage(data, config)
            if name == "resumed":
                with pytest.raises(KeyboardInterrupt):
                    fit(stage, config.fit, tmp_path / name)
                stage = AutoencoderStage(data, config)
        fit(stage, config.fit, tmp_path / name)
        assert {parameter.dtype for parameter in stage.module.parameters()} == {torch.float32}
        stage.module.save_pretrained(tmp_path / name / "module")  # also: nothing of accelerate's is left in it
        assert not stage.module.training
    assert bits(tmp_path / "whole") == bits(tmp_path / "resumed")


@pytest.mark.parametrize(
    "precision", ["fp8", "half", "", pytest.param("fp16", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has it"))]
)
def test_a_precision_that_cannot_be_had_is_refused(data: ZooParams, tmp_path: Path, precision: str) -> None:
    config = tiny_config(precision=precision)
    with pytest.raises(TrainingError, match="precision"):
        fit(AutoencoderStage(data, config), config.fit, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard_events_are_written_on_demand(data: ZooParams, tmp_path: Path) -> None:
    config = tiny_config(steps=2, log_every=1)
    fit(AutoencoderStage(data, config), config.fit, tmp_path, tensorboard=True)
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()


def test_the_unet_stage_draws_tasks_evenly_and_only_their_adapters(unet_stage: UNetStage, data: ZooParams) -> None:
    tasks, adapters = unet_stage.draw(400, torch.Generator().manual_seed(0))
    assert torch.equal(data.tasks[adapters], tasks)
    assert sorted(set(adapters.tolist())) == [0, 1, 2, 3]
    assert abs(int((tasks == 0).sum()) - 200) < 60
    assert unet_stage.describe((tasks[:1], torch.tensor([3]))) == data.names[3]


def test_latents_have_unit_variance(unet_stage: UNetStage) -> None:
    code = unet_stage.latents[..., :-2]  # behind them stand the two statistics of the normaliser
    assert float(code.square().mean()) == pytest.approx(1, abs=1e-4)
    assert float(unet_stage.latents[..., -2:].square().mean()) == pytest.approx(1, abs=0.05)


def test_prompt_variants_differ_in_examples_parts_and_words(tasks_folder: Path) -> None:
    task = Task.load(tasks_folder / "animals")
    variants = [prompt_variant(task, index) for index in range(40)]
    assert variants == [prompt_variant(task, index) for index in range(40)]
    assert variants[0].description == task.description
    assert len(variants[0].examples) == 16
    assert len(set(variants)) > 30
    assert {len(prompt.examples) for prompt in variants} == {0, 2, 4, 8, 16}
    assert {prompt.labels for prompt in variants} == {task.labels, ()}
    words = [set(prompt.description.split()) for prompt in variants]
    assert all(some <= set(task.description.split()) for some in words)
    assert min(map(len, words)) < len(task.description.split())


# --- recipes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config_class", "section", "message"),
    [
        (FitConfig, {"stepz": 1}, r"here: unknown entry 'stepz'; known are \['batch_size',"),
        (FitConfig, {"steps": "5"}, "here: steps must be int, got '5'"),
        (FitConfig, {"steps": 5.0}, "here: steps must be int, got 5.0"),
        (FitConfig, {"steps": True}, "here: steps must be int, got True"),
        (FitConfig, {"learning_rate": None}, "here: learning_rate must be float, got None"),
        (FitConfig, {"precision": 16}, "here: precision must be str, got 16"),
        (FitConfig, 5, "here must be a JSON object"),
        (FitConfig, ["steps"], "here must be a JSON object"),
        (AutoencoderConfig, {"fit": {"step": 1}}, "here, fit: unknown entry 'step'"),
        (AutoencoderConfig, {"fit": 5}, "here, fit must be a JSON object"),
        (AutoencoderConfig, {"model": [1]}, "here: model must be"),
        (UNetConfig, {"condition_encoder": "ClipConditionEncoder"}, "here: condition_encoder must be"),
        (CollectConfig, {"learning_rates": []}, "at least one learning rate"),
        (CollectConfig, {"tasks": "moods"}, "here: tasks must be"),
        (CollectConfig, {"tasks": ["moods"], "train_lora_a": 1}, "here: train_lora_a must be bool, got 1"),
        (CollectConfig, {"tasks": ["moods"], "learning_rates": 1e-3}, "here: learning_rates must be"),
    ],
)
def test_unknown_and_mistyped_entries_are_refused(config_class: type[Any], section: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        parse(config_class, section, "here")


def test_parse_fills_in_defaults_and_reads_lists() -> None:
    assert parse(FitConfig, {"steps": 7, "learning_rate": 1}, "fit") == FitConfig(steps=7, learning_rate=1)
    assert parse(AutoencoderConfig, {"fit": {"steps": 7}}, "autoencoder").fit == FitConfig(steps=7)
    assert parse(CollectConfig, {"tasks": ["a", "b"]}, "collect").tasks == ("a", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"autoencodr": {}}', "unknown section 'autoencodr'"),
    ],
)
def test_files_that_are_no_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(TrainingError, match=message):
        read_recipe(tmp_path / "recipe.json")
    with pytest.raises(TrainingError, match=r"no recipe 'nonsense'; there are .*'minilm-text-tasks'"):
        read_recipe("nonsense")
    with pytest.raises(TrainingError, match="no recipe"):
        read_recipe(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("stage", "section", "message"),
    [
        ("autoencoder", {"model": {"latent_dims": 8}}, "latent_dims"),
        ("autoencoder", {"model": {"num_params": 8}}, "num_params"),
        ("unet", {"model": {"heads": 8}}, "heads"),
        ("unet", {"condition_encoder": {"type": "Nonsense"}}, "type must be one of .*'SentenceConditionEncoder'.*, got 'Nonsense'"),
        ("unet", {"condition_encoder": {"type": "ClipConditionEncoder", "layers": 2}}, "layers"),
    ],
)
def test_unknown_arguments_of_networks_are_refused(
    recipe: dict[str, Any], tiny_zoo: Path, tasks_folder: Path, tmp_path: Path, stage: str, section: dict[str, Any], message: str
) -> None:
    recipe["autoencoder"]["fit"]["steps"] = 1
    recipe[stage].update(section)
    with pytest.raises(TrainingError, match=message):
        train(recipe, tiny_zoo, tasks_folder, tmp_path / "run")


BERT = [f"layer.{layer}.attention.{name}" for layer in range(12) for name in ("self.query", "self.key", "self.value", "output.dense")]
PIXART = [
    f"transformer_blocks.{block}.{attention}.{name}"
    for block in range(28)
    for attention in ("attn1", "attn2")
    for name in ("to_q", "to_k", "to_v", "to_out.0")
]
# Recipe → modules, their width, rank, number of modelled params, latents of one adapter, size of a condition.
SHAPES: dict[str, tuple[list[str], int, int, int, tuple[int, int], int]] = {
    "minilm-text-tasks": (BERT[:24], 384, 4, 36_864, (1, 96), 1152),
    "paper-language-half": (BERT, 768, 1, 73_728, (4, 117), 512),
    "paper-style-half": (PIXART, 1152, 1, 516_096, (1, 256), 256),
    "pixart-mini-styles": (PIXART[:64], 160, 4, 40_960, (1, 96), 256),
}


def random_zoo(modules: list[str], width: int, rank: int, shared_a: bool) -> ZooParams:
    """Two random adapters for each of two tasks."""
    spec = LoraSpec("nobody/base", rank, 8.0, tuple({name.split(".", 3)[-1] for name in modules}))
    rng = torch.Generator().manual_seed(0)
    shapes = {f"{KEY_PREFIX}{name}.{factor}.weight": factor for name in modules for factor in FACTORS}
    shared = {key: torch.randn(rank, width, generator=rng) for key, factor in shapes.items() if factor == "lora_A"}
    adapters = []
    for _ in range(4):
        tensors = {key: 0.1 * torch.randn(rank, width, generator=rng) for key in shapes}
        tensors = {key: tensor if "lora_A" in key else tensor.T.contiguous() for key, tensor in tensors.items()}
        adapters.append(LoraAdapter(spec, {**tensors, **(shared if shared_a else {})}))
    template = AdapterTemplate.from_adapters(adapters, Backbone("nobody/base"), 32)
    params = torch.stack([template.to_params(adapter) for adapter in adapters])
    return ZooParams(template, params, torch.tensor([0, 0, 1, 1]), ["moods/run-0", "moods/run-1", "animals/run-0", "animals/run-1"])


def one_step(stage: AutoencoderStage | UNetStage, folder: Path) -> None:
    """One real step of the loop, with two samples; every parameter must move."""
    before = [parameter.detach().clone() for parameter in stage.module.parameters()]
    config = replace(stage.config.fit, batch_size=2, steps=1, precision="no")  # many CPUs only emulate the others
    AcceleratorState._reset_state()
    assert math.isfinite(_Run(stage, config, folder, Accelerator(mixed_precision=config.precision)).step(0))
    moved = [not torch.equal(old, new) for old, new in zip(before, stage.module.parameters(), strict=True)]
    assert sum(moved) > 0.8 * len(moved)
    assert all(torch.isfinite(parameter).all() for parameter in stage.module.parameters())


def test_all_recipes_are_tested() -> None:
    assert {path.stem for path in RECIPES_FOLDER.glob("*.json")} == {*SHAPES, "pixart-mini"}  # the last in test_text_to_image.py


@pytest.mark.parametrize("name", SHAPES)
def test_recipes_parse_and_name_no_task_twice(name: str) -> None:
    recipe = read_recipe(name)
    if "collect" in recipe:
        config = parse(CollectConfig, recipe["collect"], "collect")
        assert len({*config.tasks, *config.unseen}) == len(config.tasks) + len(config.unseen)
        assert config.rank == SHAPES[name][2]
    assert parse(UNetConfig, recipe["unet"], "unet").fit.checkpoint_every <= 1000
    assert recipe["about"]


@pytest.mark.parametrize("name", SHAPES)
def test_recipes_build_their_networks_and_train(
    name: str, tiny_backbone: Backbone, tasks_folder: Path, styles_folder: Path, tmp_path: Path
) -> None:
    modules, width, rank, num_params, latent_shape, _ = SHAPES[name]
    recipe = read_recipe(name)
    data = random_zoo(modules, width, rank, shared_a=not recipe.get("collect", {"train_lora_a": True}).get("train_lora_a", False))
    assert data.params.shape == (4, num_params)
    assert data.template.layout.num_adapter_params == {36_864: 73_728, 40_960: 81_920}.get(num_params, num_params)

    if name == "paper-style-half":  # a step of the whole takes 20 s and 3 GB; its full size is checked below, on the meta device
        model = recipe["autoencoder"]["model"]
        model.update({entry: [width // 16 for width in model[entry]] for entry in ("encoder_channels", "decoder_channels")})
    autoencoder = AutoencoderStage(data, parse(AutoencoderConfig, recipe["autoencoder"], "autoencoder"))
    assert autoencoder.module.latent_shape == latent_shape
    one_step(autoencoder, tmp_path)
    autoencoder.module.eval()

    encoder = recipe["unet"].get("condition_encoder", {"type": "SentenceConditionEncoder"})
    condition: Any = "Is the remark kind?"
    tasks: Any = load_tasks(tasks_folder, ["moods", "animals"])
    if encoder["type"] == "ClipConditionEncoder":
        encoder = {**encoder, "backbone": None}
    elif encoder["type"] == "SentenceConditionEncoder":
        encoder = {**encoder, "backbone": tiny_backbone.to_json(), "embedding_dim": HIDDEN}
    else:
        condition, tasks = Image.new("RGB", (64, 64)), load_styles(styles_folder, ["embers", "lagoon"])
    section = {**recipe["unet"], "condition_encoder": encoder, "variants_per_task": 2}
    unet = UNetStage(autoencoder, tasks, parse(UNetConfig, section, "unet"))
    channels, length = latent_shape
    statistics = {"minilm-text-tasks": 2, "paper-language-half": 1}.get(name, 0)
    assert unet.latents.shape == (4, channels, length + statistics)
    one_step(unet, tmp_path)

    pipe = unet.pipeline()
    pipe.set_progress_bar_config(disable=True)
    adapter = pipe(condition, num_inference_steps=1).adapter
    assert adapter.modules == tuple(sorted(modules))


def test_the_papers_style_adapters_fit_pixart_xl() -> None:
    """The whole of PixArt-XL-2-256, without weights: its modules are the 224 that the recipe names, 516,096 numbers."""
    with torch.device("meta"):
        transformer = PixArtTransformer2DModel(num_layers=28, sample_size=32, out_channels=8)
    collect = parse(CollectConfig, read_recipe("paper-style-half")["collect"], "collect")
    linears = target_linears(transformer, LoraSpec("base", collect.rank, collect.alpha, collect.target_modules))
    assert list(linears) == sorted(PIXART)
    assert sum(collect.rank * (linear.in_features + linear.out_features) for linear in linears.values()) == 516_096


@pytest.mark.parametrize("name", ["paper-language-half", "paper-style-half"])
def test_the_papers_networks_have_their_shapes_and_the_sizes_that_the_recipes_state(name: str) -> None:
    *_, num_params, (channels, length), condition_dim = SHAPES[name]
    recipe = read_recipe(name)
    statistics = int(recipe["autoencoder"]["normalizer"] == "task")
    with torch.device("meta"):
        autoencoder = ParamAutoencoder(num_params, **recipe["autoencoder"]["model"])
        unet = ParamUNet1D(channels, length + statistics, condition_dim, **recipe["unet"]["model"])
        latents = autoencoder.encode(torch.empty(2, num_params))
        noisy = torch.empty(2, channels, length + statistics)
        assert latents.shape == (2, channels, length)
        assert autoencoder.decode(latents).shape == (2, num_params)
        assert unet(noisy, 5, torch.empty(2, condition_dim)).sample.shape == noisy.shape
    sizes = [sum(parameter.numel() for parameter in network.parameters()) / 1e6 for network in (autoencoder, unet)]
    assert f"{sizes[0]:.1f} M / {sizes[1]:.1f} M parameters" in recipe["about"]
