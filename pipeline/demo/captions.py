"""Captions of scenes in English, German, French and Chinese.

Tables contain the grammar: genders of nouns, forms of adjectives, and templates of sentences.
"""

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Literal, TypeVar, get_args

from pipeline.demo.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene, Thing

Language = Literal["en", "de", "fr", "zh"]
# The form of a thing in a sentence: "a star"; "the star"; after "left of" (German: dative; French: "de" with the
# article); "a star, which is small and red" (German: adjectives without endings).
Form = Literal["indefinite", "definite", "relative", "predicate"]
_FORMS: tuple[Form, ...] = get_args(Form)

Relation = Literal["left", "right", "above", "below"]
Word = TypeVar("Word", bound=str)

LANGUAGES: tuple[Language, ...] = ("en", "de", "fr", "zh")
# Relation of one thing to another -> relation of the other thing to the first.
CONVERSE: dict[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}


def _table(words: Iterable[Word], translations: str) -> dict[Word, str]:
    """Map each word to its translation, given a list separated by commas. A translation may be empty."""
    return dict(zip(words, translations.split(", "), strict=True))


def _forms(words: Iterable[str], translations: str) -> dict[str, tuple[str, str]]:
    """Map each word to its two forms, given a list such as "petit/petite, grand/grande"."""
    pairs = (each.split("/") for each in translations.split(", "))
    return {word: (first, second) for word, (first, second) in zip(words, pairs, strict=True)}


# Noun and gender.
_SHAPES: dict[Language, dict[str, tuple[str, str]]] = {
    "en": {shape: (shape, "n") for shape in SHAPES},
    "de": _forms(SHAPES, "Kreis/m, Quadrat/n, Dreieck/n, Stern/m, Kreuz/n, Ring/m, Raute/f, Herz/n"),
    "fr": _forms(SHAPES, "cercle/m, carré/m, triangle/m, étoile/f, croix/f, anneau/m, losange/m, cœur/m"),
    "zh": _forms(SHAPES, "圆形/n, 正方形/n, 三角形/n, 五角星/n, 十字形/n, 圆环/n, 菱形/n, 心形/n"),
}

_WORDS = (*SIZES, *COLOURS)
# German: the stem. French: masculine, feminine.
_ADJECTIVES: dict[Language, Mapping[str, str | tuple[str, str]]] = {
    "en": {word: word for word in _WORDS},
    "de": _table(_WORDS, "klein, groß, rot, orangefarben, gelb, grün, türkisfarben, blau, violett, rosa"),
    "fr": _forms(
        _WORDS,
        "petit/petite, grand/grande, rouge/rouge, orange/orange, jaune/jaune, vert/verte, turquoise/turquoise, "
        "bleu/bleue, violet/violette, rose/rose",
    ),
    "zh": _table(_WORDS, "小, 大, 红色, 橙色, 黄色, 绿色, 青色, 蓝色, 紫色, 粉色"),
}
_INDECLINABLE = {"rosa"}
_DATIVES = {"Herz": "Herzen"}  # the other nouns keep their form

# Language -> gender -> form -> article.
_ARTICLES: dict[Language, dict[str, dict[Form, str]]] = {
    "en": {"n": _table(_FORMS, "a, the, the, a")},
    "de": {
        "m": _table(_FORMS, "ein, der, dem, ein"),
        "f": _table(_FORMS, "eine, die, der, eine"),
        "n": _table(_FORMS, "ein, das, dem, ein"),
    },
    "fr": {"m": _table(_FORMS, "un, le, du, un"), "f": _table(_FORMS, "une, la, de la, une")},
    "zh": {"n": _table(_FORMS, "一个, , , 一个")},
}
# The endings of German adjectives after these articles.
_ENDINGS: dict[str, dict[Form, str]] = {
    "m": _table(_FORMS, "er, e, en, "),
    "f": _table(_FORMS, "e, e, en, "),
    "n": _table(_FORMS, "es, e, en, "),
}

