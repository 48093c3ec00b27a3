from __future__ import annotations

import gzip
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
from conftest import TINY_RECIPE, bits, interrupt_at
from safetensors.torch import load_file, save_file

from cond_pdiff import CondPDiffPipeline
from cond_pdiff.errors import TaskDataError, TrainingError
from cond_pdiff.training.config import AutoencoderConfig, FitConfig, UNetConfig, parse
from cond_pdiff.training.stages.autoencoder import AutoencoderStage
from cond_pdiff.training.stages.condition_bank import ConditionBank
from cond_pdiff.training.stages.denoiser import DenoiserStage
from cond_pdiff.training.stages.loop import _Run, fit, learning_rate, step_generator
from cond_pdiff.training.stages.train import train
from cond_pdiff.training.tasks.tasks import Task, load_tasks
from cond_pdiff.training.zoo.params import ZooParams
from cond_pdiff.training.zoo.zoo import Zoo, write_run

AE_STEPS, UNET_STEPS = (TINY_RECIPE[stage]["fit"]["steps"] for stage in ("autoencoder", "unet"))
TINY_AE = TINY_RECIPE["autoencoder"]["model"]


@pytest.fixture
def finished(tiny_generator: Path, tmp_path: Path) -> Path:
    """A copy of the run folder of the tiny generator."""
    return Path(shutil.copytree(tiny_generator.parent, tmp_path / "run"))


