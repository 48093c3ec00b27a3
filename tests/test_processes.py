from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits, tiny_recipe
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cond_pdiff import CondPDiffPipeline, TokenDenoiser
from cond_pdiff.errors import TrainingError
from cond_pdiff.hub import Backbone
from cond_pdiff.training.config import TuneConfig, UNetConfig, parse
from cond_pdiff.training.stages.sharding import shard, unshard
from cond_pdiff.training.stages.train import train

WORKER = """
import hashlib, json, os, sys
from pathlib import Path
import cond_pdiff.models.token_denoiser as tokens
from cond_pdiff.training.processes import processes
from cond_pdiff.training.stages.loop import _Run
from cond_pdiff.training.stages.train import train

runs, out = json.loads(sys.argv[1])
(Path(out) / f"pid-{os.getpid()}").touch()
tokens.NUMBERS_AT_ONCE = 6000  # a step of a tiny one is in parts
finish, ends = _Run.finish, []

def held(tensors):
    return sum((tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel() for tensor in tensors)

def finish_and_tell(run):
    moments = [value for entry in run.optimizer.state_dict()["state"].values() for value in entry.values()]
    kept = [list(run.trained.parameters()), moments, run.ema.shadow_params]
    shares = [held(tensors) / sum(tensor.numel() for tensor in tensors) for tensors in kept]
    (run.folder / f"shares-{processes().process_index}.json").write_text(json.dumps(shares))
    finish(run)
    stage = run.stage
    tensors = [*stage.module.state_dict().values(), *([stage.latents] if stage.name == "unet" else [])]
    ends.append(hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest())
    (Path(out) / f"process-{processes().process_index}.json").write_text(json.dumps(ends))

_Run.finish = finish_and_tell
for arguments in runs:
    train(*arguments)
"""


class Job:
    """`train` in two processes, as a person starts it on a machine without a GPU; with several runs, one after the other."""

    def __init__(self, arguments: list[Any], out: Path, *before: list[Any]) -> None:
        out.mkdir(exist_ok=True)
        (out / "worker.py").write_text(WORKER)
        self.arguments, self.out, self.run, self.printed = arguments, out, Path(arguments[-1]), ""
        self.runs = [*before, arguments]

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += [str(self.out / "worker.py"), json.dumps([self.runs, str(self.out)])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def finish(self) -> None:
        process = self.start()
        self.printed, _ = process.communicate()
        assert process.returncode == 0, self.printed[-3000:]

    def kill_in(self, stage: str, lines: int) -> None:
        """Kill everything once the stage has written as many lines of metrics."""
        metrics, process = self.run / stage / "metrics.jsonl", self.start()
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.002)
        process.kill()
        for path in self.out.glob("pid-*"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.name.removeprefix("pid-")), signal.SIGKILL)
            path.unlink()
        process.communicate()


@pytest.fixture(scope="module")
def recipe(tiny_backbone: Backbone) -> dict[str, Any]:
    """With batch norm, whose running statistics each process measures on samples of its own."""
    recipe = tiny_recipe(tiny_backbone)
    recipe["autoencoder"]["model"]["norm"] = "batch"
    return recipe


