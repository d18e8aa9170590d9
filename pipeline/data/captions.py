"""Read captions of images and videos from the files of published datasets."""

import csv
import logging
from collections.abc import Iterable
from io import StringIO

from pipeline.data.sample import BYTE_ORDER_MARK, distinct, is_absent, text_fault
from pipeline.errors import PipelineError
from pipeline.storage.documents import check_members, parse_json

logger = logging.getLogger(__name__)

_REMEDY = "download it again, or repair it"
# All keys of the published formats, including those that are not read.
_KARPATHY = ("filename", "filepath", "split", "sentences", "imgid", "sentids", "cocoid")
_SENTENCE = ("raw", "tokens", "imgid", "sentid")
_MSRVTT_VIDEO = ("video_id", "split", "category", "url", "start time", "end time", "id")
_MSRVTT_SENTENCE = ("video_id", "caption", "sen_id")
_MSRVTT_CSV = ("video_id", "sentence", "key", "vid_key")
_MSVD_CSV = ("VideoID", "Start", "End", "Language", "Description", "WorkerID", "Source", "AnnotationTime")
# An unknown key that matches this is an error: it may change which caption belongs to which file.
_MATTERS = "caption|sentence|description|conversation|text|start|end|begin|split|lang"


def usable_captions(values: Iterable[object]) -> tuple[list[str], list[tuple[str, str]]]:
    """Split values into usable captions, without duplicates, and (cause, detail) of each unusable value.

    A caption is usable if it is a str without a `text_fault`. Empty values are ignored. Of captions that differ only in
    the white space at their ends, the first is kept, byte for byte.
    """
    texts: list[str] = []
    faults: list[tuple[str, str]] = []
    for value in values:
        if not isinstance(value, str):
            if not is_absent(value):
                faults.append(("no caption", f"{value!r} is not a text"))
        elif (text := value.replace(BYTE_ORDER_MARK, "")).strip():
            if fault := text_fault(text):
                faults.append(fault)
            else:
                texts.append(text)
    return distinct(texts), faults


def captioned_images(file: str, data: bytes, split: str) -> list[tuple[str, list[object]]]:
    """Return (path of an image, its captions) for every image of a split in Karpathy's JSON; train includes restval.

    Captions may be any values: the caller decides which are usable. A warning counts the images without a split.
    Raises PipelineError, which names `file`, if it is damaged or the split does not exist; KeyError, TypeError or
    ValueError if it has another form.
    """
    listed = parse_json(data, file, remedy=_REMEDY, nan=True)["images"]
    images = [each for each in listed if isinstance(each, dict) and isinstance(each.get("split"), str)]
    if not images:
        raise ValueError("none of its images has a split")
    check_keys(file, images, _KARPATHY)
    check_keys(file, (each for image in images for each in _listed(image.get("sentences"))), _SENTENCE)
    if without := len(listed) - len(images):
        logger.warning("%d images of %s have no split and are skipped", without, file)
    rows = []
    for image in images:
        if image["split"] == split or (split, image["split"]) == ("train", "restval"):
            folder, name = image.get("filepath"), file_name(image.get("filename"))
            path = name if is_absent(folder) else f"{file_name(folder)}/{name}"
            sentences = _listed(image.get("sentences"))
            texts = [each.get("raw") if isinstance(each, dict) else each for each in sentences]
            rows.append((path.lstrip("/"), texts))
    if not rows:
        raise PipelineError(f"{file} has no split {split!r}: it has {', '.join(sorted({i['split'] for i in images}))}")
    return rows


def file_name(value: object) -> str:
    """Return a file name; for a value that is not a str, return a name that no file has."""
    return value if isinstance(value, str) else f"({value!r} is not a file name)"


def _listed(value: object) -> list[object]:
    if isinstance(value, list):
        return value
    return [] if is_absent(value) else [value]


