from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cond_pdiff.conditions.condition import condition_kind
from cond_pdiff.conditions.images import MAX_IMAGE_BYTES, STYLE_IMAGE_SIDE
from cond_pdiff.conditions.style_image import MAX_PICTURES, STYLE_VIEWS, StyleImage
from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.errors import ConditionError

RAMP = np.linspace(0, 255, 96 * 64).reshape(64, 96)


def picture(mode: str = "RGB", size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 60)], 2).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, color_type: int = 2, data: bytes = b"") -> bytes:
    """A PNG with any header, whatever its pixels are."""
    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def webp(width: int, height: int) -> bytes:
    """A WebP whose extended header claims a size."""
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def animation(kind: str) -> bytes:
    frames = [picture(), picture().rotate(180)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    reference = np.asarray(picture("RGB" if mode not in ("L", "LA", "1") else "L").convert("RGB"), float)
    style = StyleImage(picture(mode))
    assert style.image.mode == "RGB"
    assert style.image.size == (96, 64)
    tolerance = 130 if mode == "1" else 25
    assert np.abs(np.asarray(style.image, float).mean((0, 1)) - reference.mean((0, 1))).max() < tolerance


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("JPEG", {"progressive": True}), ("WEBP", {"lossless": True})]
)
def test_files_paths_bytes_and_images_give_the_same(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    data = encoded(picture(), kind, **options)
    (tmp_path / "style").write_bytes(data)
    style = StyleImage.open(data)
    assert style.sha256 == StyleImage.of(tmp_path / "style").sha256 == StyleImage.of(str(tmp_path / "style")).sha256
    assert StyleImage.of(style) is style
    assert np.abs(np.asarray(style.image, float) - np.asarray(picture(), float)).mean() < 4


def test_sixteen_bits_are_scaled_not_cut() -> None:
    deep = Image.fromarray((RAMP * 257).astype(np.uint16))
    assert np.abs(np.asarray(StyleImage.open(encoded(deep)).image, float)[..., 0] - RAMP).max() <= 1


def test_transparent_is_white_and_palettes_keep_their_colours() -> None:
    clear = picture("RGBA")
    clear.putalpha(0)
    assert np.asarray(StyleImage.open(encoded(clear)).image).min() == 255
    palette = picture("P")
    palette.info["transparency"] = palette.getpixel((5, 5))
    assert StyleImage.open(encoded(palette)).image.getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_it_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    upright = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}[orientation]  # Pillow's transpositions
    expected = picture() if upright is None else picture().transpose(Image.Transpose(upright))
    style = StyleImage.open(encoded(picture(), "JPEG", exif=exif, quality=95))
    assert style.image.size == expected.size
    assert np.abs(np.asarray(style.image, float) - np.asarray(expected, float)).mean() < 4


@pytest.mark.parametrize("size", [(2000, 1500), (700, 3000), (513, 512), (5000, 40), (512, 512)])
def test_large_pictures_shrink_and_the_callers_stays(size: tuple[int, int]) -> None:
    image = picture("RGB", size)
    before = image.tobytes()
    style = StyleImage(image)
    ratio = STYLE_IMAGE_SIDE / max(size)
    assert style.image.size == pytest.approx([max(1, side * ratio) for side in size], abs=1)
    assert image.tobytes() == before
    pixels = np.asarray(style.image, float)
    assert pixels[0, 0, :2].max() <= 40
    assert pixels[-1, -1, :2].min() >= 215


@pytest.mark.parametrize(
    ("data", "message"),
    [
        *((png(width, height), message) for width, height, message in [
            (10_000, 10_000, "100.0 megapixels"), (20_000, 20_000, "pixels"), (100_000, 4_000, "pixels"), (5600, 5800, "32.5 megapixels"),
            (4000, 4000, "a PNG may have 10"), (1, 65535, "at least 16"), (65535, 1, "at least 16"), (0, 0, "expected one of"),
            (2**31 - 1, 2**31 - 1, "pixels"),
        ]),
        (webp(16384, 16384), r"pixels|expected one of"),
        (webp(5000, 5000), r"may have 3|expected one of"),
        (png(64, 64), "cannot be decoded"),
        (png(64, 64, data=b"\0" * 500), "cannot be decoded"),
        (encoded(picture())[:-40], "cannot be decoded"),
        (encoded(picture(size=(800, 600)), "JPEG", quality=95)[:3000], "cannot be decoded"),
        (encoded(picture(), "WEBP")[:60], r"cannot be decoded|expected one of"),
        (encoded(picture(size=(3600, 3000)), "JPEG", progressive=True, quality=5), "progressive JPEG may have 10"),
        (animation("WEBP"), "animated"),
        (animation("PNG"), "animated"),
        (animation("GIF"), "expected one of PNG, JPEG, WEBP"),
        (encoded(picture(), "TIFF"), "expected one of"),
        (encoded(picture(), "BMP"), "expected one of"),
        (encoded(picture(), "PDF"), "expected one of"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="9999999" height="9999999"/>', "expected one of"),
        (b"PK\x03\x04" + bytes(100), "expected one of"),
        (b"GIF89a" + encoded(picture(), "JPEG"), "expected one of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "expected one of"),
        (b"", "expected one of"),
        (b"\x89PNG\r\n\x1a\n", "expected one of"),
        (b"\xff\xd8\xff", "expected one of"),
        (b"hello", "expected one of"),
        (bytes(MAX_IMAGE_BYTES + 1), "10.0 MB; at most 10 MB"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow's own, from 89 megapixels on
def test_hostile_files_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ConditionError, match=message):
        StyleImage.open(data)


def test_text_chunks_cannot_fill_the_memory() -> None:
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000)))
    data = encoded(picture())
    with pytest.raises(ConditionError, match=r"expected one of|cannot be decoded"):
        StyleImage.open(data[:33] + bomb + data[33:])


@pytest.mark.parametrize("size", [(90, 60), (16, 200)])
def test_crops_are_square_and_the_same_every_time(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = StyleImage(Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)))
    first, second = image.views(), image.views()
    assert [view.sha256 for view in first] == [view.sha256 for view in second]
    assert len({view.sha256 for view in first}) == STYLE_VIEWS - 1 == 15
    assert all(view.image.width == view.image.height >= 16 for view in first)


