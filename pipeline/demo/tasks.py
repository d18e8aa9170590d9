"""A small MMEB: five datasets of pairs about synthetic scenes, for MMEB's four meta-tasks.

Each dataset has two evaluation sets: an in-distribution set, and a held-out set (`-OOD`), whose questions are all about
combinations of colour and shape that never occur in training. Rows have the form of
https://huggingface.co/datasets/TIGER-Lab/MMEB-eval: the first candidate of a row is the correct one.
"""

import json
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import chain, islice, product
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.sample import IMAGE_MARK, MMEB_IMAGE_MARK, Item, Pair
from pipeline.demo import captions
from pipeline.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    changed,
    crop,
    draw,
    png,
    random_scene,
    replaced,
    scene_of_part,
    variants,
)

Split = Literal["train", "in-distribution", "held-out"]

DATASETS = {
    "Scene-CLS": "classification",
    "Scene-VQA": "vqa",
    "Scene-T2I": "retrieval",
    "Scene-I2T": "retrieval",
    "Scene-Ground": "grounding",
}
# Name of an evaluation set -> (meta-task, whether it is in distribution).
TASKS = {name: (task, True) for name, task in DATASETS.items()} | {
    f"{name}-OOD": (task, False) for name, task in DATASETS.items()
}
CANDIDATES = {"classification": 64, "vqa": 64, "retrieval": 128, "grounding": 64}
QUERIES = 200
POOL = 200  # scenes for the easier candidates of an evaluation set; few, so that encoding is fast
HARD_SCENES = 6  # one-attribute variants among the candidates of a retrieval query
HARD_CROPS = 3  # crops of the query's scene or of a variant
FIND_IMAGE = "Find the image: {}\n"  # how Scene-T2I asks for the image with a caption
REPRESENT_IMAGE = f"{IMAGE_MARK}\nRepresent the image.\n"  # the text of such an image

# Attribute that a visual question names -> its wording.
_VQA = {"colour": "What is {}?", "shape": "What does the {} look like?"}
_THINGS = tuple(Thing(*words, place="top left") for words in product(COLOURS, SHAPES, SIZES))  # one of each look

# Independent random streams: the candidates of a row do not depend on the scenes of other rows.
_STREAMS = [*(f"{name} train" for name in DATASETS), *TASKS, *(f"{name} candidates" for name in TASKS)]
_ONE, _SEVERAL = pa.string(), pa.list_(pa.string())
SCHEMA = pa.schema({"qry_text": _ONE, "qry_img_path": _ONE, "tgt_text": _SEVERAL, "tgt_img_path": _SEVERAL})


@dataclass(frozen=True)
class _Picture:
    """An image to generate: a scene, or the crop of one thing. `name` distinguishes it from the row's other images."""

    scene: Scene
    name: str = ""
    thing: Thing | None = None

    def png(self) -> bytes:
        return png(draw(self.scene) if self.thing is None else crop(self.scene, self.thing))


@dataclass(frozen=True)
class _Side:
    """A text with an optional image. Candidates with the same `key` answer the same queries."""

    text: str
    picture: _Picture | None = None
    key: Hashable = None

    def item(self) -> Item:
        return Item(self.text, (self.picture.png(),) if self.picture else ())


@dataclass(frozen=True)
class _Question:
    """A query, its correct answer, and its hard negatives; training uses the first one."""

    query: _Side
    right: _Side
    hard: Iterable[_Side]


def training_pair(dataset: str, seed: int, index: int) -> Pair:
    """Generate pair `index` of a training set, with at most one hard negative.

    A negative image costs a pass through the vision tower, so only every fourth pair has one.
    """
    question = _ask(dataset, "train", _rng(f"{dataset} train", seed, index))
    hard = next(iter(question.hard))
    negatives = (hard.item(),) if hard.picture is None or index % 4 == 0 else ()
    query, target = question.query.item(), question.right.item()
    return Pair(f"{index:08d}", dataset, DATASETS[dataset], query, target, negatives)


