"""Video clips: one thing moves from one quadrant to the next."""

import json
from dataclasses import dataclass
from io import BytesIO
from itertools import count

import av
import numpy as np
from PIL import Image

from pipeline.demo.captions import phrase
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

# Direction -> the step to the next quadrant in columns and rows, and words for it.
DIRECTIONS = {
    "right": (1, 0, "from left to right"),
    "left": (-1, 0, "from right to left"),
    "down": (0, 1, "from top to bottom"),
    "up": (0, -1, "from bottom to top"),
}


@dataclass(frozen=True)
class Clip:
    """A thing that moves from its place in one direction to the next quadrant."""

    thing: Thing
    direction: str
    background: str


def random_clip(rng: np.random.Generator) -> Clip:
    """Draw a clip of a thing without a held-out combination."""
    direction = tuple(DIRECTIONS)[rng.integers(len(DIRECTIONS))]
    dx, dy, _ = DIRECTIONS[direction]
    starts = [place for place, (x, y) in PLACES.items() if (x + dx, y + dy) in PLACES.values()]
    size = tuple(SIZES)[rng.integers(len(SIZES))]
    thing = random_thing(rng, starts[rng.integers(len(starts))], size, held_out=False)
    return Clip(thing, direction, random_background(rng))


def frames(clip: Clip, count: int = 8) -> list[Image.Image]:
    """Draw the clip as `count` (two or more) RGB images of 48 x 48 pixels, evenly spaced from start to end."""
    x, y = centre(clip.thing)
    dx, dy = (QUADRANT * OVERSAMPLING * part for part in DIRECTIONS[clip.direction][:2])
    steps = [i / (count - 1) for i in range(count)]
    return [paint(clip.background, [(clip.thing, (x + round(dx * t), y + round(dy * t)))]) for t in steps]


def caption(clip: Clip) -> str:
    """Describe the thing and its direction in English, without a full stop."""
    return f"{phrase(clip.thing, 'en')} moves {DIRECTIONS[clip.direction][2]}"


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
        "seeks_medium": "Find the image: {}\n",
        "medium": "<video>\nRepresent the image.\n",
        "seeks_caption": "<video>\nFind the caption.\n",
    }
    listed = {"captions.json": {name: caption(clip) for name, clip in files.items()}, "wording.json": wording}
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
