"""Visual questions: one right answer, which neither the question alone nor the picture alone gives."""

import re
from collections import Counter, defaultdict

import pytest

from pipeline.demo import tasks, vqa
from pipeline.demo.scenes import ATTRIBUTES, HELD_OUT, Scene, Thing, random_scene
from pipeline.demo.tasks import CANDIDATES, training_pair

SEED = 0
SPLITS = {"Scene-VQA train": "train", "Scene-VQA": "in-distribution", "Scene-VQA-OOD": "held-out"}
WORDS = {word: name for name, words in ATTRIBUTES.items() for word in words}


def asked(stream: str, count: int) -> list[tuple[Scene, str, str, list[str]]]:
    """Draw questions: scene, question, right answer, and the other candidates (in training: the negative)."""
    drawn = []
    for index in range(count):
        question = tasks._ask("Scene-VQA", SPLITS[stream], tasks._rng(stream, SEED, index))
        if stream.endswith("train"):
            wrong = [next(iter(question.hard)).text]
        else:
            rng = tasks._rng(f"{stream} candidates", SEED, index)
            wrong = [side.text for side in tasks._candidates(question, [], CANDIDATES["vqa"], rng)[1:]]
        drawn.append((question.query.picture.scene, question.query.text, question.right.text, wrong))
    return drawn


def attributes(text: str) -> dict[str, str]:
    """Return the attributes in a question or answer."""
    return {WORDS[word]: word for word in re.findall("|".join(rf"\b{word}\b" for word in WORDS), text)}


def fits(thing: Thing, text: str) -> bool:
    """Whether all that the text says is true of the thing."""
    return attributes(text).items() <= vars(thing).items()


@pytest.fixture(scope="module", params=SPLITS)
def questions(request: pytest.FixtureRequest) -> list[tuple[Scene, str, str, list[str]]]:
    return asked(request.param, 200)


def test_question_fits_one_thing_whose_other_attributes_are_the_answer(questions) -> None:
    for scene, question, right, _ in questions:
        (thing,) = [thing for thing in scene.things if fits(thing, question)]
        assert fits(thing, right)
        assert sorted([*attributes(question), *attributes(right)]) == sorted(ATTRIBUTES)


def test_questions_name_every_attribute(questions) -> None:
    named = Counter(name for _, question, _, _ in questions for name in attributes(question))
    assert named.keys() == ATTRIBUTES.keys()
    assert min(named.values()) > 10


def test_training_negative_describes_another_thing_of_scene() -> None:
    for scene, question, right, (wrong,) in asked("Scene-VQA train", 200):
        assert wrong != right
        assert any(fits(thing, wrong) for thing in scene.things if not fits(thing, question))
    assert training_pair("Scene-VQA", SEED, 0).negatives[0].text == asked("Scene-VQA train", 1)[0][3][0]


@pytest.mark.parametrize("stream", ["Scene-VQA", "Scene-VQA-OOD"])
def test_candidates_all_fit_question_and_include_other_things_and_one_attribute_variants(stream: str) -> None:
    for scene, question, right, wrong in asked(stream, 200):
        assert len({right, *wrong}) == CANDIDATES["vqa"]
        assert all(attributes(text).keys() == attributes(right).keys() for text in wrong)
        others = [thing for thing in scene.things if not fits(thing, question)]
        assert all(any(fits(thing, text) for text in (right, *wrong)) for thing in others)
        near = {
            name
            for text in wrong
            for name in attributes(right)
            if len(attributes(text).items() - attributes(right).items()) == 1
        }
        assert near == attributes(right).keys()


def test_held_out_questions_are_about_held_out_combinations() -> None:
    for stream in SPLITS:
        for _, question, right, _ in asked(stream, 100):
            found = attributes(question) | attributes(right)
            assert ((found["colour"], found["shape"]) in HELD_OUT) == (stream == "Scene-VQA-OOD")


@pytest.mark.parametrize("stream", ["Scene-VQA", "Scene-VQA-OOD"])
def test_model_that_ignores_picture_answers_at_most_3_percent(stream: str) -> None:
    """It answers each question as training does most often."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question, right, _ in asked("Scene-VQA train", 4800):
        answers[question][right] += 1
    rows = asked(stream, 200)
    assert sum(answers[question].most_common(1)[0][0] == right for _, question, right, _ in rows) / len(rows) <= 0.03


@pytest.mark.parametrize("stream", ["Scene-VQA", "Scene-VQA-OOD"])
def test_model_that_ignores_question_answers_at_most_half(stream: str) -> None:
    """It sees all and describes a thing of the scene, chosen at random."""
    rows = asked(stream, 200)
    assert sum(1 / len(scene.things) for scene, *_ in rows) / len(rows) < 0.45


def test_place_always_identifies_a_thing() -> None:
    for index in range(50):
        scene = random_scene(tasks._rng("Scene-VQA", SEED, index), held_out=False)
        assert all("place" in vqa.identifying(scene, thing) for thing in scene.things)
