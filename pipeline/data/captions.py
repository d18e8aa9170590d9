"""Captions of images and videos, from the files in which datasets are published."""

import csv
from collections.abc import Iterable
from io import StringIO

from pipeline.documents import DocumentError, check_members, parse_json
from pipeline.errors import PipelineError

_AGAIN = "download it again, or mend it"
# What files in the published forms have, read or not.
_KARPATHY = ("filename", "filepath", "split", "sentences", "imgid", "sentids", "cocoid")
_SENTENCE = ("raw", "tokens", "imgid", "sentid")
_MSRVTT_VIDEO = ("video_id", "split", "category", "url", "start time", "end time", "id")
_MSRVTT_SENTENCE = ("video_id", "caption", "sen_id")
_MSRVTT_CSV = ("video_id", "sentence", "key", "vid_key")
_MSVD_CSV = ("VideoID", "Start", "End", "Language", "Description", "WorkerID", "Source", "AnnotationTime")
# In the name of a key that is of none of these forms: it would change which caption is of what.
_MATTERS = "caption|sentence|text|start|end|begin|split|lang"


def captioned_images(file: str, data: bytes, split: str) -> list[tuple[str, list[str]]]:
    """(path of an image, its captions) of a split, from Karpathy's JSON; train includes restval.

    Raises PipelineError, which names `file`, if there is no such split; ValueError if the form is another.
    """
    try:
        images = parse_json(data, file, remedy=_AGAIN)["images"]
        _check(file, images, _KARPATHY)
        _check(file, (each for image in images for each in image["sentences"]), _SENTENCE)
        wanted = {split} | ({"restval"} if split == "train" else set())
        rows = [
            (
                f"{image.get('filepath', '')}/{image['filename']}".lstrip("/"),
                [each["raw"] for each in image["sentences"]],
            )
            for image in images
            if image["split"] in wanted
        ]
    except (DocumentError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(_reason(error)) from None
    if not rows:
        splits = sorted({str(image["split"]) for image in images})
        raise PipelineError(f"{file} has no split {split!r}: it has {', '.join(splits)}")
    return rows


def captioned_videos(file: str, text: str, split: str | None = None, language: str = "English") -> dict[str, list[str]]:
    """Video -> its captions, from the text of a .csv or .json file in one of the published forms, or one's own.

    MSR-VTT    .json        {"videos": [{"video_id", "split"}], "sentences": [{"video_id", "caption"}]}
    MSR-VTT    .csv (1k-A)  columns video_id, sentence
    MSVD       .csv         columns VideoID, Start, End, Language, Description
    one's own  .json        [{"video", "caption": "..." or ["...", ...]}, ...] or {"video": ["...", ...], ...}

    Raises PipelineError, which names `file`, if there is no such split; ValueError if the form is another.
    """
    splits: dict[str, str] = {}
    try:
        if file.endswith(".csv"):
            pairs = _csv_pairs(file, text, language)
        else:
            match parse_json(text, file, remedy=_AGAIN):
                case {"videos": list(videos), "sentences": list(sentences)}:
                    _check(file, videos, _MSRVTT_VIDEO)
                    _check(file, sentences, _MSRVTT_SENTENCE)
                    splits = {video["video_id"]: str(video.get("split") or "") for video in videos}
                    pairs = [(sentence["video_id"], sentence["caption"]) for sentence in sentences]
                case dict(videos):
                    pairs = list(videos.items())
                case videos:
                    _check(file, videos, ("video", "caption"))
                    pairs = [(video["video"], video["caption"]) for video in videos]
        captions: dict[str, list[str]] = {}
        for video, texts in pairs:
            if not isinstance(texts, str | list):
                raise ValueError(f"captions of {video!r} that are neither a text nor a list of texts")
            if split is None or splits.get(video) == split:
                captions.setdefault(video, []).extend([texts] if isinstance(texts, str) else texts)
        if not all(isinstance(text, str) for video, texts in captions.items() for text in (video, *texts)):
            raise ValueError("what should be a text is none")
    except (DocumentError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(_reason(error)) from None
    if split is not None and split not in splits.values():
        raise PipelineError(
            f"{file} has no split {split!r}: it has {', '.join(sorted(set(splits.values()) - {''})) or 'none'}"
        )
    return captions


def _reason(error: Exception) -> str:
    return str(error) if type(error) in (DocumentError, ValueError) else repr(error)


def _check(file: str, objects: Iterable[dict], known: tuple[str, ...]) -> None:
    """Look at all keys that objects of a file have; see `check_members`."""
    check_members(file, dict.fromkeys(key for each in objects for key in each), known, kind="key", matters=_MATTERS)


def _csv_pairs(file: str, text: str, language: str) -> list[tuple[str, str]]:
    header = text.partition("\n")[0]
    rows = csv.DictReader(StringIO(text), delimiter=max(",;\t", key=header.count))
    known = _MSRVTT_CSV if "sentence" in (rows.fieldnames or ()) else _MSVD_CSV
    check_members(file, rows.fieldnames or (), known, matters=_MATTERS)
    found = []
    for row in rows:
        if None in row or None in row.values():
            raise ValueError(
                f"line {rows.line_num} has not as many fields as the first: a text with commas needs quotes"
            )
        if known is _MSRVTT_CSV:
            found.append((row["video_id"], row["sentence"]))
        elif row["Language"] == language:
            found.append((f"{row['VideoID']}_{row['Start']}_{row['End']}", row["Description"]))
    return found
