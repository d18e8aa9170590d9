from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from pipeline.data.index import load_sidecar
from pipeline.data.lengths import Lengths
from pipeline.data.sample import Item, Pair, Single
from pipeline.data.shards import write_shards
from pipeline.data.tiles import Tiling

TILING = Tiling(size=24, patches=3, pinpoints=((24, 24), (24, 48), (48, 24), (48, 48)))
LENGTHS = Lengths(TILING, video_frames=4)
SIZES = [(48, 48), (20, 60), (90, 30), (24, 24)]


def picture(number: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", SIZES[number % len(SIZES)]).save(buffer, "PNG")
    return buffer.getvalue()


def image_tokens(number: int, alone: bool) -> int:
    width, height = SIZES[number % len(SIZES)]
    return TILING.tokens(height, width, anyres=alone)


def samples() -> list[tuple[Pair | Single, int]]:
    """Return samples, each with the number of tokens of its images and videos."""
    one, two = (picture(0),), (picture(1), picture(2))
    text, video = Item("t" * 40), Item("<video>", video=b"film")
    queries = [
        (Item("q"), 0),
        (Item("q", one), image_tokens(0, True)),
        (Item("q", two), image_tokens(1, False) + image_tokens(2, False)),
        (video, TILING.video_tokens(4)),
    ]
    targets = [(text, 0), (Item("t", (picture(3),)), image_tokens(3, True)), (Item("t", two), 2 * 10)]
    negatives = [((), 0), ((Item("n", one), Item("n" * 8)), image_tokens(0, True))]
    listed = [
        (Pair(f"{q}{t}{n}", "d", "", query, target, wrong), a + b + c)
        for q, (query, a) in enumerate(queries)
        for t, (target, b) in enumerate(targets)
        for n, (wrong, c) in enumerate(negatives)
    ]
    return [*listed, (Single("single", "d", "", queries[1][0]), queries[1][1])]


def test_record_lengths_count_image_and_video_tokens(tmp_path):
    listed = samples()
    (shard,) = write_shards((sample for sample, _ in listed), tmp_path, dataset="d").shards
    lengths = LENGTHS.of_records(load_sidecar(str(tmp_path), shard))
    assert lengths.dtype == np.int64
    for (sample, wanted), length in zip(listed, lengths.tolist(), strict=True):
        texts = sum(len(item.text.encode()) for item in sample.items)
        prompts = 21 * max(len(sample.items), 2)
        assert length == wanted + texts // 4 + prompts, sample


def test_longest_alternative_sets_length(tmp_path):
    pairs = [Pair("a", "d", "", Item("q" * 4), Item("t"), (), ("x" * 80, "y"))]
    (shard,) = write_shards(pairs, tmp_path, dataset="d").shards
    assert LENGTHS.of_records(load_sidecar(str(tmp_path), shard)).tolist() == [2 * 21 + 84 // 4]
    assert LENGTHS.of_shard(shard) == 2 * 21 + 84 // 4


def test_shard_length_approximates_mean_sample_length(tmp_path):
    rng = np.random.default_rng(0)
    pairs = [
        Pair(str(i), "d", "", Item("q", (picture(int(rng.integers(4))),)), Item("t" * int(rng.integers(200))))
        for i in range(400)
    ]
    (shard,) = write_shards(pairs, tmp_path, dataset="d").shards
    lengths = LENGTHS.of_records(load_sidecar(str(tmp_path), shard))
    assert LENGTHS.of_shard(shard) == pytest.approx(lengths.mean(), rel=0.03)


def test_image_of_unknown_size_adds_no_tokens(tmp_path):
    (shard,) = write_shards([Pair("a", "d", "", Item("", (b"?",)), Item(""))], tmp_path, dataset="d").shards
    assert LENGTHS.of_records(load_sidecar(str(tmp_path), shard)).tolist() == [42]
