"""The command that embeds datasets: on two processes, killed, and restarted."""

import json
import os
import signal
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import fork, launch, wait
from limits import HANG_SECONDS
from PIL import Image

from pipeline.config import Data, EvaluationRun
from pipeline.data.sample import Item, Pair
from pipeline.data.shards import write_shards
from pipeline.data.source import Source
from pipeline.data.stored_vectors import ITEMS
from pipeline.embedding.dataset import open_datasets
from pipeline.embedding.embed_shards import embed_datasets
from pipeline.evaluation.encoders import load_encoder

NAMES = ("first", "second")
SAMPLES = 480  # per dataset, in 12 shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for name in NAMES:
        pairs = (
            Pair(
                f"{i:05d}", name, "", Item("<image>", (b"image",)), Item(f"{name} {i}"), (), (f"a red {name} {i} " * 4,)
            )
            for i in range(SAMPLES)
        )
        write_shards(pairs, folder / name, dataset=name, shard_bytes=(2048 + 512) * SAMPLES // 11)
    return folder


def embedded(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_killed_embedding_resumes_to_the_bytes_of_one_process(tiny_model, shards, tmp_path):
    device = torch.device("cpu")
    encoder = load_encoder(tiny_model, EvaluationRun(), device)
    alone = open_datasets([str(shards)], str(tmp_path / "alone"))
    embed_datasets(encoder, alone, "bf16", device, overwrite=False)
    expected = embedded(tmp_path / "alone")

    out = tmp_path / "out"
    command = ["-m", "pipeline.embed", tiny_model, "--out", str(out), "--stored", "bf16"]
    command += [word for name in NAMES for word in ("--shards", str(shards / name))]
    ranks, deadline = fork(command, world=2), time.monotonic() + HANG_SECONDS
    while len(list(out.glob("*/.text_embeddings/0*.json"))) < 3 and time.monotonic() < deadline:
        assert ranks[0].poll() is None, wait(ranks, 1).output
        time.sleep(0.002)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    assert wait(ranks).status == [-signal.SIGKILL] * 2
    records = sorted(out.glob("*/.text_embeddings/0*.json"))
    assert 3 <= len(records) < 24
    kept = [path.parents[1] / path.name.removesuffix(".json") for path in records]
    times = [path.stat().st_mtime_ns for path in kept]
    samples = sum(json.loads(path.read_text())["shard"]["samples"] for path in records)

    ended = launch(command, world=2)
    assert ended.status == [0, 0], ended.output[-4000:]
    assert f"the captions of {samples:,} of {2 * SAMPLES} samples are already embedded" in ended.output
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert embedded(out) == expected
    source = Source.open(Data(url=str(shards), datasets=list(NAMES), text_embeddings=str(out)))
    metadata = source.embedding_metadata
    assert (metadata.width, metadata.identity) == (encoder.dimension, encoder.identity)


def picture(number: int) -> bytes:
    buffer = BytesIO()
    drawn = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), np.uint8)
    Image.fromarray(drawn).save(buffer, "PNG")
    return buffer.getvalue() if number != 7 else b"no image"


def test_items_on_two_processes_have_the_vectors_of_one(tiny_model, tmp_path):
    """Each group of samples has images, and items that other samples share; one image cannot be decoded."""
    pairs = (
        Pair(
            f"{i:02d}",
            "items",
            "",
            Item("<image>\nWhat is it?", (picture(i),)),
            Item(f"a ring {i // 2}"),
            (Item("a star"), Item("<image>", (picture(i // 3),))),
            ("a round thing",),
        )
        for i in range(80)
    )
    write_shards(pairs, tmp_path / "shards", dataset="items", shard_bytes=200_000)
    device = torch.device("cpu")
    alone = open_datasets([str(tmp_path / "shards")], str(tmp_path / "alone"), ITEMS)
    embed_datasets(load_encoder(tiny_model, EvaluationRun(), device), alone, "fp16", device, overwrite=False)
    ended = launch(["-m", "pipeline.embed", tiny_model, "--shards", str(tmp_path / "shards"), "--items"], world=2)
    assert ended.status == [0, 0], ended.output[-4000:]
    assert "4 of 80 samples could not be used: their items have no embeddings" in ended.output
    expected = embedded(tmp_path / "alone")
    assert len(expected) > 4
    assert {name: (tmp_path / "shards" / name).read_bytes() for name in expected} == expected
    source = Source.open(Data(url=str(tmp_path / "shards"), teacher="beside"))
    (record, data), (_, stored) = (next(tar.samples(0, 1)) for tar in source.tars(0))
    assert source.parse(0, record, data, stored).teacher.shape == (5, source.teacher_metadata.width)