_PLACES: dict[Language, dict[str, str]] = {
    "en": {place: f"at the {place}" for place in PLACES},
    "de": _table(PLACES, "oben links, oben rechts, unten links, unten rechts"),
    "fr": _table(PLACES, "en haut à gauche, en haut à droite, en bas à gauche, en bas à droite"),
    "zh": _table(PLACES, "左上角, 右上角, 左下角, 右下角"),
}
_BACKGROUNDS: dict[Language, dict[str, str]] = {
    "en": {name: name for name in BACKGROUNDS},
    "de": _table(BACKGROUNDS, "weißen, hellgrauen, beigen, hellblauen"),
    "fr": _table(BACKGROUNDS, "blanc, gris clair, beige, bleu clair"),
    "zh": _table(BACKGROUNDS, "白色, 浅灰色, 米色, 浅蓝色"),
}
_NUMBERS: dict[Language, dict[int, str]] = {
    "en": {2: "two", 3: "three"},
    "de": {2: "zwei", 3: "drei"},
    "fr": {2: "deux", 3: "trois"},
    "zh": {2: "两", 3: "三"},
}

_RELATIONS: dict[Language, dict[Relation, str]] = {
    "en": _table(CONVERSE, "to the left of, to the right of, above, below"),
    "de": _table(CONVERSE, "links von, rechts von, über, unter"),
    "fr": _table(CONVERSE, "à gauche, à droite, au-dessus, au-dessous"),
    "zh": _table(CONVERSE, "左边, 右边, 上方, 下方"),
}

# Separators: "and" and "last" (before the last part) in lists; "or" between free places; "between" between sentences.
_SENTENCES = {
    "en": {
        "phrase": "{article} {size} {colour} {shape}",
        "short": "{thing} {place}",
        "and": ", ",
        "last": " and ",
        "opening": "This picture is a simple drawing that was made by a computer, with flat and even colours, "
        "without shadows, without outlines and without any writing. It is as wide as it is high, and one can think of "
        "it as four quarters, of which each holds one object or nothing at all.",
        "number": "There are {number} objects in it, which do not touch each other.",
        "size": "The object {place} is {size}.",
        "kind": "The object {place} is {article} {shape}, which is {colour}.",
        "background": "All of it lies on a plain {background} background.",
        "relation": "{thing} is {where} {other}.",
        "free": "There is nothing {places}.",
        "or": " or ",
        "between": " ",
    },
    "de": {
        "phrase": "{article} {size} {colour} {shape}",
        "short": "{thing} {place}",
        "and": ", ",
        "last": " und ",
        "opening": "Dieses Bild ist eine einfache Zeichnung, die ein Computer gemacht hat, mit flachen und "
        "gleichmäßigen Farben, ohne Schatten, ohne Umrisse und ohne jede Schrift. Es ist so breit wie hoch, und man "
        "kann es sich in vier Viertel geteilt denken, von denen jedes ein Objekt enthält oder ganz leer ist.",
        "number": "Insgesamt befinden sich darin {number} Objekte, die einander nicht berühren.",
        "size": "Das Objekt {place} ist {size}.",
        "kind": "Das Objekt {place} ist {article} {shape}, {which} {colour} ist.",
        "background": "Das alles liegt auf einem einfarbigen {background} Hintergrund.",
        "relation": "{thing} befindet sich {where} {other}.",
        "free": "{places} ist nichts zu sehen.",
        "or": " und ",
        "between": " ",
    },
    "fr": {
        "phrase": "{article} {size} {shape} {colour}",
        "short": "{thing} {place}",
        "and": ", ",
        "last": " et ",
        "opening": "Cette image est un dessin simple fait par un ordinateur, avec des couleurs plates et régulières, "
        "sans ombres, sans contours et sans aucune écriture. Elle est aussi large que haute, et on peut se la figurer "
        "partagée en quatre quarts, dont chacun contient un objet ou reste entièrement vide.",
        "number": "On y voit en tout {number} objets, qui ne se touchent pas.",
        "size": "L'objet {place} est {size}.",
        "kind": "L'objet {place} est {article} {shape}, qui est {colour}.",
        "background": "Le tout se trouve sur un fond {background} uni.",
        "relation": "{thing} se trouve {where} {other}.",
        "free": "Il n'y a rien {places}.",
        "or": " ni ",
        "between": " ",
    },
    "zh": {
        "phrase": "{article}{colour}的{size}{shape}",
        "short": "{place}有{thing}",
        "and": "，",
        "last": "，",
        "opening": "这张图片是一幅由电脑绘制的简单图画，颜色均匀平整，没有阴影，没有轮廓线，也没有任何文字。"
        "它的宽和高相等，可以看作分成四个区域，每个区域里有一个物体，或者什么也没有。",
        "number": "图中一共有{number}个物体，它们互不接触。",
        "size": "{place}的物体比较{size}。",
        "kind": "{place}的物体是{article}{shape}，它的颜色是{colour}。",
        "background": "它们都在单一的{background}背景上。",
        "relation": "{thing}在{other}的{where}。",
        "free": "{places}什么也没有。",
        "or": "和",
        "between": "",
    },
}


