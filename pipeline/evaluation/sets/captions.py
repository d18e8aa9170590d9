"""Sets for retrieval of pictures or videos by captions, and of captions by pictures or videos.

A set is a folder, local or on S3. Its pictures or videos are anywhere below it, under the names in the set's files,
which are:

    msrvtt      MSRVTT_JSFUSION_test.csv (video_id, sentence: the 1,000 clips of "1k-A"; Yu et al., 2018)
                or msrvtt_test_1k.json [{"video": "video7020.mp4", "caption": "..."}, ...]
    msvd        msvd_test.json [{"video": "ID_START_END.avi", "caption": ["...", ...]}, ...]
                or test_list.txt (an ID_START_END a line) and AllVideoDescriptions.txt ("ID_START_END caption" a line)
    flickr30k   dataset_flickr30k.json, Karpathy's; the split test
    coco        dataset_coco.json, likewise; the first five captions of an image
    urban1k     caption/N.txt: its first line is the caption of image/N.jpg (Zhang et al., Long-CLIP, 2024)
    docci       docci_descriptions.jsonlines {"split", "image_file", "description"}; the split test
    sharegpt4v  share-captioner_coco_lcs_sam_1246k_1107.json, or another share*.json:
                [{"image", "conversations": [{"from", "value"}, ...]}, ...]; the first 1,000, as in Long-CLIP
    xm3600      captions.jsonl {"image/key", "<language>": {"caption": ["...", ...]}, ...}: a dataset for each language
    flickr-cn   flickr30k_cn_test.txt, or another *flickr*cn*test*.txt: "NAME#0 caption", "NAME#zhm#0 caption" or
                "NAME.jpg,caption" a line
    coco-cn     coco-cn_test.txt (a NAME a line) and imageid.human-written-caption.txt ("NAME#0 caption" a line), as in
                other evaluations, not the translated captions; or coco-cn_test.txt with the captions in it
    text-video, text-image
                your own: captions.json {"NAME": "caption" or ["caption", ...], ...}; the folder's name is the set's.

For a model that was trained with instructions other than INSTRUCTED below, a set may also have a wording.json:
{"medium": "...", "seeks_caption": "...", "seeks_medium": "..."}. Without seeks_caption, both directions compare the
same items.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.captions import captioned_images, captioned_videos, check_keys
from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK
from pipeline.errors import PipelineError
from pipeline.evaluation.sets.folder import (
    MEND,
    PICTURES,
    VIDEOS,
    Folder,
    expecting,
    plain_text,
    read_text,
    read_texts,
    stem,
)
from pipeline.evaluation.tasks import Collection, Retrieval, RetrievalKind
from pipeline.storage import objects
from pipeline.storage.documents import foreign, parse_json

WORDING_FILE = "wording.json"
_FIRST_BYTES = 4 << 20  # bytes read from a long file at first; doubled until they suffice


@dataclass(frozen=True)
class Wording:
    """The texts of the items.

    medium: of a picture or video as a candidate.
    seeks_medium: of a caption as a query; the caption replaces {}.
    seeks_caption: of a picture or video as a query, whose candidates are the bare captions; None: the queries and
        candidates of one direction are the candidates and queries of the other.
    """

    medium: str
    seeks_medium: str = "{}"
    seeks_caption: str | None = None


BARE = {"text-image": Wording(IMAGE_MARK), "text-video": Wording(VIDEO_MARK)}
# For images MMEB's instructions. For videos those of LLaVE's zero-shot evaluation (its CLIP4Clip/dataloaders/
# dataloader_msrvtt_retrieval.py and dataloader_msvd_retrieval.py), which compares the same items in both directions.
INSTRUCTED = {
    "text-image": Wording(
        seeks_medium="Find me an everyday image that matches the given caption: {}",
        medium=f"{IMAGE_MARK}\nRepresent the given image.",
        seeks_caption=f"{IMAGE_MARK}\nFind an image caption describing the given everyday image.",
    ),
    "text-video": Wording(
        seeks_medium="Find me an video that matches the given caption: {}",
        medium=f"{VIDEO_MARK}\nRepresent the given video.",
    ),
}


class Captioned(NamedTuple):
    """A picture or video with its captions by language.  medium: its name in the file with the URL `source`."""

    medium: str
    captions: dict[str, list[Any]]
    source: str


def add(
    collection: Collection,
    url: str,
    instructed: bool,
    *,
    name: str = "",
    kind: RetrievalKind,
    read: Callable[[Folder], list[Captioned]],
) -> None:
    """Add tasks in both directions for each language of the set at `url`.

    name: of the dataset, with {} for the language; default: the folder's name.
    instructed: see Encoder.

    Each caption is a separate query and candidate, even if two are equal, as in the papers. Raises PipelineError with
    the file's name if the set is incomplete: a missing picture, an empty caption, or a picture without captions in a
    language.
    """
    folder = Folder.of(url)
    letter, suffixes = ("v", VIDEOS) if kind == "text-video" else ("i", PICTURES)
    media: dict[str, Captioned] = {}  # by URL
    captions: dict[str, dict[str, list[str]]] = {}  # by language and URL
    for each in read(folder):
        found = folder.media(plain_text(each.medium, f"{each.source}: the name of a file").strip(), suffixes)
        first = media.setdefault(found, each)
        if stem(first.medium, suffixes) != stem(each.medium, suffixes):
            raise PipelineError(
                f"{each.source}: {first.medium} and {each.medium} both match {found}: add the missing file"
            )
        for language, texts in each.captions.items():
            own = captions.setdefault(language, {}).setdefault(found, [])
            own += (plain_text(text, f"{each.source}: a caption of {each.medium}") for text in texts)
    if not captions:
        raise PipelineError(f"{url}: its files list no captions, or none of the test split")
    wording = _wording(folder, kind) if instructed else BARE[kind]
    for language, by_url in captions.items():
        if missing := [each for found, each in media.items() if not by_url.get(found)]:
            raise PipelineError(f"{missing[0].source} has no caption of {missing[0].medium} ({language}): add one")
        texts = [text for own in by_url.values() for text in own]
        counts = [len(own) for own in by_url.values()]
        owners = np.repeat(np.arange(len(counts)), counts)
        captions_of = np.split(np.arange(len(texts)), np.cumsum(counts)[:-1])
        seeking = [collection.text(wording.seeks_medium.replace("{}", text)) for text in texts]
        sought, asking = (
            [collection.medium(text, each, folder.stamps[each], video=letter == "v") for each in by_url]
            for text in (wording.medium, wording.medium if wording.seeks_caption is None else wording.seeks_caption)
        )
        answers = seeking if wording.seeks_caption is None else [collection.text(text) for text in texts]
        for direction, queries, candidates, right in (
            (f"t2{letter}", seeking, sought, list(owners[:, None])),
            (f"{letter}2t", asking, answers, captions_of),
        ):
            rows = np.array(queries, np.int64), np.array(candidates, np.int64)
            collection.tasks.append(
                Retrieval(name.format(language) or folder.name, kind, direction, language, *rows, right)
            )


def _wording(folder: Folder, kind: RetrievalKind) -> Wording:
    if not (file := folder.files.get(WORDING_FILE)):
        return INSTRUCTED[kind]
    mark = BARE[kind].medium
    with expecting(
        file, f'{{"medium", "seeks_caption", "seeks_medium"}}, the first two with {mark}, the last with {{}}'
    ):
        wording = Wording(**parse_json(read_text(file), file, remedy=MEND))
        with_mark = (wording.medium, mark if wording.seeks_caption is None else wording.seeks_caption)
        if "{}" not in wording.seeks_medium or any(text.count(mark) != 1 for text in with_mark):
            raise ValueError(f"it has {wording}")
    return wording


def _msvd(folder: Folder) -> list[Captioned]:
    file = folder.named("msvd_test.json", "test_list.txt")
    if file.endswith(".json"):
        return _listed(folder, names=["msvd_test.json"])
    captions: dict[str, list[str]] = {stem(video, VIDEOS): [] for video in read_text(file).split()}
    descriptions = folder.named("AllVideoDescriptions.txt")
    for line in read_text(descriptions).split("\n"):
        video, _, caption = line.removesuffix("\r").partition(" ")
        if video in captions:
            captions[video].append(caption)
    return [Captioned(video, {"en": texts}, descriptions) for video, texts in captions.items()]


def _listed(folder: Folder, *, names: Sequence[str]) -> list[Captioned]:
    file = folder.named(*names)
    with expecting(file, "a list of names with their captions"):
        captions = captioned_videos(file, read_text(file))
    return [Captioned(video, {"en": texts}, file) for video, texts in captions.items()]


def _karpathy(folder: Folder, *, name: str) -> list[Captioned]:
    file = folder.named(name)
    with expecting(file, 'Karpathy\'s {"images": [{"filename", "split", "sentences": [{"raw"}, ...]}, ...]}'):
        images = captioned_images(file, objects.read(file), "test")
    # COCO's test split has 25,010 captions; papers and Long-CLIP's code use 25,000 of them.
    return [Captioned(image, {"en": texts[:5]}, file) for image, texts in images]


def _urban1k(folder: Folder) -> list[Captioned]:
    texts = {path: url for path, url in folder.files.items() if re.search(r"(^|/)caption/[^/]+\.txt$", path)}
    if not texts:
        raise PipelineError(f"{folder.url} has no caption/N.txt beside its image/N.jpg")
    names = {re.sub(r"caption/([^/]+)\.txt$", r"image/\1", path): url for path, url in texts.items()}
    pictures = {folder.media(name, PICTURES) for name in names}
    for path, url in folder.files.items():
        if re.search(rf"(^|/)image/[^/]+\.({'|'.join(PICTURES)})$", path, re.IGNORECASE) and url not in pictures:
            raise PipelineError(f"{url} has no caption: add its caption/N.txt, or remove it")
    contents = zip(names.items(), read_texts(list(names.values())), strict=True)
    lines = ((name, url, text.strip().split("\n")[0]) for (name, url), text in contents)
    return [Captioned(name, {"en": [line] if line else []}, url) for name, url, line in lines]


def _docci(folder: Folder) -> list[Captioned]:
    file = folder.named("docci_descriptions.jsonlines")
    with expecting(file, 'lines {"split": "...", "image_file": "...", "description": "..."}'):
        rows = _json_lines(file)
        check_keys(file, rows, ("split", "image_file", "description", "example_id", "type"))
        return [
            Captioned(row["image_file"], {"en": [row["description"]]}, file) for row in rows if row["split"] == "test"
        ]


def _sharegpt4v(folder: Folder) -> list[Captioned]:
    file = folder.named("share-captioner_coco_lcs_sam_1246k_1107.json", "share*.json")
    with expecting(file, 'a list of {"image": "...", "conversations": [{"from": "...", "value": "..."}, ...]}'):
        entries = _first(file, 1000)
        check_keys(file, entries, ("id", "image", "conversations"))
        if asked := [entry["image"] for entry in entries if entry["conversations"][1]["from"] == "human"]:
            raise ValueError(f"the second turn of {asked[0]} is no answer")
        return [
            # On one line, as in Long-CLIP's code.
            Captioned(entry["image"], {"en": [entry["conversations"][1]["value"].replace("\n", " ")]}, file)
            for entry in entries
        ]


def _xm3600(folder: Folder) -> list[Captioned]:
    file = folder.named("captions.jsonl")
    with expecting(file, 'lines {"image/key": "...", "<language>": {"caption": ["...", ...]}, ...}'):
        rows = _json_lines(file)
        check_keys(file, ({key: own for key, own in row.items() if not isinstance(own, dict)} for row in rows), _XM3600)
        check_keys(file, (own for row in rows for own in row.values()), _XM3600_CAPTIONS)
        return [
            Captioned(
                row["image/key"],
                {language: _list(own["caption"]) for language, own in row.items() if isinstance(own, dict)},
                file,
            )
            for row in rows
        ]


_XM3600 = ("image/key", "image/locale")
_XM3600_CAPTIONS = ("caption", "caption/tokenized", "caption/tokenized/lowercase")


def _list(captions: Any) -> list[Any]:
    if not isinstance(captions, list):
        raise ValueError(f"{captions!r} is no list of captions")
    return captions


# "1007129816.jpg#0 caption", "1007129816#zhm#0\tcaption", "1007129816.jpg,caption"
_NAMED_LINE = re.compile(r"(?P<name>[^\s#,]+)(#\w+)*(\s+|,)(?P<caption>.+)")


def _named_lines(folder: Folder, *, names: Sequence[str]) -> list[Captioned]:
    file = folder.named(*names)
    captions: dict[str, list[str]] = {}
    with expecting(file, 'lines "NAME#0 caption"'):
        for number, line in enumerate(map(str.strip, read_text(file).split("\n")), 1):
            if line and (number, line) != (1, "image,caption"):
                if (found := _NAMED_LINE.fullmatch(line)) is None:
                    raise ValueError(f"line {number} is {line[:80]!r}")
                captions.setdefault(found["name"], []).append(found["caption"])
    return [Captioned(name, {"zh": texts}, file) for name, texts in captions.items()]


def _coco_cn(folder: Folder) -> list[Captioned]:
    listed, written = ("coco-cn_test.txt", "*coco*cn*test*.txt"), "imageid.human-written-caption.txt"
    text = read_text(folder.named(*listed))
    if any(_NAMED_LINE.fullmatch(line.strip()) for line in text.split("\n")):
        return _named_lines(folder, names=listed)
    by_name = {each.medium: each for each in _named_lines(folder, names=[written])}
    return [by_name.get(name, Captioned(name, {"zh": []}, folder.named(written))) for name in text.split()]


def _json_lines(file: str) -> list[Any]:
    # splitlines() would also split at a U+2028 in a text.
    lines = enumerate(read_text(file).split("\n"), 1)
    return [parse_json(line, f"{file}, line {number},", dict, remedy=MEND) for number, line in lines if line.strip()]


def _first(file: str, number: int) -> list[Any]:
    """Return the first objects of a JSON list, reading little more of the file: ShareGPT4V's has 1.5 GB."""
    size, length = objects.size(file), _FIRST_BYTES
    if why := foreign(objects.read(file, 0, min(8, size))):
        raise ValueError(f"it {why}")
    while True:
        data = objects.read(file, 0, min(length, size))
        try:
            return _leading(data.decode("utf-8-sig"), number)
        except ValueError:  # the data may end inside a character or an object
            if length >= size:
                raise
            length *= 2


