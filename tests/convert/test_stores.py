"""make_shards names, shows and verifies what lies beside a dataset for its training."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from small_mining import mine, references, write_datasets

from pipeline.convert import inspect
from pipeline.convert.command import Command
from pipeline.data.index import Index
from pipeline.data.mined import MinedIndex
from pipeline.data.neighbours import write_neighbours
from pipeline.data.sample import BadSample, Item, Pair
from pipeline.data.shards import write_shards
from pipeline.data.stored_vectors import ITEMS
from pipeline.embedding.dataset import open_datasets
from pipeline.embedding.embed_shards import embed_datasets
from pipeline.errors import PipelineError


class Teacher:
    name, identity, dimension, instructed = "the \x1bteacher", "1", 4, True

    def prepare(self, item: Item) -> Item:
        if item.text == "unread":
            raise BadSample("made so")
        return item

    def embed(self, prepared: list[Item]) -> torch.Tensor:
        return torch.eye(4)[[len(item.text) % 4 for item in prepared]]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Create a dataset of two shards with a teacher's vectors."""
    pairs = [Pair(str(i), "D", "", Item(text), Item("t"), (Item("n"),)) for i, text in enumerate(["a", "b", "unread"])]
    write_shards(pairs, tmp_path, dataset="D", shard_bytes=2048)
    embed_datasets(Teacher(), open_datasets([str(tmp_path)], None, ITEMS), "fp16", torch.device("cpu"), overwrite=False)
    return tmp_path


def run(command: Command, *arguments: object) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(list(map(str, arguments))))


def printed(capsys, command: Command, *arguments: object) -> str:
    capsys.readouterr()
    run(command, *arguments)
    return " ".join(capsys.readouterr().out.split())


def test_stats_and_show_name_the_stores(folder, capsys):
    write_neighbours(str(folder), Index.load(str(folder)), np.arange(3), 2, {"model": "the teacher"})
    found = printed(capsys, inspect.STATS, folder)
    assert "item_embeddings.json: vectors of items by the \\x1bteacher, width 4, fp16, 0.0 MB" in found
    assert "neighbours.json: 1 clusters of 2 neighbours by the teacher" in found and "mined" not in found
    assert "vectors of items 3, by the \\x1bteacher" in printed(capsys, inspect.SHOW, folder, 1)
    assert "vectors of items 0, by" in printed(capsys, inspect.SHOW, folder, 2)


@pytest.mark.parametrize("file", ["000001_item_embeddings.tar", "000001_item_embeddings.idx.npy"])
def test_verify_reads_the_stores(folder, capsys, file):
    assert "3 samples in 2 shards are intact" in printed(capsys, inspect.VERIFY, folder, "--processes", 1)
    data = bytearray((folder / file).read_bytes())
    data[-100] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(PipelineError, match=rf"is not intact:\n.*{file}: its sha256 is not the index's$"):
        run(inspect.VERIFY, folder, "--processes", 1)
    (folder / file).unlink()
    with pytest.raises(PipelineError, match=f"{file}: there is no such file$"):
        run(inspect.VERIFY, folder, "--processes", 1)


def test_verify_lists_all_damaged_stores(folder):
    write_neighbours(str(folder), Index.load(str(folder)), np.arange(3), 2, {})
    mine(folder, folder, teacher=None, overwrite=True)
    run(inspect.VERIFY, folder, "--processes", 1)
    for name in ("item_embeddings.json", "000000.mined.npy", "000001.mined.npy", "neighbours.npy"):
        content = bytearray((folder / name).read_bytes())
        content[-20] ^= 1
        (folder / name).write_bytes(content)
    (folder / "000001.mined.npy").unlink()
    with pytest.raises(PipelineError, match="is not intact") as error:
        run(inspect.VERIFY, folder, "--processes", 1)
    found = [line.removeprefix(f"{folder}/").split()[0].strip(":") for line in str(error.value).splitlines()[1:]]
    assert found == ["item_embeddings.json", "000000.mined.npy", "000001.mined.npy", "neighbours.npy"]


def test_verify_refuses_vectors_of_other_shards(folder):
    write_shards([Pair("0", "D", "", Item("c"), Item("t"))], folder, dataset="D")
    with pytest.raises(PipelineError, match=r"item_embeddings\.json has 2 shards, but .* has 1: embed its items again"):
        run(inspect.VERIFY, folder, "--processes", 1)


def test_mined_negatives_are_named_shown_and_verified(tmp_path, capsys):
    write_datasets(tmp_path)
    folder = tmp_path / "first"
    mine(folder, folder, teacher=None)
    index = MinedIndex.load(str(folder))
    found = printed(capsys, inspect.STATS, folder)
    assert f"mined.json: {index.total('mined'):,} mined negatives of 88 queries by texts, mean similarity 0." in found
    shown = printed(capsys, inspect.SHOW, folder, 2)
    first = references(tmp_path, "first")[2][0]
    line = (
        f"mined negative the target of sample {first['sample']} of shard {first['shard']}, score {first['score']:.4f}"
    )
    assert line in shown and shown.count("mined negative") == 3
    mine(tmp_path, tmp_path, teacher=None, among="all", overwrite=True)
    assert " of 'second', score " in " ".join(printed(capsys, inspect.SHOW, folder, i) for i in range(10))
    file = folder / index.parts[0].file
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(PipelineError, match=rf"is not intact:\n.*{file.name}: its sha256 is not the index's$"):
        run(inspect.VERIFY, folder, "--processes", 1)