def evaluation_rows(dataset: str, seed: int, count: int = QUERIES) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Generate the rows of an evaluation set (a name in `TASKS`), and its images: path -> PNG bytes."""
    task, in_distribution = TASKS[dataset]
    base = dataset.removesuffix("-OOD")
    split: Split = "in-distribution" if in_distribution else "held-out"
    questions = [_ask(base, split, _rng(dataset, seed, index)) for index in range(max(count, POOL))]
    questions = [_named(question, f"{dataset}/{index:06d}") for index, question in enumerate(questions)]
    pool = _pool(base, questions[:POOL])
    rows, pictures = [], {}
    for index, question in enumerate(questions[:count]):
        rng = _rng(f"{dataset} candidates", seed, index)
        candidates = _candidates(question, pool, CANDIDATES[task], rng)
        texts, paths = map(list, zip(*map(_mmeb, candidates), strict=True))
        rows.append(dict(zip(SCHEMA.names, (*_mmeb(question.query), texts, paths), strict=True)))
        for side in (question.query, *candidates):
            if side.picture and side.picture.name not in pictures:
                pictures[side.picture.name] = side.picture.png()
    return rows, pictures


def evaluation_files(seed: int, count: int = QUERIES) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of all evaluation sets' files: NAME/*.parquet, images/* and tasks.json."""
    for dataset in TASKS:
        rows, pictures = evaluation_rows(dataset, seed, count)
        yield f"{dataset}/test-00000-of-00001.parquet", parquet_of(rows)
        yield from ((f"images/{path}", content) for path, content in pictures.items())
    tasks = {name: {"task": task, "in_distribution": known} for name, (task, known) in TASKS.items()}
    yield "tasks.json", (json.dumps(tasks, indent=2) + "\n").encode()


def captioned_pictures(seed: int, count: int = QUERIES) -> Iterator[tuple[str, bytes]]:
    """Yield (caption, PNG) of the pictures that the queries of the evaluation set Scene-T2I ask for."""
    for index in range(count):
        picture = _ask("Scene-T2I", "in-distribution", _rng("Scene-T2I", seed, index)).right.picture
        assert picture
        yield captions.short(picture.scene, "en"), picture.png()


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    """Write rows in MMEB's form as a parquet file."""
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer)
    return buffer.getvalue()


def _rng(stream: str, seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, _STREAMS.index(stream), index])


def _ask(dataset: str, split: Split, rng: np.random.Generator) -> _Question:
    """Draw a scene and ask the dataset's question about it."""
    one_large = dataset == "Scene-CLS"
    scene = _scene(split, rng, one_large)
    while dataset == "Scene-VQA" and not _named_things(scene):
        scene = _scene(split, rng, one_large)
    if dataset == "Scene-Ground":
        # All scenes have the same background: otherwise it would reveal which crops are from the same scene.
        scene = replace(scene, background=next(iter(BACKGROUNDS)))
    return _QUESTIONS[dataset](scene, split, rng)


def _scene(split: Split, rng: np.random.Generator, one_large: bool) -> Scene:
    if split == "held-out":  # a scene with a held-out combination is never in training
        return random_scene(rng, held_out=True, one_large=one_large)
    return scene_of_part(rng, reserved=split == "in-distribution", one_large=one_large)


def _classification(scene: Scene, split: Split, rng: np.random.Generator) -> _Question:
    large = next(thing for thing in scene.things if thing.size == "large")
    query = _Side(f"{IMAGE_MARK}\nClassify the large object.\n", _Picture(scene))
    near = _near(large, split, rng, ("colour", "shape"))
    return _Question(query, _text(captions.label(large)), [_text(captions.label(thing)) for thing in near])


def _vqa(scene: Scene, split: Split, rng: np.random.Generator) -> _Question:
    """Ask about a thing by its colour or shape, which the answer repeats: "What is red?", "a small red star".

    In a few hundred steps, the demo's model learns to combine what the question names with what the picture shows. It
    does not learn to look for a thing: asked what is at the top left, it chooses among the scene's things by chance.
    """
    named = _named_things(scene)
    asked, attribute = named[rng.integers(len(named))]
    query = _Side(f"{IMAGE_MARK}\n{_VQA[attribute].format(getattr(asked, attribute))}\n", _Picture(scene))
    # The question fits the things in `near` and `fitting` as well as the right one; the picture shows `others`, too.
    near = _near(asked, split, rng, tuple(name for name in ("colour", "shape", "size") if name != attribute))
    others = [thing for thing in scene.things if thing is not asked]
    fitting = [thing for thing in _THINGS if getattr(thing, attribute) == getattr(asked, attribute)]
    if split == "train":
        fitting = [thing for thing in fitting if not thing.held_out]
    hard = (_text(captions.phrase(thing, "en")) for thing in (*near, *others, *fitting))
    return _Question(query, _text(captions.phrase(asked, "en")), hard)


def _named_things(scene: Scene) -> list[tuple[Thing, str]]:
    """Return the things that a visual question can be about, with each attribute of `_VQA` that only they have."""
    return [
        (thing, name)
        for thing in _askable(scene)
        for name in _VQA
        if all(getattr(thing, name) != getattr(other, name) for other in scene.things if other is not thing)
    ]


def _text_to_image(scene: Scene, split: Split, rng: np.random.Generator) -> _Question:
    query = _Side(FIND_IMAGE.format(captions.short(scene, "en")))
    hard = (_image(other, f"-v{i}") for i, other in enumerate(_siblings(scene, split, rng), 1))
    return _Question(query, _image(scene), hard)


