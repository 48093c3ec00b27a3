"""Pictures from outside: what is accepted, and how they are read without spending much memory."""

from __future__ import annotations

import io
import random
from pathlib import Path

from PIL import Image, ImageOps

from cond_pdiff.errors import ConditionError

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_IMAGE_BYTES = 10_000_000
MAX_IMAGE_PIXELS = 32_000_000
MAX_DECODED_PIXELS = {"JPEG": 10_000_000, "PNG": 10_000_000, "WEBP": 3_000_000}
"""The most pixels of an image that must be decoded whole, so that at most 64 MB are spent on it. (A baseline JPEG is decoded at a
fraction of its size.)"""
MIN_IMAGE_SIDE = 16
SMALLEST_CROP = 0.4
"""The smallest side of a crop that stands for a style picture, as a share of the picture's shorter side."""
STYLE_IMAGE_SIDE = 512
"""The longer side of a style image as it is kept, in pixels; encoders read far less."""


def square_crop(image: Image.Image, share: float, rng: random.Random) -> Image.Image:
    """Cut a square out of a picture at a random place; its side is that `share` of the picture's shorter one."""
    side = max(MIN_IMAGE_SIDE, round(min(image.size) * share))
    left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
    return image.crop((left, top, left + side, top + side))


def size_of(image: Image.Image) -> str:
    """Write the width and height of a picture as text."""
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
            f"the image has {pixels / 1e6:.1f} megapixels ({size_of(image)}); at most {MAX_IMAGE_PIXELS // 1_000_000} are accepted"
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


def open_picture(source: str | Path | bytes) -> Image.Image:
    """Open a PNG, JPEG or WebP file, or its bytes: the header is checked, and no pixel is decoded yet.

    Raises:
        ConditionError: no such file, more than 10 MB or 32 megapixels, animated, or another format.
    """
    size = len(source) if isinstance(source, bytes) else _file_size(Path(source))
    if size > MAX_IMAGE_BYTES:
        raise ConditionError(f"the image has {size / 1e6:.1f} MB; at most {MAX_IMAGE_BYTES // 1_000_000} MB are accepted")
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ConditionError(f"the image has too many pixels; at most {MAX_IMAGE_PIXELS // 1_000_000} megapixels are accepted") from error
    except Exception as error:  # decoders raise a dozen kinds, from SyntaxError to struct.error
        name = "the data" if isinstance(source, bytes) else f"{Path(source).name!r:.200}"
        raise ConditionError(f"{name} is not an image that can be read; expected one of {', '.join(IMAGE_FORMATS)}") from error
    _check_header(image)
    image.draft("RGB", (STYLE_IMAGE_SIDE, STYLE_IMAGE_SIDE))  # a JPEG is decoded at a fraction of its size
    return image


def small_rgb(image: Image.Image) -> Image.Image:
    """Return a picture in RGB, upright (EXIF), over white where it was transparent, its longer side at most `STYLE_IMAGE_SIDE` pixels.

    Raises:
        ConditionError: too small, or not decodable.
    """
    if min(image.size) < MIN_IMAGE_SIDE:
        raise ConditionError(f"the image is {size_of(image)} pixels; each side needs at least {MIN_IMAGE_SIDE}")
    try:
        return _to_rgb(image)
    except Exception as error:  # as above
        raise ConditionError(f"the image cannot be decoded, perhaps it is incomplete: {type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Make a small upright RGB copy of `image` strip by strip: converting it as a whole would need several times its memory."""
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
    """Return `image` in RGB, over white."""
    if image.mode.startswith("I;16"):  # Pillow would cut, not scale
        return image.convert("I").point(lambda value: value / 257).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
