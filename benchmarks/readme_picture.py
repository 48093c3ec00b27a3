"""Draw the picture at the top of the README: a style picture → the base model, the generated adapter, the trained adapter.

    python benchmarks/readme_picture.py --tasks styles --zoo style-zoo --out docs/pictures/styles.png

The styles are the first one by name that the generator was trained on and the first that it was not, among those that the zoo holds and
whose picture is in the public domain (the painter died more than seventy years ago). Prompts and seed are the same everywhere, and nothing
is selected. Of the trained style the generator is shown the whole painting; it was trained on crops of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from cond_pdiff import CondPDiffPipeline, LoraAdapter
from cond_pdiff.text_to_image import load_text_to_image, make_pictures
from cond_pdiff.training.tasks.styles import load_styles

GENERATOR = "cond-pdiff/pixart-mini-styles"
PROMPTS = ("a red house beside a tree by day", "a blue boat on the sea at night")
STYLES = {"seurat_grande_jatte": "trained style", "cezanne_card_players": "unseen style"}
COLUMNS = ("you show", "base model", "generated adapter", "trained adapter")
SIDE, GAP, HEAD, LEFT = 168, 8, 44, 42


def square(picture: Image.Image) -> Image.Image:
    """Return the middle of a picture as a square of `SIDE` pixels."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.convert("RGB").crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def write(draw: ImageDraw.ImageDraw, middle: tuple[float, float], text: str) -> None:
    """Write a line around a point."""
    draw.text(middle, text, fill="black", font=ImageFont.load_default(26), anchor="mm")


def compose(rows: list[tuple[Image.Image, list[list[Image.Image]]]]) -> Image.Image:
    """Put the pictures into one: a row a style; the shown picture, then two pictures for each of the other columns."""
    place = [LEFT, *(LEFT + SIDE + 4 * GAP + column * (2 * SIDE + 4 * GAP) for column in range(3))]
    height = HEAD + len(rows) * (SIDE + GAP)
    sheet = Image.new("RGB", (place[-1] + 2 * SIDE + 2 * GAP, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (x, name) in enumerate(zip(place, COLUMNS, strict=True)):
        write(draw, (x + (SIDE if column else SIDE / 2), HEAD / 2), name)
    for number, ((shown, columns), kind) in enumerate(zip(rows, STYLES.values(), strict=True)):
        y = HEAD + number * (SIDE + GAP)
        label = Image.new("RGB", (SIDE, LEFT), "white")
        write(ImageDraw.Draw(label), (SIDE / 2, LEFT / 2), kind)
        sheet.paste(label.rotate(90, expand=True), (0, y))
        sheet.paste(square(shown), (place[0], y))
        for x, pictures in zip(place[1:], columns, strict=True):
            for index, picture in enumerate(pictures):
                sheet.paste(square(picture), (x + index * (SIDE + GAP), y))
    return sheet


def main() -> None:
    """Make the pictures and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", required=True, type=Path, help="made by make-styles")
    parser.add_argument("--zoo", required=True, type=Path, help="with a trained adapter of both styles")
    parser.add_argument("--out", required=True, type=Path, help="the picture to write")
    parser.add_argument("--seed", type=int, default=0, help="of adapters and pictures (default: %(default)s)")
    arguments = parser.parse_args()
    pipe, base = CondPDiffPipeline.from_pretrained(GENERATOR), load_text_to_image()
    rows = []
    for style in load_styles(arguments.tasks, STYLES):
        generated = pipe(style.image, generator=torch.Generator().manual_seed(arguments.seed)).adapter
        trained = LoraAdapter.load(arguments.zoo / "tasks" / style.name / "run-0")
        drawn = [make_pictures(base, PROMPTS, adapters, arguments.seed) for adapters in ([], [(generated, 1.0)], [(trained, 1.0)])]
        rows.append((style.image.image, drawn))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    compose(rows).quantize(128).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