def _image_to_text(scene: Scene, split: Split, rng: np.random.Generator) -> _Question:
    query = _Side(f"{IMAGE_MARK}\nFind the caption.\n", _Picture(scene))
    return _Question(query, _caption(scene), (_caption(other) for other in _siblings(scene, split, rng)))


def _grounding(scene: Scene, split: Split, rng: np.random.Generator) -> _Question:
    asked = _asked(scene, rng)
    phrase = captions.phrase(asked, "en", "definite")
    query = _Side(f"{IMAGE_MARK}\nSelect the part: {phrase}\n", _Picture(scene))
    others = (_part(scene, thing) for thing in scene.things if thing is not asked)
    looks = [thing.looks for thing in scene.things]
    near = [new for new in _near(asked, split, rng, ("colour", "shape", "size")) if new.looks not in looks]
    variant_parts = (_part(replaced(scene, asked, new), new, f"-v{i}") for i, new in enumerate(near, 1))
    return _Question(query, _part(scene, asked), islice(chain(others, variant_parts), HARD_CROPS))


_QUESTIONS = {
    "Scene-CLS": _classification,
    "Scene-VQA": _vqa,
    "Scene-T2I": _text_to_image,
    "Scene-I2T": _image_to_text,
    "Scene-Ground": _grounding,
}


def _asked(scene: Scene, rng: np.random.Generator) -> Thing:
    """Draw the thing that a question is about, a held-out one if there is any."""
    things = _askable(scene)
    return things[rng.integers(len(things))]


def _askable(scene: Scene) -> tuple[Thing, ...]:
    """Return the things that a question can be about: the held-out ones if there are any."""
    return tuple(thing for thing in scene.things if thing.held_out) or scene.things


def _near(thing: Thing, split: Split, rng: np.random.Generator, attributes: tuple[str, ...]) -> list[Thing]:
    """Return things that differ from this one in one attribute, in random order."""
    near = [new for attribute in attributes for new in changed(thing, attribute)]
    near = [other for other in near if split == "held-out" or not other.held_out]
    return [near[i] for i in rng.permutation(len(near))]


def _siblings(scene: Scene, split: Split, rng: np.random.Generator) -> Iterator[Scene]:
    """Generate variants of a scene as wrong answers; in training, none that are reserved for evaluation."""
    found = variants(scene, rng, held_out=split == "held-out")
    return islice((other for other in found if split != "train" or not other.reserved), HARD_SCENES)


def _text(text: str) -> _Side:
    return _Side(text, key=text)


def _image(scene: Scene, name: str = "") -> _Side:
    return _Side(REPRESENT_IMAGE, _Picture(scene, name), scene.content)


def _caption(scene: Scene) -> _Side:
    return _Side(captions.short(scene, "en"), key=scene.content)


def _part(scene: Scene, thing: Thing, name: str = "") -> _Side:
    picture = _Picture(scene, name or "-" + thing.place.replace(" ", "-"), thing)
    # The key excludes the place, which the phrase in the query does not mention.
    return _Side(f"{IMAGE_MARK}\nRepresent the part.\n", picture, thing.looks)


def _named(question: _Question, stem: str) -> _Question:
    """Name the question's images after the row: "Scene-T2I/000123-v2.png"."""

    def named(side: _Side) -> _Side:
        if side.picture is None:
            return side
        return replace(side, picture=replace(side.picture, name=f"{stem}{side.picture.name}.png"))

    return _Question(named(question.query), named(question.right), [named(side) for side in question.hard])


def _pool(dataset: str, questions: list[_Question]) -> list[_Side]:
    """Return the pool of a dataset's easier candidates."""
    if dataset == "Scene-CLS":
        return [_text(captions.label(thing)) for thing in _THINGS]
    if dataset == "Scene-VQA":
        return [_text(captions.phrase(thing, "en")) for thing in _THINGS]
    if dataset == "Scene-Ground":
        return [side for question in questions for side in (question.right, *question.hard)]
    return [question.right for question in questions]


def _candidates(question: _Question, pool: list[_Side], count: int, rng: np.random.Generator) -> list[_Side]:
    """Return the correct answer, hard negatives, and others from the pool; no two have the same key."""
    shuffled = (pool[i] for i in rng.permutation(len(pool)))
    chosen: dict[Hashable, _Side] = {}
    for side in chain((question.right, *question.hard), shuffled):
        if len(chosen) < count:
            chosen.setdefault(side.key, side)
    assert len(chosen) == count, f"{len(chosen)} candidates where {count} are needed"
    return list(chosen.values())


def _mmeb(side: _Side) -> tuple[str, str]:
    """Return MMEB's text and image path; the path is empty without an image."""
    return side.text.replace(IMAGE_MARK, MMEB_IMAGE_MARK), side.picture.name if side.picture else ""
