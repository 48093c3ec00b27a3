"""Kill training at random points, run the same command again, compare the weights' bits with an undisturbed run's.

    python benchmarks/resume.py [--kills 50] [--processes 2]

Each trial trains both stages, small networks (with batch norm) on a synthetic zoo, is killed (SIGKILL) a random moment after a random step,
all of its processes in a random order, and started again. Children are forked from one process that has imported everything, so that kills
fall into training. Several processes train together on the CPU, as `torch.distributed.run` would have started them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked children must not inherit a thread pool

import torch
from safetensors.torch import save_file

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.hub import MINILM
from cond_pdiff.lora import KEY_PREFIX, LoraSpec
from cond_pdiff.models.adapter_template import AdapterTemplate
from cond_pdiff.training.config import AutoencoderConfig, UNetConfig, parse
from cond_pdiff.training.processes import processes
from cond_pdiff.training.recipe import read_recipe
from cond_pdiff.training.stages.autoencoder import AutoencoderStage
from cond_pdiff.training.stages.condition_bank import ConditionBank
from cond_pdiff.training.stages.denoiser import DenoiserStage
from cond_pdiff.training.stages.loop import fit
from cond_pdiff.training.tasks.tasks import Task, write_task
from cond_pdiff.training.zoo.params import ZooParams

STEPS = {"autoencoder": 60, "unet": 60}
NETWORKS = {"autoencoder": "model", "unet": "denoiser"}
SMALL = {
    "autoencoder": {"encoder_channels": [4, 4], "decoder_channels": [4, 2], "decoder_bottom_channels": 4, "stride": 8, "latent_dim": 16,
                    "norm": "batch"},
    "unet": {"block_out_channels": [8, 8, 4], "embedding_dim": 64},
}


def synthetic_zoo(folder: Path) -> tuple[ZooParams, list[Task]]:
    """Write a zoo of random `lora_B` for two tasks, on MiniLM's shapes."""
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
    names = [f"run {index}" for index in range(4)]
    return ZooParams.write(folder / "params", template, map(template.to_params, adapters), [0, 0, 1, 1], names, "{}"), tasks


def train(data: ZooParams, tasks: list[Task], folder: Path) -> None:
    recipe = read_recipe("minilm-text-tasks")
    sections = {}
    for name in STEPS:
        short = {"steps": STEPS[name], "batch_size": 8, "checkpoint_every": 5, "warmup_steps": 5, "log_every": 1}
        sections[name] = {**recipe[name], NETWORKS[name]: SMALL[name], "fit": short}
    autoencoder = AutoencoderStage(data, parse(AutoencoderConfig, sections["autoencoder"], "autoencoder"))
    fit(autoencoder, autoencoder.config.fit, folder / "autoencoder")
    config = parse(UNetConfig, {**sections["unet"], "conditions_per_task": 2}, "unet")
    bank = ConditionBank.build(tasks, config, folder)
    unet = DenoiserStage(autoencoder.codec, data, bank, config, autoencoder.identity, autoencoder.latents())
    fit(unet, unet.config.fit, folder / "unet")
    factor = torch.tensor(autoencoder.module.config.scaling_factor)
    ends = {**autoencoder.module.state_dict(), **unet.module.state_dict(), "latents": unet.latents, "factor": factor}
    save_file(ends, folder / f"process-{processes().process_index}.safetensors")


def run_children(data: ZooParams, tasks: list[Task], folder: Path, count: int, steps: int | None, rng: random.Random) -> bool:
    """Train in forked children; kill them after so many steps of both stages. Return whether they were killed before they had finished."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            if count > 1:
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true")
            train(data, tasks, folder)
            os._exit(0)
        children.append(child)
    if steps is not None:
        while sum(path.read_bytes().count(b"\n") for path in folder.glob("*/metrics.jsonl")) < steps:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        for child in rng.sample(children, count):
            os.kill(child, signal.SIGKILL)
            time.sleep(rng.choice((0, 0.002)))  # meanwhile the others may find that one is gone
    ends = [os.waitpid(child, 0)[1] for child in children]
    if steps is None and any(ends):
        raise SystemExit(f"training failed with status {ends}")
    return any(ends)


def bits(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".jsonl"):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        data, tasks = synthetic_zoo(root)
        started, count = time.monotonic(), arguments.processes
        run_children(data, tasks, root / "whole", count, None, rng)
        whole = time.monotonic() - started
        ends = {(root / "whole" / f"process-{index}.safetensors").read_bytes() for index in range(count)}
        expected, same, hit, places = bits(root / "whole"), 0, 0, []
        while hit < arguments.kills:
            folder = root / f"killed-{hit}-{rng.random()}"
            if not run_children(data, tasks, folder, count, rng.randrange(sum(STEPS.values())), rng):
                continue  # it had finished before the kill
            hit += 1
            places.append(sum(path.read_bytes().count(b"\n") for path in folder.glob("*/metrics.jsonl")))
            run_children(data, tasks, folder, count, None, rng)
            same += bits(folder) == expected
            print(f"\r{same} of {hit} bit-identical", end="", flush=True)
        print(f" (weights, optimiser, EMA and metrics of both stages; an undisturbed run takes {whole:.1f} s)")
        print(f"{count} processes end in {len(ends)} kind of bits; killed after {places} of the {sum(STEPS.values())} steps of both stages")
        sys.exit(same != hit or len(ends) != 1)
