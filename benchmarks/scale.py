"""Measure what adapters of 7·10⁴ to 10⁸ numbers cost: codec, denoiser, generating and saving; `results/scale.json`, with a plot.

    python benchmarks/scale.py [--sizes 73728 …] [--adapters 16] [--folder DIR] [--out results]

Layouts are of real base models; adapters are random ones of low rank (a mean, eight directions, noise), `--adapters` of each size. Every
row is made in a process of its own, so peaks of memory are of that size alone; "beyond torch" is what comes on top of the imported
libraries. `--folder` needs 80 bytes a number for the largest size (8 GB) for as long as it takes. Times are the best of three where they
are short. What the paper's network would need at the same size is computed, not run. Quality is in `benchmarks/scale_quality.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cond_pdiff import ConditionIndex, CondPDiffPipeline, ParamAutoencoder, TokenDenoiser, Vector, VectorConditionEncoder
from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.hub import MINILM
from cond_pdiff.layout import ParamLayout
from cond_pdiff.lora import KEY_PREFIX, LoraSpec
from cond_pdiff.models.adapter_template import AdapterTemplate
from cond_pdiff.training.config import AutoencoderConfig
from cond_pdiff.training.recipe import read_recipe
from cond_pdiff.training.stages.codec_stages import codec_stage
from cond_pdiff.training.zoo.params import ZooParams

DIM, WIDTH, BATCH, GOES = 384, 64, 16, 3
MINILM_ATTENTION = {"attention.self.query": (384, 384), "attention.self.key": (384, 384), "attention.self.value": (384, 384),
                    "attention.output.dense": (384, 384)}  # fmt: skip
MINILM_ALL = {**MINILM_ATTENTION, "intermediate.dense": (384, 1536), "output.dense": (1536, 384)}
PIXART = {f"attn{which}.{part}": (1152, 1152) for which in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")}
SMOLLM2 = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (576, 192), "self_attn.v_proj": (576, 192), "self_attn.o_proj": (576, 576),
           "mlp.gate_proj": (576, 1536), "mlp.up_proj": (576, 1536), "mlp.down_proj": (1536, 576)}  # fmt: skip


class Size(NamedTuple):
    """A base model's adapted modules, and the rank that gives an adapter its size."""

    what: str
    modules: dict[str, tuple[int, int]]
    layers: int
    rank: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key → shape of the adapter's tensors."""
        shapes = {}
        for layer in range(self.layers):
            for name, (inputs, outputs) in self.modules.items():
                for factor, shape in (("A", (self.rank, inputs)), ("B", (outputs, self.rank))):
                    shapes[f"{KEY_PREFIX}layers.{layer}.{name}.lora_{factor}.weight"] = shape
        return dict(sorted(shapes.items()))


SIZES = {
    73_728: Size("MiniLM, attention, rank 4", MINILM_ATTENTION, 6, 4),
    516_096: Size("PixArt-XL, attention, rank 1", PIXART, 28, 1),
    10_616_832: Size("MiniLM, all linear layers, rank 256", MINILM_ALL, 6, 256),
    39_075_840: Size("SmolLM2-135M, all linear layers, rank 128", SMOLLM2, 30, 128),
    100_131_840: Size("SmolLM2-135M, all linear layers, rank 328", SMOLLM2, 30, 328),
}
"""Numbers an adapter → what has so many."""


def random_params(size: int, count: int) -> Iterator[torch.Tensor]:
    """Yield random params, one adapter after the other: a mean, eight directions with random coefficients, and noise."""
    rng = torch.Generator().manual_seed(0)
    coefficients = torch.randn(count, 8, generator=rng)
    for index in range(count):
        parts = []
        for start in range(0, size, 2**20):  # the same directions for all adapters, drawn anew for each, as all do not fit into memory
            of_part = torch.Generator().manual_seed(start + 1)
            fixed = torch.randn(9, min(2**20, size - start), generator=of_part)
            noise = torch.randn(fixed.shape[1], generator=rng)
            parts.append(0.03 * fixed[0] + 0.01 * (coefficients[index] @ fixed[1:]) + 0.005 * noise)
        yield torch.cat(parts)


