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
    names, templates = _names(folder, pictures), _templates(folder)
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
        name, _, file = path.removeprefix("val/").partition("/")
        if not file or "/" in file:
            raise PipelineError(f"{folder.files[path]} should be {folder.url}/<class>/NAME, or val/<class>/NAME")
        pictures.setdefault(name, []).append(folder.files[path])
    others = [path for path in folder.files.keys() - paths if not path.endswith(("Thumbs.db", "desktop.ini"))]
    within = (path for path in others if path.removeprefix("val/").rpartition("/")[0] in pictures)
    if unread := sorted(folder.files[path] for path in within):
        raise PipelineError(
            f"{unread[0]} ({len(unread)} in all) is not an image in a known format ({', '.join(sorted(PICTURES))}): "
            "convert or remove it; a score over fewer pictures would not be comparable"
        )
    numbered = all(name.isdecimal() for name in pictures)
    return {name: pictures[name] for name in sorted(pictures, key=int if numbered else str)}


def _names(folder: Folder, pictures: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return folder of a class -> its names, at least one, in the order of `pictures`."""
    if not (file := folder.files.get(NAMES_FILE)):
        raise PipelineError(f'{folder.url}/{NAMES_FILE} is missing; list the classes in it: {{"folder": "name", ...}}')
    with expecting(file, '{"folder": "name" or ["name", ...], ...}, or a list in the order of the sorted folders'):
        given = parse_json(read_text(file), file, remedy=MEND)
        if isinstance(given, list):
            if len(given) != len(pictures):
                raise ValueError(f"it has {len(given)} names for {len(pictures)} folders of pictures")
            given = dict(zip(pictures, given, strict=True))
        named = {name for name, own in given.items() if own}
        if apart := sorted(named ^ pictures.keys()):
            lack = "pictures" if apart[0] in named else "a name"
            raise ValueError(f"the class {apart[0]!r} lacks {lack}")
    names = {}
    for name in pictures:
        own = given[name] if isinstance(given[name], list) else [given[name]]
        names[name] = [plain_text(each, f"{file}: a name of the class {name}").strip() for each in own]
    return names


def _templates(folder: Folder) -> tuple[str, ...]:
    if not (file := folder.files.get(TEMPLATES_FILE)):
        return TEMPLATES
    templates = tuple(line.strip() for line in read_text(file).split("\n") if line.strip())
    for template in templates:
        if plain_text(template, f"{file}: a template").count("{}") != 1:
            raise PipelineError(f"{file}: {template!r} must have one {{}}, for the name of the class")
    if not templates:
        raise PipelineError(f"{file} has no templates: write one on each line, or remove the file")
    return templates


SETS: dict[str, Callable[..., None]] = {"classification": add}
