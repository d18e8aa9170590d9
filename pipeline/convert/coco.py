"""Images with several captions each, as Karpathy split COCO and Flickr30k."""

import argparse
from dataclasses import dataclass

import numpy as np

from pipeline.convert.command import add_images, conversion, image_folder, local_path
from pipeline.convert.rows import ImageFolder, checked_captions, member_bytes, note_captions_left_out
from pipeline.data.captions import captioned_images
from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK, Item, Pair
from pipeline.errors import PipelineError

QUERY = f"{IMAGE_MARK}\nFind an image caption describing the given everyday image."  # MMEB's
_TEXT_BYTES = 512  # of a pair's texts, about

DESCRIPTION = """\
images with their captions, as Karpathy split COCO and Flickr30k

SOURCE is dataset_coco.json or dataset_flickr30k.json, or another file in their form:

    {"images": [{"filepath": "train2014", "filename": "COCO_train2014_000000000009.jpg", "split": "train",
                 "sentences": [{"raw": "A plate of food."}, ...]}, ...]}

Images are looked for as IMAGES/filepath/filename; filepath may be left out. Each becomes one pair: the query is
--query with the image, the target its first caption; a training step that takes the pair draws one of all its
captions. A caption that is no text, or has <image> or <video> in it, is left out; an image without any other is
rejected.

    python tools/make_shards.py coco-captions dataset_coco.json s3://bucket/coco --images coco
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=local_path, help="the .json file")
    parser.add_argument("--split", default="train", metavar="NAME", help="train (with restval), val or test (train)")
    parser.add_argument("--query", default=QUERY, metavar="TEXT", help=f"of all pairs ({QUERY!r})")
    parser.add_argument("--dataset", metavar="NAME", help="the dataset's name (the file's stem)")
    add_images(parser, "SOURCE's")


def datasets(arguments: argparse.Namespace) -> dict[str, "Captions"]:
    """The one dataset of the source, by its URL."""
    if (arguments.query.count(IMAGE_MARK), arguments.query.count(VIDEO_MARK)) != (1, 0):
        raise PipelineError(f"--query {arguments.query!r} must have one {IMAGE_MARK}, and no {VIDEO_MARK}")
    folder = image_folder(arguments, arguments.images or arguments.source.parent)
    try:
        rows = captioned_images(str(arguments.source), arguments.source.read_bytes(), arguments.split)
    except ValueError as error:
        raise PipelineError(f"{arguments.source} is not in the form that --help describes: {error}") from None
    note_captions_left_out(arguments.source, rows)
    return {arguments.dest: Captions(arguments.dataset or arguments.source.stem, folder, rows, arguments.query)}


@dataclass(frozen=True)
class Captions:
    """Rows of (path of an image, its captions)."""

    dataset: str
    images: ImageFolder
    rows: list[tuple[str, list[object]]]
    query: str

    def sizes(self) -> np.ndarray:
        """(rows,) int64."""
        files = np.array([self.images.size(path) for path, _ in self.rows], np.int64)
        return member_bytes(files) + member_bytes(_TEXT_BYTES)

    def name(self, number: int) -> str:
        return self.rows[number][0]

    def sample(self, number: int) -> Pair:
        path, captions = self.rows[number]
        texts = checked_captions(captions)
        query, target = Item(self.query, (self.images.read(path),)), Item(texts[0])
        return Pair(f"{number:08d}", self.dataset, "retrieval", query, target, alternatives=tuple(texts[1:]))

    def files(self) -> dict[str, bytes]:
        return {}


COMMAND = conversion(DESCRIPTION, add_arguments, datasets)
