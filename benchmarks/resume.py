"""Kill training at random points, run the same command again, compare the weights' bits with an undisturbed run's.

    python benchmarks/resume.py [--kills 50]

Each trial trains both stages, small networks on a synthetic zoo, is killed (SIGKILL) after a random delay and started again.
Children are forked from one process that has imported everything, so that kills fall into training.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked children must not inherit a thread pool

import torch

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.hub import MINILM
from cond_pdiff.lora import KEY_PREFIX, LoraSpec
from cond_pdiff.models.adapter_template import AdapterTemplate
from cond_pdiff.training.config import AutoencoderConfig, UNetConfig, parse, read_recipe
from cond_pdiff.training.loop import fit
from cond_pdiff.training.tasks import Task, write_task
from cond_pdiff.training.train_autoencoder import AutoencoderStage, ZooParams
from cond_pdiff.training.train_unet import UNetStage

STEPS = {"autoencoder": 60, "unet": 60}
SMALL = {
    "autoencoder": {"encoder_channels": [4, 4], "decoder_channels": [4, 2], "decoder_bottom_channels": 4, "stride": 8, "latent_dim": 16},
    "unet": {"block_out_channels": [8, 8, 4], "embedding_dim": 64},
}


def synthetic_zoo(folder: Path) -> tuple[ZooParams, list[Task]]:
    """Random `lora_B` for two tasks, on MiniLM's shapes."""
    spec = LoraSpec(MINILM.repo_id, 4, 16.0, ("attention.output.dense", "key", "query", "value"))
    modules = [
        f"encoder.layer.{layer}.attention.{name}" for layer in range(6) for name in ("self.query", "self.key", "self.value", "output.dense")
    ]
    rng = torch.Generator().manual_seed(0)
    shared = {f"{KEY_PREFIX}{module}.lora_A.weight": torch.randn(4, 384, generator=rng) for module in modules}
    adapters = [
        LoraAdapter(spec, shared | {f"{KEY_PREFIX}{module}.lora_B.weight": 0.03 * torch.randn(384, 4, generator=rng) for module in modules})
        for _ in range(4)
    ]
    template = AdapterTemplate.from_adapters(adapters, MINILM, 48)
    rows = [(f"text number {index}", index % 2) for index in range(40)]
    tasks = [
        write_task(folder / name, f"Decide about {name}.", ["no", "yes"], {"train": rows, "test": rows}) for name in ("apples", "pears")
    ]
    params = torch.stack([template.to_params(adapter) for adapter in adapters])
    return ZooParams(template, params, torch.tensor([0, 0, 1, 1]), [f"run {index}" for index in range(4)]), tasks


def train(data: ZooParams, tasks: list[Task], folder: Path) -> None:
    recipe = read_recipe("minilm-text-tasks")
    sections = {}
    for name in STEPS:
        short = {"steps": STEPS[name], "batch_size": 8, "checkpoint_every": 5, "warmup_steps": 5, "log_every": 1}
        sections[name] = {**recipe[name], "model": SMALL[name], "fit": short}
    autoencoder = AutoencoderStage(data, parse(AutoencoderConfig, sections["autoencoder"], "autoencoder"))
    fit(autoencoder, autoencoder.config.fit, folder / "autoencoder")
    unet = UNetStage(autoencoder, tasks, parse(UNetConfig, {**sections["unet"], "variants_per_task": 2}, "unet"))
    fit(unet, unet.config.fit, folder / "unet")


def run_child(data: ZooParams, tasks: list[Task], folder: Path, delay: float | None) -> bool:
    """Train in a forked child; kill it after `delay` seconds. True if it was killed before it had finished."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)
        train(data, tasks, folder)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"training failed with status {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status)


def bits(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".jsonl"):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        data, tasks = synthetic_zoo(root)
        started = time.monotonic()
        run_child(data, tasks, root / "whole", None)
        whole = time.monotonic() - started
        expected, same, hit = bits(root / "whole"), 0, 0
        while hit < arguments.kills:
            folder = root / f"killed-{hit}-{rng.random()}"
            if not run_child(data, tasks, folder, rng.uniform(0, whole)):
                continue  # it had finished before the kill
            hit += 1
            run_child(data, tasks, folder, None)
            same += bits(folder) == expected
            print(f"\r{same} of {hit} bit-identical", end="", flush=True)
        print(f" (weights, optimiser, EMA and metrics of both stages; an undisturbed run takes {whole:.1f} s)")
        sys.exit(same != hit)
