"""Visual questions in English about one thing of a scene: "What is red?", answered by "a small red star"."""

from pipeline.demo.scenes import Scene, Thing

QUESTIONS = {"colour": "What is {}?", "shape": "What does the {} look like?"}


def question(thing: Thing, named: str) -> str:
    """Ask for the thing by an attribute, a key of `QUESTIONS`."""
    return QUESTIONS[named].format(getattr(thing, named))


def identifying(scene: Scene, thing: Thing) -> list[str]:
    """Return the attributes by which a question can ask for the thing: no other thing of the scene shares them."""
    others = [other for other in scene.things if other is not thing]
    return [name for name in QUESTIONS if all(getattr(thing, name) != getattr(other, name) for other in others)]
