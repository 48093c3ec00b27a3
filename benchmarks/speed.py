"""Measure the time from a condition to a saved adapter, and the command line from a cold shell against its imports alone.

    python benchmarks/speed.py [--repeats 7] [--only warm|cold|style-half]

Prints medians and their ratio; all of one run on the same machine. Of the paper's own style half (516,096 numbers an adapter, untrained
networks of the published sizes), the best of the repeats, with torch's own layers and with `cond_pdiff.models.long_maps` in turn. Where
other processes use the cores too, read the time on the CPU with OMP_NUM_THREADS=1: several threads wait for each other, and that counts.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cond_pdiff.codec import AdapterCodec
    from cond_pdiff.models.param_unet_1d import ParamUNet1D

DESCRIPTION = "Decide whether a sentence from a review of an electronic product is negative or positive."
EXAMPLES = [("battery died after a week", "negative"), ("crisp, bright screen", "positive")]
IMPORTS = "import torch, diffusers, peft"


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def warm(repeats: int) -> None:
    from cond_pdiff import CondPDiffPipeline, TaskPrompt

    pipe = CondPDiffPipeline.from_pretrained("cond-pdiff/minilm-text-tasks")
    pipe.set_progress_bar_config(disable=True)
    prompt = TaskPrompt(DESCRIPTION, EXAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 20):

            def generate(count: int = count) -> None:
                pipe(prompt, num_adapters=count).save_adapter(Path(folder) / "adapter", overwrite=True)

            generate()
            print(f"condition → saved adapter, warm, {count:>2} candidates  {median_seconds(generate, repeats):.3f} s")


def cold(repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("cond-pdiff")), "generate", DESCRIPTION, "--out", f"{folder}/a", "--force"]
        for text, label in EXAMPLES:
            command += ["--example", f"{text}={label}"]
        imports = [sys.executable, "-c", IMPORTS]
        times: dict[str, list[float]] = {"generate": [], "imports": []}
        for _ in range(repeats):  # in turn, so that a slow moment of the machine meets both
            for name, argv in (("imports", imports), ("generate", command)):
                times[name].append(median_seconds(lambda argv=argv: subprocess.run(argv, check=True, capture_output=True), 1))
        medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"python -c '{IMPORTS}'                {medians['imports']:.2f} s")
    print(f"cond-pdiff generate, cold shell, 20 candidates      {medians['generate']:.2f} s")
    print(f"ratio                                               {medians['generate'] / medians['imports']:.2f}")


def style_half_networks() -> tuple[ParamUNet1D, AdapterCodec]:
    """Make the denoiser and the codec of the recipe `paper-style-half`, for PixArt-XL-2's adapters, with random weights."""
    import torch

    from cond_pdiff.adapter import LoraAdapter
    from cond_pdiff.codec import AdapterCodec
    from cond_pdiff.hub import Backbone
    from cond_pdiff.lora import KEY_PREFIX, LoraSpec
    from cond_pdiff.models.adapter_template import AdapterTemplate
    from cond_pdiff.models.param_autoencoder import ParamAutoencoder
    from cond_pdiff.models.param_unet_1d import ParamUNet1D
    from cond_pdiff.normalization import ParamNormalizer
    from cond_pdiff.training.recipe import read_recipe

    recipe = read_recipe("paper-style-half")
    torch.manual_seed(0)
    targets = recipe["collect"]["target_modules"]
    modules = [f"transformer_blocks.{block}.attn{number}.{part}" for block in range(28) for number in (1, 2) for part in targets]
    factors = {"A": (1, 1152), "B": (1152, 1)}
    shapes = {f"{KEY_PREFIX}{name}.lora_{factor}.weight": shape for name in modules for factor, shape in factors.items()}
    spec = LoraSpec("nobody/base", 1, 8.0, tuple(sorted(targets)))
    zoo = [LoraAdapter(spec, {key: 0.03 * torch.randn(shape) for key, shape in shapes.items()}) for _ in range(3)]
    template = AdapterTemplate.from_adapters(zoo, Backbone("nobody/base"), recipe["collect"]["max_length"])
    autoencoder = ParamAutoencoder(template.layout.num_params, **recipe["autoencoder"]["model"]).eval()
    codec = AdapterCodec(template, ParamNormalizer(recipe["autoencoder"]["normalizer"], template.layout.sizes), autoencoder)
    codec.fit_normalizer([torch.stack([template.to_params(adapter) for adapter in zoo])])
    arguments = {key: value for key, value in recipe["unet"]["denoiser"].items() if key != "type"}
    unet = ParamUNet1D(*codec.latent_shape, recipe["unet"]["condition_encoder"]["condition_dim"], **arguments).eval()
    return unet, codec


def style_half(repeats: int, steps: int = 10) -> None:
    import torch
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    from cond_pdiff.models import param_autoencoder
    from cond_pdiff.sampling import denoise

    unet, codec = style_half_networks()
    noise, condition = torch.randn(1, *codec.latent_shape), torch.randn(1, unet.config.condition_dim)
    since = (sys.maxsize, param_autoencoder.LONG_ADAPTER)  # torch's own layers; the forms of long maps
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():

        def generate(guidance: float) -> torch.Tensor:
            params = codec.decode(denoise(unet, DPMSolverMultistepScheduler(), noise, condition, steps, guidance))
            codec.to_adapter(params[0]).save(Path(folder) / "adapter", overwrite=True)
            return params

        actions: dict[str, Callable[[], torch.Tensor]] = {
            f"embedding → saved adapter, {steps} steps": lambda: generate(1.0),
            "the same, guided": lambda: generate(1.5),
            "decoder alone": lambda: codec.autoencoder.decode(noise),
        }
        for what, action in actions.items():
            walls, works, made = [sys.float_info.max] * 2, [sys.float_info.max] * 2, [noise] * 2
            for _ in range(repeats):
                for way, param_autoencoder.LONG_ADAPTER in enumerate(since):
                    started, worked = time.perf_counter(), time.process_time()
                    made[way] = action()
                    works[way] = min(works[way], time.process_time() - worked)
                    walls[way] = min(walls[way], time.perf_counter() - started)
            difference = float((made[1] - made[0]).abs().max() / made[0].abs().max())
            times = [f"{before:.2f} s → {after:.2f} s (ratio {after / before:.2f})" for before, after in (walls, works)]
            print(f"style half, {what:<36} {times[0]}, on the CPU {times[1]}, {difference:.0e} apart", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    measurements = {"warm": warm, "cold": cold, "style-half": style_half}
    parser.add_argument("--only", choices=measurements)
    arguments = parser.parse_args()
    for name, measure in measurements.items():
        if arguments.only in (None, name):
            measure(arguments.repeats)