def label(thing: Thing) -> str:
    """Return the English class name of a thing, without its size: "red star"."""
    return f"{thing.colour} {thing.shape}"


def phrase(thing: Thing, language: Language, form: Form = "indefinite") -> str:
    """Return a noun phrase with the thing's size, colour and shape: "a small red star"."""
    return _SENTENCES[language]["phrase"].format(**_words(thing, language, form))


def short(scene: Scene, language: Language) -> str:
    """Describe every thing and its place, in one line without a full stop."""
    template = _SENTENCES[language]["short"]
    parts = [
        template.format(thing=phrase(thing, language), place=_PLACES[language][thing.place]) for thing in scene.things
    ]
    return _listed(parts, language, "last")


def long(scene: Scene, language: Language) -> str:
    """Describe the scene in about 140 words: places, sizes, then shapes and colours, relations, and background.

    The first 77 words mention no shape or colour, so a model with CLIP's limit of 77 tokens cannot learn them.
    """
    sentences, places = _SENTENCES[language], _PLACES[language]
    said = [sentences["opening"], sentences["number"].format(number=_NUMBERS[language][len(scene.things)])]
    for thing in scene.things:
        size = _adjective(thing.size, language, feminine=False)  # like "objet"
        said.append(sentences["size"].format(place=places[thing.place], size=size))
    taken = {thing.place for thing in scene.things}
    free = [words for place, words in places.items() if place not in taken]
    said.append(sentences["free"].format(places=_listed(free, language, "or")))
    for thing in scene.things:
        said.append(sentences["kind"].format(place=places[thing.place], **_words(thing, language, "predicate")))
    for first, second in combinations(scene.things, 2):
        left, right = sorted((first, second), key=lambda thing: PLACES[thing.place][0])
        if PLACES[left.place][0] != PLACES[right.place][0]:
            said.append(relation("left", left, right, language))
        # Things are in reading order: the second is never above the first.
        if PLACES[first.place][1] != PLACES[second.place][1]:
            said.append(relation("above", first, second, language))
    said.append(sentences["background"].format(background=_BACKGROUNDS[language][scene.background]))
    return sentences["between"].join(map(_capitalised, said))


def relation(name: Relation, thing: Thing, other: Thing, language: Language) -> str:
    """Return a sentence about two things, such as "The small red star is above the large blue circle."."""
    definite, relative = phrase(thing, language, "definite"), phrase(other, language, "relative")
    words = {"thing": definite, "where": _RELATIONS[language][name], "other": relative}
    return _capitalised(_SENTENCES[language]["relation"].format(**words))


def _words(thing: Thing, language: Language, form: Form) -> dict[str, str]:
    """Return the words for a thing, inflected for the noun's gender and the form."""
    noun, gender = _SHAPES[language][thing.shape]
    if language == "de" and form == "relative":
        noun = _DATIVES.get(noun, noun)
    words = {"article": _ARTICLES[language][gender][form], "shape": noun}
    for name, value in (("size", thing.size), ("colour", thing.colour)):
        words[name] = _adjective(value, language, feminine=gender == "f")
        if language == "de" and words[name] not in _INDECLINABLE:
            words[name] += _ENDINGS[gender][form]
    if language == "de":
        words["which"] = _ARTICLES["de"][gender]["definite"]  # articles serve as relative pronouns
    return words


def _adjective(word: str, language: Language, feminine: bool) -> str:
    adjective = _ADJECTIVES[language][word]
    return adjective if isinstance(adjective, str) else adjective[feminine]


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _listed(parts: list[str], language: Language, last: str) -> str:
    """Join the parts as a list. `last`: the key of the separator before the last part."""
    *others, final = parts
    return _SENTENCES[language]["and"].join(others) + (_SENTENCES[language][last] if others else "") + final
