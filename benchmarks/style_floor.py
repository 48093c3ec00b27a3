"""Measure what can be said of the bundled style generator without a zoo: generated adapters beside no LoRA, and what noise alone makes.

    cond-pdiff make-styles --images paintings --out styles
    python benchmarks/style_floor.py --tasks styles --out floor

For the unseen styles of the recipe and a random choice of the trained ones, on all held-out pictures of each: distances to the true
pictures, with 95 % intervals over styles. *floor*: between pictures of the base from one noise and from another. Conditions are those of
`cond-pdiff evaluate`. What is measured is not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from few_shot import once
from style_part import GENERATOR, RECIPE, choose_trained

from cond_pdiff import CondPDiffPipeline
from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.defaults import DEFAULT_STEPS
from cond_pdiff.text_to_image import load_text_to_image
from cond_pdiff.training.card import markdown_table
from cond_pdiff.training.evaluate.measure import mean, mean_interval
from cond_pdiff.training.evaluate.styles import METRICS, OTHER_NOISE, PictureSet, draw_pictures, shown_picture
from cond_pdiff.training.recipe import read_recipe
from cond_pdiff.training.tasks.styles import Style, load_styles

COLUMNS = ("base", "generated", "base_floor")


class StyleMeasurer:
    """The generator, its base model, and the base's pictures, which are the same for all styles."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.pipe = CondPDiffPipeline.from_pretrained(GENERATOR)
        self.pipe.set_progress_bar_config(disable=True)
        self.base = load_text_to_image(self.pipe.template.base)
        self._of_base: dict[tuple[str, ...], tuple[PictureSet, PictureSet]] = {}

    def of_base(self, captions: tuple[str, ...]) -> tuple[PictureSet, PictureSet]:
        """Draw the base's pictures from one noise and from another."""
        if captions not in self._of_base:
            one, other = (PictureSet(draw_pictures(self.base, None, captions, self.seed * 1_000_003 + noise)) for noise in (0, OTHER_NOISE))
            self._of_base[captions] = one, other
        return self._of_base[captions]

    def measure(self, style: Style) -> dict[str, Any]:
        """Measure a style: its distances by column and metric."""
        seen, (pixels, captions) = style.name in self.pipe.condition_index.names, style.pictures("test")
        true, (base, other) = PictureSet(pixels), self.of_base(tuple(captions))
        generators = [torch.Generator().manual_seed(self.seed * 1_000_003)]
        output = self.pipe(shown_picture(style, self.seed, seen), generator=generators)
        made = PictureSet(draw_pictures(self.base, output.adapter, captions, self.seed * 1_000_003))
        found = {"base": base.distances(true), "generated": made.distances(true), "base_floor": base.distances(other)}
        return {"seen": seen, "pictures": len(captions), "in_distribution": output.report.in_distribution, **found}


def to_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Return a table of means over the styles that were trained on and over the unseen ones."""
    rows = []
    for title, seen in (("trained styles", True), ("unseen styles", False)):
        part = [result for result in results if result["seen"] == seen]
        for metric in METRICS if part else ():
            columns = [[result[column][metric] for result in part] for column in COLUMNS]
            columns.append([generated - base for base, generated in zip(*columns[:2], strict=True)])
            rows.append([f"{len(part)} {title}, {metric}", *map(_cell, columns)])
    return markdown_table(["mean over", "no LoRA", "generated", "no LoRA, floor", "generated − no LoRA"], rows) + "\n"


def _cell(values: Sequence[float]) -> str:
    low, high = mean_interval(values) or (float("nan"), float("nan"))
    return f"{mean(values):.3g} ({low:.3g} to {high:.3g})"


def main() -> None:
    """Measure every style, and write `floor.json` and `floor.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", required=True, type=Path, help="made by make-styles")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--trained", type=int, default=8, help="how many trained styles (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their choice and of all noise (default: %(default)s)")
    arguments = parser.parse_args()
    measurer, results = StyleMeasurer(arguments.seed), []
    names = choose_trained(measurer.pipe.condition_index.names, arguments.trained, arguments.seed)[1]
    for style in load_styles(arguments.tasks, [*read_recipe(RECIPE)["collect"]["unseen"], *names]):
        path = arguments.out / "styles" / f"{style.name}.json"
        results.append({"style": style.name, **once(path, partial(measurer.measure, style))})
    facts = {"generator": GENERATOR, "seed": arguments.seed, "num_inference_steps": DEFAULT_STEPS}
    write_text(arguments.out / "floor.json", dump_json({**facts, "styles": results}))
    write_text(arguments.out / "floor.md", to_markdown(results))
    print((arguments.out / "floor.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
