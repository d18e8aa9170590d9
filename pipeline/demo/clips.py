"""Video clips: one thing moves from one quadrant to the next. Captions are in four languages."""

import json
from dataclasses import dataclass
from io import BytesIO
from itertools import count

import av
import numpy as np
from PIL import Image

from pipeline.demo.captions import Language, phrase
from pipeline.demo.scenes import (
    OVERSAMPLING,
    PLACES,
    QUADRANT,
    SIZES,
    Thing,
    centre,
    paint,
    random_background,
    random_thing,
)

DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}

# Language -> the words for each of DIRECTIONS.
_MOVES: dict[Language, tuple[str, str, str, str]] = {
    "en": ("from left to right", "from right to left", "from top to bottom", "from bottom to top"),
    "de": ("von links nach rechts", "von rechts nach links", "von oben nach unten", "von unten nach oben"),
    "fr": ("de gauche à droite", "de droite à gauche", "de haut en bas", "de bas en haut"),
    "zh": ("从左向右", "从右向左", "从上向下", "从下向上"),
}
_SENTENCES: dict[Language, str] = {
    "en": "{thing} moves {move}",
    "de": "{thing} bewegt sich {move}",
    "fr": "{thing} se déplace {move}",
    "zh": "{thing}{move}移动",
}


@dataclass(frozen=True)
class Clip:
    """A thing that moves from its place in one direction to the next quadrant."""

    thing: Thing
    direction: str
    background: str

    @property
    def start(self) -> str:
        return self.thing.place


def random_clip(rng: np.random.Generator) -> Clip:
    """Draw a clip of a thing without a held-out combination."""
    direction = tuple(DIRECTIONS)[rng.integers(len(DIRECTIONS))]
    starts = [place for place in PLACES if _can_start(place, direction)]
    size = tuple(SIZES)[rng.integers(len(SIZES))]
    thing = random_thing(rng, starts[rng.integers(len(starts))], size, held_out=False)
    return Clip(thing, direction, random_background(rng))


def frames(clip: Clip, count: int = 8) -> list[Image.Image]:
    """Draw the clip as `count` (two or more) RGB images of 48 x 48 pixels, evenly spaced from start to end."""
    x, y = centre(clip.thing)
    dx, dy = (QUADRANT * OVERSAMPLING * part for part in DIRECTIONS[clip.direction])
    steps = [i / (count - 1) for i in range(count)]
    return [paint(clip.background, [(clip.thing, (x + round(dx * t), y + round(dy * t)))]) for t in steps]


def caption(clip: Clip, language: Language) -> str:
    """Describe the thing and its direction, without a full stop."""
    move = _MOVES[language][tuple(DIRECTIONS).index(clip.direction)]
    return _SENTENCES[language].format(thing=phrase(clip.thing, language), move=move)


def evaluation_files(seed: int, number: int) -> dict[str, bytes]:
    """Generate a set of up to 50 clips: name -> content of the videos, captions.json, and wording.json.

    wording.json has the prompts of training. All things are large, since models get frames at a lower resolution than
    images. All things look different, so a model trained only on images can find each clip without knowing motion.
    """
    clips: dict[str, Clip] = {}
    for index in count():
        if len(clips) == min(number, 50):
            break
        clip = random_clip(np.random.default_rng([seed, index, *b"clips"]))
        if clip.thing.size == "large":
            clips.setdefault(phrase(clip.thing, "en"), clip)
    files = {f"{place:04d}.mp4": clip for place, clip in enumerate(clips.values())}
    wording = {
        "seeks_medium": "Find the image: {}",
        "medium": "<video>\nRepresent the image.",
        "seeks_caption": "<video>\nFind the caption.",
    }
    listed = {"captions.json": {name: caption(clip, "en") for name, clip in files.items()}, "wording.json": wording}
    texts = {name: (json.dumps(content, indent=1) + "\n").encode() for name, content in listed.items()}
    return {name: _mp4(frames(clip)) for name, clip in files.items()} | texts


def _mp4(pictures: list[Image.Image]) -> bytes:
    data = BytesIO()
    with av.open(data, "w", format="mp4", options={"fflags": "+bitexact"}) as file:  # without the current time
        width, height = pictures[0].size
        best = {"qmin": "1", "qmax": "1"}
        stream = file.add_stream("mpeg4", rate=8, options=best, width=width, height=height, pix_fmt="yuv420p")
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_image(picture)))
        file.mux(stream.encode())
    return data.getvalue()


def _can_start(place: str, direction: str) -> bool:
    """Return whether there is a quadrant in this direction."""
    column, row = (a + b for a, b in zip(PLACES[place], DIRECTIONS[direction], strict=True))
    return (column, row) in PLACES.values()
