"""Each item is embedded once, and missing ones again after any stop; see also tests/integration/test_evaluate.py."""

from functools import partial

import numpy as np
import pytest
import torch
from two_ranks import on_two_ranks

from pipeline.data.sample import BadSample, Item
from pipeline.errors import PipelineError
from pipeline.evaluation import encode
from pipeline.evaluation.encode import embed_collection
from pipeline.evaluation.store import DiskStore, MemoryStore
from pipeline.evaluation.tasks import Collection, Ranking, Retrieval, item_key


class Lengths:
    """An encoder whose vectors depend on a text's length, and that records its calls."""

    name = identity = "lengths"
    dimension, instructed = 2, True

    def __init__(self) -> None:
        self.groups = []

    def prepare(self, item: Item) -> str:
        if item.text == "broken":
            raise BadSample("undecodable")
        return item.text

    def embed(self, prepared: list[str]) -> torch.Tensor:
        self.groups.append(prepared)
        return torch.tensor([[np.cos(len(text)), np.sin(len(text))] for text in prepared]).reshape(-1, 2)


@pytest.fixture
def collection(monkeypatch) -> Collection:
    monkeypatch.setattr(encode, "GROUP", 4)
    return thirty_items()


def thirty_items() -> Collection:
    """Return two tasks that share half of the items."""
    collection = Collection()
    for number in range(30):
        collection.row(item_key(str(number)), f"item {number}", partial(Item, "x" * number))
    one = Ranking("one", "vqa", True, np.arange(3), [np.arange(3, 20)] * 3)
    right = [np.array([0])] * 2
    two = Retrieval("two", "text-image", "t2i", "en", np.array([29, 1]), np.arange(10, 29), right)
    collection.tasks += [one, two]
    return collection


def test_items_are_embedded_once_and_only_new_items_later(collection, tmp_path):
    encoder, disk = Lengths(), DiskStore(tmp_path, collection.keys, 2)
    assert embed_collection(encoder, collection, disk)
    assert sorted(len(text) for group in encoder.groups for text in group) == list(range(30))
    assert [len(group) for group in encoder.groups] == [4] * 5 + [4, 3, 3]
    for group in encoder.groups[:5]:  # long items are also distributed over the groups
        assert [len(text) // 5 for text in group] == [0, 1, 2, 3]
    expected = np.array([[np.cos(n), np.sin(n)] for n in range(30)], np.float32)
    np.testing.assert_array_equal(disk.take(np.arange(30)), expected)
    assert (len(np.load(tmp_path / "one.npy")), len(np.load(tmp_path / "two.npy"))) == (20, 10)

    collection.row(item_key("new"), "new", partial(Item, "y" * 40))
    collection.tasks.append(Ranking("three", "vqa", True, np.array([30]), [np.array([0, 29])]))
    again, disk = Lengths(), DiskStore(tmp_path, collection.keys, 2)
    embed_collection(again, collection, disk)
    assert again.groups == [["y" * 40]]
    memory = MemoryStore(31, 2)
    embed_collection(Lengths(), collection, memory)
    np.testing.assert_array_equal(memory.take(np.arange(31)), disk.take(np.arange(31)))


def test_interrupted_embedding_resumes_with_same_groups(collection, tmp_path):
    whole = Lengths()
    embed_collection(whole, collection, MemoryStore(30, 2))
    first, second, left = Lengths(), Lengths(), iter(range(3))
    stopped = embed_collection(
        first, collection, DiskStore(tmp_path, collection.keys, 2), interrupted=lambda: next(left, None) is None
    )
    assert not stopped
    assert embed_collection(second, collection, DiskStore(tmp_path, collection.keys, 2))
    assert len(first.groups) == 3
    assert first.groups + second.groups == whole.groups


def test_unusable_item_is_named(collection):
    collection.items[7] = partial(Item, "broken")
    with pytest.raises(PipelineError, match="evaluation item item 7: undecodable"):
        embed_collection(Lengths(), collection, MemoryStore(30, 2))


def test_non_unit_embeddings_are_not_stored(collection, tmp_path):
    class Overflowing(Lengths):
        def embed(self, prepared: list[str]) -> torch.Tensor:
            return super().embed(prepared) * (torch.nan if "x" * 9 in prepared else 1)

    class Wide(Lengths):
        dimension = 3

    with pytest.raises(
        PipelineError, match="lengths: the embedding of item 4 has length nan, not 1: check the model's weights"
    ):
        embed_collection(Overflowing(), collection, DiskStore(tmp_path, collection.keys, 2))
    disk = DiskStore(tmp_path, collection.keys, 2)
    assert disk.missing(np.arange(20)).tolist() == [n for n in range(20) if n % 5 == 4]  # the last of five groups
    with pytest.raises(PipelineError, match=r"returned \(4, 2\) for 4 items of 3"):
        embed_collection(Wide(), collection, MemoryStore(30, 3))
    assert embed_collection(Lengths(), collection, disk)


def _embedded_here(rank: int) -> tuple[list[list[str]], torch.Tensor]:
    """Return a rank's groups, all vectors (on rank 0), and the error that follows from rank 1's additional item."""
    encode.GROUP, encoder, collection = 4, Lengths(), thirty_items()
    store = MemoryStore(30, 2) if rank == 0 else None
    assert embed_collection(encoder, collection, store)
    if rank:
        collection.text("another")
    try:
        embed_collection(encoder, collection, store)
    except PipelineError as error:
        return encoder.groups, torch.tensor(store.vectors if store else []), str(error)
    return encoder.groups, torch.tensor(store.vectors if store else []), ""


def test_two_ranks_share_groups_and_require_equal_items(collection):
    whole, memory = Lengths(), MemoryStore(30, 2)
    embed_collection(whole, collection, memory)
    (first, vectors, _), (second, _, error) = on_two_ranks(_embedded_here)
    assert [group for both in zip(first, second, strict=True) for group in both if group] == whole.groups
    np.testing.assert_array_equal(vectors.numpy(), memory.vectors)
    assert "rank 1 found other items in the evaluation sets than rank 0" in error