def peak() -> float:
    """Return this process's largest memory so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def best(work: Callable[[], Any], goes: int = GOES) -> float:
    """Return the seconds of the fastest go."""
    seconds = []
    for _ in range(goes):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return round(min(seconds), 4)


def make_zoo(numbers: int, adapters: int, folder: Path) -> None:
    """Write the matrix of a random zoo."""
    size = SIZES[numbers]
    targets = tuple({name.rpartition(".")[2] if "to_out" not in name else "to_out.0" for name in size.modules})
    spec = LoraSpec(MINILM.repo_id, size.rank, float(size.rank), targets)
    template = AdapterTemplate(ParamLayout(size.shapes).to_json(), spec.to_json(), MINILM.to_json(), 128)
    names = [f"task/run-{index}" for index in range(adapters)]
    ZooParams.write(folder, template, random_params(numbers, adapters), list(range(adapters)), names, "{}")


def open_zoo(folder: Path, adapters: int) -> ZooParams:
    """Open what `make_zoo` wrote."""
    return ZooParams._open(folder, list(range(adapters)), [f"task/run-{index}" for index in range(adapters)])


def fit_row(folder: Path, adapters: int) -> dict[str, Any]:
    """Fit the codec, and save a generator with it whose other parts are not trained."""
    before, started = peak(), time.perf_counter()
    stage = codec_stage(open_zoo(folder / "zoo", adapters), AutoencoderConfig({"type": "ModuleBasis", "width": WIDTH}, normalizer="none"))
    hashed = time.perf_counter()
    stage.train(folder / "basis")
    row = {"hash_seconds": hashed - started, "fit_seconds": time.perf_counter() - hashed, "fit_gigabytes": peak() - before}
    codec, latents = stage.codec, stage.latents()
    torch.manual_seed(0)
    denoiser = TokenDenoiser(*codec.latent_shape, DIM, **codec.token_places, guided_length=codec.guided_length)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4)
    drawn = torch.randint(len(latents), (BATCH,))

    def step() -> None:
        predicted = denoiser(latents[drawn], torch.randint(1000, (BATCH,)), torch.randn(BATCH, DIM)).sample
        predicted.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    row |= {"modules": codec.latent_shape[1], "train_step_seconds": best(step, 5), "lost": stage.lost()}
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    index = ConditionIndex({"a task": {"description": "A task."}}, DIM)
    scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction", use_exponential_sigmas=True)
    pipe = CondPDiffPipeline(
        codec.autoencoder, denoiser.eval(), scheduler, VectorConditionEncoder(DIM), codec.normalizer, codec.template, index
    )
    pipe.save_pretrained(folder / "generator")
    row["generator_bytes"] = sum(path.stat().st_size for path in (folder / "generator").rglob("*") if path.is_file())
    return row


def generate_row(folder: Path) -> dict[str, Any]:
    """Load the generator and write adapters: twenty denoising steps with guidance, decoding, checking, saving."""
    before = peak()
    pipe = CondPDiffPipeline.from_pretrained(folder / "generator")
    pipe.set_progress_bar_config(disable=True)
    condition = Vector.of([float(index % 7) for index in range(DIM)])

    def denoise() -> Any:
        return pipe(condition, generator=torch.Generator().manual_seed(0), output_type="latent")

    def write() -> None:
        pipe(condition, generator=torch.Generator().manual_seed(0)).save_adapter(folder / "adapter", overwrite=True)

    write()
    row = {"generate_and_save_seconds": best(write), "denoise_seconds": best(denoise), "generate_gigabytes": peak() - before}
    row["adapter_bytes"] = sum(path.stat().st_size for path in (folder / "adapter").iterdir())
    return row


def papers_network(numbers: int) -> dict[str, Any]:
    """Compute what the bundled text generator's kind of `ParamAutoencoder` has, and needs to be trained, without making it."""
    with torch.device("meta"):
        network = ParamAutoencoder(numbers, **read_recipe("minilm-text-tasks")["autoencoder"]["model"])
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"parameters": parameters, "training_gigabytes": 4 * 5 * parameters / 2**30}  # weights, gradient, AdamW's two, average


def plot(rows: dict[str, Any], path: Path) -> None:
    """Draw time and disk against size, on logarithmic axes, with a line of proportion."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    sizes = [int(size) for size in rows]
    for name, label in (("fit_seconds", "fit the basis"), ("generate_and_save_seconds", "generate and save one"),
                        ("train_step_seconds", "one training step of the denoiser")):  # fmt: skip
        left.loglog(sizes, [row[name] for row in rows.values()], "o-", label=label)
    for name, label in (("generator_bytes", "generator"), ("adapter_bytes", "adapter")):
        right.loglog(sizes, [row[name] / 1e6 for row in rows.values()], "o-", label=label)
    for axes, column, scale, unit in ((left, "fit_seconds", 1, "seconds"), (right, "generator_bytes", 1e-6, "MB")):
        last = list(rows.values())[-1][column] * scale
        axes.loglog(sizes, [last * size / sizes[-1] for size in sizes], ":", color="grey", label="in proportion")
        axes.set(xlabel="numbers an adapter", ylabel=unit)
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def markdown(facts: dict[str, Any]) -> list[str]:
    """Return the rows of the table in docs/large_adapters.md."""
    lines = []
    for numbers, row in sorted(facts["sizes"].items(), key=lambda entry: int(entry[0])):
        network = row["papers_network"]
        cells = [
            f"{int(numbers):,}", row["what"], row["modules"], f"{row['fit_seconds']:.1f} s, {row['fit_gigabytes']:.1f} GB",
            f"{row['train_step_seconds']:.2f} s", f"{row['generate_and_save_seconds']:.2f} s, {row['generate_gigabytes']:.1f} GB",
            f"{row['generator_bytes'] / 1e6:,.0f} MB", f"{row['adapter_bytes'] / 1e6:,.1f} MB",
            f"{network['parameters'] / 1e6:,.0f} million, {network['training_gigabytes']:.1f} GB",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def child(*arguments: str) -> dict[str, Any]:
    """Run a part of a row in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--part", choices=("zoo", "fit", "generate"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        (numbers,) = arguments.sizes
        if arguments.part == "zoo":
            make_zoo(numbers, arguments.adapters, arguments.folder / "zoo")
            made: dict[str, Any] = {}
        elif arguments.part == "fit":
            made = fit_row(arguments.folder, arguments.adapters)
        else:
            made = generate_row(arguments.folder)
        print(json.dumps(made))
        sys.exit()
    rows: dict[str, Any] = {}
    for numbers in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            options = ("--sizes", str(numbers), "--adapters", str(arguments.adapters), "--folder", temporary)
            row = {"what": SIZES[numbers].what}
            for part in ("zoo", "fit", "generate"):
                row |= child("--part", part, *options)
            row["papers_network"] = papers_network(numbers)
            rows[str(numbers)] = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
            print(numbers, rows[str(numbers)], flush=True)
    facts = {"adapters": arguments.adapters, "width": WIDTH, "batch": BATCH, "cores": os.cpu_count(), "torch": torch.__version__,
             "threads": torch.get_num_threads(), "sizes": rows}  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out / "scale.json", dump_json(facts))
    plot(rows, arguments.out / "scale.png")
    print("\n".join(markdown(facts)))
