"""The demo world: training pairs and evaluation sets drawn from a seed."""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.convert.command import conversion, positive
from pipeline.data.sample import Pair
from pipeline.demo import captioned, clips, tasks
from pipeline.storage import objects

DESCRIPTION = """\
a small world of drawn scenes, to try everything out

One seed always draws the same:

    DEST/train/<dataset>/   training pairs of MMEB's kinds
    DEST/eval/              their evaluation sets
    DEST/clips/             clips of moving things, with captions
    DEST/captions/train/    for LLM2CLIP: images/ with captions, texts/ (pairs of captions), sentences/ (a quarter as
                            many pairs of sentences); Chinese is in the last two alone
    DEST/captions/eval/     short/, long/ and chinese/ (pictures and captions, half as many again), classification/,
                            and separation/ (a caption among those that differ in one word or two)

    python tools/make_shards.py demo 0 s3://bucket/demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SEED", type=_seed, help="the seed, a number from 0 on")
    parser.add_argument("--pairs", type=positive, default=4800, metavar="N", help="pairs a dataset (default 4800)")
    parser.add_argument("--queries", type=positive, default=200, metavar="N", help="queries a dataset (default 200)")


def _seed(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def datasets(arguments: argparse.Namespace) -> dict[str, "TrainingPairs"]:
    """The training sets by the URLs they go to."""
    counts = dict.fromkeys(captioned.DATASETS, arguments.pairs) | {"sentences": -(-arguments.pairs // 4)}
    urls = {objects.join(arguments.dest, "train", name): name for name in tasks.DATASETS}
    urls |= {objects.join(arguments.dest, "captions/train", name): name for name in captioned.DATASETS}
    return {url: TrainingPairs(name, arguments.source, counts.get(name, arguments.pairs)) for url, name in urls.items()}


def evaluation_files(arguments: argparse.Namespace) -> Iterator[tuple[str, bytes]]:
    """(URL, content) of all evaluation files."""
    with tempfile.TemporaryDirectory(prefix="make-shards-", dir=arguments.tmp) as folder:
        tasks.write_evaluation(Path(folder), arguments.source, arguments.queries)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            yield objects.join(arguments.dest, "eval", path.relative_to(folder).as_posix()), path.read_bytes()
    for name, content in clips.evaluation_files(arguments.source, arguments.queries).items():
        yield objects.join(arguments.dest, "clips", name), content
    for path, content in captioned.evaluation_files(arguments.source, arguments.queries):
        yield objects.join(arguments.dest, "captions/eval", path), content


@dataclass(frozen=True)
class TrainingPairs:
    """The first `count` pairs of a training set of the demo world."""

    dataset: str
    seed: int
    count: int

    def sizes(self) -> np.ndarray:
        """(count,) int64; drawn pictures compress to next to nothing."""
        return np.full(self.count, 4096)

    def name(self, number: int) -> str:
        return f"pair {number}"

    def sample(self, number: int) -> Pair:
        draw = captioned.training_pair if self.dataset in captioned.DATASETS else tasks.training_pair
        return draw(self.dataset, self.seed, number)

    def files(self) -> dict[str, bytes]:
        return {}


COMMAND = conversion(DESCRIPTION, add_arguments, datasets, evaluation_files)
