"""Generators of style adapters: how far the pictures that adapters make are from true pictures in the style (paper, table 2).

True pictures are the style's held-out ones. Every column makes one picture for each of their captions, from the same noise.
Nothing is selected on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.atomic import write_bytes
from cond_pdiff.conditioning import StyleImage
from cond_pdiff.pipelines.pipeline_output import CondPDiffPipelineOutput
from cond_pdiff.text_to_image import encode_png, load_text_to_image, make_pictures, picture_sheet, stack_pictures
from cond_pdiff.training.conditions import style_variants
from cond_pdiff.training.evaluate.measure import EvaluateConfig, ZooEvaluator, mean
from cond_pdiff.training.evaluate.pictures import colour_texture, colour_texture_distance, features, frechet_distance
from cond_pdiff.training.evaluate.similarity import ZooSpace
from cond_pdiff.training.styles import Style, load_styles
from cond_pdiff.training.zoo import Zoo

ROUTING_PICTURES = 5
PICTURE_BATCH = 32
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
        """Fréchet distance of features, and the distance of colours and textures."""
        return {
            "frechet": round(frechet_distance(self.features, other.features), 4),
            "look": round(colour_texture_distance(self.look, other.look), 4),
        }


class StyleEvaluator(ZooEvaluator):
    """See `ZooEvaluator`."""

    def __init__(self, generator: str | Path, zoo: Zoo, config: EvaluateConfig, out: Path) -> None:
        super().__init__(generator, zoo, config, out)
        self.base = load_text_to_image(self.pipe.template.base)
        self._made: dict[tuple[str, tuple[str, ...]], PictureSet] = {}

    def load_tasks(self, folder: str | Path) -> list[Style]:
        """The zoo's styles, but for recoloured ones, and the unseen styles."""
        return [style for style in load_styles(folder, [*self.zoo.task_names, *self.zoo.unseen_names]) if not style.source]

    def condition(self, task: Style) -> StyleImage:
        """The style's picture."""
        return task.image

    def other_conditions(self, task: Style) -> list[StyleImage]:
        """Five held-out pictures in the style."""
        return style_variants(task, 2 * ROUTING_PICTURES, "test")[1::2]

    def compare(self, task: Style, output: CondPDiffPipelineOutput, retrieved: str) -> dict[str, Any]:
        """Distances by column, novelty, and how much samples and trained runs differ."""
        pixels, captions = task.pictures("test")
        asked = tuple(captions[: self.config.max_rows])
        true = PictureSet(pixels[: len(asked)])
        columns = {
            "base": self.made("base", None, asked),
            "trained": self.made(f"{task.name}, run 0", self.trained[task.name][0], asked),
            "soup": self.made(task.name, self.soup(task.name), asked),
            "multitask": self.made("multi-task", self.multitask, asked) if self.multitask else None,
            "retrieval": self.made(retrieved, self.soup(retrieved), asked),
            "generated": PictureSet(self.draw(output.adapter, asked)),
        }
        self._write_sheet(task.name, {"true": true, **columns}, asked)
        distances = {name: made.distances(true) if made else None for name, made in columns.items()}
        return {
            "pictures": len(asked),
            "frechet": {name: found["frechet"] if found else None for name, found in distances.items()},
            "look": {name: found["look"] if found else None for name, found in distances.items()},
            "novelty": mean([distance for _, distance in self.space.nearest(output.adapters)]),
            "diversity": _spread(output.adapters),
            "between_runs": _spread(self.trained[task.name]),
        }

    def _write_sheet(self, name: str, sets: Mapping[str, PictureSet | None], captions: Sequence[str]) -> None:
        """The first pictures of every column, to be looked at."""
        rows = {title: [Image.fromarray(pixels.numpy()) for pixels in made.pictures[:SHOWN]] for title, made in sets.items() if made}
        write_bytes(self.out / "pictures" / f"{name}.png", encode_png(picture_sheet(rows, captions[:SHOWN], SHOWN_SIDE)))

    def made(self, name: str, adapter: LoraAdapter | None, captions: tuple[str, ...]) -> PictureSet:
        """The pictures of an adapter that stands in several styles' rows, made once."""
        key = (name, captions)
        if key not in self._made:
            self._made[key] = PictureSet(self.draw(adapter, captions))
        return self._made[key]

    def draw(self, adapter: LoraAdapter | None, captions: Sequence[str]) -> torch.Tensor:
        """One picture a caption, uint8 of shape `(len(captions), height, width, 3)`."""
        adapters = [(adapter, 1.0)] if adapter else []
        images = []
        for start in range(0, len(captions), PICTURE_BATCH):
            images += make_pictures(self.base, captions[start : start + PICTURE_BATCH], adapters, self.config.seed + start)
        return stack_pictures(images)


def _spread(adapters: Sequence[LoraAdapter]) -> float | None:
    """Mean distance between two adapters, in units of their size."""
    space = ZooSpace(adapters, [""] * len(adapters))
    distances = space.distances(adapters) / space.norms
    pairs = ~torch.eye(len(adapters), dtype=torch.bool)
    return round(float(distances[pairs].mean()), 4) if len(adapters) > 1 else None