def _leading(text: str, number: int) -> list[Any]:
    """Return the first objects of a JSON list. Raises ValueError if the text ends before them and within the list."""
    decoder, separator = json.JSONDecoder(), re.compile(r"\s*([,\]])\s*")
    entries: list[Any] = []
    found = re.match(r"\s*(\[)\s*", text)
    while found and len(entries) < number and found[1] != "]":
        entry, position = decoder.raw_decode(text, found.end())
        entries.append(entry)
        found = separator.match(text, position)
    if found is None:
        raise ValueError("it is no list" if not entries else f"no , or ] at character {position + 1}")
    return entries


_FLICKR_CN = ("flickr30k_cn_test.txt", "*flickr*cn*test*.txt")
_MSRVTT = ("MSRVTT_JSFUSION_test.csv", "msrvtt_test_1k.json")
_own = partial(_listed, names=("captions.json",))
_images = partial(add, kind="text-image")
_videos = partial(add, kind="text-video")
# Name on the command line -> function (collection, url, instructed) that adds the set at a URL.
SETS: dict[str, Callable[..., None]] = {
    "text-video": partial(_videos, read=_own),
    "text-image": partial(_images, read=_own),
    "msrvtt": partial(_videos, name="MSR-VTT", read=partial(_listed, names=_MSRVTT)),
    "msvd": partial(_videos, name="MSVD", read=_msvd),
    "flickr30k": partial(_images, name="Flickr30k", read=partial(_karpathy, name="dataset_flickr30k.json")),
    "coco": partial(_images, name="COCO", read=partial(_karpathy, name="dataset_coco.json")),
    "urban1k": partial(_images, name="Urban1k", read=_urban1k),
    "docci": partial(_images, name="DOCCI", read=_docci),
    "sharegpt4v": partial(_images, name="ShareGPT4V", read=_sharegpt4v),
    "xm3600": partial(_images, name="XM3600 {}", read=_xm3600),
    "flickr-cn": partial(_images, name="Flickr30k-CN", read=partial(_named_lines, names=_FLICKR_CN)),
    "coco-cn": partial(_images, name="COCO-CN", read=_coco_cn),
}
