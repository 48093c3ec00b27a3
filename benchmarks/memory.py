"""Measure the peak memory of training on `paper-language-half+bert+rank16`: 750 adapters of 1,179,648 parameters, a few steps a stage.

    python benchmarks/memory.py [--recipe paper-language-half+bert+rank16] [--adapters 750] [--steps 1] [--batch 256] [--latents 256]
        [--passed 750]

Adapters are random, the text encoder is untrained; the networks, the batches and what is done with the whole zoo are those of `train`.
`--batch` and `--latents` (of a step of autoencoder and U-Net) and `--passed` (adapters of the autoencoder's last pass) may be less than
the recipe's where time is short: a step goes through the networks in parts, one adapter and eight latents each, so the peak is that of one.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.hub import MINILM
from cond_pdiff.lora import KEY_PREFIX, LoraSpec
from cond_pdiff.models.adapter_template import AdapterTemplate
from cond_pdiff.training.config import AutoencoderConfig, CollectConfig, UNetConfig, parse
from cond_pdiff.training.precision import on_training_device
from cond_pdiff.training.recipe import read_recipe
from cond_pdiff.training.stages.autoencoder import AutoencoderStage
from cond_pdiff.training.stages.condition_bank import ConditionBank
from cond_pdiff.training.stages.denoiser import DenoiserStage
from cond_pdiff.training.stages.loop import fit
from cond_pdiff.training.tasks.tasks import write_task
from cond_pdiff.training.zoo.params import ZooParams

TASKS = 5
WIDTH = 768  # BERT-base's, in twelve layers
PARTS = ("self.query", "self.key", "self.value", "output.dense")
MODULES = [f"bert.encoder.layer.{layer}.attention.{part}" for layer in range(12) for part in PARTS]


def random_zoo(rank: int, count: int, folder: Path) -> ZooParams:
    """Write random adapters of BERT-base's attention to disk, one after the other."""
    rng = torch.Generator().manual_seed(0)

    def adapter() -> LoraAdapter:
        factors = {"A": (rank, WIDTH), "B": (WIDTH, rank)}
        shapes = {f"{KEY_PREFIX}{name}.lora_{factor}.weight": shape for name in MODULES for factor, shape in factors.items()}
        spec = LoraSpec("nobody/base", rank, 2.0 * rank, ("attention.output.dense", "key", "query", "value"))
        return LoraAdapter(spec, {key: 0.03 * torch.randn(shape, generator=rng) for key, shape in shapes.items()})

    template = AdapterTemplate.from_adapters([adapter(), adapter()], MINILM, 128)
    tasks = [index * TASKS // count for index in range(count)]
    params = (template.to_params(adapter()) for _ in range(count))
    return ZooParams.write(folder, template, params, tasks, [f"run {index}" for index in range(count)], "{}")


def report(what: str, started: float) -> None:
    """Print the seconds and the peak so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.monotonic() - started:7.1f} s  {peak:5.2f} GB  {what}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="paper-language-half+bert+rank16")
    parser.add_argument("--adapters", type=int, default=750)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--latents", type=int, default=256)
    parser.add_argument("--passed", type=int, default=750)
    arguments = parser.parse_args()
    recipe, started = read_recipe(arguments.recipe), time.monotonic()
    rank = parse(CollectConfig, recipe["collect"], "collect").rank
    sections = {}
    for name, batch in (("autoencoder", arguments.batch), ("unet", arguments.latents)):
        fit_section = {**recipe[name]["fit"], "steps": arguments.steps, "batch_size": batch}
        sections[name] = {**recipe[name], "fit": fit_section}
    sections["unet"]["condition_encoder"] = {**recipe["unet"]["condition_encoder"], "backbone": None}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        report("libraries", started)
        data = random_zoo(rank, arguments.adapters, folder / "params")
        report(f"{len(data)} adapters of {data.template.layout.num_params:,} numbers on disk", started)
        autoencoder = AutoencoderStage(data, parse(AutoencoderConfig, sections["autoencoder"], "autoencoder"))
        report("autoencoder, normaliser and the hash of all adapters", started)
        fit(autoencoder, autoencoder.config.fit, folder / "autoencoder")
        report(f"{arguments.steps} steps of the autoencoder with {arguments.batch} adapters", started)
        passed = data.part(range(min(arguments.passed, len(data))))
        with on_training_device(autoencoder.module):
            autoencoder.codec.reconstruction_error(passed.chunks())
        report(f"{len(passed)} adapters through the autoencoder and back", started)
        rows = [(f"text number {index}", index % 2) for index in range(40)]
        splits = {"train": rows, "test": rows}
        tasks = [write_task(folder / f"task-{index}", f"Decide about {index}.", ["no", "yes"], splits) for index in range(TASKS)]
        config = parse(UNetConfig, sections["unet"], "unet")
        bank = ConditionBank.build(tasks, config, folder)
        unet = DenoiserStage(autoencoder.codec, data, bank, config, autoencoder.identity, autoencoder.latents())
        report("latents and conditions", started)
        fit(unet, config.fit, folder / "unet")
        report(f"{arguments.steps} steps of the U-Net with {arguments.latents} latents", started)
        unet.pipeline().save_pretrained(folder / "generator")
        report("generator on disk", started)
