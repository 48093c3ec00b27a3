"""Measure several pictures of a style as the condition, training steps on them, and guidance on the positive side, on unseen styles.

    cond-pdiff make-styles --images paintings --out styles
    python benchmarks/style_pictures.py --tasks styles --multitask zoo/multitask --out pictures --refined 5

For unseen styles of the recipe: the bundled generator is shown 1, 2, 4 or 8 of a style's training pictures; its adapter then takes steps on
all eight, with their captions, beside the same steps from nothing (`lora_B` of zeros) and from the multi-task adapter that runs of the
zoo start from. Distances are those of `cond-pdiff evaluate`, of the pictures for the first held-out captions to the true ones. What is
measured is not measured again; `--only` and several processes share the work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from few_shot import once
from PIL import Image
from style_part import GENERATOR, RECIPE

from cond_pdiff import CondPDiffPipeline, LoraAdapter, StyleImage
from cond_pdiff.atomic import dump_json, write_text
from cond_pdiff.text_to_image import load_text_to_image
from cond_pdiff.training.card import markdown_table
from cond_pdiff.training.evaluate.measure import mean, mean_interval
from cond_pdiff.training.evaluate.styles import PictureSet, draw_pictures
from cond_pdiff.training.finetuning.style_refinement import refine_style
from cond_pdiff.training.recipe import read_recipe
from cond_pdiff.training.tasks.styles import Style, load_styles

COUNTS = (1, 2, 4, 8)
STEPS = (5, 20, 50, 100)
STARTS = ("generated", "nothing", "multitask")
POINTS = (
    *(("generated", 20), ("nothing", 100), ("nothing", 20), ("multitask", 20), ("generated", 100), ("multitask", 100), ("uncaptioned", 20)),
    *((start, steps) for steps in (5, 50) for start in STARTS),
    ("multitask", 0),
)
"""Starts and steps, in the order in which they are measured; without steps, the others are those of the conditions."""
PICTURES = 24
METRICS = {"kid": "kernel distance", "look": "colours and textures"}

Distances = dict[str, float]


class Measurer:
    """The generator, its base model, and the pictures that are the same for all styles."""

    def __init__(self, multitask: Path) -> None:
        self.pipe = CondPDiffPipeline.from_pretrained(GENERATOR)
        self.pipe.set_progress_bar_config(disable=True)
        self.base, self.multitask = load_text_to_image(self.pipe.template.base), LoraAdapter.load(multitask)
        self._shared: dict[str, PictureSet] = {}

    def draw(self, adapter: LoraAdapter | None, captions: Sequence[str], positive_only: bool = False) -> PictureSet:
        """Draw a picture a caption."""
        with adapter.attached(self.base, positive_only=positive_only) if adapter else nullcontext():
            return PictureSet(draw_pictures(self.base, None, captions, 0))

    def shared(self, name: str, adapter: LoraAdapter | None, captions: Sequence[str]) -> PictureSet:
        """Draw what is the same for all styles, once."""
        if name not in self._shared:
            self._shared[name] = self.draw(adapter, captions)
        return self._shared[name]

    def generate(self, condition: StyleImage) -> LoraAdapter:
        """Generate the adapter of some pictures."""
        adapter: LoraAdapter = self.pipe(condition, generator=torch.Generator().manual_seed(0)).adapter
        return adapter

    def conditions(self, style: Style) -> dict[str, Distances]:
        """Measure by number of pictures shown, and with the adapter of all on the positive side alone."""
        condition, true, captions = read_style(style)
        found = {"base": compare(self.shared("base", None, captions), true)}
        for count in COUNTS:
            adapter = self.generate(StyleImage.of(condition[:count]))
            found[str(count)] = compare(self.draw(adapter, captions), true)
        found["positive"] = compare(self.draw(adapter, captions, positive_only=True), true)
        return found

    def refinement(self, style: Style, start: str, steps: int) -> Distances:
        """Measure an adapter after steps on all pictures; "uncaptioned": from the generated adapter, without captions."""
        condition, true, captions = read_style(style)
        shown = StyleImage.of(condition)
        if start == "multitask" and not steps:
            return compare(self.shared(start, self.multitask, captions), true)
        adapter = self.multitask if start == "multitask" else self.generate(shown)
        if start == "nothing":
            adapter = adapter.scaled(0.0)
        if start == "uncaptioned":
            shown = StyleImage.of([picture.image for picture in condition])
        return compare(self.draw(refine_style(self.base, adapter, shown, steps), captions), true)


def read_style(style: Style) -> tuple[list[StyleImage], PictureSet, list[str]]:
    """Return pictures to show with their captions, and the true held-out pictures with theirs."""
    pixels, captions = style.pictures("train")
    shown = [StyleImage(Image.fromarray(pixels[place].numpy()), captions[place]) for place in range(max(COUNTS))]
    pixels, captions = style.pictures("test")
    return shown, PictureSet(pixels[:PICTURES]), captions[:PICTURES]


def compare(made: PictureSet, true: PictureSet) -> Distances:
    """Return the distances that are told."""
    found = made.distances(true)
    return {metric: found[metric] for metric in METRICS}


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Return the lines of the tables of `docs/styles.md`; what was not measured on all styles is a dash, or left out."""
    conditions, refined = list(results["conditions"].values()), list(results["refinement"].values())
    titles = {"base": "no LoRA", "1": "1 picture", **{str(count): f"{count} pictures" for count in COUNTS[1:]}}
    rows = [[title, *_cells(conditions, (key,), ("1",))] for key, title in titles.items()]
    rows.append(["8 pictures, positive side only", *_cells(conditions, ("positive",), ("8",))])
    heads = [f"{len(conditions)} styles"]
    for name in METRICS.values():
        heads += [name, "beside 1 picture; the last row beside 8"]
    lines = [*markdown_table(heads, rows).splitlines(), ""]
    rows = []
    for steps in map(str, (0, *STEPS)):
        rows.append([f"{steps} steps", *(_value(refined, (start, steps), metric) for metric in METRICS for start in STARTS)])
    bare = ["uncaptioned", "", ""]
    rows.append(["20 steps, no captions", *(_value(refined, (start, "20"), metric) for metric in METRICS for start in bare)])
    starts = {"generated": "from generated", "nothing": "from nothing", "multitask": "from multi-task"}
    heads = [f"{len(refined)} styles", *(f"{name}, {starts[start]}" for name in METRICS.values() for start in STARTS)]
    lines += [*markdown_table(heads, _measured(rows)).splitlines(), ""]
    pairs = {
        "20 steps from generated beside 100 from nothing": (("generated", "20"), ("nothing", "100")),
        "20 steps from generated beside 20 from nothing": (("generated", "20"), ("nothing", "20")),
        "20 steps from generated beside 20 from multi-task": (("generated", "20"), ("multitask", "20")),
        "20 steps from generated beside generated": (("generated", "20"), ("generated", "0")),
    }
    rows = [[title, *(_gap(refined, *pair, metric) for metric in METRICS)] for title, pair in pairs.items()]
    return [*lines, *markdown_table([f"{len(refined)} styles", *METRICS.values()], _measured(rows)).splitlines()]


