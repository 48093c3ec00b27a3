"""A zoo of LoRA files of other tools → generator → adapter → the same kind of file, which diffusers loads.

    python benchmarks/foreign_files.py [--adapters 40] [--steps 1500] [--out FOLDER]

Adapters of a tiny Stable Diffusion U-Net are trained by peft, each towards a U-Net with other weights and from factors of its own.
They are saved by diffusers, by peft, and by the writers here in the keys of kohya, ComfyUI and diffusers, imported, and a generator is
trained on them; each has a vector for its condition. Told are: how well the import keeps ΔW, task-identification accuracy (routing), and by
how much the output of a generated adapter, written in each form and loaded by diffusers, differs from that of the adapter attached here.

With 40 adapters and 600 steps (two shared CPU cores, 6 minutes): ΔW kept to 5.1e-8, routing 100 % of 200 samples, outputs equal in all
bits. The tiny generator tells the adapters apart but does not make them well: generated ones lie 0.97 of ‖ΔW‖ from their own, where no
LoRA is 1, the mean of the zoo 0.99, the nearest other adapter 1.32 and the autoencoder's reconstruction 0.63.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
import tiny_pipelines
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from cond_pdiff import CondPDiffPipeline, LoraAdapter
from cond_pdiff.conditions.vector import Vector
from cond_pdiff.formats.lora_file import read_adapter
from cond_pdiff.formats.lora_writer import save_lora_file
from cond_pdiff.hub import Backbone
from cond_pdiff.training.evaluate.evaluate import evaluate
from cond_pdiff.training.evaluate.measure import EvaluateConfig
from cond_pdiff.training.stages.train import train
from cond_pdiff.training.zoo.import_adapters import import_adapters, update_error

FORMS = ("diffusers' saver", "kohya", "peft's saver", "comfyui", "diffusers")
LOADED = ("diffusers", "kohya")
TARGETS = ["attn1.to_q", "attn2.to_k", "attn2.to_v", "conv2"]
RANK, ALPHA, NUMBERS, TRAINED_STEPS, SHIFT = 2, 4, 16, 20, 0.1


def trained(seed: int, folder: Path) -> LoraAdapter:
    """Train an adapter towards a U-Net whose targeted weights are shifted at random, and save it in the form of its turn."""
    pipe, goal = tiny_pipelines.stable_diffusion(), tiny_pipelines.stable_diffusion().unet
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in goal.named_modules():
            if name.endswith(tuple(TARGETS)):
                module.weight += SHIFT * torch.randn(module.weight.shape, generator=rng)
    torch.manual_seed(seed)
    model: Any = get_peft_model(pipe.unet, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    optimiser = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.02)
    for _ in range(TRAINED_STEPS):
        noisy, text = (torch.randn(shape, generator=rng) for shape in ((4, 4, 8, 8), (4, 5, tiny_pipelines.WIDTH)))
        step = torch.randint(1000, (4,), generator=rng)
        with torch.no_grad():
            right = goal(noisy, step, text).sample
        optimiser.zero_grad()
        nn.functional.mse_loss(model(noisy, step, text).sample, right).backward()
        optimiser.step()
    form, place = FORMS[seed % len(FORMS)], folder / "adapters" / f"shift-{seed}"
    model.save_pretrained(folder / "peft" / place.name)
    adapter = LoraAdapter.load(folder / "peft" / place.name)
    if form == "peft's saver":
        (folder / "peft" / place.name).rename(place)
    elif form == "diffusers' saver":
        # Its files name no alpha but in the header, which it is given as diffusers' training scripts give it.
        settings = {**model.peft_config["default"].to_dict(), "target_modules": TARGETS}
        layers = {key.removeprefix("base_model.model."): tensor for key, tensor in get_peft_model_state_dict(model).items()}
        tiny_pipelines.stable_diffusion().save_lora_weights(
            place.parent, unet_lora_layers=layers, weight_name=f"{place.name}.safetensors", unet_lora_adapter_metadata=settings
        )
    else:
        save_lora_file(read_adapter(folder / "peft" / place.name), place.with_suffix(".safetensors"), form)
    return adapter


def recipe(steps: int) -> dict[str, Any]:
    """Return a recipe for a tiny generator that reads vectors."""
    fit = {"batch_size": 20, "warmup_steps": 50, "learning_rate": 3e-3, "steps": steps}
    return {
        "autoencoder": {
            "model": {"encoder_channels": [4, 8], "decoder_channels": [8, 4], "stride": 4, "latent_dim": 64},
            "normalizer": "batch", "fit": fit,
        },
        "unet": {
            "denoiser": {"type": "ParamUNet1D", "block_out_channels": [32, 32]}, "conditions_per_task": 2, "fit": fit,
            "condition_encoder": {"type": "VectorConditionEncoder", "condition_dim": NUMBERS},
        },
    }  # fmt: skip


def loaded_differences(adapter: LoraAdapter, folder: Path) -> dict[str, float]:
    """Return, by form, the largest difference of outputs: the file loaded by diffusers, and the adapter attached here."""
    pipe = tiny_pipelines.stable_diffusion()
    with adapter.attached(pipe):
        right = tiny_pipelines.denoised(pipe)
    found = {}
    for form in LOADED:
        file = save_lora_file(adapter, folder / f"{form}.safetensors", form, overwrite=True)
        loaded = tiny_pipelines.stable_diffusion()
        loaded.load_lora_weights(file)
        found[form] = float((tiny_pipelines.denoised(loaded) - right).abs().max())
    return found


def measure(count: int, steps: int, folder: Path) -> dict[str, Any]:
    """Go the whole way; return what is told."""
    started = time.monotonic()
    (folder / "adapters").mkdir(parents=True)
    vectors = np.random.default_rng(0).normal(size=(count, NUMBERS))
    given = {}
    with (folder / "vectors.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "vector"])
        for seed in range(count):
            given[f"shift-{seed}"] = trained(seed, folder)
            np.save(folder / f"{seed}.npy", vectors[seed])
            writer.writerow([f"shift-{seed}", f"{seed}.npy"])
    zoo = import_adapters(folder / "adapters", folder / "vectors.csv", folder / "zoo", Backbone("tiny/stable-diffusion"))
    error = max(update_error(adapter, zoo.runs(name)[0].adapter()) for name, adapter in given.items())
    generator = train(recipe(steps), zoo.folder, None, folder / "run")
    evaluation = evaluate(generator, zoo.folder, None, folder / "evaluation", EvaluateConfig(samples=2, num_inference_steps=10))
    assert evaluation is not None
    pipe = CondPDiffPipeline.from_pretrained(generator)
    pipe.set_progress_bar_config(disable=True)
    made = [pipe(Vector.of(vectors[seed]), generator=torch.Generator().manual_seed(seed)).adapter for seed in range(len(FORMS))]
    differences = [loaded_differences(adapter, folder) for adapter in made]
    means = evaluation["zoo"]
    return {
        "adapters": count, "parameters": made[0].layout.num_adapter_params, "steps": steps,
        "largest_update_error": error, "routing": means["routing"], "routing_samples": means["routing_samples"], "error": means["error"],
        "loaded_by_diffusers": {form: max(found[form] for found in differences) for form in LOADED},
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip


def main() -> None:
    """Measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(measure(arguments.adapters, arguments.steps, arguments.out or Path(temporary) / "out"), indent=1))


if __name__ == "__main__":
    main()
