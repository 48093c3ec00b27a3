"""StyleImage: a picture that shows a style, or several of one style."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from cond_pdiff.conditions.condition import Condition, Files, register_condition
from cond_pdiff.conditions.images import SMALLEST_CROP, open_picture, size_of, small_rgb, square_crop
from cond_pdiff.conditions.texts import check_string
from cond_pdiff.errors import ConditionError

STYLE_VIEWS = 16
"""The number of views of an unseen style picture: itself and crops of it. The adapter is their mean: on its own the U-Net jumps between
trained styles. `benchmarks/style_views.py` chooses the number."""
MAX_PICTURES = 64
"""The most pictures of one style: each is read, and makes an adapter in its own views, so that more take longer."""


@register_condition
@dataclass(frozen=True, eq=False)
class StyleImage(Condition):
    """A style image: the condition of the paper's style half (section 3.3). Several of one style are one condition: see `of`.

    Args:
        image: any Pillow image. Kept in RGB, upright (EXIF), over white where it was transparent, its longer side at most
            `STYLE_IMAGE_SIDE` pixels.
        caption: what it shows, for training steps on it (`refine_steps`); nothing else reads it. Empty: not said.
        others: further pictures of the same style. `of` brings all into one order, so that it makes no difference in which they are given.

    Raises:
        ConditionError: not an image, too small, or not decodable; or a caption that is no text.
    """

    name: ClassVar[str] = "style-image"
    noun: ClassVar[str] = "style"
    adapters: ClassVar[str] = "style"
    keyword: ClassVar[str] = "image"
    own_key: ClassVar[str | None] = "image_sha256"
    file_option: ClassVar[str] = " --image PICTURE"
    column: ClassVar[str] = "image"
    column_names_files: ClassVar[bool] = True

    image: Image.Image
    caption: str = ""
    others: tuple[StyleImage, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.image, Image.Image):
            raise ConditionError(f"a style image must be a Pillow image, got {type(self.image).__name__}")
        object.__setattr__(self, "image", small_rgb(self.image))
        object.__setattr__(self, "caption", check_string(self.caption, "the caption") if self.caption else "")

    @cached_property
    def pictures(self) -> tuple[StyleImage, ...]:
        """The picture and the others, each alone."""
        return (replace(self, others=()) if self.others else self, *self.others)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready facts, kept with the adapters that are made from this image; the picture itself is not."""
        if self.others:
            return {"type": self.name, "images": [picture.to_json() for picture in self.pictures]}
        return {"image_size": list(self.image.size), "image_sha256": self.sha256}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], file: Files | None = None) -> StyleImage:
        """Read the picture in `file`, of which the record holds a hash; of several pictures all files, in any order.

        Raises:
            ConditionError: no file, too few or too many, or another picture.
        """
        recorded = sorted(str(each["image_sha256"]) for each in data.get("images", [data]))
        files = [file] if isinstance(file, (str, Path)) else list(file or ())
        if len(files) != len(recorded):
            count = "a picture" if len(recorded) == 1 else f"{len(recorded)} pictures"
            what = "give the file (--image)" if len(recorded) == 1 else f"give all files (--image), got {len(files)}"
            raise ConditionError(f"the adapter was made from {count}, of which it keeps the hash only; {what}")
        opened = [(name, cls.open(name)) for name in files]
        for name, picture in opened:
            if picture.sha256 not in recorded:
                raise ConditionError(f"{name} is not the picture that the adapter was made from (their pixels have other hashes)")
            recorded.remove(picture.sha256)
        return cls.of([picture for _, picture in opened])

    def file(self) -> tuple[str, bytes]:
        """Return a PNG file of the picture; `ConditionError` where there are several."""
        if self.others:
            raise ConditionError(f"{len(self.pictures)} pictures are no single file; keep them as a condition each")
        written = io.BytesIO()
        Image.frombytes("RGB", self.image.size, self.image.tobytes()).save(written, "PNG")  # pixels alone, without a camera's notes
        return ".png", written.getvalue()

    @classmethod
    def describe(cls, record: Mapping[str, Any]) -> str:
        """Say that an adapter comes from a style picture, or from several, with the pictures' hashes."""
        several = record.get("images")
        found = [each.get("image_sha256") for each in several if isinstance(each, Mapping)] if isinstance(several, list) else None
        hashes = [" ".join(str(sha256).split()).replace("`", "'") for sha256 in found or [record.get("image_sha256")]]
        pictures = "one style picture" if len(hashes) == 1 else f"{len(hashes)} pictures of one style"
        told = ", ".join(f"`{sha256}`" for sha256 in hashes)
        return f"Generated by a diffusion model over network weights from {pictures} (sha256 {told})."

    def views(self) -> list[StyleImage]:
        """Return square crops of the picture; of several, each picture and crops of it, about as many in all."""
        if not self.others:
            return self._crops(STYLE_VIEWS - 1)
        crops = STYLE_VIEWS // len(self.pictures)
        return [view for picture in self.pictures for view in (picture, *picture._crops(crops))]

    def refined_on(self) -> str:
        """Return the number of pictures; all of them must have captions, or none."""
        if len({bool(picture.caption) for picture in self.pictures}) > 1:
            raise ConditionError("some pictures have captions and some have none; training steps take a caption of each, or of none")
        count = len(self.pictures)
        return f"{count} picture{'s' if count > 1 else ''}"

    def _crops(self, count: int) -> list[StyleImage]:
        rng = random.Random(0)
        return [StyleImage(square_crop(self.image, rng.uniform(SMALLEST_CROP, 1.0), rng)) for _ in range(count)]

    @property
    def sha256(self) -> str:
        """The sha256 of the picture's size and pixels."""
        return hashlib.sha256(f"{size_of(self.image)} ".encode() + self.image.tobytes()).hexdigest()

    @classmethod
    def open(cls, source: str | Path | bytes) -> StyleImage:
        """Read a PNG, JPEG or WebP file, or its bytes. Format, size and number of frames are checked before any pixel is decoded.

        Raises:
            ConditionError: no such file, more than 10 MB or 32 megapixels, animated, another format, or broken.
        """
        with open_picture(source) as image:
            return cls(image)

    @classmethod
    def of(cls, given: Any, captions: Sequence[str] = ()) -> StyleImage:
        """Make a style image from itself, a Pillow image, a path, or a file's bytes; or from a list of these, pictures of one style.

        Args:
            captions: of the pictures of a list, one each; see `caption`.

        Raises:
            ConditionError: something else; of a list, the message says which one. No picture, or too many; another number of captions.
        """
        if isinstance(given, (list, tuple)) or captions:
            return cls._of_several(given if isinstance(given, (list, tuple)) else [given], captions)
        if isinstance(given, cls):
            return given
        if isinstance(given, Image.Image):
            return cls(given)
        if isinstance(given, (str, Path, bytes)):
            return cls.open(given)
        raise ConditionError(f"this generator reads a style image (Pillow image, path or bytes), got a {type(given).__name__}")

    @classmethod
    def _of_several(cls, given: Sequence[Any], captions: Sequence[str]) -> StyleImage:
        pictures: list[StyleImage] = []
        for number, one in enumerate(given, 1):
            try:
                if isinstance(one, (list, tuple)):
                    raise ConditionError("a list in a list; give all pictures in one")
                pictures += cls.of(one).pictures
            except ConditionError as error:
                which = f"style image {number} of {len(given)}: " if len(given) > 1 else ""
                raise ConditionError(f"{which}{error}") from error
        if not 1 <= len(pictures) <= MAX_PICTURES:
            raise ConditionError(f"give 1 to {MAX_PICTURES} style images, got {len(pictures)}")
        if isinstance(captions, str) or len(captions) not in (0, len(pictures)):
            raise ConditionError(f"give a list of captions, one for each of the {len(pictures)} pictures, or none; got {captions!r:.80}")
        if captions:
            pictures = [replace(picture, caption=caption) for picture, caption in zip(pictures, captions, strict=True)]
        first, *others = sorted(pictures, key=lambda picture: (picture.sha256, picture.caption))
        return replace(first, others=tuple(others)) if others else first