def captioned_videos(
    file: str, text: str, split: str | None = None, language: str = "English"
) -> dict[str, list[object]]:
    """Return video -> captions from the text of a .csv or .json file in one of these forms:

    MSR-VTT    .json        {"videos": [{"video_id", "split"}], "sentences": [{"video_id", "caption"}]}
    MSR-VTT    .csv (1k-A)  columns video_id, sentence
    MSVD       .csv         columns VideoID, Start, End, Language, Description
    your own   .json        [{"video", "caption": "..." or ["...", ...]}, ...] or {"video": ["...", ...], ...}

    Captions may be any values, as in `captioned_images`. With a split, a warning counts the captions of videos
    without one. The errors are those of `captioned_images`; a file without any text as a caption has another form.
    """
    splits: dict[str, object] = {}
    pairs: Iterable[tuple[object, object]]
    if file.endswith(".csv"):
        pairs = _csv_pairs(file, text, language)
    else:
        match parse_json(text, file, remedy=_REMEDY, nan=True):
            case {"videos": list(videos), "sentences": list(sentences)}:
                check_keys(file, videos, _MSRVTT_VIDEO)
                check_keys(file, sentences, _MSRVTT_SENTENCE)
                splits = {file_name(_get(video, "video_id")): _get(video, "split") for video in videos}
                pairs = ((_get(sentence, "video_id"), _get(sentence, "caption")) for sentence in sentences)
            case dict(videos):
                pairs = videos.items()
            case videos:
                check_keys(file, videos, ("video", "caption"))
                pairs = ((_get(video, "video"), _get(video, "caption")) for video in videos)
    named = [(file_name(video), _listed(texts)) for video, texts in pairs]
    if named and not any(isinstance(text, str) for _, texts in named for text in texts):
        video, texts = next((each for each in named if each[1]), named[0])
        raise ValueError(f"the captions of {video!r} are neither a text nor a list of texts: {texts!r}"[:300])
    known = {each for each in splits.values() if isinstance(each, str) and each}
    if split is not None and split not in known:
        raise PipelineError(f"{file} has no split {split!r}: it has {', '.join(sorted(known)) or 'none'}")
    captions: dict[str, list[object]] = {}
    without = 0
    for name, texts in named:
        if split is None or splits.get(name) == split:
            captions.setdefault(name, []).extend(texts)
        elif splits.get(name) not in known:
            without += 1
    if without:
        logger.warning("%d captions of %s belong to videos without a split and are skipped", without, file)
    return captions


def _get(entry: object, key: str) -> object:
    return entry.get(key) if isinstance(entry, dict) else None


def check_keys(file: str, objects: Iterable[object], known: tuple[str, ...]) -> None:
    """Check all keys of the objects in a file of captions with `check_members`."""
    keys = dict.fromkeys(key for each in objects if isinstance(each, dict) for key in each)
    check_members(file, keys, known, kind="key", matters=_MATTERS)


def _csv_pairs(file: str, text: str, language: str) -> list[tuple[str, str]]:
    lines = StringIO(text, newline=None)  # with any line ends
    header = lines.readline()
    lines.seek(0)
    rows = csv.DictReader(lines, delimiter=max(",;\t", key=header.count))
    found = []
    try:
        known = _MSRVTT_CSV if "sentence" in (rows.fieldnames or ()) else _MSVD_CSV
        check_members(file, rows.fieldnames or (), known, matters=_MATTERS)
        for row in rows:
            if None in row or None in row.values() or any("\n" in field for field in row.values()):
                raise ValueError(
                    f"line {rows.line_num} does not have the fields of the first line, each on one line: quote texts "
                    "that contain the separator, and close each quote"
                )
            if known is _MSRVTT_CSV:
                found.append((row["video_id"], row["sentence"]))
            elif row["Language"] == language:
                found.append((f"{row['VideoID']}_{row['Start']}_{row['End']}", row["Description"]))
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {error}") from None
    return found
