"""Captions of images and videos, from the files in which datasets are published."""

import csv
from collections.abc import Iterable
from io import StringIO

from pipeline.data.sample import BYTE_ORDER_MARK, is_absent, text_fault
from pipeline.errors import PipelineError
from pipeline.storage.documents import DocumentError, check_members, note, parse_json

_AGAIN = "download it again, or mend it"
# What files in the published forms have, read or not.
_KARPATHY = ("filename", "filepath", "split", "sentences", "imgid", "sentids", "cocoid")
_SENTENCE = ("raw", "tokens", "imgid", "sentid")
_MSRVTT_VIDEO = ("video_id", "split", "category", "url", "start time", "end time", "id")
_MSRVTT_SENTENCE = ("video_id", "caption", "sen_id")
_MSRVTT_CSV = ("video_id", "sentence", "key", "vid_key")
_MSVD_CSV = ("VideoID", "Start", "End", "Language", "Description", "WorkerID", "Source", "AnnotationTime")
# In the name of a key that is of none of these forms: it would change which caption is of what.
_MATTERS = "caption|sentence|description|conversation|text|start|end|begin|split|lang"


def usable_captions(values: Iterable[object]) -> tuple[list[str], list[tuple[str, str]]]:
    """The captions among these values, each once and without white space around it, and why others are none.

    A caption is a text that `text_fault` has nothing against. What is empty counts as nothing.
    """
    texts, faults = [], []
    for value in values:
        if not isinstance(value, str):
            if not is_absent(value):
                faults.append(("no caption", f"{value!r} is no text"))
        elif text := value.replace(BYTE_ORDER_MARK, "").strip():
            if fault := text_fault(text):
                faults.append(fault)
            else:
                texts.append(text)
    return list(dict.fromkeys(texts)), faults


def captioned_images(file: str, data: bytes, split: str) -> list[tuple[str, list[object]]]:
    """(path of an image, its captions) of a split, from Karpathy's JSON; train includes restval.

    What should be a caption may be anything, for one that is none must not cost the others. An image of no split is
    said on stderr. Raises PipelineError, which names `file`, if there is no such split; ValueError if the form is
    another.
    """
    try:
        listed = parse_json(data, file, remedy=_AGAIN, nan=True)["images"]
        images = [each for each in listed if isinstance(each, dict) and isinstance(each.get("split"), str)]
        if not images:
            raise ValueError("none of its images has a split")
        check_keys(file, images, _KARPATHY)
        check_keys(file, (each for image in images for each in _listed(image.get("sentences"))), _SENTENCE)
    except (DocumentError, ValueError, KeyError, TypeError) as error:
        raise ValueError(_reason(error)) from None
    if without := len(listed) - len(images):
        note(f"{without} of the images of {file} are left out, for they have no split")
    wanted = {split} | ({"restval"} if split == "train" else set())
    rows = [_captioned(image) for image in images if image["split"] in wanted]
    if not rows:
        raise PipelineError(f"{file} has no split {split!r}: it has {', '.join(sorted({i['split'] for i in images}))}")
    return rows


def _captioned(image: dict) -> tuple[str, list[object]]:
    folder, name = image.get("filepath"), file_name(image.get("filename"))
    path = name if is_absent(folder) else f"{file_name(folder)}/{name}"
    sentences = _listed(image.get("sentences"))
    return path.lstrip("/"), [each.get("raw") if isinstance(each, dict) else each for each in sentences]


def file_name(value: object) -> str:
    """The name of a file; one that no file has, if it is no text."""
    return value if isinstance(value, str) else f"({value!r} is no file's name)"


def _listed(value: object) -> list[object]:
    """What stands where a list should, as one."""
    if isinstance(value, list):
        return value
    return [] if is_absent(value) else [value]


