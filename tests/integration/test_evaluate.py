"""MMEB's 36 datasets in their original layout: the same scores on any number of processes, and after a kill."""

import io
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from launch import fork, launch, wait
from limits import HANG_SECONDS
from PIL import Image

from pipeline.data.mmeb import MMEB_IMAGE_MARK, MMEB_TASKS
from pipeline.evaluation.report import Report
from pipeline.models.compact import Form

NAMES = [name for name in MMEB_TASKS if name != "ImageNet_1K"]


@pytest.fixture(scope="module")
def mmeb(tmp_path_factory) -> Path:
    """Create few rows per dataset. Queries: a text, some with an image. Candidates: texts or images, some shared."""
    folder, some = tmp_path_factory.mktemp("mmeb"), random.Random(0)
    for name in NAMES:
        pictures = folder / "eval_images" / name
        pictures.mkdir(parents=True)
        for number in range(6):
            picture = io.BytesIO()
            pixels = np.random.default_rng([number, *name.encode()]).integers(0, 256, (6, 8, 3), np.uint8)
            Image.fromarray(pixels).resize((24, 24)).save(picture, "PNG")
            (pictures / f"{number}.png").write_bytes(picture.getvalue())
        rows, asks_for_pictures = [], MMEB_TASKS[name][0] == "retrieval"
        for number in range(5):
            if asks_for_pictures:
                others = some.sample([n for n in range(6) if n != number], 3)
                texts = [f"{MMEB_IMAGE_MARK} Represent the given image."] * 4
                images = [f"{name}/{n}.png" for n in (number, *others)]
            else:
                texts = [f"answer {n}" for n in some.sample(range(40), 4)]  # other datasets have the same answers
                images = [""] * 4
            image = "" if asks_for_pictures and number % 2 else f"{name}/{number}.png"
            text = f"{MMEB_IMAGE_MARK}\n{name}: question {number}?" if image else f"Find picture {number} of {name}."
            rows.append({"qry_text": text, "qry_img_path": image, "tgt_text": texts, "tgt_img_path": images})
        (folder / name).mkdir()
        parquet.write_table(pa.Table.from_pylist(rows), folder / name / "test-00000-of-00001.parquet")
    return folder


def command(model: str, mmeb: Path, out: Path, *options: str) -> list[str]:
    return ["-m", "pipeline.evaluate", model, f"mmeb={mmeb}", f"out={out}", *options]


def embedded(out: Path) -> list[bytes]:
    """Return the keys of all items whose embeddings are stored."""
    keys = b"".join(path.read_bytes() for path in sorted(out.glob("embeddings/*/*.keys")))
    return [keys[start : start + 16] for start in range(0, len(keys), 16)]


@pytest.fixture(scope="module")
def alone(tiny_model, mmeb, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluations") / "alone"
    ended = launch(command(tiny_model, mmeb, out, "dimensions=[16]", "vectors=[binary]", "projector=1"), world=1)
    assert ended.status == [0], ended.output[-4000:]
    assert "means (%) by size and type of the vectors" in ended.output
    return out


def test_all_36_datasets_are_scored_and_items_embedded_once(alone):
    report = Report.read(alone)
    assert list(report.results) == NAMES
    assert len(report.averages()) == 7
    keys = embedded(alone)
    assert len(keys) == len(set(keys))
    assert len(keys) == 24 * 5 + 12 * 5 + 40 + 12 * 6  # queries, and candidates: all answers, all images of retrieval
    board = json.loads((alone / "leaderboard.json").read_text())
    assert len(board["metrics"]["image"]) == 36
    assert (alone / "report.html").stat().st_size > 100_000


def test_projector_has_a_query_of_each_dataset_and_its_answer(alone):
    (folder,) = (alone / "tensorboard/projector").iterdir()
    lines = (folder / "labels.tsv").read_text().splitlines()[1:]
    assert {line.split("\t")[1] for line in lines if line.endswith("query")} == {*NAMES}
    assert (folder / "vectors.bytes").stat().st_size == 4 * 48 * len(lines)


def test_other_sizes_and_types_are_scored(alone):
    report = Report.read(alone)
    forms = [Form(48), Form(48, "binary"), Form(16), Form(16, "binary")]
    assert [variant.form for variant in report.variants] == forms
    assert report.variants[0].scores == {name: result.score for name, result in report.results.items()}
    assert len({tuple(variant.scores.values()) for variant in report.variants}) == 4


def test_two_processes_give_the_same_scores(alone, tiny_model, mmeb, tmp_path):
    ended = launch(command(tiny_model, mmeb, tmp_path), world=2)
    assert ended.status == [0, 0], ended.output[-4000:]
    assert Report.read(tmp_path).results == Report.read(alone).results
    assert sorted(embedded(tmp_path)) == sorted(embedded(alone))


def test_killed_evaluation_resumes_without_embedding_items_twice(alone, tiny_model, mmeb, tmp_path):
    processes, deadline = fork(command(tiny_model, mmeb, tmp_path), world=1), time.monotonic() + HANG_SECONDS
    while len(embedded(tmp_path)) < 100 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(processes[0].pid, signal.SIGKILL)
    assert wait(processes).status == [-signal.SIGKILL]
    before = embedded(tmp_path)
    assert 100 <= len(before) < len(embedded(alone))
    ended = launch(command(tiny_model, mmeb, tmp_path), world=2)
    assert ended.status == [0, 0], ended.output[-4000:]
    assert f"{len(before)} of {len(embedded(alone))} items are already embedded" in ended.output
    assert Report.read(tmp_path).results == Report.read(alone).results
    assert sorted(embedded(tmp_path)) == sorted(embedded(alone))
