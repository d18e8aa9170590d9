"""Caption files with additional, different or damaged fields."""

import json
import math

import pytest

from pipeline.data.captions import captioned_images, captioned_videos, usable_captions
from pipeline.errors import PipelineError

KARPATHY = {"filename": "a.jpg", "filepath": "val", "split": "test", "sentences": [{"raw": "a", "tokens": ["a"]}]}


def images(**changes):
    return json.dumps({"images": [KARPATHY | changes]}).encode()


def test_unread_keys_are_listed_once(capsys):
    expected = [("val/a.jpg", ["a"])]
    assert captioned_images("K.json", b"\xef\xbb\xbf" + images(imgid=3, cocoid=4), "test") == expected
    assert capsys.readouterr().err == ""
    assert captioned_images("K.json", images(licence_of_k=1), "test") == expected
    assert captioned_images("K.json", images(licence_of_k=1), "test") == expected
    assert capsys.readouterr().err == "note: nothing reads the key licence_of_k of K.json\n"
    text = json.dumps([{"video": "v", "caption": "c", "origin_of_own": "x"}])
    assert captioned_videos("own.json", text) == {"v": ["c"]}
    assert capsys.readouterr().err == "note: nothing reads the key origin_of_own of own.json\n"


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({k: v for k, v in KARPATHY.items() if k != "filepath"} | {"file_path": "val"}, "'file_path'.*mean filepath"),
        (KARPATHY | {"caption": "another"}, "'caption', which nothing reads"),
        (KARPATHY | {"sentences": [{"raw": "a", "text": "b"}]}, "'text', which nothing reads"),
    ],
)
def test_keys_that_would_change_image_captions_are_refused(form, said):
    with pytest.raises(PipelineError, match=f"K.json has the key {said}"):
        captioned_images("K.json", json.dumps({"images": [form]}).encode(), "test")


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("v.json", '[{"video": "v", "caption": "c", "start": 3}]', "v.json has the key 'start', which nothing reads"),
        ("v.json", '[{"Video": "v", "caption": "c"}]', "v.json has the key 'Video', .*mean video"),
        ("v.csv", "Video_ID,sentence\nv,c\n", "v.csv has the column 'Video_ID', .*mean video_id"),
        ("v.csv", "video_id,sentence,sentence\nv,c,d\n", "v.csv has the column 'sentence' twice"),
        ("v.csv", "video_id,sentence,start\nv,c,3\n", "v.csv has the column 'start', which nothing reads"),
    ],
)
def test_keys_that_would_change_video_captions_are_refused(file, text, said):
    with pytest.raises(PipelineError, match=said):
        captioned_videos(file, text)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("v.csv", "video_id,sentence\nv,one man, two dogs\n", "line 2 does not have the fields of the first line"),
        ("v.csv", 'video_id,sentence\nv,"c\nw,d\n', "line 3 does not have the fields .*: .* close each quote"),
        ("v.csv", "video_id,sentence\nv,c\nw\n", "line 3 does not have the fields of the first line"),
        ("v.csv", f'video_id,sentence\nv,"{"c" * 200_000}\n', "line [0-9]+: field larger than field limit"),
        ("v.csv", f'"{"c" * 200_000}', "line [0-9]+: field larger than field limit"),
        ("v.json", '{"v": ["c"], "v": ["d"]}', "has the key 'v' twice"),
        ("v.json", "<html></html>", "v.json is HTML or XML"),
        ("v.json", "", "v.json is empty"),
    ],
)
def test_what_would_lose_a_caption_is_an_error(file, text, said):
    with pytest.raises((ValueError, PipelineError), match=said):
        captioned_videos(file, text)


def test_invalid_captions_do_not_discard_valid_ones(caplog):
    values = [None, math.nan, 7, "c"]
    assert str(captioned_images("K.json", images(sentences=[{"raw": each} for each in values]), "test")[0][1]) == (
        "[None, nan, 7, 'c']"
    )
    assert captioned_images("K.json", images(sentences=None, filepath=None), "test") == [("a.jpg", [])]
    assert usable_captions(values) == (["c"], [("no caption", "7 is not a text")])
    nothing = ["\u200b", " \u2060\ufeff", "\u00ad"]  # invisible characters
    assert usable_captions([*nothing, "c"]) == (
        ["c"],
        [("empty text", repr(text.replace("\ufeff", ""))) for text in nothing],
    )
    assert usable_captions([" a\n", "b ", "a", "  "]) == ([" a\n", "b "], [])
    listed = [{"video": "v", "caption": "c"}, {"video": None, "caption": "d"}, {"video": "w"}, None]
    assert captioned_videos("own.json", json.dumps(listed)) == {"v": ["c"], "(None is not a file name)": ["d"], "w": []}
    videos = {"videos": [{"video_id": "v", "split": "test"}, {}], "sentences": []}
    videos["sentences"] += [{"video_id": name, "caption": "c"} for name in ("v", "w", None)] + [{"video_id": "v"}]
    assert captioned_videos("M.json", json.dumps(videos), "test") == {"v": ["c"]}
    assert caplog.messages == ["2 captions of M.json belong to videos without a split and are skipped"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_delimiter_is_detected_from_header(delimiter):
    rows = [["video_id", "sentence"], ["v", "a man"], ["v", '"a dog, and; a\tcat"']]
    text = "\n".join(delimiter.join(row) for row in rows)
    assert captioned_videos("v.csv", text) == {"v": ["a man", "a dog, and; a\tcat"]}
