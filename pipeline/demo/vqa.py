"""Visual questions in English: "Which object is red?", answered by "the small star at the top left".

A question names one attribute of a thing, and its answer gives all others. So an answer says nothing that is in the
question, and every answer of the same form fits a question as well as the right one, until one sees the picture.
"""

from functools import cache
from itertools import product

from pipeline.demo.scenes import ATTRIBUTES, Scene, Thing

_ASKED = {"colour": "{}", "shape": "a {}", "size": "{}", "place": "at the {}"}
_ANSWERS = {
    "colour": "the {size} {shape} at the {place}",
    "shape": "the {size} {colour} one at the {place}",
    "size": "the {colour} {shape} at the {place}",
    "place": "the {size} {colour} {shape}",
}


def question(thing: Thing, named: str) -> str:
    """Ask for the thing by one of its `ATTRIBUTES`."""
    return f"Which object is {_ASKED[named].format(getattr(thing, named))}?"


def answer(thing: Thing, named: str) -> str:
    """Describe the thing by all attributes but the one that the question names."""
    return _ANSWERS[named].format(**vars(thing))


@cache
def answers(named: str) -> tuple[str, ...]:
    """Return all answers to the questions that name this attribute."""
    things = (Thing(**dict(zip(ATTRIBUTES, values, strict=True))) for values in product(*ATTRIBUTES.values()))
    return tuple(dict.fromkeys(answer(thing, named) for thing in things))


def identifying(scene: Scene, thing: Thing) -> list[str]:
    """Return the attributes that tell the thing from all others of its scene; its place always does."""
    others = [other for other in scene.things if other is not thing]
    return [name for name in ATTRIBUTES if all(getattr(thing, name) != getattr(other, name) for other in others)]