def _measured(rows: Sequence[list[str]]) -> list[list[str]]:
    return [row for row in rows if set(row[1:]) != {"–"}]


def _cells(results: Sequence[Any], row: tuple[str, ...], beside: tuple[str, ...]) -> list[str]:
    cells = []
    for metric in METRICS:
        cells += [_value(results, row, metric), "" if row == beside else _gap(results, row, beside, metric)]
    return cells


def _of(result: Any, path: tuple[str, ...], metric: str) -> float | None:
    """Return a value; None where it was not measured."""
    for name in (*path, metric):
        result = result.get(name, {})
    return None if result == {} else float(result)


def _value(results: Sequence[Any], path: tuple[str, ...], metric: str) -> str:
    """Return the mean over all styles."""
    values = [_of(result, path, metric) for result in results]
    return "–" if None in values else f"{mean(values):.3g}"


def _gap(results: Sequence[Any], first: tuple[str, ...], other: tuple[str, ...], metric: str) -> str:
    pairs = [(_of(result, first, metric), _of(result, other, metric)) for result in results]
    gaps = [one - two for one, two in pairs if one is not None and two is not None]
    if len(gaps) < len(results):
        return "–"
    low, high = mean_interval(gaps) or (float("nan"),) * 2
    return f"{mean(gaps):+.3g} ({low:.3g} to {high:.3g})"


def main() -> None:
    """Measure every style, write `style_pictures.json`, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", required=True, type=Path, help="made by make-styles")
    parser.add_argument("--multitask", required=True, type=Path, help="the multi-task adapter of a zoo of styles")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--refined", type=int, default=5, help="styles that steps are measured on (default: %(default)s)")
    parser.add_argument("--only", action="append", default=[], help="measure this style alone; repeatable")
    arguments = parser.parse_args()
    measurer = Measurer(arguments.multitask)
    unseen = load_styles(arguments.tasks, read_recipe(RECIPE)["collect"]["unseen"])
    chosen = [style for style in unseen if style.name in arguments.only or not arguments.only]
    for style in chosen:
        found = once(arguments.out / "conditions" / f"{style.name}.json", partial(measurer.conditions, style))
        print(style.name, found, flush=True)
    refined = unseen[:: len(unseen) // arguments.refined][: arguments.refined]
    for style in (style for style in refined if style in chosen):
        for start, steps in POINTS:
            path = arguments.out / "refinement" / style.name / f"{start}-{steps}.json"
            print(style.name, start, steps, once(path, partial(measurer.refinement, style, start, steps)), flush=True)
    print("\n".join(markdown(write_results(arguments.out))))


def write_results(out: Path) -> dict[str, Any]:
    """Gather all that is measured in one file, and return it."""
    conditions = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "conditions").glob("*.json"))}
    refined: dict[str, dict[str, dict[str, Distances]]] = {}
    for path in sorted((out / "refinement").glob("*/*.json")):
        begun = conditions[path.parent.name]
        found = refined.setdefault(path.parent.name, {"generated": {"0": begun[str(max(COUNTS))]}, "nothing": {"0": begun["base"]}})
        start, _, steps = path.stem.partition("-")
        found.setdefault(start, {})[steps] = json.loads(path.read_text(encoding="utf-8"))
    facts = {"generator": GENERATOR, "pictures": PICTURES, "conditions": conditions, "refinement": refined}
    write_text(out / "style_pictures.json", dump_json(facts))
    return facts


if __name__ == "__main__":
    main()
