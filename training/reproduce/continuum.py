"""A continuum of styles (paper, appendix C): mixtures of two trained styles, half of them for training, half for test.

<folder>/zoo/, <folder>/styles/   the training half, as `train` reads it: every mixture is a style with one adapter
<folder>/test.safetensors          the test half: ratios, params and pictures
<folder>/continuum.json            which styles, how many mixtures

Training and test ratios take turns in bands, so that the test half lies in gaps that training has never seen (figure 7).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm.auto import tqdm

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.atomic import dump_json, write_bytes, write_text
from cond_pdiff.defaults import CONTINUUM_MIXTURES
from cond_pdiff.errors import TaskDataError
from cond_pdiff.models.adapter_template import AdapterTemplate
from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.text_to_image import make_pictures, stack_pictures
from cond_pdiff.training.tasks.styles import write_style
from cond_pdiff.training.text_to_image.scenes import scene_stream
from cond_pdiff.training.zoo.zoo import Zoo, soup, write_run

BANDS = 10
"""The number of bands of equal width over the ratios from 0 to 1; every second one is for test."""
PICTURES = 4
"""The number of pictures made with each mixture, each of another caption; together they are its style picture."""
FACTS_FILE, TEST_FILE = "continuum.json", "test.safetensors"
RATIOS_FILE = "ratios.json"
"""The file of what an evaluation found."""


def make_continuum(zoo: Zoo, first: str, second: str, out: str | Path, count: int = CONTINUUM_MIXTURES, seed: int = 0) -> Path:
    """Mix two styles of a zoo in `count` ratios, make pictures with each mixture, and write both halves below `out`.

    Run the same command again to go on where it stopped.

    Args:
        first, second: trained styles of the zoo; their soups are mixed as (1 − ratio) · first + ratio · second.

    Raises:
        TaskDataError: the zoo has no such style, or `out` holds another continuum.
    """
    out = Path(out)
    missing = [name for name in (first, second) if name not in zoo.task_names]
    if count < 2 * BANDS:
        raise TaskDataError(f"a continuum needs at least {2 * BANDS} mixtures, got {count}")
    if missing or not zoo.family.paints or first == second:
        raise TaskDataError(f"name two trained styles of {zoo.folder}, got {first!r} and {second!r}; there are {zoo.task_names}")
    facts = {"first": first, "second": second, "count": count, "seed": seed}
    if (out / FACTS_FILE).exists() and json.loads((out / FACTS_FILE).read_text(encoding="utf-8")) != facts:
        raise TaskDataError(f"{out} holds another continuum; choose another folder, or delete it")
    write_text(out / FACTS_FILE, dump_json(facts))
    ends = [soup([run.adapter() for run in zoo.runs(name)]) for name in (first, second)]
    base = zoo.family.load(zoo.base, ends[0].spec)
    training = [index for index in range(count) if not is_test(index / (count - 1))]
    names = {index: f"mixture-{index:05d}" for index in training}
    collect = {**zoo.facts["collect"], "runs": 1, "multitask_steps": 0}
    tasks: dict[str, Any] = {names[index]: {"group": names[index], "licence": ""} for index in training}
    write_text(out / "zoo" / "zoo.json", dump_json({**zoo.facts, "collect": collect, "tasks": tasks, "unseen": {}}))
    found: dict[str, list[torch.Tensor]] = {"ratios": [], "params": [], "pictures": []}
    template = AdapterTemplate.from_adapters(ends, zoo.base, int(collect["max_length"]))
    for index in tqdm(range(count), desc="continuum", unit="mixture"):
        ratio = index / (count - 1)
        adapter = ends[0].interpolate(ends[1], ratio)
        if index in names:
            _write_mixture(out, names[index], adapter, base, seed + index)
        elif not (out / TEST_FILE).exists():
            found["ratios"].append(torch.tensor(ratio, dtype=torch.float64))
            found["params"].append(template.to_params(adapter))
            found["pictures"].append(stack_pictures([_sheet(_pictures(base, adapter, seed + index)[0])])[0])
    if not (out / TEST_FILE).exists():
        write_bytes(out / TEST_FILE, save({name: torch.stack(rows) for name, rows in found.items()}))
    return out


def is_test(ratio: float) -> bool:
    """Return whether a ratio from 0 to 1 belongs to the test half."""
    return min(int(ratio * BANDS), BANDS - 1) % 2 == 1


def _pictures(base: DiffusionPipeline, adapter: LoraAdapter, seed: int) -> tuple[list[Image.Image], list[str]]:
    scenes = islice(scene_stream(seed), PICTURES)
    captions = [scene.caption(random.Random(f"continuum/{seed}/{place}"), full=True) for place, (scene, _) in enumerate(scenes)]
    return make_pictures(base, captions, [(adapter, 1.0)], seed), captions


def _sheet(pictures: list[Image.Image]) -> Image.Image:
    """Put four pictures into one."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (2 * width, 2 * height))
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (width * (place % 2), height * (place // 2)))
    return sheet


def _write_mixture(out: Path, name: str, adapter: LoraAdapter, base: DiffusionPipeline, seed: int) -> None:
    run = out / "zoo" / "tasks" / name / "run-0"
    if not (out / "styles" / name).exists():
        pictures, captions = _pictures(base, adapter, seed)
        pixels = stack_pictures(pictures)
        write_style(out / "styles" / name, _sheet(pictures), {"train": (pixels, captions), "test": (pixels.clone(), captions)}, group=name)
    if not run.exists():
        write_run(run, adapter, {"task": name, "run": 0})


@dataclass(frozen=True)
class ContinuumResult:
    """What a generator makes of pictures of unseen mixtures.

    Args:
        ratios: true ones, shape `(num_tests,)`.
        recovered: those of the generated params: their projection on the line between the two styles.
        off_line: distance of the generated params from that line, in units of its length.
    """

    ratios: torch.Tensor
    recovered: torch.Tensor
    off_line: torch.Tensor

    def to_json(self) -> dict[str, Any]:
        """Return the mean error of the ratio, and the pairs."""
        errors = (self.recovered - self.ratios).abs()
        return {
            "tests": len(errors),
            "mean_error": round(float(errors.mean()), 4),
            "worst_error": round(float(errors.max()), 4),
            "mean_off_line": round(float(self.off_line.mean()), 4),
            "ratios": [[round(float(true), 4), round(float(found), 4)] for true, found in zip(self.ratios, self.recovered, strict=True)],
        }


def evaluate_continuum(generator: str | Path, folder: str | Path, out: str | Path) -> dict[str, Any]:
    """Generate from every test picture; write `ratios.json` and `continuum.png` (figures 6 and 7) to `out`."""
    try:
        test = load_file(Path(folder) / TEST_FILE)
    except (OSError, SafetensorError) as error:
        raise TaskDataError(f"{folder} has no test half; run `cond-pdiff make-continuum` to the end ({error})") from error
    pipe = CondPDiffPipeline.from_pretrained(generator)
    pipe.set_progress_bar_config(disable=True)
    made = torch.cat([_params(pipe, pixels, index) for index, pixels in enumerate(tqdm(test["pictures"], desc="generate"))]).double()
    ratios, params = test["ratios"], test["params"].double()
    # Mixtures lie on a line: two of them give its ends.
    low, high = int(ratios.argmin()), int(ratios.argmax())
    along = (params[high] - params[low]) / (ratios[high] - ratios[low])
    start = params[low] - ratios[low] * along
    recovered = (made - start) @ along / along.square().sum()
    off_line = (made - start - recovered[:, None] * along).norm(dim=1) / along.norm()
    result = ContinuumResult(ratios, recovered, off_line)
    write_text(Path(out) / RATIOS_FILE, dump_json(result.to_json()))
    _plot(result, torch.cat([start[None], (start + along)[None], made]), Path(out))
    return result.to_json()


def _params(pipe: CondPDiffPipeline, pixels: torch.Tensor, seed: int) -> torch.Tensor:
    image = Image.fromarray(pixels.numpy())
    params: torch.Tensor = pipe(image, generator=torch.Generator().manual_seed(seed), output_type="params")
    return params


def _plot(result: ContinuumResult, points: torch.Tensor, out: Path) -> None:
    """Plot true against recovered ratio; right of it the line of mixtures and the generated params in their two principal directions."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    center = points[:2].mean(0)
    _, _, directions = torch.pca_lowrank(points - center, 2, center=False)
    placed = (points - center) @ directions
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for band in range(0, BANDS, 2):
        left.axvspan(band / BANDS, (band + 1) / BANDS, color="0.9", lw=0)
        ends = torch.lerp(placed[0], placed[1], torch.tensor([[band / BANDS], [(band + 1) / BANDS]], dtype=placed.dtype))
        right.plot(*ends.T.numpy(), color="#0072B2", lw=4, label="training mixtures" if band == 0 else None)
    left.plot([0, 1], [0, 1], color="0.5", lw=1)
    left.scatter(result.ratios, result.recovered, s=6, color="#D55E00")
    left.set(xlabel="ratio of the mixture that the picture shows", ylabel="ratio of the generated adapter", title="grey: ratios trained on")
    right.scatter(*placed[2:].T.numpy(), s=6, color="#D55E00", label="generated from test pictures", zorder=3)
    right.set(xlabel="first principal direction", ylabel="second", title="params")
    right.legend()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "continuum.png", dpi=110)
    pyplot.close(figure)
