"""The caption sets: no evaluation or held-out content in training, one right answer, readable by the evaluation."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.sample import Pair
from pipeline.demo import captioned, captions
from pipeline.demo.captioned import CANDIDATES, DATASETS, RETRIEVAL, SEPARATION, SIBLINGS, training_pair
from pipeline.demo.captions import LANGUAGES
from pipeline.demo.scenes import BACKGROUNDS, COLOURS, HELD_OUT, PLACES, SHAPES, SIZES, Scene, Thing, draw
from pipeline.evaluation import sets
from pipeline.evaluation.tasks import Collection

SEED = 0
CHINESE = re.compile("[\u4e00-\u9fff]")
THING = re.compile(f"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) at the ({'|'.join(PLACES)})")


def scene_of(caption: str, background: str = "white") -> Scene:
    """Return the scene that the short English caption describes."""
    things = [Thing(colour, shape, size, place) for size, colour, shape, place in THING.findall(caption)]
    return Scene(tuple(things), background)


def coloured(image: bytes, background: str) -> dict[str, str]:
    """Return {place: the colour of the thing there}; check that each place has only one."""
    pixels = np.asarray(Image.open(io.BytesIO(image)))
    assert pixels[0, 0].tolist() == list(BACKGROUNDS[background])
    found = {}
    for place, (column, row) in PLACES.items():
        quadrant = pixels[row * 24 : row * 24 + 24, column * 24 : column * 24 + 24]
        for name, colour in COLOURS.items():
            if (quadrant == colour).all(-1).any():
                assert place not in found
                found[place] = name
    return found


def pairs(dataset: str, count: int) -> list[Pair]:
    return [training_pair(dataset, SEED, index) for index in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captions")
    for path, content in captioned.evaluation_files(SEED, 70):
        assert not (folder / path).exists()
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def loaded(*urls: str) -> Collection:
    return sets.load(urls, instructed=False)


@pytest.mark.parametrize("dataset", DATASETS)
def test_training_pairs_depend_only_on_seed_and_index(dataset: str) -> None:
    drawn = pairs(dataset, 20)
    assert drawn[13] == training_pair(dataset, SEED, 13)
    assert drawn == pairs(dataset, 20)
    assert drawn != [training_pair(dataset, SEED + 1, index) for index in range(20)]
    assert len({pair.key for pair in drawn}) == len({pair.query.content_hash for pair in drawn}) == 20


def test_images_match_their_captions() -> None:
    languages = set()
    for pair in pairs("images", 60):
        short, long, other, other_long = pair.texts
        assert pair.query.text == "<image>" and pair.target.images == ()
        (background,) = [name for name in BACKGROUNDS if f"on a plain {name} background" in long]
        scene = scene_of(short, background)
        assert coloured(pair.query.images[0], background) == {thing.place: thing.colour for thing in scene.things}
        assert long == captions.long(scene, "en")
        (language,) = [name for name in LANGUAGES if captions.short(scene, name) == other]
        assert other_long == captions.long(scene, language)
        languages.add(language)
    assert languages == {"de", "fr"}


def test_text_pairs_caption_the_same_scene() -> None:
    """One text is a short English caption; the other is any other caption of the same scene."""
    seen = set()
    for pair in pairs("texts", 600):
        assert not pair.query.images and not pair.alternatives
        for short, other in ((pair.query.text, pair.target.text), (pair.target.text, pair.query.text)):
            if THING.search(short):
                (found,) = {
                    (form.__name__, language)
                    for form in (captions.short, captions.long)
                    for language in LANGUAGES
                    for background in BACKGROUNDS
                    if form(scene_of(short, background), language) == other
                }
                seen.add(found)
    assert len(seen) == 7 and ("short", "en") not in seen


def test_sentence_pairs_state_converse_relations() -> None:
    sentence = re.compile(r"The (.+) is (above|below|to the left of|to the right of) the (.+)\.")
    converse = {"above": "below", "below": "above", "to the left of": "to the right of"}
    converse |= {"to the right of": "to the left of"}
    drawn = pairs("sentences", 500)
    english = [(sentence.fullmatch(p.query.text), sentence.fullmatch(p.target.text)) for p in drawn]
    both = [(one.groups(), other.groups()) for one, other in english if one and other]
    assert len(both) > 15
    for (thing, way, other), said in both:
        assert said == (other, converse[way], thing)
        assert thing != other
    assert any(CHINESE.search(pair.query.text) and not CHINESE.search(pair.target.text) for pair in drawn)


@pytest.mark.slow
def test_training_excludes_evaluation_and_held_out_content() -> None:
    combination = re.compile(f"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")
    in_long = re.compile(f"is an? ({'|'.join(SHAPES)}), which is ({'|'.join(COLOURS)})")
    said, contents = set(), set()
    for dataset in DATASETS:
        for pair in pairs(dataset, 1500):
            for text in (pair.query.text, *pair.texts):
                said |= set(combination.findall(text)) | {each[::-1] for each in in_long.findall(text)}
                if THING.search(text):
                    contents.add(scene_of(text).content)
    assert len(said) == 56 and said.isdisjoint(HELD_OUT)
    assert len(contents) > 1500 and not any(scene_of_content(content).reserved for content in contents)
    asked = captioned.retrieval_scenes(SEED, 100)
    assert contents.isdisjoint(scene.content for scene in asked)
    for name in SEPARATION:
        # In every set, the short caption is the query or the right answer.
        rows = captioned.separation_rows(name, SEED, 100)
        short = [next(text for text in (row["qry_text"], row["tgt_text"][0]) if THING.search(text)) for row in rows]
        assert all(scene_of(text).reserved for text in short)


def scene_of_content(content: tuple[tuple[str, str, str, str], ...]) -> Scene:
    return Scene(tuple(Thing(colour, shape, size, place) for size, colour, shape, place in content), "white")


def test_image_captions_contain_no_chinese() -> None:
    assert not any(CHINESE.search(text) for pair in pairs("images", 500) for text in pair.texts)


@pytest.mark.slow
def test_retrieval_siblings_differ_in_one_attribute() -> None:
    scenes = captioned.retrieval_scenes(SEED, 400)
    assert scenes == captioned.retrieval_scenes(SEED, 500)[: len(scenes)]
    assert len({scene.content for scene in scenes}) == len(scenes) == 400 * (1 + SIBLINGS)
    assert all(scene.reserved and not scene.held_out for scene in scenes)
    for first in range(0, len(scenes), 1 + SIBLINGS):
        own = set(scenes[first].content)
        for sibling in scenes[first + 1 : first + 1 + SIBLINGS]:
            (old,), (new,) = own - set(sibling.content), set(sibling.content) - own
            assert sum(a != b for a, b in zip(old, new, strict=True)) == 1


def test_evaluation_reads_caption_sets(folder: Path) -> None:
    collection = loaded(*(f"text-image={folder / name}" for name in RETRIEVAL))
    assert [(task.name, task.direction) for task in collection.tasks] == [
        (name, direction) for name in RETRIEVAL for direction in ("t2i", "i2t")
    ]
    scenes = captioned.retrieval_scenes(SEED, 35)
    for task in collection.tasks[::2]:
        form, language = RETRIEVAL[task.name]
        texts = [collection.names[row] for row in task.queries]
        assert texts == [form(scene, language) for scene in scenes]
        assert len(set(texts)) == 105
        assert all(bool(CHINESE.search(text)) == (task.name == "chinese") for text in texts)
        assert all((len(text.split()) > 77) == (task.name == "long") for text in texts)
        assert [right.tolist() for right in task.right] == [[number] for number in range(105)]
        for row, scene in zip(task.candidates, scenes, strict=True):
            item = collection.items[row]()
            assert item.text == "<image>"
            assert Image.open(io.BytesIO(item.images[0])).tobytes() == draw(scene).tobytes()


def test_instructed_and_bare_wording_have_same_keys(folder: Path) -> None:
    bare, instructed = (sets.load([f"text-image={folder / 'short'}"], instructed=each) for each in (False, True))
    assert bare.keys == instructed.keys


def test_evaluation_reads_separation_sets(folder: Path) -> None:
    collection = loaded(str(folder / "separation"))
    assert [task.name for task in collection.tasks] == list(SEPARATION)
    for task in collection.tasks:
        (ask, asked), (answer, answered) = SEPARATION[task.name]
        assert len(task.queries) == 70
        for query, candidates in zip(task.queries, task.candidates, strict=True):
            texts = [collection.names[row] for row in candidates]
            assert len(set(texts)) == len(texts) == CANDIDATES
            if (answer, answered) == (captions.short, "en"):
                right = [scene_of(text, name) for text in texts for name in BACKGROUNDS]
                fitting = [ask(scene, asked) == collection.names[query] for scene in right]
                assert [number // len(BACKGROUNDS) for number, fits in enumerate(fitting) if fits] == [0]
            else:
                scene = scene_of(collection.names[query])
                assert ask(scene, asked) == collection.names[query]
                assert answer(scene, answered) == texts[0]


def test_separation_candidates_differ_in_one_attribute() -> None:
    for row in captioned.separation_rows("Caption-Length", SEED, 100):
        right, *wrong = (set(scene_of(text).content) for text in row["tgt_text"])
        for other in wrong:
            (old,), (new,) = right - other, other - right
            assert sum(a != b for a, b in zip(old, new, strict=True)) == 1


def test_evaluation_reads_classification_set(folder: Path) -> None:
    (task,) = loaded(f"classification={folder / 'classification'}").tasks
    assert sorted(task.names) == sorted(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
    assert len(task.queries) == 70 and task.candidates.shape == (64, len(SIZES) * len(PLACES))
    for path in folder.glob("classification/*/*.png"):
        pixels = np.asarray(Image.open(path)).reshape(-1, 3)
        assert np.abs(pixels.astype(int) - COLOURS[path.parent.name.partition("-")[0]]).max(-1).min() == 0


def test_single_query_writes_few_files() -> None:
    files = dict(captioned.evaluation_files(SEED, 1))
    assert sum(path.startswith("short/") for path in files) == 2 + 1 + SIBLINGS
    assert len([path for path in files if path.startswith("classification/") and path.endswith(".png")]) == 1
