import tracemalloc

import numpy as np
import pytest
import torch
import torch.distributed as dist
from two_ranks import on_two_ranks

from pipeline.data.batch import Encoded, Image
from pipeline.models.chunks import _FLAGS, embed_chunks, plan_chunks

CPU = torch.device("cpu")


def encoded(length: int, image: bool = False, size: int = 4) -> Encoded:
    tile = Image(np.zeros((1, 3, size, size), np.uint8), size, size)
    return Encoded(np.full(length, length, np.int32), (tile,) if image else ())


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_chunks_contain_each_item_once_within_the_budget(budget, padded):
    lengths = np.random.default_rng(0).integers(1, 60, 50).tolist()
    chunks = plan_chunks([encoded(n) for n in lengths], budget, CPU, padded=padded)
    assert sorted(torch.cat([chunk.rows for chunk in chunks]).tolist()) == list(range(50))
    for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
        inside = chunk.packed.lengths
        assert inside == tuple(lengths[row] for row in chunk.rows)
        assert chunk.size == (len(inside) * max(inside) if padded else sum(inside))
        assert len(chunk.rows) == 1 or chunk.size <= budget
        if following:  # its longest item did not fit
            more = following.packed.lengths[0]
            assert (chunk.size + (max(inside) if padded else more)) > budget


def test_short_items_do_not_share_a_chunk_with_a_long_one():
    """Attention pads items to the chunk's longest: 100 short ones next to one of 3000 would take 300,000 tokens."""
    chunks = plan_chunks([encoded(40)] * 100 + [encoded(3000)], 4000, CPU)
    assert [len(chunk.rows) for chunk in chunks] == [1, 100]


def test_unpadded_chunk_mixes_short_and_long_items():
    chunks = plan_chunks([encoded(40)] * 100 + [encoded(3000)], 4000, CPU, padded=False)
    assert [len(chunk.rows) for chunk in chunks] == [26, 75]


def test_tiles_are_copied_one_chunk_at_a_time():
    size = 512
    items = [encoded(20, image=True, size=size) for _ in range(30)]

    def model(packed, with_images, features):
        return packed.tiles[:, 0, 0].float()

    tracemalloc.start()
    try:
        chunks = plan_chunks(items, 100, CPU)
        assert sum(len(chunk.rows) * chunk.size for chunk in chunks) == 30 * 100
        assert tracemalloc.get_traced_memory()[1] < size**2
        embed_chunks(model, chunks, len(items))
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 5 * 3 * size**2 <= peak < 6 * 3 * size**2
    assert now < size**2


def test_with_images_is_set_per_chunk():
    chunks = plan_chunks([encoded(9, image=True), encoded(8), encoded(7)], 9, CPU)
    assert [chunk.with_images for chunk in chunks] == [True, False, False]


# For each rank its number of chunks, and which of them have images.
SEVERAL = [((3, [1]), (5, [4])), ((_FLAGS + 2, [_FLAGS + 1]), (2, [0])), ((1, []), (_FLAGS, [3])), ((0, []), (2, []))]


def agreed(rank: int) -> list[tuple[int, list[int], list[int], int]]:
    """Return of each case: chunks, those with images, those with all images, collectives per plan."""
    found, calls, all_reduce = [], [], dist.all_reduce
    dist.all_reduce = lambda *given: calls.append(given) or all_reduce(*given)
    for case in SEVERAL:
        count, images = case[rank]
        items = [encoded(2, image=number in images) for number in range(count)]
        calls.clear()
        one, all_of = (plan_chunks(items, 1, CPU, all_with_images=flag) for flag in (False, True))
        assert [len(chunk.rows) for chunk in one] == [number < count for number in range(len(one))]
        flags = [[number for number, chunk in enumerate(chunks) if chunk.with_images] for chunks in (one, all_of)]
        found.append((len(one), *flags, len(calls) / 2))
    return found


def test_ranks_agree_on_chunks_in_one_collective():
    expected = []
    for case in SEVERAL:
        most = max(count for count, _ in case)
        flags = sorted({number for _, images in case for number in images})
        expected.append((most, flags, list(range(most)), 1 + (most > _FLAGS)))
    assert on_two_ranks(agreed) == [expected, expected]


def test_embeddings_keep_the_order_of_items():
    lengths = [5, 30, 2, 17]

    def model(packed, with_images, features):
        return torch.tensor(packed.lengths, dtype=torch.float32)[:, None].expand(-1, 3)

    chunks = plan_chunks([encoded(n) for n in lengths], 20, CPU)
    assert embed_chunks(model, chunks, 4)[:, 0].tolist() == lengths
