"""Captions of images and videos, from the files in which datasets are published."""

import csv
import json
from io import StringIO

from pipeline.errors import PipelineError


def captioned_images(file: str, data: bytes, split: str) -> list[tuple[str, list[str]]]:
    """(path of an image, its captions) of a split, from Karpathy's JSON; train includes restval.

    Raises PipelineError, which names `file`, if there is no such split; ValueError if the form is another.
    """
    try:
        images = json.loads(data)["images"]
        wanted = {split} | ({"restval"} if split == "train" else set())
        rows = [
            (
                f"{image.get('filepath', '')}/{image['filename']}".lstrip("/"),
                [each["raw"] for each in image["sentences"]],
            )
            for image in images
            if image["split"] in wanted
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(repr(error)) from None
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
            pairs = _csv_pairs(text, language)
        else:
            match json.loads(text):
                case {"videos": list(videos), "sentences": list(sentences)}:
                    splits = {video["video_id"]: str(video.get("split") or "") for video in videos}
                    pairs = [(sentence["video_id"], sentence["caption"]) for sentence in sentences]
                case dict(videos):
                    pairs = list(videos.items())
                case videos:
                    pairs = [(video["video"], video["caption"]) for video in videos]
        captions: dict[str, list[str]] = {}
        for video, texts in pairs:
            if not isinstance(texts, str | list):
                raise ValueError(f"captions of {video!r} that are neither a text nor a list of texts")
            if split is None or splits.get(video) == split:
                captions.setdefault(video, []).extend([texts] if isinstance(texts, str) else texts)
        if not all(isinstance(text, str) for video, texts in captions.items() for text in (video, *texts)):
            raise ValueError("what should be a text is none")
    except (ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
        raise ValueError(repr(error)) from None
    if split is not None and split not in splits.values():
        raise PipelineError(
            f"{file} has no split {split!r}: it has {', '.join(sorted(set(splits.values()) - {''})) or 'none'}"
        )
    return captions


def _csv_pairs(text: str, language: str) -> list[tuple[str, str]]:
    rows = list(csv.DictReader(StringIO(text)))
    if rows and "sentence" in rows[0]:
        return [(row["video_id"], row["sentence"]) for row in rows]
    # MSVD's workers left some descriptions empty.
    return [
        (f"{row['VideoID']}_{row['Start']}_{row['End']}", row["Description"] or "")
        for row in rows
        if row["Language"] == language
    ]
