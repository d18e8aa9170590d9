"""Convert images or videos with captions: each file becomes a pair of the file and its captions."""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.convert.command import (
    IMAGE_QUERY,
    add_images,
    add_names,
    check_query,
    conversion,
    image_folder,
    local_path,
)
from pipeline.convert.sharding import ImageFolder, Rejection, Rows, folder, member_bytes
from pipeline.data.captions import captioned_images, captioned_videos, usable_captions
from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK, VIDEO_SUFFIXES, Item, Pair
from pipeline.errors import PipelineError
from pipeline.storage.documents import utf8_text

logger = logging.getLogger(__name__)

_IMAGES = """\
images with captions: COCO and Flickr30k in Karpathy's splits

SOURCE is dataset_coco.json, dataset_flickr30k.json, or another file in the same form:

    {"images": [{"filepath": "train2014", "filename": "COCO_train2014_000000000009.jpg", "split": "train",
                 "sentences": [{"raw": "A plate of food."}, ...]}, ...]}

The images are IMAGES/filepath/filename; filepath is optional. Each image becomes one pair: the query is --query with
the image, and the target is its first caption; each training step draws one of all its captions. Captions that are not
texts, or contain <image> or <video>, are skipped; an image without any other caption is rejected.

    python tools/make_shards.py coco-captions dataset_coco.json s3://bucket/coco --images coco
"""
_VIDEOS = """\
videos with captions: MSR-VTT, MSVD, or your own with a JSON file

SOURCE is a folder of videos, and --captions is a file with their captions in one of these forms:

    MSR-VTT    .json             {"videos": [{"video_id", "split"}], "sentences": [{"video_id", "caption"}]}
    MSR-VTT    .csv (1k-A)       columns video_id, sentence
    MSVD       video_corpus.csv  columns VideoID, Start, End, Language, Description: VideoID_Start_End.avi
    your own   .json             [{"video": "clips/1.mp4", "caption": "..." or ["...", ...]}, ...]
    your own   .json             {"clips/1.mp4": ["...", ...], ...}

The file names a video by its path below SOURCE, with or without suffix (mp4, webm, mkv, avi, mov). Each video becomes
one pair: the query is --query with the video, and the target is its first caption; each training step draws one of all
its captions. Captions that are not texts, or contain <image> or <video>, are skipped. A video is rejected if it has no
other caption, is missing, or cannot be decoded.

    python tools/make_shards.py video-captions MSRVTT/videos s3://bucket/msr-vtt \\
        --captions MSR_VTT.json --list train_list.txt
"""


def _add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=local_path, help="the JSON file")
    parser.add_argument(
        "--split", default="train", metavar="NAME", help="train (including restval), val or test (default train)"
    )
    add_names(parser, IMAGE_QUERY, "that of the file without suffix")
    add_images(parser, "that of SOURCE")


def _add_video_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=local_path, help="the folder of videos")
    parser.add_argument(
        "--captions", type=local_path, required=True, metavar="FILE", help="a JSON or CSV file, see above"
    )
    parser.add_argument("--split", metavar="NAME", help="use only this split of MSR-VTT: train, validate or test")
    parser.add_argument(
        "--list", type=local_path, metavar="FILE", help="use only the videos that FILE names, one per line"
    )
    parser.add_argument(
        "--language", default="English", metavar="NAME", help="language of MSVD's captions (default %(default)s)"
    )
    add_names(parser, f"{VIDEO_MARK}\nDescribe the video.", "that of the folder")


def _image_datasets(arguments: argparse.Namespace) -> dict[str, Rows]:
    check_query(arguments.query, IMAGE_MARK)
    file = arguments.source
    images = image_folder(arguments, arguments.images or file.parent)
    with _form_of(file):
        captions = captioned_images(str(file), file.read_bytes(), arguments.split)
    rows = CaptionedFiles(arguments.dataset or file.stem, images, captions, arguments.query)
    rows.note_skipped(file)
    return {arguments.dest: rows}


