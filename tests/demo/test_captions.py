"""Captions: grammar in four languages; long captions describe everything."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.demo import captions
from pipeline.demo.captions import LANGUAGES
from pipeline.demo.scenes import Scene, Thing, random_scene, variants

STAR = Thing("red", "star", "small", "top left")
CIRCLE = Thing("blue", "circle", "large", "bottom right")
HEART = Thing("pink", "heart", "large", "bottom left")
DIAMOND = Thing("purple", "diamond", "small", "top right")
SCENE = Scene((STAR, CIRCLE), "light grey")


def scenes(count: int) -> list[Scene]:
    return [random_scene(np.random.default_rng([3, 0, i]), held_out=i % 2 == 1) for i in range(count)]


@pytest.mark.parametrize(
    ("thing", "language", "form", "expected"),
    [
        (STAR, "en", "indefinite", "a small red star"),
        (STAR, "en", "definite", "the small red star"),
        (STAR, "de", "indefinite", "ein kleiner roter Stern"),
        (STAR, "de", "definite", "der kleine rote Stern"),
        (STAR, "de", "relative", "dem kleinen roten Stern"),
        (HEART, "de", "indefinite", "ein großes rosa Herz"),
        (HEART, "de", "relative", "dem großen rosa Herzen"),
        (DIAMOND, "de", "indefinite", "eine kleine violette Raute"),
        (DIAMOND, "de", "relative", "der kleinen violetten Raute"),
        (STAR, "fr", "indefinite", "une petite étoile rouge"),
        (STAR, "fr", "relative", "de la petite étoile rouge"),
        (CIRCLE, "fr", "definite", "le grand cercle bleu"),
        (CIRCLE, "fr", "relative", "du grand cercle bleu"),
        (Thing("green", "cross", "large", "top left"), "fr", "indefinite", "une grande croix verte"),
        (STAR, "zh", "indefinite", "一个红色的小五角星"),
        (STAR, "zh", "definite", "红色的小五角星"),
    ],
)
def test_phrases(thing: Thing, language: str, form: str, expected: str) -> None:
    assert captions.phrase(thing, language, form) == expected


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("en", "a small red star at the top left and a large blue circle at the bottom right"),
        ("de", "ein kleiner roter Stern oben links und ein großer blauer Kreis unten rechts"),
        ("fr", "une petite étoile rouge en haut à gauche et un grand cercle bleu en bas à droite"),
        ("zh", "左上角有一个红色的小五角星，右下角有一个蓝色的大圆形"),
    ],
)
def test_short_caption(language: str, expected: str) -> None:
    assert captions.short(SCENE, language) == expected


def test_short_caption_with_three_things() -> None:
    scene = Scene((STAR, DIAMOND, CIRCLE), "white")
    assert captions.short(scene, "en") == (
        "a small red star at the top left, a small purple diamond at the top right "
        "and a large blue circle at the bottom right"
    )


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        (
            "en",
            "There are two objects in it, which do not touch each other. "
            "The object at the top left is small. The object at the bottom right is large. "
            "There is nothing at the top right or at the bottom left. "
            "The object at the top left is a star, which is red. "
            "The object at the bottom right is a circle, which is blue. "
            "The small red star is to the left of the large blue circle. "
            "The small red star is above the large blue circle. "
            "All of it lies on a plain light grey background.",
        ),
        (
            "de",
            "Insgesamt befinden sich darin zwei Objekte, die einander nicht berühren. "
            "Das Objekt oben links ist klein. Das Objekt unten rechts ist groß. "
            "Oben rechts und unten links ist nichts zu sehen. "
            "Das Objekt oben links ist ein Stern, der rot ist. "
            "Das Objekt unten rechts ist ein Kreis, der blau ist. "
            "Der kleine rote Stern befindet sich links von dem großen blauen Kreis. "
            "Der kleine rote Stern befindet sich über dem großen blauen Kreis. "
            "Das alles liegt auf einem einfarbigen hellgrauen Hintergrund.",
        ),
        (
            "fr",
            "On y voit en tout deux objets, qui ne se touchent pas. "
            "L'objet en haut à gauche est petit. L'objet en bas à droite est grand. "
            "Il n'y a rien en haut à droite ni en bas à gauche. "
            "L'objet en haut à gauche est une étoile, qui est rouge. "
            "L'objet en bas à droite est un cercle, qui est bleu. "
            "La petite étoile rouge se trouve à gauche du grand cercle bleu. "
            "La petite étoile rouge se trouve au-dessus du grand cercle bleu. "
            "Le tout se trouve sur un fond gris clair uni.",
        ),
        (
            "zh",
            "图中一共有两个物体，它们互不接触。"
            "左上角的物体比较小。右下角的物体比较大。"
            "右上角和左下角什么也没有。"
            "左上角的物体是一个五角星，它的颜色是红色。"
            "右下角的物体是一个圆形，它的颜色是蓝色。"
            "红色的小五角星在蓝色的大圆形的左边。"
            "红色的小五角星在蓝色的大圆形的上方。"
            "它们都在单一的浅灰色背景上。",
        ),
    ],
)
def test_long_caption(language: str, expected: str) -> None:
    opening, _, rest = captions.long(SCENE, language).partition(expected[:5])
    assert expected[:5] + rest == expected
    twin = Scene((HEART, DIAMOND), "white")
    assert opening and captions.long(twin, language).startswith(opening)  # the opening is the same for all scenes


def test_left_of_relation_when_left_thing_comes_second() -> None:
    text = captions.long(Scene((DIAMOND, HEART), "light blue"), "en")
    assert "The large pink heart is to the left of the small purple diamond." in text
    assert "The small purple diamond is above the large pink heart." in text


@pytest.mark.parametrize(
    ("language", "one", "other"),
    [
        ("en", "The small red star is below the large pink heart.", "to the right of the large pink heart."),
        (
            "de",
            "Der kleine rote Stern befindet sich unter dem großen rosa Herzen.",
            "rechts von dem großen rosa Herzen.",
        ),
        ("fr", "La petite étoile rouge se trouve au-dessous du grand cœur rose.", "à droite du grand cœur rose."),
        ("zh", "红色的小五角星在粉色的大心形的下方。", "在粉色的大心形的右边。"),
    ],
)
def test_relations(language: str, one: str, other: str) -> None:
    assert captions.relation("below", STAR, HEART, language) == one
    assert captions.relation("right", STAR, HEART, language).endswith(other)


@pytest.mark.parametrize("language", LANGUAGES)
def test_long_captions_differ_only_after_first_77_words(language: str) -> None:
    """Shapes, colours and background come after its first 77 words (Chinese: characters)."""
    units = list if language == "zh" else str.split
    for number, scene in enumerate(scenes(100)):
        text = captions.long(scene, language)
        for other in variants(scene, np.random.default_rng(number), held_out=True):
            of_other = captions.long(other, language)
            assert of_other != text
            looks = {(thing.size, thing.place) for thing in other.things}
            if looks == {(thing.size, thing.place) for thing in scene.things}:
                assert units(of_other)[:77] == units(text)[:77]
        bright = captions.long(replace(scene, background="white"), language)
        assert units(bright)[:77] == units(text)[:77]
        assert (bright == text) == (scene.background == "white")
        assert len(units(text)) > 1.5 * 77


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_identify_scene_content(language: str) -> None:
    """Scenes with equal short captions have equal content; those with equal long captions also share the background."""
    short, long = {}, {}
    for scene in scenes(1000):
        whole = scene.content, scene.background
        assert short.setdefault(captions.short(scene, language), scene.content) == scene.content
        assert long.setdefault(captions.long(scene, language), whole) == whole


def test_label() -> None:
    assert captions.label(STAR) == "red star"
