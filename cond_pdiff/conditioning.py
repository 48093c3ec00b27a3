"""What a person gives: task prompts and style images, checked. Encoders turn them into condition embeddings."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from cond_pdiff.errors import ConditionError

Text = str | tuple[str, str]
"""A text, or a pair of texts (premise and hypothesis, question and answer …)."""

MAX_TEXT_CHARS = 200_000
"""Beyond this a single text is surely a mistake (a whole file); encoders have far smaller limits and report them."""


def check_text(text: object, what: str) -> Text:
    """`text` as a `str` or a pair of `str`, stripped; `ConditionError` naming `what` otherwise."""
    if isinstance(text, str):
        return _check_string(text, what)
    if isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(part, str) for part in text):
        return _check_string(text[0], f"{what}, part 1"), _check_string(text[1], f"{what}, part 2")
    raise ConditionError(f"{what} must be a string or a pair of strings, got {type(text).__name__}")


def _check_string(text: object, what: str) -> str:
    if not isinstance(text, str):
        raise ConditionError(f"{what} must be one string, got {type(text).__name__}")
    stripped = text.strip()
    try:
        stripped.encode()
    except UnicodeEncodeError as error:
        raise ConditionError(f"{what} holds characters that no text can have (lone surrogates): {error.reason}") from error
    if not stripped:
        raise ConditionError(f"{what} is empty; give at least one word")
    if len(stripped) > MAX_TEXT_CHARS:
        raise ConditionError(f"{what} has {len(stripped)} characters; at most {MAX_TEXT_CHARS} are accepted")
    return stripped


@dataclass(frozen=True)
class TaskPrompt:
    """A classification task in words: a description, label names, and a few labelled examples.

    The paper's condition for language tasks is "a task description and two-shot examples" (section 3.3).

    Args:
        description: what to decide, in a sentence or two.
        examples: `(text, label)` pairs; a text is a string or a pair of strings. May be empty.
        labels: the label names. Default: the labels of the examples, in order of first appearance.

    Raises:
        ConditionError: an empty or over-long text, an example whose label is not among the labels, one label only.
    """

    description: str
    examples: Sequence[tuple[Text, str]] = ()
    labels: Sequence[str] = ()

    def __post_init__(self) -> None:
        description = _check_string(self.description, "the task description")
        labels = check_labels(self.labels) if self.labels else None
        examples = check_examples(self.examples, labels)
        if labels is None:
            labels = tuple(dict.fromkeys(label for _, label in examples))
        if examples and len(labels) < 2:
            raise ConditionError(f"all examples have the label {labels[0]!r}; give an example of another label, or name all labels")
        object.__setattr__(self, "description", description)
        object.__setattr__(self, "examples", examples)
        object.__setattr__(self, "labels", labels)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready facts, kept with the adapters that are made from this prompt."""
        return {"description": self.description, "examples": [list(example) for example in self.examples], "labels": list(self.labels)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskPrompt:
        """Read what `to_json` wrote."""
        try:
            examples = [(tuple(text) if isinstance(text, list) else text, label) for text, label in data["examples"]]
            return cls(data["description"], examples, data["labels"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConditionError(f"not a recorded task prompt: {type(error).__name__}: {error}") from error

    @classmethod
    def of(cls, condition: str | TaskPrompt) -> TaskPrompt:
        """A prompt from a plain string or a prompt."""
        if isinstance(condition, cls):
            return condition
        if isinstance(condition, str):
            return cls(condition)
        raise ConditionError(f"this generator reads a task description (a string or a TaskPrompt), got a {type(condition).__name__}")


def check_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Label names, stripped, at least two and all different; `ConditionError` otherwise."""
    if isinstance(labels, str):
        raise ConditionError(f"labels must be a list of names, got the single string {labels!r}")
    if not isinstance(labels, Iterable):
        raise ConditionError(f"labels must be a list of names, got {type(labels).__name__}")
    checked = [_check_string(label, f"label {index}") for index, label in enumerate(labels, 1)]
    if len(checked) < 2:
        raise ConditionError(f"a classification task needs at least two labels, got {checked}")
    repeated = sorted({name for name in checked if checked.count(name) > 1})
    if repeated:
        raise ConditionError(f"the label {repeated[0]!r} is given twice")
    return tuple(checked)


def label_text(label: str) -> str:
    """A label name as words: `not_paraphrase` → `not paraphrase`."""
    return label.replace("_", " ").replace("-", " ").strip()


def check_examples(examples: Iterable[tuple[Text, str]], labels: Sequence[str] | None = None) -> tuple[tuple[Text, str], ...]:
    """Labelled examples, stripped, all single texts or all pairs, of the given labels; `ConditionError` otherwise."""
    if not isinstance(examples, Iterable):
        raise ConditionError(f"examples must be a list of (text, label) pairs, got {type(examples).__name__}")
    checked = tuple(_check_example(example, index) for index, example in enumerate(examples, 1))
    for index, (_, label) in enumerate(checked, 1):
        if labels is not None and label not in labels:
            raise ConditionError(f"example {index} has the label {label!r}, which is not among the labels {list(labels)}")
    if len({isinstance(text, str) for text, _ in checked}) > 1:
        raise ConditionError("some examples are single texts and some are pairs; a task has one kind")
    return checked


def _check_example(example: object, index: int) -> tuple[Text, str]:
    if not isinstance(example, (tuple, list)) or len(example) != 2:
        raise ConditionError(f"example {index} must be a (text, label) pair, got {example!r:.80}")
    return check_text(example[0], f"the text of example {index}"), _check_string(example[1], f"the label of example {index}")


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_IMAGE_BYTES = 10_000_000
MAX_IMAGE_PIXELS = 32_000_000
MAX_DECODED_PIXELS = {"JPEG": 10_000_000, "PNG": 10_000_000, "WEBP": 3_000_000}
"""Where an image must be decoded whole, at most 64 MB are spent on it. (A baseline JPEG is decoded at a fraction of its size.)"""
MIN_IMAGE_SIDE = 16
SMALLEST_CROP = 0.4
"""Of a style picture's shorter side, where a crop stands for the picture."""
STYLE_IMAGE_SIDE = 512
"""Longer side of a style image as it is kept; encoders read far less."""


@dataclass(frozen=True, eq=False)
class StyleImage:
    """A style image: the condition of the paper's style half (section 3.3).

    Args:
        image: any Pillow image. Kept in RGB, upright (EXIF), over white where it was transparent, its longer side at most
            `STYLE_IMAGE_SIDE` pixels.

    Raises:
        ConditionError: not an image, too small, or not decodable.
    """

    image: Image.Image

    def __post_init__(self) -> None:
        if not isinstance(self.image, Image.Image):
            raise ConditionError(f"a style image must be a Pillow image, got {type(self.image).__name__}")
        if min(self.image.size) < MIN_IMAGE_SIDE:
            raise ConditionError(f"the image is {_size(self.image)} pixels; each side needs at least {MIN_IMAGE_SIDE}")
        try:
            image = _to_rgb(self.image)
        except Exception as error:  # decoders raise a dozen kinds, from SyntaxError to struct.error
            raise ConditionError(f"the image cannot be decoded, perhaps it is incomplete: {type(error).__name__}: {error}") from error
        object.__setattr__(self, "image", image)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready facts, kept with the adapters that are made from this image; the picture itself is not."""
        return {"image_size": list(self.image.size), "image_sha256": self.sha256}

    def crops(self, count: int) -> list[StyleImage]:
        """Square crops of the picture, the same ones every time: ways to see one style."""
        rng = random.Random(0)
        return [StyleImage(square_crop(self.image, rng.uniform(SMALLEST_CROP, 1.0), rng)) for _ in range(count)]

    @property
    def sha256(self) -> str:
        """Of size and pixels."""
        return hashlib.sha256(f"{_size(self.image)} ".encode() + self.image.tobytes()).hexdigest()

    @classmethod
    def open(cls, source: str | Path | bytes) -> StyleImage:
        """Read a PNG, JPEG or WebP file, or its bytes. Format, size and number of frames are checked before any pixel is decoded.

        Raises:
            ConditionError: no such file, more than 10 MB or 32 megapixels, animated, another format, or broken.
        """
        size = len(source) if isinstance(source, bytes) else _file_size(Path(source))
        if size > MAX_IMAGE_BYTES:
            raise ConditionError(f"the image has {size / 1e6:.1f} MB; at most {MAX_IMAGE_BYTES // 1_000_000} MB are accepted")
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        try:
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ConditionError(
                f"the image has too many pixels; at most {MAX_IMAGE_PIXELS // 1_000_000} megapixels are accepted"
            ) from error
        except Exception as error:  # as above
            name = "the data" if isinstance(source, bytes) else f"{Path(source).name!r:.200}"
            raise ConditionError(f"{name} is not an image that can be read; expected one of {', '.join(IMAGE_FORMATS)}") from error
        with image:
            _check_header(image)
            image.draft("RGB", (STYLE_IMAGE_SIDE, STYLE_IMAGE_SIDE))  # a JPEG is decoded at a fraction of its size
            return cls(image)

    @classmethod
    def of(cls, condition: object) -> StyleImage:
        """A style image from itself, a Pillow image, a path, or a file's bytes."""
        if isinstance(condition, cls):
            return condition
        if isinstance(condition, Image.Image):
            return cls(condition)
        if isinstance(condition, (str, Path, bytes)):
            return cls.open(condition)
        raise ConditionError(f"this generator reads a style image (Pillow image, path or bytes), got a {type(condition).__name__}")


def square_crop(image: Image.Image, share: float, rng: random.Random) -> Image.Image:
    """A square somewhere in a picture, its side that `share` of the picture's shorter one."""
    side = max(MIN_IMAGE_SIDE, round(min(image.size) * share))
    left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
    return image.crop((left, top, left + side, top + side))


def _size(image: Image.Image) -> str:
    return f"{image.width}×{image.height}"


def _file_size(path: Path) -> int:
    try:
        if path.is_file():
            return path.stat().st_size
    except OSError:  # a name that is too long, perhaps because it is a description
        pass
    raise ConditionError(f"there is no image file {str(path)!r:.200}")


def _check_header(image: Image.Image) -> None:
    pixels = image.width * image.height
    if pixels > MAX_IMAGE_PIXELS:
        raise ConditionError(
            f"the image has {pixels / 1e6:.1f} megapixels ({_size(image)}); at most {MAX_IMAGE_PIXELS // 1_000_000} are accepted"
        )
    whole = image.format != "JPEG" or bool(image.info.get("progressive"))
    most = MAX_DECODED_PIXELS[str(image.format)] // 1_000_000
    if whole and pixels > most * 1_000_000:
        kind = "a progressive JPEG" if image.format == "JPEG" else f"a {image.format}"
        raise ConditionError(
            f"the image has {pixels / 1e6:.1f} megapixels; {kind} may have {most}: make it smaller, or save it as an ordinary JPEG"
        )
    if getattr(image, "n_frames", 1) > 1:
        raise ConditionError(f"the image is animated ({getattr(image, 'n_frames', 1)} frames); give a single picture")


def _to_rgb(image: Image.Image) -> Image.Image:
    """A small upright RGB copy of `image`, made strip by strip: converting it as a whole would need several times its memory."""
    factor = max(1, max(image.size) // (2 * STYLE_IMAGE_SIDE))
    rows = 64 * factor
    small = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        small.paste(_opaque(strip).reduce(factor), (0, top // factor))
    ratio = min(1.0, STYLE_IMAGE_SIDE / max(small.size))
    small = small.resize((max(1, round(small.width * ratio)), max(1, round(small.height * ratio))))
    small.info = image.info  # the orientation stands there
    return ImageOps.exif_transpose(small)


def _opaque(image: Image.Image) -> Image.Image:
    """`image` in RGB, over white."""
    if image.mode.startswith("I;16"):  # Pillow would cut, not scale
        return image.convert("I").point(lambda value: value / 257).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
