from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import bits, tiny_recipe

from cond_pdiff.errors import TrainingError
from cond_pdiff.hub import Backbone
from cond_pdiff.training.stages.train import train

WORKER = """
import hashlib, json, os, sys
from pathlib import Path
import cond_pdiff.training.stages.autoencoder as first
import cond_pdiff.training.stages.train as training
from cond_pdiff.training.processes import processes

arguments, out = json.loads(sys.argv[1])
(Path(out) / f"pid-{os.getpid()}").touch()
fit, ends = training.fit, []

def fit_and_tell(stage, *rest):
    fit(stage, *rest)
    tensors = [*stage.module.state_dict().values(), *([stage.latents] if stage.name == "unet" else [])]
    ends.append(hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest())
    (Path(out) / f"process-{processes().process_index}.json").write_text(json.dumps(ends))

first.fit = training.fit = fit_and_tell
training.train(*arguments)
"""


class Job:
    """`train` in two processes, as a person starts it on a machine without a GPU."""

    def __init__(self, arguments: list[Any], out: Path) -> None:
        out.mkdir(exist_ok=True)
        (out / "worker.py").write_text(WORKER)
        self.arguments, self.out, self.run, self.printed = arguments, out, Path(arguments[-1]), ""

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += [str(self.out / "worker.py"), json.dumps([self.arguments, str(self.out)])]
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