@pytest.fixture(scope="session")
def data(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> ZooParams:
    return ZooParams.load(Zoo(tiny_zoo), tmp_path_factory.mktemp("data") / "params")


def all_params(data: ZooParams) -> torch.Tensor:
    return torch.cat(list(data.chunks()))


def with_a_fault(data: ZooParams, number: float, folder: Path) -> ZooParams:
    """One number of the third adapter is not what it was."""
    params = all_params(data)
    params[2, 100] = number
    return ZooParams.write(folder, data.template, params, data.tasks.tolist(), data.names, "{}")


def logged_steps(run: Path, stage: str) -> list[int]:
    return [json.loads(line)["step"] for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


# --- what training leaves ----------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_generator_one_checkpoint_a_stage_and_metrics(tiny_generator: Path) -> None:
    run = tiny_generator.parent
    for stage, steps in (("autoencoder", AE_STEPS), ("unet", UNET_STEPS)):
        assert [path.name for path in (run / stage).glob("checkpoint-*")] == [f"checkpoint-{steps:08d}"]
        assert logged_steps(run, stage) == list(range(5, steps + 1, 5))
        assert json.loads((run / stage / "run.json").read_text())["steps"] == steps
    assert {path.suffix for path in run.rglob("*") if path.is_file()} == {".json", ".jsonl", ".md", ".safetensors"}
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
    assert "# generator\n" in (finished / "generator" / "README.md").read_text()
    (finished / "generator" / "README.md").write_text("# Measured meanwhile\n")
    (finished / "generator" / "pictures").mkdir()
    (finished / "generator" / "pictures" / "one.png").write_bytes(b"PNG")
    before = bits(finished)
    interrupt_at(monkeypatch, "torch.optim.AdamW.step", 1)
    assert train(recipe, tiny_zoo, tasks_folder, finished) == finished / "generator"
    assert bits(finished) == before
    assert (finished / "generator" / "README.md").read_text() == "# Measured meanwhile\n"
    assert (finished / "generator" / "pictures" / "one.png").read_bytes() == b"PNG"


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
        "log": "cond_pdiff.training.stages.loop._Run.log",
        "save_checkpoint": "cond_pdiff.training.stages.loop.save_checkpoint",
        "rmtree": "cond_pdiff.training.stages.checkpoint.shutil.rmtree",
        "save_generator": "cond_pdiff.training.stages.train.save_generator",
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
from cond_pdiff.training.stages.train import train

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
        ("unet", {"cond_drop_prob": 0.2}, "config"),
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
    other = Zoo(shutil.copytree(tiny_zoo, tmp_path / "zoo"))
    run = other.runs("moods")[0]
    changed = run.adapter()
    shutil.rmtree(run.folder)
    write_run(run.folder, replace(changed, tensors={key: 1.01 * tensor for key, tensor in changed.tensors.items()}), run.facts)
    with pytest.raises(TrainingError, match=r"other settings or data \(data differ\)"):
        train(recipe, other.folder, tasks_folder, finished)


def test_other_prompts_are_refused(finished: Path, recipe: dict[str, Any], tiny_zoo: Path, tasks_folder: Path, tmp_path: Path) -> None:
    """Descriptions, labels, and the rows that stand in prompts as examples."""
    before = bits(finished)
    for index, (old, new) in enumerate((("kind?", "nice?"), ("positive", "fine"), ("the film", "the song"))):
        tasks = Path(shutil.copytree(tasks_folder, tmp_path / f"tasks-{index}"))
        for path in (tasks / "moods" / "meta.json", tasks / "moods" / "train.jsonl.gz"):
            packed = path.suffix == ".gz"
            text = (gzip.decompress(path.read_bytes()) if packed else path.read_bytes()).decode().replace(old, new)
            path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        with pytest.raises(TrainingError, match=rf"{finished / 'unet'} holds a run with other settings or data \(conditions differ\)"):
            train(recipe, tiny_zoo, tasks, finished)
    assert bits(finished) == before


def test_a_run_of_the_first_release_is_continued(
    finished: Path, tiny_generator: Path, recipe: dict[str, Any], tiny_zoo: Path, tasks_folder: Path
) -> None:
    """Its checkpoints say nothing of processes and conditions, and its recipe names the U-Net's arguments in another way."""
    denoiser = recipe["unet"].pop("denoiser")
    recipe["unet"]["model"] = {name: value for name, value in denoiser.items() if name != "type"}
    for path in finished.glob("*/checkpoint-*/state.json"):
        state = json.loads(path.read_text())
        for name in ("processes", "conditions"):
            state["identity"].pop(name, None)
        path.write_text(json.dumps(state))
    train(recipe, tiny_zoo, tasks_folder, finished)
    assert bits(finished / "generator") == bits(tiny_generator)


@pytest.mark.parametrize("gone", ["tasks/animals/run-1", "tasks/likeness/run-0", "multitask"])
def test_a_zoo_that_is_not_complete_is_refused(
    recipe: dict[str, Any], tiny_zoo: Path, tasks_folder: Path, tmp_path: Path, gone: str
) -> None:
    zoo = Zoo(shutil.copytree(tiny_zoo, tmp_path / "zoo"))
    shutil.rmtree(zoo.folder / gone)
    zoo.write_manifest()
    assert json.loads((zoo.folder / "manifest.json").read_text())["complete"] is False
    assert json.loads((tiny_zoo / "manifest.json").read_text())["complete"] is True
    with pytest.raises(TaskDataError, match=rf"1 of 6 runs are missing \(.*\); run `cond-pdiff collect --zoo {zoo.folder}` with"):
        train(recipe, zoo.folder, tasks_folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def tiny_config(mode: str = "task", **settings: Any) -> AutoencoderConfig:
    return AutoencoderConfig(TINY_AE, FitConfig(**{"steps": 30, "batch_size": 1, "warmup_steps": 3, **settings}), mode)


def test_an_adapter_that_is_not_finite_is_named_with_its_step(data: ZooParams, tmp_path: Path) -> None:
    stage = AutoencoderStage(with_a_fault(data, float("nan"), tmp_path / "params"), tiny_config(checkpoint_every=1))
    drawn = [int(stage.draw(1, step_generator(0, step))) for step in range(30)]
    first = drawn.index(2)
    assert 0 < first < 29
    message = rf"autoencoder: the loss is nan at step {first}; the batch was {data.names[2]}\. The last checkpoint is kept"
    with pytest.raises(TrainingError, match=message):
        fit(stage, stage.config.fit, tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{first:08d}"]
    for path in tmp_path.rglob("checkpoint-*/*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())


@pytest.mark.parametrize("mode", ["none", "batch", "tensor", "task"])
def test_no_normaliser_hides_what_is_not_finite(data: ZooParams, tmp_path: Path, mode: str) -> None:
    stage = AutoencoderStage(with_a_fault(data, float("inf"), tmp_path / "params"), tiny_config(mode, batch_size=4))
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+; the batch was .*/run-"):
        fit(stage, stage.config.fit, tmp_path)


@pytest.fixture
def unet_stage(data: ZooParams, recipe: dict[str, Any], tasks_folder: Path, tiny_zoo: Path, tmp_path: Path) -> DenoiserStage:
    """On an untrained autoencoder."""
    autoencoder, config = AutoencoderStage(data, tiny_config()), parse(UNetConfig, recipe["unet"], "unet")
    autoencoder.module.eval()
    bank = ConditionBank.build(load_tasks(tasks_folder, Zoo(tiny_zoo).task_names), config, tmp_path)
    return DenoiserStage(autoencoder.codec, data, bank, config, autoencoder.identity, autoencoder.latents())


def test_latents_that_are_not_finite_are_named_too(unet_stage: DenoiserStage, data: ZooParams, tmp_path: Path) -> None:
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


def test_one_process_has_nothing_to_share(data: ZooParams, tmp_path: Path) -> None:
    ends = []
    for sharded in (False, True):
        config = tiny_config(sharded=sharded, steps=3, batch_size=4)
        stage = AutoencoderStage(data, config)
        fit(stage, config.fit, tmp_path / f"{sharded}")
        ends.append(stage.module.state_dict())
    assert all(torch.equal(ends[1][name], tensor) for name, tensor in ends[0].items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has it")
def test_a_precision_that_cannot_be_had_is_refused(data: ZooParams, tmp_path: Path) -> None:
    config = tiny_config(precision="fp16")
    with pytest.raises(TrainingError, match="precision 'fp16' needs a GPU"):
        fit(AutoencoderStage(data, config), config.fit, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_average_waits_where_the_gradient_scaler_skips_a_step(data: ZooParams, tmp_path: Path) -> None:
    """As with fp16 on a GPU: the scale is too large at first, gradients overflow, and the optimiser does nothing."""
    stage = AutoencoderStage(data, tiny_config())
    AcceleratorState._reset_state()
    accelerator = Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=math.inf)
    run = _Run(stage, stage.config.fit, tmp_path, accelerator)
    before = [parameter.clone() for parameter in stage.module.parameters()]
    run.step(0)
    assert run.optimizer.step_was_skipped
    assert all(torch.equal(old, new) for old, new in zip(before, stage.module.parameters(), strict=True))
    assert run.ema.optimization_step == 0
    accelerator.scaler.update(1.0)
    run.step(1)
    assert not run.optimizer.step_was_skipped
    assert run.ema.optimization_step == 1


def test_a_step_in_parts_has_the_gradient_of_the_whole(data: ZooParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise, on all four adapters in order: three at once and then one, or all."""
    ends = []
    for at_once in (None, 3):
        config = replace(tiny_config(steps=1, batch_size=4, log_every=1), input_noise=0.0, latent_noise=0.0)
        stage = AutoencoderStage(data, config)
        stage.at_once, left = at_once, list(range(4))
        monkeypatch.setattr(stage, "draw", lambda size, rng, left=left: torch.tensor([left.pop(0) for _ in range(size)]))
        fit(stage, config.fit, tmp_path / f"{at_once}")
        ends.append((stage.module.state_dict(), json.loads((tmp_path / f"{at_once}" / "metrics.jsonl").read_text())["loss"]))
        assert left == []
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-5)
    for name, tensor in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], tensor, rtol=1e-3, atol=1e-6)


def test_the_matrix_of_a_zoo_is_made_once_and_again_for_other_adapters(tiny_zoo: Path, tmp_path: Path) -> None:
    zoo, folder = Zoo(shutil.copytree(tiny_zoo, tmp_path / "zoo")), tmp_path / "params"
    first = ZooParams.load(zoo, folder)
    made = (folder / "params.safetensors").stat().st_mtime_ns
    again = ZooParams.load(zoo, folder)
    assert (folder / "params.safetensors").stat().st_mtime_ns == made
    assert first.sha256 == again.sha256 == hashlib.sha256(all_params(first).numpy().tobytes()).hexdigest()
    assert all(torch.equal(first.template.to_params(run.adapter()), first[torch.tensor([index])][0])
               for index, run in enumerate(run for task in zoo.task_names for run in zoo.runs(task)))  # fmt: skip
    part = first.part([3, 1])
    assert torch.equal(part[torch.tensor([0, 1])], first[torch.tensor([3, 1])])
    assert (part.names, part.tasks.tolist()) == ([first.names[3], first.names[1]], [1, 0])
    run = zoo.runs("moods")[0]
    changed = run.adapter()
    shutil.rmtree(run.folder)
    write_run(run.folder, replace(changed, tensors={key: 1.01 * tensor for key, tensor in changed.tensors.items()}), run.facts)
    assert ZooParams.load(zoo, folder).sha256 != first.sha256


def test_tensorboard_events_are_written_on_demand(data: ZooParams, tmp_path: Path) -> None:
    config = tiny_config(steps=2, log_every=1)
    fit(AutoencoderStage(data, config), config.fit, tmp_path, tensorboard=True)
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()


def test_the_unet_stage_draws_adapters_evenly_with_their_tasks(unet_stage: DenoiserStage, data: ZooParams) -> None:
    tasks, adapters = unet_stage.draw(400, torch.Generator().manual_seed(0))
    assert torch.equal(data.tasks[adapters], tasks)
    assert len(adapters.bincount()) == 4
    assert adapters.bincount().sub(100).abs().max() < 40
    assert unet_stage.describe((tasks[:1], torch.tensor([3]))) == data.names[3]


def test_a_mixture_is_mixed_in_condition_and_latents_alike(unet_stage: DenoiserStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half and half of two tasks: the network gets both halves of both, and is asked for what lies between."""
    monkeypatch.setattr(unet_stage.scheduler, "add_noise", lambda clean, noise, timesteps: clean)
    batch = unet_stage.draw(8, torch.Generator().manual_seed(0))
    seen: list[tuple[torch.Tensor, ...]] = []

    def network(*inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs)
        return unet_stage.module(*inputs)

    network.parameters = unet_stage.module.parameters  # type: ignore[attr-defined]
    for mixing, beyond in ((0.0, 0.5), (1.0, 0.0), (1.0, 0.5)):
        unet_stage.config = replace(unet_stage.config, mixing=mixing, mixing_beyond=beyond)
        assert torch.isfinite(unet_stage.loss(network, batch, torch.Generator().manual_seed(0)))  # type: ignore[arg-type]
    (plain, _, condition, same, none, *_), (mixed, _, _, partner, ratio, *_), (past, _, _, others, further, *_) = seen
    assert same.tolist() == list(range(8))
    assert not none.any()
    assert 0.05 < float(ratio.std()) < 0.5
    torch.testing.assert_close(mixed, torch.lerp(plain, plain[partner], ratio[..., None]))
    torch.testing.assert_close(further, 2 * ratio - 0.5)
    torch.testing.assert_close(past, torch.lerp(plain, plain[others], further[..., None]))
    # At a ratio of one, the condition is the partner's; between, it keeps the length of an embedding.
    still, keep, steps = torch.zeros(8, condition.shape[1]), torch.ones(8, 1), torch.zeros(8, dtype=torch.long)
    with torch.no_grad():
        whole = unet_stage.module(plain, steps, condition, partner, torch.ones(8, 1), still, keep)
        swapped = unet_stage.module(plain, steps, condition[partner], same, none, still, keep)
    torch.testing.assert_close(whole, swapped)


def test_a_step_may_train_each_sample_at_several_noise_levels(unet_stage: DenoiserStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet_stage.scheduler, "add_noise", lambda clean, noise, timesteps: clean)
    batch = unet_stage.draw(4, torch.Generator().manual_seed(0))
    unet_stage.config = replace(unet_stage.config, noise_draws=3)
    seen: list[tuple[torch.Tensor, ...]] = []

    def network(*inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs)
        return unet_stage.module(*inputs)

    network.parameters = unet_stage.module.parameters  # type: ignore[attr-defined]
    assert torch.isfinite(unet_stage.loss(network, batch, torch.Generator().manual_seed(0)))  # type: ignore[arg-type]
    noisy, timesteps, condition, partner, ratio, disturbance, keep = seen[0]
    assert [len(each) for each in (noisy, timesteps, disturbance, keep, condition, partner, ratio)] == [12, 12, 12, 12, 4, 4, 4]
    assert torch.equal(noisy, noisy[:4].repeat(3, 1, 1))
    assert len(set(timesteps.tolist())) > 4
    # The k-th draw of a sample has the sample's own condition.
    still, kept = torch.zeros_like(disturbance), torch.ones_like(keep)
    with torch.no_grad():
        all_at_once = unet_stage.module(noisy, timesteps, condition, partner, ratio, still, kept)
        second = unet_stage.module(noisy[4:8], timesteps[4:8], condition, partner, ratio, still[:4], kept[:4])
    torch.testing.assert_close(all_at_once[4:8], second, atol=1e-5, rtol=1e-4)


def test_latents_have_unit_variance(unet_stage: DenoiserStage) -> None:
    code = unet_stage.latents[..., :-2]  # behind them stand the two statistics of the normaliser
    assert float(code.square().mean()) == pytest.approx(1, abs=1e-4)
    assert float(unet_stage.latents[..., -2:].square().mean()) == pytest.approx(1, abs=0.05)


def test_prompt_variants_differ_in_examples_parts_and_words(tasks_folder: Path) -> None:
    task = Task.load(tasks_folder / "animals")
    variants = task.conditions(40)
    assert variants == task.conditions(40)
    assert variants[0].description == task.description
    assert len(variants[0].examples) == 16
    assert len(set(variants)) > 30
    assert {len(prompt.examples) for prompt in variants} == {0, 2, 4, 8, 16}
    assert {prompt.labels for prompt in variants} == {task.labels, ()}
    words = [set(prompt.description.split()) for prompt in variants]
    assert all(some <= set(task.description.split()) for some in words)
    assert min(map(len, words)) < len(task.description.split())