def _video_datasets(arguments: argparse.Namespace) -> dict[str, Rows]:
    videos, file = folder(arguments.source), arguments.captions
    check_query(arguments.query, VIDEO_MARK)
    if file.suffix not in (".json", ".csv"):
        raise PipelineError(
            f"{file} is neither .json nor .csv; for MSVD use video_corpus.csv: its .pkl is not read, because a pickle "
            "can run code"
        )
    text = _text(file)
    with _form_of(file):
        captions = captioned_videos(str(file), text, arguments.split, arguments.language)
    if arguments.list is not None:
        names = (line.strip() for line in _text(arguments.list).split("\n"))
        wanted = dict.fromkeys(_without_suffix(name) for name in names if name)
        captions = {video: texts for video, texts in captions.items() if _without_suffix(video) in wanted}
        found = set(map(_without_suffix, captions))
        captions |= {name: [] for name in wanted if name not in found}  # they will be rejected
    if not any(captions.values()):
        raise PipelineError(f"{file} has no captions of the selected videos")
    dataset = arguments.dataset or videos.resolve().name
    rows = CaptionedFiles(dataset, ImageFolder(videos), list(captions.items()), arguments.query)
    rows.note_skipped(file)
    return {arguments.dest: rows}


@dataclass(frozen=True)
class CaptionedFiles(Rows):
    """Rows of (file name, captions). The query is the text `query` with the file, the target the first caption."""

    folder: ImageFolder
    rows: list[tuple[str, list[object]]]
    query: str

    @property
    def _of_videos(self) -> bool:
        return VIDEO_MARK in self.query

    def _path(self, name: str) -> str:
        """Return the path of the file in the folder. The name of a video may lack the suffix."""
        if not self._of_videos or _without_suffix(name) != name:
            return name
        files = (f"{name}.{suffix}" for suffix in VIDEO_SUFFIXES)
        return next((file for file in files if self.folder.size(file)), name)

    def sizes(self) -> np.ndarray:
        files = np.array([self.folder.size(self._path(name)) for name, _ in self.rows], np.int64)
        return 1024 + member_bytes(files)

    def name(self, number: int) -> str:
        name, _ = self.rows[number]
        return f"video {name}" if self._of_videos else name

    def sample(self, number: int) -> Pair:
        name, values = self.rows[number]
        texts, faults = usable_captions(values)
        if not texts:
            raise Rejection(*(faults[0] if faults else ("no caption", "it has none")))
        if self._of_videos:
            query = Item(self.query, video=self.folder.read_video(self._path(name)))
        else:
            query = Item(self.query, (self.folder.read(name),))
        target, *others = texts
        return Pair(f"{number:08d}", self.dataset, "retrieval", query, Item(target), alternatives=tuple(others))

    def note_skipped(self, file: Path) -> None:
        """Log how many unusable captions from `file` are skipped in rows that have usable ones."""
        found = ((name, usable_captions(values)) for name, values in self.rows)
        faults = [(name, *fault) for name, (texts, faults) in found if texts for fault in faults]
        if faults:
            first = ": ".join(faults[0])[:300]
            text = "%d unusable captions of %s are skipped; their rows have others. The first: %s"
            logger.warning(text, len(faults), file, first)


@contextmanager
def _form_of(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise PipelineError(f"{file} has none of the forms that --help describes: {reason}") from None


def _text(file: Path) -> str:
    try:
        return utf8_text(file.read_bytes())
    except ValueError as error:
        raise PipelineError(f"{file} {error}") from None


def _without_suffix(video: str) -> str:
    stem, _, suffix = video.rpartition(".")
    return stem if suffix.lower() in VIDEO_SUFFIXES else video


IMAGES = conversion(_IMAGES, _add_image_arguments, _image_datasets)
VIDEOS = conversion(_VIDEOS, _add_video_arguments, _video_datasets)
