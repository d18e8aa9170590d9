"""Captions: grammar in four languages, and everything there is to say in the long ones."""

import numpy as np
import pytest

from pipeline.demo import captions
from pipeline.demo.captions import LANGUAGES
from pipeline.demo.scenes import Scene, Thing, random_scene

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
def test_short(language: str, expected: str) -> None:
    assert captions.short(SCENE, language) == expected


def test_short_with_three_things() -> None:
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
            "This picture shows two objects on a plain light grey background. "
            "At the top left there is a star, which is small and red. "
            "At the bottom right there is a circle, which is large and blue. "
            "The small red star is to the left of the large blue circle. "
            "The small red star is above the large blue circle. "
            "There is nothing at the top right or at the bottom left.",
        ),
        (
            "de",
            "Dieses Bild zeigt zwei Objekte auf einem einfarbigen hellgrauen Hintergrund. "
            "Oben links ist ein Stern zu sehen, der klein und rot ist. "
            "Unten rechts ist ein Kreis zu sehen, der groß und blau ist. "
            "Der kleine rote Stern befindet sich links von dem großen blauen Kreis. "
            "Der kleine rote Stern befindet sich über dem großen blauen Kreis. "
            "Oben rechts und unten links ist nichts zu sehen.",
        ),
        (
            "fr",
            "Cette image montre deux objets sur un fond gris clair uni. "
            "En haut à gauche se trouve une étoile, qui est petite et rouge. "
            "En bas à droite se trouve un cercle, qui est grand et bleu. "
            "La petite étoile rouge se trouve à gauche du grand cercle bleu. "
            "La petite étoile rouge se trouve au-dessus du grand cercle bleu. "
            "Il n'y a rien en haut à droite ni en bas à gauche.",
        ),
        (
            "zh",
            "这张图片里有两个物体，背景是单一的浅灰色。"
            "左上角有一个五角星，它的颜色是红色，尺寸比较小。"
            "右下角有一个圆形，它的颜色是蓝色，尺寸比较大。"
            "红色的小五角星在蓝色的大圆形的左边。"
            "红色的小五角星在蓝色的大圆形的上方。"
            "右上角和左下角什么也没有。",
        ),
    ],
)
def test_long(language: str, expected: str) -> None:
    assert captions.long(SCENE, language) == expected


def test_left_of_when_the_left_thing_is_read_second() -> None:
    text = captions.long(Scene((DIAMOND, HEART), "light blue"), "en")
    assert "The large pink heart is to the left of the small purple diamond." in text
    assert "The small purple diamond is above the large pink heart." in text


def test_long_is_long() -> None:
    for scene in scenes(200):
        assert 55 <= len(captions.long(scene, "en").split()) <= 120
        for language in LANGUAGES:
            assert len(captions.long(scene, language)) > 2 * len(captions.short(scene, language))


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_tell_contents_apart(language: str) -> None:
    """Two scenes share a short caption only if they share their content."""
    found = {}
    for scene in scenes(1000):
        assert found.setdefault(captions.short(scene, language), scene.content) == scene.content


def test_label() -> None:
    assert captions.label(STAR) == "red star"
