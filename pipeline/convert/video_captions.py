"""Convert a folder of videos and a file of captions: the video is the query, a caption the target."""

import argparse
from pathlib import Path

from pipeline.convert.command import check_query, conversion, local_path
from pipeline.convert.rows import CaptionedFiles, ImageFolder, Rows, folder
from pipeline.data.captions import captioned_videos
from pipeline.data.sample import VIDEO_MARK, VIDEO_SUFFIXES, Item
from pipeline.errors import PipelineError
from pipeline.storage.documents import utf8_text

DESCRIPTION = """\
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    query = f"{VIDEO_MARK}\nDescribe the video."
    parser.add_argument("--query", default=query, metavar="TEXT", help=f"query of all pairs (default {query!r})")
    parser.add_argument("--dataset", metavar="NAME", help="name of the dataset (default: that of the folder)")


def datasets(arguments: argparse.Namespace) -> dict[str, Rows]:
    """Return the URL of the dataset and its rows."""
    videos = folder(arguments.source)
    check_query(arguments.query, VIDEO_MARK)
    captions = _captions(arguments.captions, arguments.split, arguments.language)
    if arguments.list is not None:
        names = (line.strip() for line in _text(arguments.list).split("\n"))
        wanted = dict.fromkeys(_without_suffix(name) for name in names if name)
        captions = {video: texts for video, texts in captions.items() if _without_suffix(video) in wanted}
        found = set(map(_without_suffix, captions))
        captions |= {name: [] for name in wanted if name not in found}  # they will be rejected
    if not any(captions.values()):
        raise PipelineError(f"{arguments.captions} has no captions of the selected videos")
    dataset = arguments.dataset or videos.resolve().name
    rows = CaptionedVideos(dataset, ImageFolder(videos), list(captions.items()), arguments.query)
    rows.note_skipped(arguments.captions)
    return {arguments.dest: rows}


class CaptionedVideos(CaptionedFiles):
    """Rows of (name of a video, its captions), in the order of their first appearance."""

    def path(self, name: str) -> str:
        """Return the path of the video's file. The name may lack the suffix."""
        if _without_suffix(name) != name:
            return name
        files = (f"{name}.{suffix}" for suffix in VIDEO_SUFFIXES)
        return next((file for file in files if self.folder.size(file)), name)

    def item(self, path: str) -> Item:
        return Item(self.query, video=self.folder.read_video(path))

    def name(self, number: int) -> str:
        return f"video {super().name(number)}"


def _captions(file: Path, split: str | None, language: str) -> dict[str, list[object]]:
    """Read video -> captions from a file in one of the forms above."""
    if file.suffix not in (".json", ".csv"):
        raise PipelineError(
            f"{file} is neither .json nor .csv; for MSVD use video_corpus.csv, since a pickle can execute any code"
        )
    try:
        return captioned_videos(str(file), _text(file), split, language)
    except ValueError as error:
        raise PipelineError(f"{file} has none of the forms that --help describes: {error}") from None


def _text(file: Path) -> str:
    try:
        return utf8_text(file.read_bytes())
    except OSError as error:
        raise PipelineError(f"{file}: {error}") from None
    except ValueError as error:
        raise PipelineError(f"{file} {error}") from None


def _without_suffix(video: str) -> str:
    stem, _, suffix = video.rpartition(".")
    return stem if suffix.lower() in VIDEO_SUFFIXES else video


COMMAND = conversion(DESCRIPTION, add_arguments, datasets)
