"""Styles: a folder with a style picture, and captioned pictures in that style for fine-tuning.

`<name>/meta.json`: `name`, `"task_type": "style"`, `group`, `licence`, `source`; `<name>/style.png` (or .jpg, .webp): the picture that a
person would show; `<name>/pictures.safetensors`: uint8 tensors `train` and `test` of shape (count, height, width, 3);
`<name>/captions.json`: as many captions under the same names.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from cond_pdiff.atomic import atomic_folder, dump_json
from cond_pdiff.conditions.images import SMALLEST_CROP, square_crop
from cond_pdiff.conditions.style_image import StyleImage
from cond_pdiff.errors import TaskDataError
from cond_pdiff.training.tasks.task import ZooTask
from cond_pdiff.training.tasks.tasks import read_meta

STYLE_TYPE = "style"
PICTURE_SPLITS = ("train", "test")
STYLE_FILES = ("style.png", "style.jpg", "style.webp")
PREVIEW_SIDE, PREVIEW_QUALITY = 48, 80
"""The side and quality of the small picture of each style that goes with a generator: about 700 bytes."""


@dataclass(frozen=True)
class Style(ZooTask):
    """A style, as a task of a zoo.

    Args:
        name: the folder's name.
        folder: where the pictures are.
        group: the kind of style, for reports.
        licence: of the style picture.
        source: of a recoloured style, the style that it comes from; else empty.
    """

    condition_kind: ClassVar[type[StyleImage]] = StyleImage

    name: str
    folder: Path
    group: str = ""
    licence: str = ""
    source: str = ""

    @classmethod
    def load(cls, folder: str | Path) -> Style:
        """Read and check a style folder's `meta.json`; `TaskDataError` says what is wrong."""
        folder = Path(folder)
        meta = read_meta(folder)
        if meta.get("task_type") != STYLE_TYPE or meta.get("name") != folder.name:
            raise TaskDataError(f"{folder / 'meta.json'}: expected task_type {STYLE_TYPE!r} and name {folder.name!r}")
        return cls(folder.name, folder, str(meta.get("group", "")), str(meta.get("licence", "")), str(meta.get("source", "")))

    @property
    def image(self) -> StyleImage:
        """The style picture."""
        path = next((self.folder / name for name in STYLE_FILES if (self.folder / name).exists()), None)
        if path is None:
            raise TaskDataError(f"{self.folder} has no style picture; expected one of {', '.join(STYLE_FILES)}")
        return StyleImage.open(path)

    def pictures(self, split: str) -> tuple[torch.Tensor, list[str]]:
        """Return pictures in the style, uint8, shape `(count, height, width, 3)`, and their captions."""
        path = self.folder / "pictures.safetensors"
        try:
            pixels = load_file(path)[split]
            captions = json.loads((self.folder / "captions.json").read_text(encoding="utf-8"))[split]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise TaskDataError(f"the {split} pictures of {self.folder} cannot be read: {type(error).__name__}: {error}") from error
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or len(pixels) != len(captions) or not captions:
            raise TaskDataError(f"{path}: expected uint8 (count, height, width, 3) with a caption each, got {tuple(pixels.shape)}")
        return pixels, [str(caption) for caption in captions]

    def conditions(self, count: int, split: str = "train") -> list[StyleImage]:
        """Return square crops of the style picture, and every second time of a picture made in the style.

        Args:
            split: of the pictures made in the style.
        """
        shown = self.image.image
        pixels, _ = self.pictures(split)
        crops = []
        for index in range(count):
            rng = random.Random(f"{self.name}/variant/{split}/{index}")
            image = shown if index % 2 == 0 else Image.fromarray(pixels[rng.randrange(len(pixels))].numpy())
            crops.append(StyleImage(square_crop(image, 1.0 if index == 0 else rng.uniform(SMALLEST_CROP, 1.0), rng)))
        return crops

    def zoo_facts(self) -> dict[str, Any]:
        """Return what the zoo records of the style; of a recoloured style also where it comes from."""
        return {**super().zoo_facts(), **({"source": self.source} if self.source else {})}

    def preview(self) -> bytes:
        """Return a scene in the style, small: which one, the style's name decides, so that styles side by side show many."""
        pixels, _ = self.pictures("train")
        scene, file = Image.fromarray(pixels[self.shown_scene(len(pixels))].numpy()), io.BytesIO()
        scene.resize((PREVIEW_SIDE, PREVIEW_SIDE), Image.Resampling.BOX).save(file, "WEBP", quality=PREVIEW_QUALITY)
        return file.getvalue()

    def shown_scene(self, count: int) -> int:
        """Return which of `count` scenes stands for the style."""
        return random.Random(f"{self.name}/preview").randrange(count)


def load_styles(folder: str | Path, names: Sequence[str] | None = None) -> list[Style]:
    """Load the named styles below `folder`, or all, sorted by name; raise `TaskDataError` if one is missing or malformed."""
    folder = Path(folder)
    if names is None:
        names = sorted(path.parent.name for path in folder.glob("*/meta.json"))
    if not names:
        raise TaskDataError(f"no styles below {folder}")
    return [Style.load(folder / name) for name in names]


def write_style(folder: str | Path, image: Image.Image, pictures: Mapping[str, tuple[torch.Tensor, Sequence[str]]], **meta: Any) -> Style:
    """Write a style folder, complete or not at all.

    Args:
        image: the style picture.
        pictures: "train" and "test" → (uint8 pixels of shape `(count, height, width, 3)`, captions).
        meta: further entries of `meta.json` (`group`, `licence`, …).
    """
    folder = Path(folder)
    with atomic_folder(folder, ()) as aside:
        image.save(aside / STYLE_FILES[0])
        facts = {**meta, "name": folder.name, "task_type": STYLE_TYPE}
        (aside / "meta.json").write_text(dump_json(facts), encoding="utf-8")
        (aside / "captions.json").write_text(
            dump_json({name: list(captions) for name, (_, captions) in pictures.items()}), encoding="utf-8"
        )
        (aside / "pictures.safetensors").write_bytes(save({name: pixels.contiguous() for name, (pixels, _) in pictures.items()}))
        for split in PICTURE_SPLITS:
            Style(folder.name, aside).pictures(split)
    return Style.load(folder)
