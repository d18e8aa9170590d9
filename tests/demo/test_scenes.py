"""Scenes: reproducible bytes, distinct things, variants that change one attribute."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from pipeline.demo.scenes import (
    ATTRIBUTES,
    COLOURS,
    HELD_OUT,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    crop,
    draw,
    png,
    random_scene,
    variants,
)


def scenes(count: int, held_out: bool = False, **kwargs: bool) -> list[Scene]:
    return [random_scene(np.random.default_rng([7, 0, i]), held_out, **kwargs) for i in range(count)]


def changes(before: Scene, after: Scene) -> list[str]:
    """Return the attributes in which the things of two scenes differ, without knowing which things correspond."""
    gone = sorted(set(before.things) - set(after.things), key=repr)
    new = sorted(set(after.things) - set(before.things), key=repr)
    assert len(before.things) == len(after.things)
    assert len(gone) == len(new) == 1
    names = [name for name in (*ATTRIBUTES, "jitter") if getattr(gone[0], name) != getattr(new[0], name)]
    return names + ["background"] * (before.background != after.background)


def test_first_scenes_are_pinned() -> None:
    digest = hashlib.sha256()
    for scene in scenes(50) + scenes(50, held_out=True):
        digest.update(np.asarray(draw(scene)).tobytes())
    assert digest.hexdigest() == "2fd91a25a9ed5150746f6004f6e4906b75bd2e9220e62b4b58124575362065f7"


def test_scene_pngs_are_deterministic() -> None:
    assert [png(draw(scene)) for scene in scenes(50)] == [png(draw(scene)) for scene in scenes(50)]


def test_every_colour_and_shape_is_held_out_once() -> None:
    assert len(HELD_OUT) == 8
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS)
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)


def test_scenes_are_well_formed() -> None:
    for scene in scenes(500) + scenes(500, held_out=True):
        assert len(scene.things) in (2, 3)
        assert len({thing.place for thing in scene.things}) == len(scene.things)
        assert len({thing.looks for thing in scene.things}) == len(scene.things)


def test_held_out_combinations_only_on_request() -> None:
    assert not any(scene.held_out for scene in scenes(2000))
    assert all(sum(thing.held_out for thing in s.things) == 1 for s in scenes(500, held_out=True))


@pytest.mark.parametrize("held_out", [False, True])
def test_one_large_option_gives_one_large_thing(held_out: bool) -> None:
    for scene in scenes(300, held_out, one_large=True):
        (large,) = [thing for thing in scene.things if thing.size == "large"]
        assert large.held_out == held_out


def test_every_attribute_value_is_common() -> None:
    things = [thing for scene in scenes(1000) for thing in scene.things]
    for name, values in ATTRIBUTES.items():
        counts = Counter(getattr(thing, name) for thing in things)
        assert min(counts[value] for value in values) > 0.7 * len(things) / len(values)


def test_one_eighth_of_scenes_is_reserved() -> None:
    assert 0.1 < np.mean([scene.reserved for scene in scenes(2000)]) < 0.15


@pytest.mark.parametrize("held_out", [False, True])
def test_variants_differ_in_one_attribute(held_out: bool) -> None:
    for i, scene in enumerate(scenes(40, held_out)):
        found = list(variants(scene, np.random.default_rng(i)))
        assert len(set(found)) == len(found) > 25
        kinds = [changes(scene, other) for other in found]
        assert all(len(kind) == 1 for kind in kinds)
        # From the first variant on, the changed attributes alternate.
        assert {kind[0] for kind in kinds[:4]} == set(ATTRIBUTES)
        before = {thing for thing in scene.things if thing.held_out}
        for other in found:
            assert len({thing.place for thing in other.things}) == len(other.things)
            assert len({thing.looks for thing in other.things}) == len(other.things)
            held = sum(thing.held_out for thing in other.things)
            assert held <= len(before)
            assert np.any(np.asarray(draw(other)) != np.asarray(draw(scene)))


def test_variants_include_held_out_combinations_on_request() -> None:
    scene = scenes(1)[0]
    rng = np.random.default_rng(0)
    assert any(other.held_out for other in variants(scene, rng, held_out=True))


def test_scene_and_crop_sizes() -> None:
    scene = scenes(1)[0]
    assert draw(scene).size == (48, 48)
    assert draw(scene).mode == "RGB"
    assert crop(scene, scene.things[0]).size == (24, 24)


def test_crop_shows_only_its_thing() -> None:
    for scene in scenes(50):
        for thing in scene.things:
            alone = Scene((thing,), scene.background)
            assert crop(scene, thing).tobytes() == crop(alone, thing).tobytes()


def test_all_looks_differ_clearly() -> None:
    """Any two of the 128 looks differ clearly in several pixels, on every background."""
    for background in ("white", "light blue"):
        pictures = []
        for colour in COLOURS:
            for shape in SHAPES:
                for size in SIZES:
                    thing = Thing(colour, shape, size, "top left")
                    pictures.append(np.asarray(crop(Scene((thing,), background), thing), dtype=np.int16))
        flat = np.stack(pictures)
        for i in range(len(flat) - 1):
            clearly = np.abs(flat[i + 1 :] - flat[i]).max(-1) > 60
            assert clearly.sum((1, 2)).min() >= 10
