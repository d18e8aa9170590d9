"""Training and evaluation sets for LLM2CLIP (arXiv 2411.04997): images with captions, and pairs of captions.

Training sets contain no reserved scene and no held-out combination of colour and shape. Chinese occurs in "texts" and
"sentences", which train the language model, but not in "images", which trains the vision encoder.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, cycle, islice, product

import numpy as np

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
from pipeline.demo.tasks import parquet_of

Caption = tuple[Callable[[Scene, Language], str], Language]

# Caption set -> type and language of its captions. All sets have the same images.
RETRIEVAL: dict[str, Caption] = {
    "short": (captions.short, "en"),
    "long": (captions.long, "en"),
    "chinese": (captions.short, "zh"),
}
# Separation set -> type and language of (queries, candidates).
SEPARATION: dict[str, tuple[Caption, Caption]] = {
    "Caption-Length": ((captions.long, "en"), (captions.short, "en")),
    "Caption-German": ((captions.short, "en"), (captions.short, "de")),
    "Caption-Chinese": ((captions.short, "en"), (captions.short, "zh")),
}
SIBLINGS = 2  # one-attribute variants that follow each image of the caption sets
CANDIDATES = 16  # candidates of a query in a separation set
_CAPTIONS: tuple[Caption, ...] = tuple(product((captions.short, captions.long), LANGUAGES))


def training_pair(dataset: str, seed: int, index: int) -> Pair:
    """Generate pair `index` of a training set, a name in `DATASETS`."""
    query, texts = DATASETS[dataset](_rng(dataset, seed, index))
    target, *alternatives = texts
    key = f"{index:08d}"
    return Pair(key, dataset, "retrieval", query, Item(target), alternatives=tuple(alternatives))


def evaluation_files(seed: int, queries: int) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of the evaluation sets' files.

    short, long, chinese: image-caption sets of the same scenes, 1.5 times as many as `queries`.
    classification: scenes with one thing in ImageNet's layout, including held-out combinations.
    separation: text sets in MMEB's layout.
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
        yield f"separation/{name}/test-00000-of-00001.parquet", parquet_of(separation_rows(name, seed, queries))
    yield "separation/tasks.json", _json({name: {"task": "retrieval", "in_distribution": True} for name in SEPARATION})


def retrieval_scenes(seed: int, groups: int) -> list[Scene]:
    """Generate reserved scenes with different contents, each followed by SIBLINGS reserved one-attribute variants."""
    scenes: dict[tuple[tuple[str, str, str, str], ...], Scene] = {}
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
    """Generate rows in MMEB's form for a set in `SEPARATION`: find a scene's other caption among those of variants."""
    (ask, asked), (answer, answered) = SEPARATION[name]
    rows: list[dict[str, str | list[str]]] = []
    for index in range(queries):
        rng = _rng(name, seed, index)
        scene = scene_of_part(rng, reserved=True)
        scenes = [scene, *islice(variants(scene, rng), CANDIDATES - 1)]
        texts = [answer(each, answered) for each in scenes]
        query = {"qry_text": ask(scene, asked), "qry_img_path": ""}
        rows.append({**query, "tgt_text": texts, "tgt_img_path": [""] * len(texts)})
    return rows


def _image(rng: np.random.Generator) -> tuple[Item, list[str]]:
    """Draw an image with four captions: short and long, in English and in German or French."""
    scene = scene_of_part(rng, reserved=False)
    other: Language = ("de", "fr")[rng.integers(2)]
    texts = [describe(scene, language) for language in ("en", other) for describe in (captions.short, captions.long)]
    return Item(IMAGE_MARK, (png(draw(scene)),)), texts


def _captions(rng: np.random.Generator) -> tuple[Item, list[str]]:
    """Draw two captions of one scene that differ in length, language or both."""
    scene = scene_of_part(rng, reserved=False)
    query, target = (_CAPTIONS[i] for i in rng.permutation(len(_CAPTIONS))[:2])
    return Item(query[0](scene, query[1])), [target[0](scene, target[1])]


def _sentences(rng: np.random.Generator) -> tuple[Item, list[str]]:
    """Draw two sentences about the positions of two things, one from the side of each, in any languages."""
    thing, other = random_scene(rng, held_out=False).things[:2]
    # Only the things come from the scene: their relation is random.
    relation = tuple(CONVERSE)[rng.integers(len(CONVERSE))]
    first, second = (LANGUAGES[i] for i in rng.integers(len(LANGUAGES), size=2))
    query = captions.relation(relation, thing, other, first)
    return Item(query), [captions.relation(CONVERSE[relation], other, thing, second)]


# Training set -> function that draws a query and its target's texts.
DATASETS = {"images": _image, "texts": _captions, "sentences": _sentences}


def _classification(seed: int, number: int) -> Iterator[tuple[str, bytes]]:
    """Yield images of each class in turn, and class names and templates in the training sets' wording."""
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
