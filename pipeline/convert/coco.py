"""Convert images with several captions each: COCO and Flickr30k in Karpathy's splits."""

import argparse

from pipeline.convert.command import add_images, check_query, conversion, image_folder, local_path
from pipeline.convert.rows import CaptionedFiles, Rows
from pipeline.data.captions import captioned_images
from pipeline.data.sample import IMAGE_MARK, Item
from pipeline.errors import PipelineError

QUERY = f"{IMAGE_MARK}\nFind an image caption describing the given everyday image."  # from MMEB

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
    """Return the URL of the dataset and its rows."""
    check_query(arguments.query, IMAGE_MARK)
    folder = image_folder(arguments, arguments.images or arguments.source.parent)
    try:
        listed = captioned_images(str(arguments.source), arguments.source.read_bytes(), arguments.split)
    except ValueError as error:
        raise PipelineError(f"{arguments.source} does not have the form that --help describes: {error}") from None
    rows = CaptionedImages(arguments.dataset or arguments.source.stem, folder, listed, arguments.query)
    rows.note_skipped(arguments.source)
    return {arguments.dest: rows}


class CaptionedImages(CaptionedFiles):
    """Rows of (path of an image, its captions)."""

    def item(self, path: str) -> Item:
        return Item(self.query, (self.folder.read(path),))


COMMAND = conversion(DESCRIPTION, add_arguments, datasets)
