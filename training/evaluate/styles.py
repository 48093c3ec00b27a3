"""Generators of style adapters: how far the pictures that adapters make are from true pictures in the style (paper, table 2).

True pictures are the style's held-out ones. Every column makes one picture for each of their captions, each caption's from a noise of
its own that is the same in all columns. The floors are how far apart two such sets of one adapter, or of the base, are with other noise.
Nothing is selected on them, and no generator was trained on what it is shown: see `shown_picture`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.atomic import write_bytes
from cond_pdiff.conditions.style_image import StyleImage
from cond_pdiff.pipelines.pipeline_output import CondPDiffPipelineOutput
from cond_pdiff.text_to_image import encode_png, make_pictures, picture_sheet, stack_pictures
from cond_pdiff.training.evaluate.measure import EvaluateConfig, ZooEvaluator, mean
from cond_pdiff.training.evaluate.pictures import colour_texture, colour_texture_distance, features, frechet_distance, kernel_distance
from cond_pdiff.training.evaluate.similarity import ZooSpace
from cond_pdiff.training.tasks.styles import Style, load_styles
from cond_pdiff.training.zoo.zoo import Zoo

ROUTING_PICTURES = 5
PICTURE_BATCH = 32
METRICS = ("frechet", "kid", "look")
OTHER_NOISE = 1_000_000  # is added to the seeds of pictures for a floor
SHOWN, SHOWN_SIDE = 4, 96  # pictures a row, and their side in pixels


class PictureSet:
    """Pictures and what distances between sets need.

    Args:
        pictures: uint8 of shape `(count, height, width, 3)`.
    """

    def __init__(self, pictures: torch.Tensor) -> None:
        self.pictures = pictures
        self.features, self.look = features(pictures), colour_texture(pictures)

    def distances(self, other: PictureSet) -> dict[str, float]:
        """Return by metric: Fréchet and kernel distance of features, and the distance of colours and textures."""
        return {
            "frechet": round(frechet_distance(self.features, other.features), 4),
            "kid": round(kernel_distance(self.features, other.features), 4),
            "look": round(colour_texture_distance(self.look, other.look), 4),
        }


class StyleEvaluator(ZooEvaluator):
    """The evaluation of a generator of style adapters; see `ZooEvaluator`."""

    def __init__(self, generator: str | Path, zoo: Zoo, config: EvaluateConfig, out: Path) -> None:
        super().__init__(generator, zoo, config, out)
        self.base = zoo.family.load(self.pipe.template.base, self.pipe.template.spec)
        self._made: dict[tuple[str, tuple[str, ...], int], PictureSet] = {}

    def load_tasks(self, folder: str | Path) -> list[Style]:
        """Load the zoo's styles, but for recoloured ones, and the unseen styles."""
        return [style for style in load_styles(folder, [*self.zoo.task_names, *self.zoo.unseen_names]) if not style.source]

    def condition(self, task: Style) -> StyleImage:
        """Return what a generator is shown for a style; see `shown_picture`."""
        return shown_picture(task, self.config.seed, task.name in self.zoo.task_names)

    def other_conditions(self, task: Style) -> list[StyleImage]:
        """Return crops of five held-out pictures in the style."""
        return task.conditions(2 * ROUTING_PICTURES, "test")[1::2]

    def compare(self, task: Style, output: CondPDiffPipelineOutput, retrieved: str) -> dict[str, Any]:
        """Measure distances by column, novelty, and how much samples and trained runs differ."""
        pixels, captions = task.pictures("test")
        asked = tuple(captions[: self.config.max_rows])
        true = PictureSet(pixels[: len(asked)])
        runs = self.trained[task.name]
        columns = {
            "base": self.made("base", None, asked),
            "trained": self.made(f"{task.name}, run 0", runs[0], asked),
            "soup": self.made(task.name, self.soup(task.name), asked) if len(runs) > 1 else None,
            "multitask": self.made("multi-task", self.multitask, asked) if self.multitask else None,
            "retrieval": self.made(retrieved, self.soup(retrieved), asked),
            "generated": PictureSet(self.draw(output.adapter, asked)),
        }
        self._write_sheet(task.name, {"true": true, **columns}, asked)
        distances = {name: made.distances(true) if made else None for name, made in columns.items()}
        for name, title, adapter in (("base", "base", None), ("trained", f"{task.name}, run 0", runs[0])):
            distances[f"{name}_floor"] = self.made(title, adapter, asked).distances(self.made(title, adapter, asked, OTHER_NOISE))
        return {
            "pictures": len(asked),
            **{metric: {name: found[metric] if found else None for name, found in distances.items()} for metric in METRICS},
            "novelty": mean([distance for _, distance in self.space.nearest(output.adapters)]),
            "diversity": _spread(output.adapters),
            "between_runs": _spread(runs),
        }

    def _write_sheet(self, name: str, sets: Mapping[str, PictureSet | None], captions: Sequence[str]) -> None:
        """Write a sheet of the first pictures of every column, to be looked at."""
        rows = {title: [Image.fromarray(pixels.numpy()) for pixels in made.pictures[:SHOWN]] for title, made in sets.items() if made}
        write_bytes(self.out / "pictures" / f"{name}.png", encode_png(picture_sheet(rows, captions[:SHOWN], SHOWN_SIDE)))

    def made(self, name: str, adapter: LoraAdapter | None, captions: tuple[str, ...], noise: int = 0) -> PictureSet:
        """Return the pictures of an adapter that stands in several styles' rows, made once."""
        key = (name, captions, noise)
        if key not in self._made:
            self._made[key] = PictureSet(self.draw(adapter, captions, noise))
        return self._made[key]

    def draw(self, adapter: LoraAdapter | None, captions: Sequence[str], noise: int = 0) -> torch.Tensor:
        """Draw one picture a caption, as `draw_pictures` does; `noise` chooses all noises anew."""
        return draw_pictures(self.base, adapter, captions, self.config.seed * 1_000_003 + noise)


def draw_pictures(base: DiffusionPipeline, adapter: LoraAdapter | None, captions: Sequence[str], first: int) -> torch.Tensor:
    """Draw one picture a caption, uint8 of shape `(len(captions), height, width, 3)`, from the noises of seeds that begin with `first`."""
    adapters, images = [(adapter, 1.0)] if adapter else [], []
    for start in range(0, len(captions), PICTURE_BATCH):
        part = captions[start : start + PICTURE_BATCH]
        images += make_pictures(base, part, adapters, range(first + start, first + start + len(part)))
    return stack_pictures(images)


def shown_picture(style: Style, seed: int, trained: bool) -> StyleImage:
    """Choose what a generator is shown for a style: a picture that none of its training conditions was cut from.

    That is the style picture of a style that it was not trained on; of a trained one, one of its held-out pictures, chosen by `seed`.
    """
    if not trained:
        return style.image
    pixels, _ = style.pictures("test")
    place = random.Random(f"{style.name}/evaluate/{seed}").randrange(len(pixels))
    return StyleImage(Image.fromarray(pixels[place].numpy()))


def _spread(adapters: Sequence[LoraAdapter]) -> float | None:
    """Return the mean distance between two adapters, in units of their size."""
    space = ZooSpace(adapters, [""] * len(adapters))
    distances = space.distances(adapters) / space.norms
    pairs = ~torch.eye(len(adapters), dtype=torch.bool)
    return round(float(distances[pairs].mean()), 4) if len(adapters) > 1 else None
