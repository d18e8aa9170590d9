"""The demo's batches: ranks have nearly equal numbers of tokens, according to the demo's own tokenizer and tiling."""

import numpy as np
import pytest

from pipeline.config import Data
from pipeline.data.lengths import Lengths
from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK, Pair
from pipeline.data.shards import write_shards
from pipeline.data.source import Source
from pipeline.data.tiles import Tiling
from pipeline.demo.tasks import DATASETS, training_pair
from pipeline.models.llave.processor import LlaveProcessor, train_tokenizer

PAIRS = 400  # per dataset
BATCH = 512
TILING = Tiling(size=24, patches=3, pinpoints=((24, 24), (24, 48), (48, 24), (48, 48)))


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[str, dict[tuple[str, int], int]]:
    """Return the URL of the demo's training sets, and the number of tokens of each pair."""
    folder = tmp_path_factory.mktemp("demo")
    pairs = {name: [training_pair(name, 0, index) for index in range(PAIRS)] for name in DATASETS}
    texts = (item.text for some in pairs.values() for pair in some for item in pair.items)
    tokenizer = train_tokenizer(texts, 512)
    marks = [tokenizer.convert_tokens_to_ids(mark) for mark in (IMAGE_MARK, VIDEO_MARK)]
    processor = LlaveProcessor(tokenizer, TILING, *marks, max_tokens=512)

    def tokens(pair: Pair) -> int:
        return sum(len(processor.encode(item).input_ids) for item in pair.items)

    for name, some in pairs.items():
        write_shards(some, folder / name, dataset=name, shard_bytes=1 << 20)
    return str(folder), {(name, i): tokens(pair) for name, some in pairs.items() for i, pair in enumerate(some)}


@pytest.mark.parametrize("ranks", [8, 64])
def test_rank_tokens_stay_within_10_percent_of_mean(demo, ranks):
    url, tokens = demo
    source = Source.open(Data(url=url, datasets=list(DATASETS), lanes=ranks, block_samples=16))
    order = source.order(BATCH, 0, Lengths(TILING, 8))
    first = np.cumsum([0] + [shard.samples for _, shard in source.shards])
    lengths = np.array([tokens[name, i] for name in DATASETS for i in range(PAIRS)])
    heaviest = []
    for step in range(order.steps_per_epoch):
        batch = order.batch(step).reshape(ranks, -1, 2)
        loads = lengths[first[batch[:, :, 0]] + batch[:, :, 1]].sum(axis=1)
        heaviest.append(loads.max() / loads.mean())
    assert max(heaviest) < 1.1
