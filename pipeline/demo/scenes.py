"""Scenes: a plain background with two or three things, each in its own quadrant.

All random choices come from the caller's generator, `np.random.default_rng([seed, stream, index])`, so a scene does
not depend on the scenes before it.
"""

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from hashlib import blake2b
from itertools import chain, product, zip_longest

import numpy as np
from PIL import Image, ImageDraw

SIDE = 48  # pixels of a scene
QUADRANT = SIDE // 2  # pixels of a crop
OVERSAMPLING = 4  # scenes are drawn this much larger, then averaged for smooth edges
JITTER = 6  # the largest offset from the quadrant's centre in oversampled pixels: 1.5 pixels

COLOURS = {
    "red": (220, 30, 40),
    "orange": (250, 130, 10),
    "yellow": (245, 210, 0),
    "green": (30, 160, 60),
    "turquoise": (20, 195, 190),
    "blue": (40, 80, 230),
    "purple": (145, 55, 200),
    "pink": (255, 130, 195),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
SIZES = {"small": 13, "large": 20}  # pixels across
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "light grey": (215, 215, 215),
    "beige": (240, 230, 210),
    "light blue": (210, 225, 245),
}
ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES), "place": tuple(PLACES)}

# 3 has an inverse modulo 8, so each colour and each shape is in exactly one of the eight combinations.
HELD_OUT = frozenset((tuple(COLOURS)[(3 * i + 5) % 8], shape) for i, shape in enumerate(SHAPES))
_HELD_OUT = sorted(HELD_OUT)
_TRAINED = sorted(set(product(COLOURS, SHAPES)) - HELD_OUT)


@dataclass(frozen=True)
class Thing:
    """One object. `jitter`: its offset from the centre of its quadrant, in oversampled pixels."""

    colour: str
    shape: str
    size: str
    place: str
    jitter: tuple[int, int] = (0, 0)

    @property
    def looks(self) -> tuple[str, str, str]:
        """The attributes in a phrase such as "the small red star": size, colour, shape."""
        return (self.size, self.colour, self.shape)

    @property
    def held_out(self) -> bool:
        """Whether its colour and shape never occur together in training."""
        return (self.colour, self.shape) in HELD_OUT


@dataclass(frozen=True)
class Scene:
    """Two or three things in reading order (one for classification), with different places and different looks."""

    things: tuple[Thing, ...]
    background: str

    @cached_property
    def content(self) -> tuple[tuple[str, str, str, str], ...]:
        """The attributes in a short caption. Scenes that differ only in background or jitter have the same content."""
        return tuple((*thing.looks, thing.place) for thing in self.things)

    @property
    def held_out(self) -> bool:
        return any(thing.held_out for thing in self.things)

    @cached_property
    def reserved(self) -> bool:
        """Whether the scene is reserved for evaluation: one content in eight, the same for every seed.

        A separate random stream would not suffice: there are only about 75,000 contents of two things, and a large
        training set contains most of them.
        """
        return blake2b(repr(self.content).encode(), digest_size=1).digest()[0] % 8 == 0


def in_reading_order(things: Iterable[Thing]) -> tuple[Thing, ...]:
    return tuple(sorted(things, key=lambda thing: PLACES[thing.place][::-1]))


def random_thing(rng: np.random.Generator, place: str, size: str, held_out: bool) -> Thing:
    """Draw a thing with a random combination of colour and shape: a held-out one, or one that is not held out."""
    combinations = _HELD_OUT if held_out else _TRAINED
    colour, shape = combinations[rng.integers(len(combinations))]
    dx, dy = rng.integers(-JITTER, JITTER + 1, 2).tolist()
    return Thing(colour, shape, size, place, (dx, dy))


def random_scene(rng: np.random.Generator, held_out: bool, one_large: bool = False) -> Scene:
    """Draw two or three things.

    held_out: one of them has a held-out combination of colour and shape; otherwise none has.
    one_large: exactly one thing is large; if there is a held-out one, it is that one.
    """
    places = rng.permutation(list(PLACES))[: rng.integers(2, 4)].tolist()
    things: list[Thing] = []
    while len(things) < len(places):
        first = not things
        large = first if one_large else rng.integers(2) == 1
        thing = random_thing(rng, places[len(things)], "large" if large else "small", held_out and first)
        if thing.looks not in [other.looks for other in things]:
            things.append(thing)
    return Scene(in_reading_order(things), random_background(rng))


def scene_of_part(rng: np.random.Generator, reserved: bool, one_large: bool = False) -> Scene:
    """Draw a scene without held-out combinations that is reserved for evaluation, or is not; see `random_scene`."""
    while (scene := random_scene(rng, held_out=False, one_large=one_large)).reserved != reserved:
        pass
    return scene


def random_background(rng: np.random.Generator) -> str:
    return tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]


