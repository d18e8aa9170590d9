"""Clips: things move as their captions say."""

import json

import numpy as np
import pytest
from PIL import ImageChops

from pipeline.data.video import sample_frames
from pipeline.demo import clips
from pipeline.demo.clips import DIRECTIONS, Clip
from pipeline.demo.scenes import BACKGROUNDS, Thing


def middle(clip: Clip, index: int) -> np.ndarray:
    """Return the mean (x, y) of the pixels that are not background."""
    pixels = np.asarray(clips.frames(clip)[index])
    y, x = np.nonzero((pixels != BACKGROUNDS[clip.background]).any(-1))
    return np.array([x.mean(), y.mean()])


def random_clips(count: int) -> list[Clip]:
    return [clips.random_clip(np.random.default_rng([1, 0, i])) for i in range(count)]


def test_things_move_in_clip_direction() -> None:
    ways = {"right": (24, 0), "left": (-24, 0), "down": (0, 24), "up": (0, -24)}
    for clip in random_clips(40):
        way = middle(clip, 7) - middle(clip, 0)
        np.testing.assert_allclose(way, ways[clip.direction], atol=0.5)


def test_every_frame_differs() -> None:
    for clip in random_clips(10):
        pictures = clips.frames(clip)
        assert len(pictures) == 8
        assert len({picture.tobytes() for picture in pictures}) == 8


def test_clips_are_deterministic_without_held_out_combinations() -> None:
    assert random_clips(200) == random_clips(200)
    assert not any(clip.thing.held_out for clip in random_clips(200))
    assert {clip.direction for clip in random_clips(200)} == set(DIRECTIONS)


@pytest.mark.parametrize(
    ("direction", "words"),
    [
        ("right", "from left to right"),
        ("left", "from right to left"),
        ("down", "from top to bottom"),
        ("up", "from bottom to top"),
    ],
)
def test_captions(direction: str, words: str) -> None:
    clip = Clip(Thing("red", "star", "small", "top left"), direction, "white")
    assert clips.caption(clip) == f"a small red star moves {words}"


def test_evaluation_clips_are_deterministic_with_distinct_things() -> None:
    files = clips.evaluation_files(3, 60)
    assert files == clips.evaluation_files(3, 60)
    captions = json.loads(files["captions.json"])
    assert len(captions) == len(files) - 2 == 50
    assert len({caption.partition(" moves ")[0] for caption in captions.values()}) == 50
    first, last = sample_frames(files["0000.mp4"], 2)
    assert ImageChops.difference(first, last).getbbox() is not None
