"""What LLM2CLIP (arXiv 2411.04997) learns from, and is asked: pictures with captions, captions with each other.

Training never has a reserved scene, or a held-out combination of colour and shape; and Chinese is in "texts" and
"sentences" alone, from which a language model learns: who learns from "images" never sees any.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from itertools import count, cycle, islice, product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.sample import IMAGE_MARK, Item, Pair
from pipeline.demo import captions
from pipeline.demo.captions import CONVERSE, LANGUAGES, Language
from pipeline.demo.scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    draw,
    png,
    random_background,
    random_scene,
    random_thing,
    scene_of_part,
    variants,
)
from pipeline.demo.tasks import SCHEMA

Caption = tuple[Callable[[Scene, Language], str], Language]

# What a training set's pairs are.
DATASETS = {
    "images": "a picture with four captions: short and long, in English and in German or French",
    "texts": "two captions of one scene that differ in length, language or both",
    "sentences": "two sentences of how two things lie, from the side of either, in any languages",
}
# Caption set -> the captions of its pictures, which are the same in all of them.
RETRIEVAL: dict[str, Caption] = {
    "short": (captions.short, "en"),
    "long": (captions.long, "en"),
    "chinese": (captions.short, "zh"),
}
# Separation set -> what its queries are, and what their candidates are.
SEPARATION: dict[str, tuple[Caption, Caption]] = {
    "Caption-Length": ((captions.long, "en"), (captions.short, "en")),
    "Caption-German": ((captions.short, "en"), (captions.short, "de")),
    "Caption-Chinese": ((captions.short, "en"), (captions.short, "zh")),
}
SIBLINGS = 2  # one-attribute variants of a picture of the caption sets, which are pictures of them, too
CANDIDATES = 16  # captions that a query of a separation set chooses from
_CAPTIONS: tuple[Caption, ...] = tuple(product((captions.short, captions.long), LANGUAGES))


def training_pair(dataset: str, seed: int, index: int) -> Pair:
    """The pair number `index` of a training set, a name in `DATASETS`."""
    rng = _rng(dataset, seed, index)
    match dataset:
        case "images":
            query, texts = _image(rng)
        case "texts":
            query, texts = _captions(rng)
        case "sentences":
            query, texts = _sentences(rng)
        case _:
            raise ValueError(f"no such dataset: {dataset}")
    target, *alternatives = texts
    key = f"{index:08d}"
    return Pair(key, dataset, "retrieval", query, Item(target), alternatives=tuple(alternatives))


def evaluation_files(seed: int, queries: int) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the evaluation sets' files.

    short, long, chinese: text-image sets of the same scenes, half as many again as `queries`.
    classification: one-thing scenes in ImageNet's layout; also of the combinations that training never shows.
    separation: a folder of sets in MMEB's layout, texts alone.
    """
    scenes = retrieval_scenes(seed, max(queries // 2, 1))
    pictures = {f"{number:04d}.png": png(draw(scene)) for number, scene in enumerate(scenes)}
    wording = {"medium": IMAGE_MARK, "seeks_caption": IMAGE_MARK, "seeks_medium": "{}"}
    for name, (describe, language) in RETRIEVAL.items():
        texts = {file: describe(scene, language) for file, scene in zip(pictures, scenes, strict=True)}
        yield f"{name}/captions.json", _json(texts)
        yield f"{name}/wording.json", _json(wording)
        yield from ((f"{name}/{file}", content) for file, content in pictures.items())
    yield from ((f"classification/{path}", content) for path, content in _classification(seed, queries))
    for name in SEPARATION:
        buffer = BytesIO()
        pq.write_table(pa.Table.from_pylist(separation_rows(name, seed, queries), schema=SCHEMA), buffer)
        yield f"separation/{name}/test-00000-of-00001.parquet", buffer.getvalue()
    yield "separation/tasks.json", _json({name: {"task": "retrieval", "in_distribution": True} for name in SEPARATION})


def retrieval_scenes(seed: int, groups: int) -> list[Scene]:
    """Reserved scenes of different contents, each followed by SIBLINGS reserved ones that differ from it in little."""
    scenes: dict[tuple, Scene] = {}
    for index in count():
        if len(scenes) >= groups * (1 + SIBLINGS):
            break
        rng = _rng("retrieval", seed, index)
        scene = scene_of_part(rng, reserved=True)
        siblings = islice((other for other in variants(scene, rng) if other.reserved), SIBLINGS)
        group = {each.content: each for each in (scene, *siblings)}
        if len(group) == 1 + SIBLINGS and scenes.keys().isdisjoint(group):
            scenes |= group
    return list(scenes.values())


def separation_rows(name: str, seed: int, queries: int) -> list[dict[str, str | list[str]]]:
    """MMEB's rows of a set in `SEPARATION`: a scene's caption seeks its other one, among those of its variants."""
    (ask, asked), (answer, answered) = SEPARATION[name]
    rows = []
    for index in range(queries):
        rng = _rng(name, seed, index)
        scene = scene_of_part(rng, reserved=True)
        scenes = [scene, *islice(variants(scene, rng), CANDIDATES - 1)]
        texts = [answer(each, answered) for each in scenes]
        row = {"qry_text": ask(scene, asked), "qry_img_path": "", "tgt_text": texts, "tgt_img_path": [""] * len(texts)}
        rows.append(row)
    return rows


def _image(rng: np.random.Generator) -> tuple[Item, list[str]]:
    scene = scene_of_part(rng, reserved=False)
    other: Language = ("de", "fr")[rng.integers(2)]
    texts = [describe(scene, language) for language in ("en", other) for describe in (captions.short, captions.long)]
    return Item(IMAGE_MARK, (png(draw(scene)),)), texts


def _captions(rng: np.random.Generator) -> tuple[Item, list[str]]:
    scene = scene_of_part(rng, reserved=False)
    query, target = (_CAPTIONS[i] for i in rng.permutation(len(_CAPTIONS))[:2])
    return Item(query[0](scene, query[1])), [target[0](scene, target[1])]


def _sentences(rng: np.random.Generator) -> tuple[Item, list[str]]:
    thing, other = random_scene(rng, held_out=False).things[:2]
    kind = tuple(CONVERSE)[rng.integers(len(CONVERSE))]  # the scene lends its things alone: they may lie in any way
    first, second = (LANGUAGES[i] for i in rng.integers(len(LANGUAGES), size=2))
    query = captions.relation(kind, thing, other, first)
    return Item(query), [captions.relation(CONVERSE[kind], other, thing, second)]


def _classification(seed: int, number: int) -> Iterator[tuple[str, bytes]]:
    """Pictures of each class in turn, and what classes are called in training's words."""
    names = {}
    for index, (colour, shape) in enumerate(islice(cycle(product(COLOURS, SHAPES)), number)):
        rng = _rng("classification", seed, index)
        place, size = (tuple(values)[rng.integers(len(values))] for values in (PLACES, SIZES))
        thing = replace(random_thing(rng, place, size, held_out=False), colour=colour, shape=shape)
        names[f"{colour}-{shape}"] = captions.label(thing)
        yield f"{colour}-{shape}/{index:04d}.png", png(draw(Scene((thing,), random_background(rng))))
    yield "classnames.json", _json(names)
    yield "templates.txt", "".join(f"a {size} {{}} at the {place}\n" for size, place in product(SIZES, PLACES)).encode()


def _rng(stream: str, seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, index, *f"captions {stream}".encode()])


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
