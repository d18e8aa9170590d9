"""Sets for zero-shot classification of pictures (Radford et al., arXiv 2103.00020, section 3.1), in ImageNet's layout.

URL/<class>/*.jpg, or URL/val/<class>/*.jpg     the pictures, in any format; if val exists, other folders are ignored
URL/classnames.json     {"n01440764": "tench", "n01443537": ["goldfish", "Carassius auratus"], ...},
                        or a list of names, in the order of the sorted folders (numbers by value)
URL/templates.txt       one template per line, with {} for the name; default: TEMPLATES
"""

from collections.abc import Callable
from itertools import cycle

import numpy as np

from pipeline.data.sample import IMAGE_MARK
from pipeline.errors import PipelineError
from pipeline.evaluation.sets.folder import MEND, PICTURES, Folder, expecting, plain_text, read_text
from pipeline.evaluation.tasks import Collection, Retrieval
from pipeline.storage import objects
from pipeline.storage.documents import parse_json

NAMES_FILE, TEMPLATES_FILE = "classnames.json", "templates.txt"
INSTRUCTION = f"{IMAGE_MARK}\nRepresent the given image for classification."
# The seven templates that CLIP's authors selected from their 80 (notebook "Prompt engineering for ImageNet").
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def add(collection: Collection, url: str, instructed: bool) -> None:
    """Add the set at `url`, with the folder's name. Queries are pictures. Candidates are classes: means of prompts.

    All classes have the same number of prompts: for each template as many as the maximum number of names of a class.
    A class with fewer names repeats them in turn.

    instructed: see Encoder.

    Raises PipelineError for a picture outside a class's folder, and for a class without a name or pictures.
    """
    folder = Folder.of(url)
    pictures = _pictures(folder)
    names = _names(objects.join(url, NAMES_FILE), folder, pictures)
    templates = _templates(objects.join(url, TEMPLATES_FILE), folder)
    most = max(map(len, names.values()))
    prompts = []
    for own in names.values():
        turns = cycle(own)
        prompts.append([template.replace("{}", next(turns)) for template in templates for _ in range(most)])
    text = INSTRUCTION if instructed else IMAGE_MARK
    queries = [collection.medium(text, file, folder.stamps[file]) for files in pictures.values() for file in files]
    numbers = np.repeat(np.arange(len(pictures)), [len(files) for files in pictures.values()])
    collection.tasks.append(
        Retrieval(
            name=folder.name,
            kind="classification",
            direction="",
            language="en",
            queries=np.array(queries, np.int64),
            candidates=np.array([[collection.text(prompt) for prompt in own] for own in prompts], np.int64),
            right=list(numbers[:, None]),
            names=tuple(own[0] for own in names.values()),
        )
    )


def _pictures(folder: Folder) -> dict[str, list[str]]:
    """Return folder of a class -> URLs of its pictures, in the order of the classes."""
    paths = [path for path in folder.files if path.rpartition(".")[2].lower() in PICTURES]
    paths = [path for path in paths if path.startswith("val/")] or paths
    if not paths:
        raise PipelineError(f"{folder.url} has no <class>/*.jpg, nor val/<class>/*.jpg")
    pictures: dict[str, list[str]] = {}
    for path in paths:
        match path.removeprefix("val/").split("/"):
            case [name, _]:
                pictures.setdefault(name, []).append(folder.files[path])
            case _:
                raise PipelineError(f"{folder.files[path]} should be {folder.url}/<class>/NAME, or val/<class>/NAME")
    others = [path for path in folder.files if path.removeprefix("val/").rpartition("/")[0] in pictures]
    read = {url for urls in pictures.values() for url in urls}
    if unread := [folder.files[path] for path in others if folder.files[path] not in read and not _hidden(path)]:
        raise PipelineError(
            f"{unread[0]} ({len(unread)} in all) is not an image in a known format ({', '.join(sorted(PICTURES))}): "
            "convert or remove it; a score over fewer pictures would not be comparable"
        )
    numbered = all(name.isdecimal() for name in pictures)
    return {name: pictures[name] for name in sorted(pictures, key=int if numbered else str)}


def _hidden(path: str) -> bool:
    """Return whether the file is one that operating systems create in folders."""
    return path.rpartition("/")[2].startswith(".") or path.endswith(("Thumbs.db", "desktop.ini"))


def _names(file: str, folder: Folder, pictures: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return folder of a class -> its names, at least one, in the order of `pictures`."""
    if NAMES_FILE not in folder.files:
        raise PipelineError(f"{file} is missing; it must have the names of the classes")
    with expecting(file, '{"folder": "name" or ["name", ...], ...}, or a list in the order of the sorted folders'):
        given = parse_json(read_text(file), file, remedy=MEND)
        if isinstance(given, list):
            if len(given) != len(pictures):
                raise ValueError(f"it has {len(given)} names for {len(pictures)} folders of pictures")
            given = dict(zip(pictures, given, strict=True))
        if apart := sorted(given.keys() ^ pictures.keys()):
            lack = "pictures" if apart[0] in given else "a name"
            raise ValueError(f"the class {apart[0]!r} lacks {lack}")
        if empty := [name for name in pictures if not given[name]]:
            raise ValueError(f"the class {empty[0]!r} lacks a name")
    place = f"{file}: a name of the class"
    return {
        name: [plain_text(each, f"{place} {name}") for each in (own if isinstance(own, list) else [own])]
        for name, own in ((name, given[name]) for name in pictures)
    }


def _templates(file: str, folder: Folder) -> tuple[str, ...]:
    if TEMPLATES_FILE not in folder.files:
        return TEMPLATES
    templates = tuple(line.strip() for line in read_text(file).split("\n") if line.strip())
    for template in templates:
        if plain_text(template, f"{file}: a template").count("{}") != 1:
            raise PipelineError(f"{file}: {template!r} must have one {{}}, for the name of the class")
    if not templates:
        raise PipelineError(f"{file} has no templates: write one on each line, or remove the file")
    return templates


SETS: dict[str, Callable[..., None]] = {"classification": add}
