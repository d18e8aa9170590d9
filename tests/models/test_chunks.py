import numpy as np
import pytest
import torch

from pipeline.data.collate import Encoded, Image
from pipeline.models.chunks import embed_chunks, plan_chunks

CPU = torch.device("cpu")


def encoded(length: int, image: bool = False) -> Encoded:
    tile = Image(np.zeros((1, 3, 4, 4), np.uint8), 4, 4)
    return Encoded(np.full(length, length, np.int32), (tile,) if image else ())


@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_chunks_hold_every_item_once_within_the_budget(budget):
    lengths = np.random.default_rng(0).integers(1, 60, 50).tolist()
    chunks = plan_chunks([encoded(n) for n in lengths], budget, CPU)
    assert sorted(torch.cat([chunk.rows for chunk in chunks]).tolist()) == list(range(50))
    for chunk in chunks:
        assert chunk.packed.lengths == tuple(lengths[row] for row in chunk.rows)
        assert len(chunk.rows) == 1 or len(chunk.rows) * max(chunk.packed.lengths) <= budget


def test_short_items_do_not_share_a_chunk_with_a_long_one():
    """Attention pads a chunk's items to its longest: 100 short ones beside one of 3000 would be 300,000 tokens."""
    chunks = plan_chunks([encoded(40)] * 100 + [encoded(3000)], 4000, CPU)
    assert [len(chunk.rows) for chunk in chunks] == [1, 100]


def test_chunks_say_whether_they_have_images():
    chunks = plan_chunks([encoded(9, image=True), encoded(8), encoded(7)], 9, CPU)
    assert [chunk.with_images for chunk in chunks] == [True, False, False]


def test_embeddings_come_in_the_items_order():
    lengths = [5, 30, 2, 17]

    def model(packed, with_images, features):
        return torch.tensor(packed.lengths, dtype=torch.float32)[:, None].expand(-1, 3)

    chunks = plan_chunks([encoded(n) for n in lengths], 20, CPU)
    assert embed_chunks(model, chunks, 4)[:, 0].tolist() == lengths