def captioned_videos(
    file: str, text: str, split: str | None = None, language: str = "English"
) -> dict[str, list[object]]:
    """Video -> its captions, from the text of a .csv or .json file in one of the published forms, or one's own.

    MSR-VTT    .json        {"videos": [{"video_id", "split"}], "sentences": [{"video_id", "caption"}]}
    MSR-VTT    .csv (1k-A)  columns video_id, sentence
    MSVD       .csv         columns VideoID, Start, End, Language, Description
    one's own  .json        [{"video", "caption": "..." or ["...", ...]}, ...] or {"video": ["...", ...], ...}

    What should be a caption may be anything, as of `captioned_images`. Captions of videos of no split are said on
    stderr, if one is asked for. Raises PipelineError, which names `file`, if there is no such split; ValueError if the
    form is another, or no caption is a text.
    """
    splits: dict[str, str] = {}
    try:
        if file.endswith(".csv"):
            pairs = _csv_pairs(file, text, language)
        else:
            match parse_json(text, file, remedy=_AGAIN, nan=True):
                case {"videos": list(videos), "sentences": list(sentences)}:
                    check_keys(file, videos, _MSRVTT_VIDEO)
                    check_keys(file, sentences, _MSRVTT_SENTENCE)
                    splits = {file_name(_get(video, "video_id")): str(_get(video, "split") or "") for video in videos}
                    pairs = [(_get(sentence, "video_id"), _get(sentence, "caption")) for sentence in sentences]
                case dict(videos):
                    pairs = list(videos.items())
                case videos:
                    check_keys(file, videos, ("video", "caption"))
                    pairs = [(_get(video, "video"), _get(video, "caption")) for video in videos]
    except (DocumentError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(_reason(error)) from None
    named = [(file_name(video), _listed(texts)) for video, texts in pairs]
    if named and not any(isinstance(text, str) for _, texts in named for text in texts):
        video, texts = next((each for each in named if each[1]), named[0])
        raise ValueError(f"captions of {video!r} that are neither a text nor a list of texts: {texts!r}"[:300])
    if split is not None and split not in splits.values():
        raise PipelineError(
            f"{file} has no split {split!r}: it has {', '.join(sorted(set(splits.values()) - {''})) or 'none'}"
        )
    if split is not None and (without := sum(not splits.get(video) for video, _ in named)):
        note(f"{without} of the captions of {file} are left out, for their videos have no split")
    captions: dict[str, list[object]] = {}
    for video, texts in named:
        if split is None or splits.get(video) == split:
            captions.setdefault(video, []).extend(texts)
    return captions


def _get(entry: object, key: str) -> object:
    return entry.get(key) if isinstance(entry, dict) else None


def _reason(error: Exception) -> str:
    return str(error) if type(error) in (DocumentError, ValueError) else repr(error)


def check_keys(file: str, objects: Iterable[object], known: tuple[str, ...]) -> None:
    """Look at all keys that objects of a file of captions have; see `check_members`."""
    keys = dict.fromkeys(key for each in objects if isinstance(each, dict) for key in each)
    check_members(file, keys, known, kind="key", matters=_MATTERS)


def _csv_pairs(file: str, text: str, language: str) -> list[tuple[str, str]]:
    lines = StringIO(text, newline=None)  # whatever they end by
    header = lines.readline()
    lines.seek(0)
    rows = csv.DictReader(lines, delimiter=max(",;\t", key=header.count))
    known = _MSRVTT_CSV if "sentence" in (rows.fieldnames or ()) else _MSVD_CSV
    check_members(file, rows.fieldnames or (), known, matters=_MATTERS)
    found = []
    for row in rows:
        if broken := next((each for each in row.values() if isinstance(each, str) and "\n" in each), None):
            raise ValueError(
                f"a field that ends on line {rows.line_num} has several: is a quote open in {broken[:80]!r}?"
            )
        if None in row or None in row.values():
            raise ValueError(
                f"line {rows.line_num} has not as many fields as the first: a text with commas needs quotes"
            )
        if known is _MSRVTT_CSV:
            found.append((row["video_id"], row["sentence"]))
        elif row["Language"] == language:
            found.append((f"{row['VideoID']}_{row['Start']}_{row['End']}", row["Description"]))
    return found
