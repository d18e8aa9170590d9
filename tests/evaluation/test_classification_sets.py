import json
from pathlib import Path

import pytest

from pipeline.data.sample import Item
from pipeline.errors import PipelineError
from pipeline.evaluation.sets.classification import SETS, TEMPLATES
from pipeline.evaluation.tasks import Collection, Retrieval
from pipeline.storage import objects

PLACES = ("n02/1.JPEG", "n02/2.png", "n10/3.webp", "n01/4.jpg")


def lay_out(folder: Path, names: object, templates: str | None = None, places: tuple[str, ...] = PLACES) -> Path:
    folder.mkdir(exist_ok=True)
    for place in places:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(place)
    (folder / "classnames.json").write_text(json.dumps(names))
    if templates is not None:
        (folder / "templates.txt").write_text(templates)
    return folder


def added(folder: Path | str, instructed: bool = False) -> tuple[Collection, Retrieval]:
    collection = Collection()
    SETS["classification"](collection, str(folder), instructed)
    (task,) = collection.tasks
    return collection, task


def classes(collection: Collection, task: Retrieval) -> dict[bytes, str]:
    """Return {image: name of its class}."""
    return {
        collection.items[query]().images[0]: task.names[right]
        for query, (right,) in zip(task.queries, task.right, strict=True)
    }


def prompts(collection: Collection, task: Retrieval) -> list[list[str]]:
    return [[collection.names[row] for row in rows] for rows in task.candidates]


RIGHT = {b"n01/4.jpg": "tench", b"n02/1.JPEG": "goldfish", b"n02/2.png": "goldfish", b"n10/3.webp": "{shark}"}


@pytest.mark.parametrize("instructed", [False, True])
def test_images_are_matched_to_class_prompts(tmp_path, instructed):
    names = {"n10": "{shark}", "n02": "goldfish ", "n01": "tench"}
    collection, task = added(lay_out(tmp_path / "fish", names, "a photo of a {}.\n\n{} {once}\n"), instructed)
    assert (task.name, task.kind, task.direction, task.language) == ("fish", "classification", "", "en")
    assert classes(collection, task) == RIGHT
    assert task.names == ("tench", "goldfish", "{shark}")
    assert prompts(collection, task) == [[f"a photo of a {name}.", f"{name} {{once}}"] for name in task.names]
    text = "<image>\nRepresent the given image for classification." if instructed else "<image>"
    assert collection.items[task.queries[0]]() == Item(text, (b"n01/4.jpg",))
    assert len(collection.items) == 4 + 6


def test_list_of_names_uses_clip_templates(tmp_path):
    collection, task = added(lay_out(tmp_path, ["tench", "goldfish", "{shark}"]))
    assert classes(collection, task) == RIGHT
    assert prompts(collection, task)[1] == [template.format("goldfish") for template in TEMPLATES]
    assert task.candidates.shape == (3, 7)


def test_class_name_variants_alternate_over_templates(tmp_path):
    names = {"n01": ["tench", "Tinca"], "n02": ["goldfish"], "n10": ["shark", "hai", "requin"]}
    collection, task = added(lay_out(tmp_path, names, "a {}\nthe {}\n"))
    assert task.names == ("tench", "goldfish", "shark")
    assert prompts(collection, task) == [
        ["a tench", "a Tinca", "a tench", "the Tinca", "the tench", "the Tinca"],
        ["a goldfish"] * 3 + ["the goldfish"] * 3,
        ["a shark", "a hai", "a requin", "the shark", "the hai", "the requin"],
    ]


def test_only_val_is_read_and_folders_sort_numerically(tmp_path):
    places = ("val/10/1.jpg", "val/9/2.jpg", "train/9/3.jpg", "val/9/._2.jpg", "train/9/more/4.jpg", "shown.png")
    collection, task = added(lay_out(tmp_path, ["nine", "ten"], places=places))
    assert classes(collection, task) == {b"val/9/2.jpg": "nine", b"val/10/1.jpg": "ten"}


def test_set_on_s3_is_read(s3, tmp_path):
    url = f"s3://pipeline-tests/classification-sets/{tmp_path.name}/fish/"
    for path in lay_out(tmp_path, ["tench", "goldfish", "{shark}"], "{}").rglob("*.*"):
        objects.write(url + path.relative_to(tmp_path).as_posix(), path)
    collection, task = added(url)
    assert task.name == "fish"
    assert classes(collection, task) == RIGHT
    assert prompts(collection, task) == [["tench"], ["goldfish"], ["{shark}"]]


@pytest.mark.parametrize(
    ("names", "templates", "place", "said"),
    [
        (["tench", "goldfish"], None, "n02/5.jpg", "it has 2 names for 3 folders"),
        ({"n01": "a", "n02": "b"}, None, "n02/5.jpg", "the class 'n10' lacks a name"),
        ({"n01": "a", "n02": "b", "n10": "c", "n11": "d"}, None, "n02/5.jpg", "the class 'n11' lacks pictures"),
        ({"n01": "a", "n02": [], "n10": "c"}, None, "n02/5.jpg", "the class 'n02' lacks a name"),
        ({"n01": "a", "n02": "b", "n10": " "}, None, "n02/5.jpg", "class n10 cannot be used: empty text"),
        (["a", "b", 3], None, "n02/5.jpg", "class n10 is 3, not a text"),
        ("tench", None, "n02/5.jpg", 'classnames.json is not {"folder": "name"'),
        (["a", "b", "c"], "a photo\n", "n02/5.jpg", "'a photo' must have one {}"),
        (["a", "b", "c"], "\n", "n02/5.jpg", "templates.txt has no templates"),
        (["a", "b", "c"], None, "5.jpg", "5.jpg should be "),
        (["a", "b", "c"], None, "n02/5.bmp", "5.bmp (1 in all) is not an image in a known format"),
        (["a", "b", "c"], None, "n02/more/5.jpg", "5.jpg should be "),
    ],
)
def test_invalid_classification_sets_are_refused(tmp_path, names, templates, place, said):
    with pytest.raises(PipelineError) as caught:
        added(lay_out(tmp_path, names, templates, (*PLACES, place)))
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_missing_classnames_or_images_are_refused(tmp_path):
    (lay_out(tmp_path, []) / "classnames.json").unlink()
    with pytest.raises(PipelineError, match=r"classnames\.json is missing"):
        added(tmp_path)
    with pytest.raises(PipelineError, match="has no <class>/"):
        added(lay_out(tmp_path / "empty", [], places=()))
