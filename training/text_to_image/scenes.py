"""What a scene may show, how captions word it, and which combinations are kept out of training."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

OBJECTS: dict[str, tuple[str, ...]] = {
    "house": ("house", "house", "cottage"),
    "tree": ("tree",),
    "boat": ("boat", "boat", "sailboat", "ship"),
    "car": ("car",),
    "cat": ("cat", "cat", "kitten"),
    "bird": ("bird",),
    "flower": ("flower",),
    "balloon": ("balloon", "balloon", "hot-air balloon"),
    "mushroom": ("mushroom", "mushroom", "toadstool"),
    "umbrella": ("umbrella", "umbrella", "parasol"),
    "tent": ("tent",),
    "castle": ("castle",),
    "rocket": ("rocket",),
    "ball": ("ball",),
}
"""The words of each object in captions, a word as often as it is drawn."""

NATURAL = {
    "house": "red", "tree": "green", "boat": "blue", "car": "red", "cat": "orange", "bird": "blue", "flower": "pink", "balloon": "red",
    "mushroom": "red", "umbrella": "purple", "tent": "orange", "castle": "white", "rocket": "white", "ball": "yellow",
}  # fmt: skip
"""The colour that each object has when a caption names none."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (250, 215, 50),
    "green": (45, 160, 65),
    "blue": (40, 95, 215),
    "purple": (130, 55, 175),
    "pink": (250, 140, 185),
    "white": (246, 246, 242),
    "black": (38, 36, 42),
}

PLACES: dict[str, tuple[str, ...]] = {
    "meadow": ("in a meadow", "on a meadow", "in a green field", "on a hill", "in the countryside"),
    "sea": ("on the sea", "on the sea", "at sea", "on the water", "on the ocean"),
    "beach": ("on the beach", "on a beach", "on a sandy beach", "by the shore"),
    "desert": ("in the desert", "in a desert", "on a dune", "in the dunes"),
    "snow": ("in the snow", "in the snow", "in winter", "on a snowy hill"),
    "forest": ("in the forest", "in a forest", "in the woods"),
    "city": ("in the city", "in a city", "in a town", "on a street"),
}

TIMES: dict[str, tuple[str, ...]] = {
    "morning": ("in the morning", "at dawn", "at sunrise"),
    "day": ("by day", "in daylight", "under a blue sky", "at noon", "on a sunny day"),
    "sunset": ("at sunset", "at sunset", "in the evening", "at dusk"),
    "night": ("at night", "at night", "by night", "under the stars", "in the moonlight"),
}

RELATIONS: dict[str, tuple[str, ...]] = {
    "beside": ("beside", "beside", "next to", "near", "by", "with", "and"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "in front of": ("in front of", "before"),
}
"""The places of the main object, seen from the second, and their words; `beside` is either side."""

OPENINGS = ("", "", "", "", "a picture of ", "an image of ", "a painting of ", "a drawing of ", "a scene with ", "there is ")
HELD_OUT_SHARE = 0.1
ATTRIBUTES = ("object", "colour", "place", "time", "second", "second_colour", "relation")


@dataclass(frozen=True)
class Scene:
    """A main object somewhere at some time, perhaps with a second object, which is drawn smaller.

    Args:
        object, colour: of the main object; keys of `OBJECTS` and `COLOURS`.
        place, time: keys of `PLACES` and `TIMES`.
        second, second_colour, relation: of the second object, `relation` a key of `RELATIONS`; all three None if there is none.
    """

    object: str
    colour: str
    place: str
    time: str
    second: str | None = None
    second_colour: str | None = None
    relation: str | None = None

    @classmethod
    def draw(cls, rng: random.Random, held_out: bool = False) -> Scene:
        """Draw a random scene of the training part, or of the part that is `held_out`."""
        while True:
            name = rng.choice(list(OBJECTS))
            scene = cls(name, _draw_colour(name, rng), rng.choice(list(PLACES)), rng.choice(list(TIMES)))
            if rng.random() < 0.6:
                second = rng.choice([other for other in OBJECTS if other != name])
                scene = cls(*_facts(scene), second, _draw_colour(second, rng), rng.choice(list(RELATIONS)))
            if scene.held_out == held_out:
                return scene

    @property
    def held_out(self) -> bool:
        """Whether this combination of main object, colour and place is kept for evaluation; a fixed tenth of all combinations is."""
        digest = hashlib.sha256("/".join((self.object, self.colour, self.place)).encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32

    def caption(self, rng: random.Random, full: bool = False) -> str:
        """Draw one of many wordings; unless it is to be `full`, attributes are sometimes left out. Lower case, as PixArt reads it."""
        subject = _noun(self.object, self.colour, rng, full)
        if self.second and self.second_colour and self.relation:
            subject += f" {rng.choice(RELATIONS[self.relation])} {_noun(self.second, self.second_colour, rng, full)}"
        where = rng.choice(PLACES[self.place]) if full or rng.random() < 0.85 else ""
        when = rng.choice(TIMES[self.time]) if full or rng.random() < 0.85 else ""
        opening = rng.choice(OPENINGS)
        if where and opening.startswith("there") and rng.random() < 0.5:
            words = [where, opening + subject, when]
        elif when and not opening and rng.random() < 0.25:
            return " ".join(f"{when}, {subject} {where}".split())
        else:
            words = [opening + subject, *((where, when) if rng.random() < 0.85 else (when, where))]
        return " ".join(" ".join(words).split())


def _facts(scene: Scene) -> tuple[str, str, str, str]:
    return scene.object, scene.colour, scene.place, scene.time


def _draw_colour(name: str, rng: random.Random) -> str:
    """Draw any colour, but the natural one more often, so that a caption may leave it out."""
    return NATURAL[name] if rng.random() < 0.2 else rng.choice(list(COLOURS))


def _noun(name: str, colour: str, rng: random.Random, full: bool) -> str:
    word = rng.choice(OBJECTS[name])
    silent = rng.random() < (0.4 if colour == NATURAL[name] else 0.04)
    phrase = word if silent and not full else f"{colour} {word}"
    return f"{'an' if phrase[0] in 'aeiou' else rng.choice(('a', 'a', 'a', 'the'))} {phrase}"


def caption_words() -> list[str]:
    """Return every word that a caption may hold, sorted: the vocabulary of the tokenizer."""
    phrases: list[Iterable[str]] = [
        *OBJECTS.values(), *PLACES.values(), *TIMES.values(), *RELATIONS.values(), OBJECTS, COLOURS, PLACES, TIMES, OPENINGS,
        ("a", "an", "the"),
    ]  # fmt: skip
    return sorted({word for group in phrases for phrase in group for word in phrase.split()})


def scene_stream(seed: int, held_out: bool = False) -> Iterator[tuple[Scene, random.Random]]:
    """Yield scenes without end, each with the random numbers to render and word it; the n-th depends on `seed` and n only."""
    index = 0
    while True:
        rng = random.Random(f"scene/{seed}/{held_out}/{index}")
        yield Scene.draw(rng, held_out), rng
        index += 1
