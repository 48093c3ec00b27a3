"""The objects of scenes, each a function that draws it from simple shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import ImageDraw

Colour = tuple[int, int, int]
SCALE = 4
INK = (40, 34, 40)
OUTLINE = 0.055


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Return `first`, with a share (clipped to 0 … 1) of `second`."""
    share = min(max(share, 0.0), 1.0)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


class Brush:
    """A brush in the coordinates of one object: its foot is (0, 0), its half width 1, and y falls upwards; colours under its light.

    Args:
        draw: of an image `SCALE` times as large as the picture.
        x, y: of the object's foot, in pixels of the picture.
        size: half width in pixels; negative mirrors the object.
        light: factor of each colour channel.
    """

    def __init__(self, draw: ImageDraw.ImageDraw, x: float, y: float, size: float, light: tuple[float, float, float] = (1, 1, 1)) -> None:
        self.draw, self.x, self.y, self.size, self.light = draw, x, y, size, light
        self.shadow: Colour = (70, 70, 60)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return (self.x + x * self.size) * SCALE, (self.y + y * abs(self.size)) * SCALE

    def _lit(self, colour: Colour) -> Colour:
        red, green, blue = (round(channel * factor) for channel, factor in zip(colour, self.light, strict=True))
        return red, green, blue

    def _pen(self, outline: bool) -> tuple[Colour | None, int]:
        return (self._lit(INK), max(2, round(OUTLINE * abs(self.size) * SCALE))) if outline else (None, 0)

    def polygon(self, points: Sequence[tuple[float, float]], colour: Colour, outline: bool = False) -> None:
        """Draw a filled polygon."""
        corners = [self._at(*point) for point in points]
        self.draw.polygon(corners, self._lit(colour))
        pen, width = self._pen(outline)
        if pen:
            self.draw.line([*corners, corners[0], corners[1]], pen, width, joint="curve")

    def rect(self, left: float, top: float, right: float, bottom: float, colour: Colour, outline: bool = False, lamp: bool = False) -> None:
        """Draw a filled rectangle; a `lamp` shines by itself."""
        self.draw.rectangle(self._box(left, top, right, bottom), colour if lamp else self._lit(colour), *self._pen(outline))

    def ellipse(self, left: float, top: float, right: float, bottom: float, colour: Colour, outline: bool = False) -> None:
        """Draw a filled ellipse in a box."""
        self.draw.ellipse(self._box(left, top, right, bottom), self._lit(colour), *self._pen(outline))

    def disc(self, x: float, y: float, radius: float, colour: Colour, outline: bool = False) -> None:
        """Draw a filled circle."""
        self.ellipse(x - radius, y - radius, x + radius, y + radius, colour, outline)

    def slice(self, left: float, top: float, right: float, bottom: float, start: float, end: float, colour: Colour) -> None:
        """Draw a part of an ellipse from the angle `start` to `end`, in degrees clockwise from three o'clock."""
        self.draw.chord(self._box(left, top, right, bottom), start, end, self._lit(colour), *self._pen(True))

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: float) -> None:
        """Draw a line of a width in the object's unit."""
        pixels = max(1, round(width * abs(self.size) * SCALE))
        self.draw.line([self._at(*point) for point in points], self._lit(colour), pixels, joint="curve")

    def _box(self, left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        (x0, y0), (x1, y1) = self._at(left, top), self._at(right, bottom)
        return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def _dark(colour: Colour) -> Colour:
    return mix(colour, (25, 20, 35), 0.35) if sum(colour) > 200 else mix(colour, (120, 120, 130), 0.4)


def _light(colour: Colour) -> Colour:
    return mix(colour, (255, 255, 255), 0.4)


def _house(brush: Brush, colour: Colour) -> None:
    brush.rect(0.4, -1.75, 0.62, -1.1, _dark(colour), True)
    brush.rect(-0.85, -1.0, 0.85, 0.05, colour, True)
    brush.polygon([(-1.08, -0.98), (0, -1.8), (1.08, -0.98)], _dark(colour), True)
    brush.rect(-0.18, -0.55, 0.18, 0.05, (110, 70, 45), True)
    for left in (-0.68, 0.36):
        brush.rect(left, -0.75, left + 0.34, -0.4, (250, 235, 150), True, lamp=True)


def _tree(brush: Brush, colour: Colour) -> None:
    brush.rect(-0.15, -0.9, 0.15, 0.05, (125, 80, 45), True)
    for x, y, radius in ((-0.42, -1.05, 0.5), (0.42, -1.05, 0.5), (0, -1.55, 0.58)):
        brush.disc(x, y, radius, colour, True)
    brush.disc(0, -1.2, 0.5, colour)
    for x, y in ((-0.3, -1.6), (-0.5, -1.15), (0.1, -1.2), (0.3, -1.6)):
        brush.disc(x, y, 0.12, _light(colour))


def _boat(brush: Brush, colour: Colour) -> None:
    brush.line([(0, -0.4), (0, -1.9)], (110, 75, 50), 0.09)
    brush.polygon([(0.08, -1.85), (0.08, -0.55), (0.85, -0.55)], (250, 248, 238), True)
    brush.polygon([(-0.08, -1.7), (-0.08, -0.55), (-0.62, -0.55)], _light(colour), True)
    brush.polygon([(-1.05, -0.45), (1.05, -0.45), (0.7, 0.1), (-0.7, 0.1)], colour, True)
    brush.line([(-0.95, -0.27), (0.95, -0.27)], _light(colour), 0.08)


def _car(brush: Brush, colour: Colour) -> None:
    brush.polygon([(-0.6, -0.6), (-0.35, -1.08), (0.35, -1.08), (0.65, -0.6)], colour, True)
    brush.polygon([(-0.45, -0.64), (-0.28, -0.97), (-0.04, -0.97), (-0.04, -0.64)], (190, 225, 245))
    brush.polygon([(0.06, -0.64), (0.06, -0.97), (0.28, -0.97), (0.48, -0.64)], (190, 225, 245))
    brush.polygon([(-1.1, -0.14), (-1.08, -0.5), (-0.9, -0.62), (0.85, -0.62), (1.1, -0.42), (1.1, -0.14)], colour, True)
    brush.disc(1.0, -0.38, 0.09, (255, 240, 150))
    for x in (-0.62, 0.62):
        brush.disc(x, -0.12, 0.25, (45, 45, 50))
        brush.disc(x, -0.12, 0.11, (200, 200, 205))


def _cat(brush: Brush, colour: Colour) -> None:
    brush.line([(0.45, -0.1), (0.85, -0.25), (0.92, -0.65), (0.75, -0.9)], INK, 0.26)
    brush.line([(0.45, -0.1), (0.85, -0.25), (0.92, -0.65), (0.75, -0.9)], colour, 0.16)
    brush.ellipse(-0.5, -0.95, 0.55, 0.08, colour, True)
    for x in (-0.42, 0.42):
        brush.polygon([(x * 1.25, -1.2), (x * 1.2, -1.78), (x * 0.25, -1.45)], colour, True)
    brush.ellipse(-0.58, -1.58, 0.58, -0.7, colour, True)
    eye = (90, 220, 90) if sum(colour) < 330 else INK
    for x in (-0.22, 0.22):
        brush.disc(x, -1.2, 0.095, eye)
    brush.polygon([(-0.08, -1.02), (0.08, -1.02), (0, -0.92)], (235, 110, 120))
    for x in (-1, 1):
        brush.line([(x * 0.2, -0.95), (x * 0.68, -0.98)], _light(INK), 0.04)
    brush.ellipse(-0.42, -0.14, -0.05, 0.08, _light(colour), True)
    brush.ellipse(0.02, -0.14, 0.38, 0.08, _light(colour), True)


def _bird(brush: Brush, colour: Colour) -> None:
    brush.polygon([(-0.55, -0.75), (-1.1, -1.0), (-1.05, -0.6)], _dark(colour), True)
    brush.ellipse(-0.75, -1.1, 0.6, -0.4, colour, True)
    brush.polygon([(0.8, -1.05), (1.15, -0.95), (0.8, -0.85)], (250, 180, 40), True)
    brush.disc(0.58, -1.0, 0.32, colour, True)
    brush.polygon([(-0.35, -0.8), (0.3, -0.8), (-0.35, -1.6)], _dark(colour), True)
    brush.disc(0.66, -1.06, 0.1, (255, 255, 255))
    brush.disc(0.68, -1.06, 0.055, INK)


def _flower(brush: Brush, colour: Colour) -> None:
    brush.line([(0, 0.05), (0.04, -1.0)], (50, 135, 60), 0.14)
    brush.polygon([(0, -0.15), (-0.6, -0.6), (-0.15, -0.55)], (70, 165, 75), True)
    brush.polygon([(0, -0.25), (0.62, -0.65), (0.2, -0.6)], (70, 165, 75), True)
    for x, y in ((0, -1.85), (0.42, -1.56), (0.26, -1.08), (-0.26, -1.08), (-0.42, -1.56)):
        brush.disc(x, y, 0.33, colour, True)
    brush.disc(0, -1.42, 0.27, (250, 205, 60) if colour[2] > 100 or colour[1] < 180 else (140, 85, 40), True)


def _balloon(brush: Brush, colour: Colour) -> None:
    for x in (-0.55, 0.55):
        brush.line([(x, -0.65), (x * 0.36, 0.05)], (95, 70, 55), 0.06)
    brush.polygon([(-0.72, -0.95), (0.72, -0.95), (0.26, -0.25), (-0.26, -0.25)], colour, True)
    brush.disc(0, -1.3, 0.85, colour, True)
    brush.polygon([(-0.62, -0.92), (0.62, -0.92), (0.22, -0.32), (-0.22, -0.32)], colour)
    brush.ellipse(-0.3, -2.12, 0.3, -0.4, _light(colour))
    brush.rect(-0.24, 0.02, 0.24, 0.35, (160, 110, 65), True)


def _mushroom(brush: Brush, colour: Colour) -> None:
    brush.polygon([(-0.25, -0.8), (0.25, -0.8), (0.36, 0.05), (-0.36, 0.05)], (245, 232, 205), True)
    brush.slice(-1.0, -1.65, 1.0, 0.15, 180, 360, colour)
    spot = (255, 255, 255) if sum(colour) < 640 else (150, 150, 160)
    for x, y, radius in ((-0.55, -0.98, 0.15), (0.02, -1.3, 0.19), (0.55, -1.0, 0.15)):
        brush.disc(x, y, radius, spot)


def _umbrella(brush: Brush, colour: Colour) -> None:
    brush.line([(0, -1.7), (0, 0.0)], (100, 70, 50), 0.1)
    brush.slice(-1.05, -1.75, 1.05, 0.15, 180, 360, colour)
    brush.polygon([(0, -1.7), (-0.38, -0.82), (0.38, -0.82)], _light(colour))
    for x in (-0.7, 0.0, 0.7):
        brush.disc(x, -0.78, 0.05, INK)


def _tent(brush: Brush, colour: Colour) -> None:
    brush.polygon([(0, -1.25), (1.1, 0.05), (-1.1, 0.05)], colour, True)
    brush.polygon([(0, -1.25), (0.42, 0.05), (-0.42, 0.05)], _dark(colour), True)
    brush.polygon([(0, -1.0), (0.2, 0.05), (-0.05, 0.05)], (45, 40, 50))


def _castle(brush: Brush, colour: Colour) -> None:
    brush.rect(-0.62, -1.0, 0.62, 0.05, colour, True)
    for left in (-0.62, -0.22, 0.18):
        brush.rect(left, -1.2, left + 0.24, -0.98, colour, True)
    for left in (-1.05, 0.6):
        brush.rect(left, -1.35, left + 0.45, 0.05, colour, True)
        brush.polygon([(left - 0.08, -1.33), (left + 0.22, -1.95), (left + 0.53, -1.33)], _dark(colour), True)
        brush.rect(left + 0.15, -1.05, left + 0.3, -0.75, INK)
    brush.slice(-0.25, -0.62, 0.25, 0.6, 180, 360, (70, 45, 35))


def _rocket(brush: Brush, colour: Colour) -> None:
    brush.polygon([(-0.26, -0.3), (0, 0.5), (0.26, -0.3)], (255, 170, 40))
    brush.polygon([(-0.12, -0.3), (0, 0.25), (0.12, -0.3)], (255, 240, 130))
    for x in (-1, 1):
        brush.polygon([(x * 0.35, -0.85), (x * 0.8, -0.15), (x * 0.3, -0.35)], _dark(colour), True)
    brush.polygon([(-0.35, -0.3), (-0.42, -1.0), (-0.3, -1.55), (0, -2.1), (0.3, -1.55), (0.42, -1.0), (0.35, -0.3)], colour, True)
    brush.polygon([(-0.28, -1.6), (0, -2.1), (0.28, -1.6)], _dark(colour), True)
    brush.disc(0, -1.15, 0.2, (150, 215, 245), True)


def _ball(brush: Brush, colour: Colour) -> None:
    brush.disc(0, -0.75, 0.82, colour, True)
    stripe = (250, 250, 250) if sum(colour) < 640 else (150, 160, 175)
    brush.slice(-0.78, -1.53, 0.78, 0.03, 205, 335, stripe)
    brush.ellipse(-0.2, -1.5, 0.2, -0.02, stripe)


DRAWINGS: dict[str, Callable[[Brush, Colour], None]] = {
    "house": _house, "tree": _tree, "boat": _boat, "car": _car, "cat": _cat, "bird": _bird, "flower": _flower, "balloon": _balloon,
    "mushroom": _mushroom, "umbrella": _umbrella, "tent": _tent, "castle": _castle, "rocket": _rocket, "ball": _ball,
}  # fmt: skip
"""The drawing of each object, about two half widths high."""
