"""How equal are the ranks' numbers of tokens, compared with a plain shuffle of the same samples?

    python benchmarks/balance.py

A mixture like MMEB's: 20 datasets of 60 to 400 blocks of 64 samples. A sample has 10 to 60 text tokens on each side and
one image of 1,200 to 3,600 tokens; in every fourth dataset it has two images. A step has 1,024 samples. In the mixture
"text", a quarter of the datasets has no images. Reported over all steps of an epoch: by how much the heaviest rank,
for which all others wait, exceeds the step's mean.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.data.dataset import Dataset
from pipeline.data.order import Order

BATCH, BLOCK, WINDOW, SHARD = 1024, 64, 16, 4000


@dataclass(frozen=True)
class Mixture:
    """Datasets, and the number of tokens of every sample, one array per shard."""

    datasets: tuple[Dataset, ...]
    tokens: list[np.ndarray]

    @classmethod
    def draw(cls, with_text: bool) -> "Mixture":
        rng = np.random.default_rng(0)
        datasets, tokens = [], []
        for number in range(20):
            images = {0: 2, 1: 0 if with_text else 1}.get(number % 4, 1)
            samples = int(rng.integers(60, 401)) * BLOCK
            lengths = rng.integers(20, 121, samples) + rng.integers(1200, 3601, (images, samples)).sum(axis=0)
            shards = np.split(lengths, range(SHARD, samples, SHARD))
            means = np.array([round(shard.mean()) for shard in shards])
            datasets.append(Dataset(str(number), np.array([len(shard) for shard in shards]), means))
            tokens += shards
        return cls(tuple(datasets), tokens)

    def order(self, lanes: int, parts: int | None, balanced: bool) -> Order:
        datasets, options = self.datasets, {"parts": parts, "seed": 1}
        if balanced:
            options["lengths"] = lambda shard, start, stop: self.tokens[shard][start:stop]
        else:
            datasets = tuple(Dataset(each.name, each.shard_samples) for each in datasets)
        return Order(datasets, BATCH, lanes, BLOCK, WINDOW, **options)

    def excess(self, order: Order, ranks: int) -> np.ndarray:
        """Return by how much the heaviest rank exceeds the mean, (steps,)."""
        flat, first = np.concatenate(self.tokens), np.cumsum([0] + [len(shard) for shard in self.tokens])
        lanes = [[self._takes(stream, lane) for lane in range(order.lanes)] for stream in order.streams]
        excess = []
        for step in range(order.steps_per_epoch):
            rows = np.concatenate([[lane[take] for lane in lanes[number]] for number, _, take in order.slices(step)], 1)
            loads = flat[first[rows[..., 0]] + rows[..., 1]].reshape(ranks, -1).sum(axis=1)
            excess.append(loads.max() / loads.mean() - 1)
        return np.array(excess)

    @staticmethod
    def _takes(stream, lane: int) -> np.ndarray:
        windows = [stream.samples_of(0, lane, index)[:, :, 1:] for index in range(stream.windows(0, lane))]
        return np.concatenate(windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    table = Table("batches", "ranks", "ours: mean", "worst", "shuffle: mean", "worst", title="heaviest rank over mean")
    for with_text in (False, True):
        mixture = Mixture.draw(with_text)
        for parts in (None, 4, 1):
            kind = "mixed" if parts is None else "homogeneous" if parts == 1 else f"interleaved:{parts}"
            for ranks in (8, 64):
                row = []
                for balanced in (True, False):
                    excess = mixture.excess(mixture.order(ranks, parts, balanced), ranks)
                    row += [f"{excess.mean():.1%}", f"{excess.max():.1%}"]
                table.add_row(kind + (", text" if with_text else ""), str(ranks), *row)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