def replaced(scene: Scene, old: Thing, new: Thing) -> Scene:
    """Return the scene with `new` instead of `old`."""
    return replace(scene, things=in_reading_order(new if thing is old else thing for thing in scene.things))


def changed(thing: Thing, attribute: str) -> list[Thing]:
    """Return the things that differ from this one in one of the `ATTRIBUTES`."""
    others = (value for value in ATTRIBUTES[attribute] if value != getattr(thing, attribute))
    return [Thing(**{**vars(thing), attribute: value}) for value in others]


def variants(scene: Scene, rng: np.random.Generator, held_out: bool = False) -> Iterator[Scene]:
    """Generate all scenes that differ in one attribute of one thing, in random order.

    The attributes alternate, so the first few variants do not all differ in colour or shape.
    held_out: include scenes in which a thing becomes a held-out combination.
    """
    turns = []
    for attribute in rng.permutation(list(ATTRIBUTES)).tolist():
        changes = [(thing, new) for thing in scene.things for new in changed(thing, attribute)]
        turns.append(_applied(scene, [changes[i] for i in rng.permutation(len(changes))], held_out))
    return (variant for variant in chain.from_iterable(zip_longest(*turns)) if variant is not None)


def _applied(scene: Scene, changes: list[tuple[Thing, Thing]], held_out: bool) -> Iterator[Scene]:
    """Yield the scene with each change that keeps it valid."""
    for old, new in changes:
        if new.held_out and not old.held_out and not held_out:
            continue
        others = [thing for thing in scene.things if thing is not old]
        if all(new.place != other.place and new.looks != other.looks for other in others):
            yield replaced(scene, old, new)


def draw(scene: Scene) -> Image.Image:
    """Draw the scene as an RGB image of 48 x 48 pixels."""
    return paint(scene.background, ((thing, centre(thing)) for thing in scene.things))


def crop(scene: Scene, thing: Thing) -> Image.Image:
    """Return the thing's quadrant of the scene: 24 x 24 pixels, without other things."""
    column, row = (QUADRANT * part for part in PLACES[thing.place])
    return draw(scene).crop((column, row, column + QUADRANT, row + QUADRANT))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # three times as fast as level 6 for these images
    return buffer.getvalue()


def centre(thing: Thing) -> tuple[int, int]:
    """Return the centre of a thing in oversampled pixels."""
    column, row = PLACES[thing.place]
    step = QUADRANT * OVERSAMPLING
    return column * step + step // 2 + thing.jitter[0], row * step + step // 2 + thing.jitter[1]


def paint(background: str, placed: Iterable[tuple[Thing, tuple[int, int]]]) -> Image.Image:
    """Draw things at given centres (oversampled pixels) on a plain background, reduced to 48 x 48 pixels."""
    canvas = Image.new("RGB", (SIDE * OVERSAMPLING,) * 2, BACKGROUNDS[background])
    for thing, (x, y) in placed:
        mask = _mask(thing.shape, SIZES[thing.size] * OVERSAMPLING // 2)
        canvas.paste(COLOURS[thing.colour], (x - mask.width // 2, y - mask.height // 2), mask)
    return canvas.reduce(OVERSAMPLING)


@cache
def _mask(shape: str, radius: int) -> Image.Image:
    """Draw the shape in white on black, in a square with sides of 2 radius + 1 pixels."""
    mask = Image.new("L", (2 * radius + 1,) * 2)
    pen = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        pen.ellipse((0, 0, 2 * radius, 2 * radius), fill=255)
        if shape == "ring":
            rim = round(0.44 * radius)
            pen.ellipse((rim, rim, 2 * radius - rim, 2 * radius - rim), fill=0)
    else:
        pen.polygon([(round(radius + radius * x), round(radius + radius * y)) for x, y in _OUTLINES[shape]], 255)
    return mask


# Shape -> its corners in the square from -1 to 1, with y downwards.
_W = 0.3  # half the width of the cross's arms
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.95, -0.95), (0.95, -0.95), (0.95, 0.95), (-0.95, 0.95)],
    "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
    "diamond": [(0, -1), (0.74, 0), (0, 1), (-0.74, 0)],
    "cross": [
        *[(-_W, -1), (_W, -1), (_W, -_W), (1, -_W), (1, _W), (_W, _W)],
        *[(_W, 1), (-_W, 1), (-_W, _W), (-1, _W), (-1, -_W), (-_W, -_W)],
    ],
    "star": [
        (reach * math.sin(math.pi * i / 5), 0.08 - reach * math.cos(math.pi * i / 5))
        for i, reach in enumerate([1.0, 0.42] * 5)
    ],
    # https://mathworld.wolfram.com/HeartCurve.html, scaled
    "heart": [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1,
        )
        for t in (math.pi * i / 32 for i in range(64))
    ],
}
