"""TensorBoard's embedding projector shows an evaluation's vectors: its plugin reads the files."""

import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from werkzeug.test import Client

from pipeline.data.sample import Item
from pipeline.errors import PipelineError
from pipeline.evaluation.projector import write_projector
from pipeline.evaluation.tasks import Collection, Ranking, Retrieval


class NoRuns:
    """A provider of data for a folder without events, as an evaluation's is."""

    def list_runs(self, context: object, experiment_id: str) -> list:
        return []


def asked(folder: Path, route: str, **query: str) -> bytes:
    """Return the answer of the plugin of a TensorBoard that has just started."""
    plugin = ProjectorPlugin(TBContext(data_provider=NoRuns(), logdir=str(folder)))
    answer = Client(plugin.get_plugin_apps()[route]).get(query_string={"run": ".", **query})
    assert answer.status_code == 200, answer.get_data()
    return answer.get_data()


@pytest.fixture
def collection() -> Collection:
    """Return a collection of two images, which are queries, and five texts."""
    items = []
    for colour in ("red", "blue"):
        picture = io.BytesIO()
        Image.new("RGB", (400, 200), colour).save(picture, "PNG")
        items.append(Item(f"<image>\nWhat is\t{colour}?", (picture.getvalue(),)))
    collection = Collection()
    for number, item in enumerate([*items, *(Item(f"answer\n{n}") for n in range(5))]):
        name = f"{number}.png" if item.images else item.text
        collection.row(bytes([number]) * 16, name, partial(lambda item: item, item))
    return collection


def vectors_of(seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(7, 24)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_projector_shows_vectors_labels_and_pictures_of_each_evaluation(collection, tmp_path):
    lists, right = [np.array([4, 3, 2]), np.array([5, 6, 3])], [np.array([1]), np.array([0])]
    collection.tasks += [
        Ranking("QA", "vqa", True, np.array([0, 1]), lists),
        Retrieval("both", "text-image", "i2t", "en", np.array([0, 1]), np.array([2, 3]), right),
    ]
    chosen, vectors = [0, 4, 1, 5, 3, 2], {step: vectors_of(step) for step in (0, 100)}
    for step in (0, 100, 0):  # a resumed run evaluates a step again
        write_projector(tmp_path, f"step-{step:08d}", collection, vectors[step].__getitem__, queries=2)
    assert json.loads(asked(tmp_path, "/runs")) == ["."]
    shown = json.loads(asked(tmp_path, "/info"))["embeddings"]
    assert [each["tensorName"] for each in shown] == ["step-00000000", "step-00000100"]
    assert [each["tensorShape"] for each in shown] == [[6, 24], [6, 24]]
    for step, of_step in vectors.items():
        read = asked(tmp_path, "/tensor", name=f"step-{step:08d}")
        assert read == of_step[chosen].tobytes()
    labels = asked(tmp_path, "/metadata", name="step-00000100").decode().splitlines()
    assert labels == [
        "item\tdataset\trole",
        "What is red? (0.png)\tQA\tquery",
        "answer 2\tQA\tanswer",
        "What is blue? (1.png)\tQA\tquery",
        "answer 3\tQA\tanswer",
        "answer 1\tboth\tanswer",
        "answer 0\tboth\tanswer",
    ]
    sprite = Image.open(io.BytesIO(asked(tmp_path, "/sprite_image", name="step-00000100")))
    size = shown[0]["sprite"]["singleImageDim"]
    assert size == [64, 64] and sprite.size == (192, 192)
    assert [sprite.getpixel((64 * place + 32, 32)) for place in (0, 2)] == [(255, 0, 0), (0, 0, 255)]
    assert sprite.getpixel((32, 8)) == (255, 255, 255)  # the picture is twice as wide as high
    assert len(sprite.crop((64, 0, 128, 64)).getcolors()) > 2  # a text


def test_queries_are_evenly_spaced(tmp_path):
    collection, count = Collection(), 5000
    for number in range(2 * count):
        collection.text(f"item {number}")
    rows = np.arange(count)
    prompts = np.stack([rows, rows[::-1]], axis=1) + count  # two for each class
    right = [np.array([row]) for row in rows]
    collection.tasks.append(Retrieval("classes", "classification", "", "en", rows, prompts, right, ("",) * count))
    take = lambda rows: np.stack([np.cos(rows), np.sin(rows)], axis=1)  # noqa: E731
    write_projector(tmp_path, "model", collection, take, queries=3)
    labels = asked(tmp_path, "/metadata", name="model").decode().splitlines()[1:]
    assert [label.partition("\t")[0] for label in labels] == [
        f"item {row}" for row in (0, count, 2500, count + 2500, 4999, count + 4999)
    ]


@pytest.mark.parametrize(
    ("file", "content"),
    [(name, None) for name in ("vectors.bytes", "labels.tsv", "sprite.png")]
    + [("vectors.bytes", b""), ("vectors.bytes", b"cut"), ("labels.tsv", b"")],
)
def test_step_that_is_not_complete_is_left_out(file, content, collection, tmp_path, caplog):
    collection.tasks.append(Ranking("QA", "vqa", True, np.array([0]), [np.array([2])]))
    for step in ("a", "b", "c"):
        if step == "b":
            damaged = tmp_path / "projector/a" / file
            damaged.unlink()
            if content is not None:
                damaged.write_bytes(content)
        write_projector(tmp_path, step, collection, vectors_of(0).__getitem__, queries=1)
    shown = json.loads(asked(tmp_path, "/info"))["embeddings"]
    assert [each["tensorName"] for each in shown] == ["b", "c"]
    assert f"{tmp_path}/projector/a is not complete" in caplog.text


def test_what_killed_processes_left_is_removed(collection, tmp_path):
    collection.tasks.append(Ranking("QA", "vqa", True, np.array([0]), [np.array([2])]))
    (tmp_path / "projector/.old.host-1.partial").mkdir(parents=True)
    (tmp_path / ".projector_config.pbtxt.host-1.partial").touch()
    write_projector(tmp_path, "model", collection, vectors_of(0).__getitem__, queries=1)
    assert sorted(path.name for path in tmp_path.glob("*")) == ["projector", "projector_config.pbtxt"]
    assert [path.name for path in tmp_path.glob("projector/*")] == ["model"]


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b"])
def test_name_that_is_none_of_a_folder_is_refused(name, collection, tmp_path):
    collection.tasks.append(Ranking("QA", "vqa", True, np.array([0]), [np.array([2])]))
    write_projector(tmp_path, "model", collection, vectors_of(0).__getitem__, queries=1)
    with pytest.raises(ValueError, match="cannot name vectors"):
        write_projector(tmp_path, name, collection, vectors_of(0).__getitem__, queries=1)
    assert (tmp_path / "projector/model/sprite.png").exists()


def test_collection_without_queries_is_an_error(tmp_path):
    collection = Collection(tasks=[Ranking("QA", "vqa", True, np.array([], int), [])])
    with pytest.raises(PipelineError, match="no query"):
        write_projector(tmp_path, "model", collection, vectors_of(0).__getitem__, queries=1)


def test_folder_that_cannot_be_written_is_named(collection, tmp_path):
    collection.tasks.append(Ranking("QA", "vqa", True, np.array([0]), [np.array([2])]))
    (tmp_path / "file").touch()
    with pytest.raises(PipelineError, match=r"file.* cannot be written"):
        write_projector(tmp_path / "file", "model", collection, vectors_of(0).__getitem__, queries=1)