@pytest.fixture(scope="module")
def job(recipe: dict[str, Any], tiny_zoo: Path, tasks_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Finished, undisturbed."""
    out = tmp_path_factory.mktemp("two")
    job = Job([recipe, str(tiny_zoo), str(tasks_folder), str(out / "run")], out)
    job.finish()
    return job


def test_two_processes_train_both_stages_and_end_in_the_same_bits(job: Job) -> None:
    assert (job.run / "generator" / "model_index.json").is_file()
    ends = [json.loads((job.out / f"process-{index}.json").read_text()) for index in range(2)]
    assert ends[0] == ends[1]
    assert len(ends[0]) == 2
    assert job.printed.count("of the zoo's energy") == 1
    for stage in ("autoencoder", "unet"):
        assert json.loads((job.run / stage / "run.json").read_text())["identity"]["processes"] == 2


def test_two_processes_killed_in_both_stages_end_in_the_same_bits(job: Job, tmp_path: Path) -> None:
    killed = Job([*job.arguments[:-1], str(tmp_path / "run")], tmp_path)
    killed.kill_in("autoencoder", 5)
    killed.kill_in("unet", 6)
    killed.finish()
    complete = {name: sha256 for name, sha256 in bits(killed.run).items() if "/." not in name}  # a kill leaves what lay aside
    assert complete == bits(job.run)


def test_one_process_does_not_go_on_where_two_stopped(job: Job) -> None:
    before = bits(job.run)
    with pytest.raises(TrainingError, match=r"other settings or data \(processes differ\)"):
        train(copy.deepcopy(job.arguments[0]), *job.arguments[1:])
    assert bits(job.run) == before


# --- sharded -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(recipe: dict[str, Any], tiny_zoo: Path, tasks_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Finished, undisturbed, after the same run data parallel, in `whole`."""
    out, whole = tmp_path_factory.mktemp("sharded"), copy.deepcopy(recipe)
    whole["unet"]["denoiser"] = {"type": "TokenDenoiser", "width": 16, "depth": 2, "heads": 2}
    divided = copy.deepcopy(whole)
    for stage in ("autoencoder", "unet"):
        divided[stage]["fit"]["sharded"] = True
    data = [str(tiny_zoo), str(tasks_folder)]
    job = Job([divided, *data, str(out / "run")], out, [whole, *data, str(out / "whole")])
    job.finish()
    return job


def rows(run: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["autoencoder", "unet"])
def test_sharded_training_is_data_parallel_training_up_to_rounding(sharded: Job, stage: str) -> None:
    whole = sharded.out / "whole"
    losses, expected = ([row["loss"] for row in rows(run, stage)] for run in (sharded.run, whole))
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[-1] < 0.85 * losses[0]
    (before,), (after,) = (sorted((run / stage).glob("checkpoint-*")) for run in (whole, sharded.run))
    for name in ("model", "optimizer", "ema"):
        shapes = [{key: tensor.shape for key, tensor in load_file(folder / f"{name}.safetensors").items()} for folder in (before, after)]
        assert shapes[0] == shapes[1]
    identities = [json.loads((run / stage / "run.json").read_text())["identity"] for run in (whole, sharded.run)]
    assert identities[1]["fit"] == {**identities[0]["fit"], "sharded": True}
    assert "sharded" not in json.dumps(identities[0])


def test_sharded_processes_hold_half_and_end_in_the_same_whole_weights(sharded: Job) -> None:
    ends = [json.loads((sharded.out / f"process-{index}.json").read_text()) for index in range(2)]
    assert ends[0] == ends[1]
    assert len(ends[0]) == 4  # two stages whole, two sharded
    for run, share in ((sharded.out / "whole", 1.0), (sharded.run, 0.5)):
        for stage in ("autoencoder", "unet"):
            for index in range(2):
                shares = json.loads((run / stage / f"shares-{index}.json").read_text())  # of weights, moments and averages
                assert shares == pytest.approx([share] * 3, rel=0.1)
    folder = next((sharded.run / "unet").glob("checkpoint-*"))
    kept = CondPDiffPipeline.from_pretrained(sharded.run / "generator").unet.parameters()
    for index, parameter in enumerate(kept):
        assert torch.equal(load_file(folder / "ema.safetensors")[str(index)].half().float(), parameter)


def test_sharded_processes_killed_end_in_the_same_bits(sharded: Job, tmp_path: Path) -> None:
    killed = Job([*sharded.arguments[:-1], str(tmp_path / "run")], tmp_path)
    killed.kill_in("unet", 6)
    killed.finish()
    complete = {name: sha256 for name, sha256 in bits(killed.run).items() if "/." not in name}
    assert complete == bits(sharded.run)


def test_a_sharded_run_does_not_go_on_whole(sharded: Job) -> None:
    with pytest.raises(TrainingError, match=r"other settings or data \(.*processes differ\)"):
        train(copy.deepcopy(sharded.arguments[0]), *sharded.arguments[1:])


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_blocks_are_sharded_one_by_one_and_come_back_whole() -> None:
    network = TokenDenoiser(2, 3, 4, width=8, depth=2, heads=2)
    before = copy.deepcopy(network.state_dict())
    divided = shard(network, torch.device("cpu"))
    assert [name for name, part in divided.named_modules() if isinstance(part, FSDPModule)] == ["", "blocks.0", "blocks.1"]
    assert all(isinstance(parameter, DTensor) for parameter in divided.parameters())
    assert sum(parameter.numel() for parameter in network.parameters()) == 0
    unshard(divided, network)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.usefixtures("alone")
def test_what_cannot_be_sharded_is_refused() -> None:
    network = torch.nn.Linear(2, 2)
    network.scale = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(TrainingError, match=r'a Linear cannot be sharded \(.*scalar.*\); set "sharded" to false'):
        shard(network, torch.device("cpu"))
    with pytest.raises(TrainingError, match="unet: fit: sharded training has the precision 'bf16' or 'no'"):
        parse(UNetConfig, {"fit": {"sharded": True, "precision": "fp16"}}, "unet")
    with pytest.raises(TrainingError, match="tune: this stage trains parts of a generator"):
        parse(TuneConfig, {"fit": {"sharded": True}}, "tune")
