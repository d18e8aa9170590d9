"""Images with several captions each: COCO and Flickr30k in Karpathy's splits."""

import argparse
from dataclasses import dataclass

import numpy as np

from pipeline.convert.command import add_images, conversion, image_folder, local_path
from pipeline.convert.rows import ImageFolder, Rows, checked_captions, member_bytes, note_captions_left_out
from pipeline.data.captions import captioned_images
from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK, Item, Pair
from pipeline.errors import PipelineError

QUERY = f"{IMAGE_MARK}\nFind an image caption describing the given everyday image."  # MMEB's
_TEXT_BYTES = 512  # approximately, of a pair's texts

DESCRIPTION = """\
images with captions: COCO and Flickr30k in Karpathy's splits

SOURCE is dataset_coco.json, dataset_flickr30k.json, or another file in the same form:

    {"images": [{"filepath": "train2014", "filename": "COCO_train2014_000000000009.jpg", "split": "train",
                 "sentences": [{"raw": "A plate of food."}, ...]}, ...]}

The images are IMAGES/filepath/filename; filepath is optional. Each image becomes one pair: the query is --query with
the image, and the target is its first caption; each training step draws one of all its captions. Captions that are not
texts, or contain <image> or <video>, are skipped; an image without any other caption is rejected.

    python tools/make_shards.py coco-captions dataset_coco.json s3://bucket/coco --images coco
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=local_path, help="the JSON file")
    parser.add_argument(
        "--split", default="train", metavar="NAME", help="train (including restval), val or test (default train)"
    )
    parser.add_argument("--query", default=QUERY, metavar="TEXT", help=f"query of all pairs (default {QUERY!r})")
    parser.add_argument(
        "--dataset", metavar="NAME", help="name of the dataset (default: that of the file without suffix)"
    )
    add_images(parser, "that of SOURCE")


def datasets(arguments: argparse.Namespace) -> dict[str, Rows]:
    """The URL of the dataset, and its rows."""
    if (arguments.query.count(IMAGE_MARK), arguments.query.count(VIDEO_MARK)) != (1, 0):
        raise PipelineError(f"--query {arguments.query!r} must have one {IMAGE_MARK}, and no {VIDEO_MARK}")
    folder = image_folder(arguments, arguments.images or arguments.source.parent)
    try:
        rows = captioned_images(str(arguments.source), arguments.source.read_bytes(), arguments.split)
    except ValueError as error:
        raise PipelineError(f"{arguments.source} does not have the form that --help describes: {error}") from None
    note_captions_left_out(arguments.source, rows)
    return {arguments.dest: CaptionedImages(arguments.dataset or arguments.source.stem, folder, rows, arguments.query)}


@dataclass(frozen=True)
class CaptionedImages(Rows):
    """Rows of (path of an image, its captions)."""

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


COMMAND = conversion(DESCRIPTION, add_arguments, datasets)
