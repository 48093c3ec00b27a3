"""Scenes as pictures: backgrounds, light, and where the objects stand. Drawn four times as large, then averaged down."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageDraw

from cond_pdiff.training.text_to_image.objects import DRAWINGS, SCALE, Brush, Colour, mix
from cond_pdiff.training.text_to_image.scenes import COLOURS, Scene

SIZE = 64
"""Height and width of a picture in pixels, the unit of all lengths here."""
HORIZON = 40.0
VARIANTS = 4
"""The number of looks of each sky and each place. With the few positions of objects they make pictures that a small network can learn:
random blades of grass cost it as much as objects do, and nobody asks for them."""
SINGLE, FIRST, SECOND = 14.0, 12.5, 9.0
"""The half widths: of an object alone, of the main one of two, of the other."""
AIRBORNE = ("balloon", "bird", "rocket")
SKIES: dict[str, tuple[Colour, Colour]] = {  # at the top, at the horizon
    "morning": ((150, 165, 225), (255, 225, 205)),
    "day": ((60, 145, 235), (195, 230, 252)),
    "sunset": ((110, 50, 130), (255, 140, 50)),
    "night": ((8, 12, 40), (35, 48, 100)),
}
GROUND_LIGHT = {"morning": (1.0, 0.93, 0.93), "day": (1.0, 1.0, 1.0), "sunset": (0.92, 0.68, 0.6), "night": (0.42, 0.5, 0.72)}
OBJECT_LIGHT = {"morning": (1.0, 0.97, 0.97), "day": (1.0, 1.0, 1.0), "sunset": (0.98, 0.9, 0.86), "night": (0.9, 0.92, 1.0)}


def render(scene: Scene, rng: random.Random) -> np.ndarray:
    """Draw a picture of the scene, uint8 of shape `(64, 64, 3)`; backdrop and positions come from `rng`."""
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE))
    draw = ImageDraw.Draw(image)
    _sky(draw, scene.time, random.Random(f"{scene.time}/{rng.randrange(VARIANTS)}"))
    canvas = Brush(draw, 0, 0, 1, GROUND_LIGHT[scene.time])
    _PLACES[scene.place](canvas, HORIZON, random.Random(f"{scene.place}/{rng.randrange(VARIANTS)}"))
    for name, colour, x, foot, size in _arrange(scene, rng):
        _stand(canvas, scene.place, name, x, foot, size)
        faces = 1 if x <= SIZE / 2 else -1  # the middle of the picture
        DRAWINGS[name](Brush(draw, x, foot, size * faces, OBJECT_LIGHT[scene.time]), COLOURS[colour])
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def _arrange(scene: Scene, rng: random.Random) -> list[tuple[str, str, float, float, float]]:
    """Return (object, colour, x of the middle, y of the foot, half width) of what is to be drawn, back to front."""
    if scene.second is None or scene.second_colour is None:
        return [(scene.object, scene.colour, rng.choice((24.0, 32.0, 40.0)), 32.0 if scene.object in AIRBORNE else 56.0, SINGLE)]
    side = {"left of": -1, "right of": 1}.get(scene.relation or "", rng.choice((-1, 1)))
    foot = 32.0 if scene.object in AIRBORNE else 56.0
    if scene.relation == "in front of":  # the second stands behind, higher and half hidden
        x, second_x, second_foot = 32.0 + 6 * side, 32.0 - 12 * side, 28.0 if foot < HORIZON and scene.second in AIRBORNE else 48.0
    else:
        x, second_x, second_foot = 32.0 + 14 * side, 32.0 - 17 * side, 28.0 if scene.second in AIRBORNE else 54.0
    return [(scene.second, scene.second_colour, second_x, second_foot, SECOND), (scene.object, scene.colour, x, foot, FIRST)]


def _stand(canvas: Brush, place: str, name: str, x: float, base: float, size: float) -> None:
    """Draw what keeps an object from floating: a shadow on the ground, an islet on the sea."""
    if name in AIRBORNE:
        return
    wide = abs(size) * 0.95
    if place != "sea":
        canvas.ellipse(x - wide, base - 0.13 * size, x + wide, base + 0.13 * size, canvas.shadow)
    elif name == "boat":
        canvas.ellipse(x - wide * 1.1, base - 0.1 * size, x + wide * 1.1, base + 0.16 * size, (200, 230, 250))
    else:
        canvas.ellipse(x - wide * 1.25, base - 0.24 * size, x + wide * 1.25, base + 0.28 * size, (225, 200, 140))


def _vary(colour: Colour, amount: float, rng: random.Random) -> Colour:
    """Return the colour, each channel moved by up to `amount`."""
    red, green, blue = (int(min(255, max(0, channel + rng.uniform(-amount, amount)))) for channel in colour)
    return red, green, blue


# --- sky -----------------------------------------------------------------------------------------------------------------------


def _sky(draw: ImageDraw.ImageDraw, time: str, rng: random.Random) -> None:
    top, bottom = (_vary(colour, 8, rng) for colour in SKIES[time])
    rows = int((HORIZON + 6) * SCALE)
    for row in range(rows):
        draw.line((0, row, SIZE * SCALE, row), mix(top, bottom, row / rows))
    brush = Brush(draw, 0, 0, 1)
    x, y = rng.uniform(6, 58), rng.uniform(6, 14)
    if time == "night":
        for _ in range(rng.randint(16, 26)):
            star_x, star_y, radius = rng.uniform(0, 64), rng.uniform(0, HORIZON - 4), rng.uniform(0.3, 0.65)
            brush.ellipse(star_x - radius, star_y - radius, star_x + radius, star_y + radius, (250, 245, 215))
        brush.disc(x, y, 4.2, (250, 244, 205))
        brush.disc(x + rng.choice((-1.8, 1.8)), y - 0.8, 3.6, mix(top, bottom, y / (HORIZON + 6)))
    elif time == "sunset":
        _glow(brush, x, HORIZON - rng.uniform(1, 5), 6.5, (255, 225, 90), (255, 140, 50))
    elif time == "morning":
        _glow(brush, x, HORIZON - rng.uniform(5, 11), 4.6, (255, 252, 225), (255, 225, 205))
    else:
        _glow(brush, x, y, 4.6, (255, 236, 90), mix(top, bottom, 0.35))
    if time in ("day", "morning"):
        for _ in range(rng.randint(1, 3)):
            _cloud(brush, rng.uniform(4, 60), rng.uniform(6, 20), rng.uniform(2.2, 3.6), rng)


def _glow(brush: Brush, x: float, y: float, radius: float, inner: Colour, outer: Colour) -> None:
    for ring in range(3, -1, -1):
        brush.disc(x, y, radius * (1 + 0.22 * ring), mix(inner, outer, 0.28 * ring))


def _cloud(brush: Brush, x: float, y: float, size: float, rng: random.Random) -> None:
    for offset in (-1.5, 0.0, 1.4):
        puff = size * rng.uniform(0.75, 1.1)
        brush.ellipse(x + offset * size - puff * 1.2, y - puff * 0.75, x + offset * size + puff * 1.2, y + puff * 0.6, (250, 250, 252))


# --- places --------------------------------------------------------------------------------------------------------------------


def _meadow(canvas: Brush, horizon: float, rng: random.Random) -> None:
    hill = rng.uniform(0, 64)
    canvas.ellipse(hill - 55, horizon - 4, hill + 55, horizon + 60, (125, 190, 85))
    canvas.ellipse(32 - hill - 40, horizon - 1, 96 - hill + 40, horizon + 60, (105, 180, 70))
    canvas.rect(0, horizon + 8, 64, 64, (92, 168, 60))
    for _ in range(26):
        x, y = rng.uniform(0, 64), rng.uniform(horizon + 6, 63)
        canvas.line([(x, y), (x + rng.uniform(-0.6, 0.6), y - 2.2)], (60, 130, 45), 0.5)
    for _ in range(rng.randint(5, 12)):
        petals = rng.choice(((250, 240, 120), (250, 250, 250), (240, 150, 190)))
        canvas.disc(rng.uniform(0, 64), rng.uniform(horizon + 8, 63), 0.75, petals)


def _sea(canvas: Brush, horizon: float, rng: random.Random) -> None:
    _water(canvas, horizon, 64, rng, 34)


def _water(canvas: Brush, top: float, bottom: float, rng: random.Random, waves: int) -> None:
    for row in range(int(bottom - top) + 1):
        canvas.rect(0, top + row, 64, top + row + 1, mix((75, 170, 215), (25, 95, 165), row / 26))
    for _ in range(waves):
        x, y, wide = rng.uniform(-2, 62), rng.uniform(top + 1, bottom), rng.uniform(1.5, 4.5)
        canvas.line([(x, y), (x + wide / 2, y - 0.6), (x + wide, y)], (165, 220, 240), 0.55)


def _beach(canvas: Brush, horizon: float, rng: random.Random) -> None:
    shore, swing = horizon + rng.uniform(5, 8), rng.uniform(-3, 3)
    _water(canvas, horizon, shore + 4, rng, 8)
    edge = [(x, shore + swing * np.sin(x / 14)) for x in range(0, 66, 3)]
    canvas.polygon([(0, 66), *((x, y - 1.2) for x, y in edge), (66, 66)], (245, 250, 250))
    canvas.polygon([(0, 66), *edge, (66, 66)], (240, 215, 150))
    for _ in range(26):
        canvas.disc(rng.uniform(0, 64), rng.uniform(shore + 3, 64), 0.4, (215, 185, 120))
    x, side = rng.choice((3, 61)), rng.uniform(0.8, 1.1)
    canvas.line([(x, shore + 5), (x + 1, shore - 9), (x - 1, shore - 17)], (150, 105, 65), 1.6)
    for across, down in ((-8, 1), (-6, -4), (6, -4), (8, 1), (4, 5), (-4, 5)):
        bend, tip = (x - 1 + across * side * 0.6, shore - 18 + down * 0.3), (x - 1 + across * side, shore - 16 + down)
        canvas.line([(x - 1, shore - 17), bend, tip], (60, 150, 70), 1.4)


def _desert(canvas: Brush, horizon: float, rng: random.Random) -> None:
    canvas.rect(0, horizon + 4, 64, 64, (238, 190, 115))
    for layer, colour in enumerate(((238, 190, 115), (228, 170, 90), (240, 185, 105))):
        peak, top = rng.uniform(5, 59), horizon - 5 + 6 * layer
        lee = [(peak, top), (peak + 20, top + 6), (peak + 60, top + 14)]
        canvas.polygon([(-30, 66), (peak - 50, top + 13), (peak - 18, top + 5), *lee, (94, 66)], colour)
        canvas.polygon([*lee, (peak + 16, top + 16), (peak + 6, top + 8)], mix(colour, (160, 100, 50), 0.35))
    canvas.rect(0, horizon + 17, 64, 64, (240, 190, 110))
    x, y = rng.choice((5, 59)), horizon + 6
    canvas.line([(x, y), (x, y - 12)], (60, 125, 70), 2.2)
    canvas.line([(x, y - 4), (x + 3.4, y - 4.6), (x + 3.4, y - 9)], (60, 125, 70), 1.6)
    canvas.line([(x, y - 5.5), (x - 3.2, y - 6), (x - 3.2, y - 8.6)], (60, 125, 70), 1.6)


def _snow(canvas: Brush, horizon: float, rng: random.Random) -> None:
    hill = rng.uniform(0, 64)
    canvas.ellipse(hill - 60, horizon - 5, hill + 50, horizon + 60, (222, 232, 246))
    canvas.rect(0, horizon + 6, 64, 64, (240, 246, 253))
    for _ in range(rng.randint(3, 5)):
        _pine(canvas, rng.uniform(0, 64), horizon + rng.uniform(3, 7), rng.uniform(5, 8), (90, 130, 125), (245, 250, 255))
    for _ in range(34):
        canvas.disc(rng.uniform(0, 64), rng.uniform(0, 64), rng.uniform(0.35, 0.65), (255, 255, 255))


def _pine(canvas: Brush, x: float, base: float, height: float, colour: Colour, cap: Colour) -> None:
    for level in range(3):
        wide, bottom = height * (0.36 - 0.08 * level), base - height * 0.27 * level
        canvas.polygon([(x - wide, bottom), (x, bottom - height * 0.48), (x + wide, bottom)], colour)
        edge = bottom - height * 0.3
        canvas.polygon([(x - wide * 0.35, edge), (x, bottom - height * 0.48), (x + wide * 0.35, edge)], cap)


def _forest(canvas: Brush, horizon: float, rng: random.Random) -> None:
    for layer, colour in enumerate(((70, 125, 85), (48, 100, 62), (32, 80, 48))):
        x = rng.uniform(-6, 0)
        while x < 68:
            height = rng.uniform(17, 26) - 2 * layer
            _pine(canvas, x, horizon + 4 + 1.5 * layer, height, colour, mix(colour, (255, 255, 255), 0.08))
            x += rng.uniform(5, 8) + 1.5 * layer
    canvas.rect(0, horizon + 4, 64, 64, (92, 105, 55))
    for _ in range(34):
        x, y = rng.uniform(0, 64), rng.uniform(horizon + 6, 64)
        canvas.ellipse(x - 1, y - 0.5, x + 1, y + 0.5, rng.choice(((120, 95, 50), (70, 90, 45), (140, 110, 60))))


def _city(canvas: Brush, horizon: float, rng: random.Random) -> None:
    lit = (255, 225, 130) if canvas.light[0] < 0.7 else (205, 225, 240)
    x = rng.uniform(-4, 0)
    while x < 64:
        wide, tall = rng.uniform(7, 12), rng.uniform(12, 27)
        colour = rng.choice(((120, 130, 150), (150, 140, 140), (100, 115, 140), (165, 150, 135)))
        canvas.rect(x, horizon + 6 - tall, x + wide, horizon + 7, colour)
        for row in range(int(tall / 4)):
            for column in range(int(wide / 3)):
                if rng.random() < 0.75:
                    left, top = x + 1 + 3 * column, horizon + 8 - tall + 4 * row
                    canvas.rect(left, top, left + 1.4, top + 2, lit, lamp=True)
        x += wide + rng.uniform(0, 1.2)
    canvas.rect(0, horizon + 6, 64, horizon + 10, (185, 185, 185))
    canvas.rect(0, horizon + 10, 64, 64, (105, 108, 116))
    for dash in range(-1, 6):
        canvas.rect(12 * dash + 3, horizon + 18, 12 * dash + 9, horizon + 19.2, (235, 235, 225))


_PLACES = {"meadow": _meadow, "sea": _sea, "beach": _beach, "desert": _desert, "snow": _snow, "forest": _forest, "city": _city}
