"""Generate the demo data: training pairs and evaluation sets of synthetic scenes, all from one seed."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.convert.command import conversion, in_range
from pipeline.convert.sharding import Rows
from pipeline.data.sample import Pair
from pipeline.demo import captioned, clips, tasks
from pipeline.storage import objects

DESCRIPTION = """\
demo data: synthetic scenes with texts, to try out everything

The same seed always gives the same data:

    DEST/train/<dataset>/   training pairs for MMEB's meta-tasks
    DEST/eval/              their evaluation sets
    DEST/clips/             video clips of moving things, with captions
    DEST/captions/train/    for LLM2CLIP: images/ with captions, texts/ (pairs of captions) and sentences/ (pairs of
                            sentences, a quarter as many); only the last two contain Chinese
    DEST/captions/eval/     short/, long/ and chinese/ (1.5 times as many images with captions), classification/, and
                            separation/ (find a caption among others that differ in one or two words)

    python tools/make_shards.py demo 0 s3://bucket/demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SEED", type=in_range(0, 1 << 63), help="the seed, a number of at least 0")
    parser.add_argument("--pairs", type=in_range(1), default=4800, metavar="N", help="pairs per dataset (default 4800)")
    parser.add_argument(
        "--queries", type=in_range(1), default=200, metavar="N", help="queries per dataset (default 200)"
    )


def datasets(arguments: argparse.Namespace) -> dict[str, Rows]:
    """Return the URL of each training set and its rows."""
    counts = dict.fromkeys(captioned.DATASETS, arguments.pairs) | {"sentences": -(-arguments.pairs // 4)}
    urls = {objects.join(arguments.dest, "train", name): name for name in tasks.DATASETS}
    urls |= {objects.join(arguments.dest, "captions/train", name): name for name in captioned.DATASETS}
    return {url: TrainingPairs(name, arguments.source, counts.get(name, arguments.pairs)) for url, name in urls.items()}


def evaluation_files(arguments: argparse.Namespace) -> Iterator[tuple[str, bytes]]:
    """Yield (URL, content) of all evaluation files."""
    for folder, module in (("eval", tasks), ("clips", clips), ("captions/eval", captioned)):
        for path, content in dict(module.evaluation_files(arguments.source, arguments.queries)).items():
            yield objects.join(arguments.dest, folder, path), content


@dataclass(frozen=True)
class TrainingPairs(Rows):
    """The first `count` pairs of a training set of the demo."""

    seed: int
    count: int

    def sizes(self) -> np.ndarray:
        return np.full(self.count, 4096)  # a rough estimate: the images are small when compressed

    def sample(self, number: int) -> Pair:
        draw = captioned.training_pair if self.dataset in captioned.DATASETS else tasks.training_pair
        return draw(self.dataset, self.seed, number)


COMMAND = conversion(DESCRIPTION, add_arguments, datasets, evaluation_files)