@pytest.mark.parametrize("condition", [None, 3, [3], torch.zeros(3, 64, 64), np.zeros((64, 64, 3), np.uint8)])
def test_what_is_no_picture_is_refused(condition: Any) -> None:
    with pytest.raises(ConditionError, match="style image"):
        StyleImage.of(condition)


def test_a_broken_file_is_named_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ConditionError, match=r"^'broken\.png' is not an image that can be read"):
        StyleImage.open(tmp_path / "broken.png")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path, "a description instead of a picture " * 20):
        with pytest.raises(ConditionError, match="there is no image file"):
            StyleImage.open(path)


# --- several pictures of one style -------------------------------------------------------------------------------------------


def several(count: int) -> list[Image.Image]:
    return [picture().rotate(90 * number).resize((60 + number, 50)) for number in range(count)]


def test_several_pictures_are_one_condition_in_any_order() -> None:
    images = several(3)
    shown = StyleImage.of(images)
    assert [one.sha256 for one in shown.pictures] == sorted(StyleImage(image).sha256 for image in images)
    for order in ((2, 0, 1), (1, 2, 0)):
        other = StyleImage.of(tuple(images[place] for place in order))
        assert (other.to_json(), other.sha256) == (shown.to_json(), shown.sha256)
        assert [view.sha256 for view in other.views()] == [view.sha256 for view in shown.views()]
    nested = StyleImage.of([StyleImage.of(images[1:]), images[0]])
    assert nested.to_json() == shown.to_json()


def test_a_list_of_one_is_that_picture() -> None:
    one = StyleImage(picture())
    assert StyleImage.of([one]) is one
    assert one.pictures == (one,)
    assert set(one.to_json()) == {"image_size", "image_sha256"}


@pytest.mark.parametrize("count", [2, 4, 7])
def test_views_of_several_are_about_as_many_and_of_every_picture(count: int) -> None:
    shown = StyleImage.of(several(count))
    views = shown.views()
    hashes = [view.sha256 for view in views]
    assert STYLE_VIEWS <= len(views) <= STYLE_VIEWS + count
    assert {one.sha256 for one in shown.pictures} < set(hashes)


def test_several_are_recorded_and_read_back_from_their_files(tmp_path: Path) -> None:
    paths = []
    for number, image in enumerate(several(3)):
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1])
    shown = StyleImage.of(paths)
    record = shown.to_json()
    assert condition_kind(record) is StyleImage
    assert StyleImage.from_json(record, [paths[2], paths[0], paths[1]]).to_json() == record
    assert StyleImage.describe(record).count("`") == 6
    assert "from 3 pictures of one style" in StyleImage.describe(record)
    for files in (None, paths[0], paths[:2], [*paths, paths[0]]):
        with pytest.raises(ConditionError, match=r"3 pictures.*give all files"):
            StyleImage.from_json(record, files)
    picture().save(paths[1])
    with pytest.raises(ConditionError, match=r"1\.png is not the picture"):
        StyleImage.from_json(record, paths)
    with pytest.raises(ConditionError, match=r"0\.png is not the picture"):
        StyleImage.from_json(record, [paths[2], paths[0], paths[0]])
    with pytest.raises(ConditionError, match="no single file"):
        shown.file()
    for malformed in ({"images": 3}, {"images": [3]}, {"images": []}):
        assert "picture" in StyleImage.describe(malformed)


def test_a_request_may_list_pictures(tmp_path: Path) -> None:
    for number, image in enumerate(several(2)):
        image.save(tmp_path / f"{number}.png")
    asked = StyleImage.from_request({"image": ["0.png", "1.png"]}, tmp_path)
    assert asked.to_json() == StyleImage.of([tmp_path / "1.png", tmp_path / "0.png"]).to_json()
    for wrong in (["0.png", "gone.png"], ["0.png", 3]):
        with pytest.raises(ConditionError, match="style image 2 of 2"):
            StyleImage.from_request({"image": wrong}, tmp_path)


def test_a_bad_picture_among_several_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    good = picture()
    for wrong, message in (
        (tmp_path / "broken.png", r"style image 2 of 3: 'broken\.png' is not an image"),
        (tmp_path / "gone.png", r"style image 2 of 3: there is no image file"),
        (TaskPrompt("Is it kind?"), r"style image 2 of 3: this generator reads a style image .* got a TaskPrompt"),
        (picture(size=(9, 90)), r"style image 2 of 3: the image is 9×90"),
        ([good], "style image 2 of 3: a list in a list"),
    ):
        with pytest.raises(ConditionError, match=message):
            StyleImage.of([good, wrong, good])
    for wrong in ([], [good] * (MAX_PICTURES + 1)):
        with pytest.raises(ConditionError, match=f"give 1 to {MAX_PICTURES} style images"):
            StyleImage.of(wrong)
