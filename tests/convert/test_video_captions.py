import argparse
import io
import json
import math
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.convert import captions
from pipeline.data.index import Index, load_sidecar, read_samples
from pipeline.data.sample import Item, Pair
from pipeline.data.shards import parse_sample
from pipeline.errors import PipelineError

QUERY = "<video>\nDescribe the video."


def convert(*arguments: str | Path) -> list[Pair]:
    """Run the command and read its output."""
    parser = argparse.ArgumentParser()
    captions.VIDEOS.add_arguments(parser)
    parsed = parser.parse_args([*map(str, arguments), "--processes", "1"])
    captions.VIDEOS.run(parsed)
    return [
        parse_sample(data)
        for shard in Index.load(parsed.dest).shards
        for data in read_samples(parsed.dest, shard, load_sidecar(parsed.dest, shard))
    ]


def film(shade: int, format: str = "avi") -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as file:
        stream = file.add_stream("mpeg4", rate=5, width=32, height=32, pix_fmt="yuv420p")
        for _ in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade, np.uint8))))
        file.mux(stream.encode())
    return buffer.getvalue()


@pytest.fixture
def videos(tmp_path) -> Path:
    folder = tmp_path / "videos"
    (folder / "clips").mkdir(parents=True)
    for number in range(3):
        (folder / f"video{number}.mp4").write_bytes(film(80 * number, "mp4"))
    (folder / "id-1_2_10.avi").write_bytes(film(50))
    (folder / "clips/a.mkv").write_bytes(film(60, "matroska"))
    return folder


MSRVTT = {
    "videos": [{"video_id": f"video{n}", "split": split} for n, split in enumerate(("train", "train", "test"))],
    "sentences": [
        {"video_id": "video1", "caption": "second"},
        {"video_id": "video0", "caption": "first"},
        {"video_id": "video1", "caption": " 第二 "},
        {"video_id": "video2", "caption": "third"},
        {"video_id": "video1", "caption": "second"},
    ],
}
NO_SPLIT = {
    "videos": [{"video_id": "video0"}, {"video_id": "video1", "split": "test"}, {"video_id": "video2", "split": None}],
    "sentences": [{"video_id": "video0", "caption": "first"}],
}
ONE_K_A = 'key,vid_key,video_id,sentence\nret0,msr1,video2,a man\nret1,msr2,video0,"one, two"\n'
MSVD = """VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description
id-1,2,10,1,clean,5,English,A bird.
id-1,2,10,2,clean,5,German,Ein Vogel.
id-1,2,10,3,clean,5,English,
id-1,2,10,3,clean,5,English,A bird flies.
"""


@pytest.mark.parametrize(
    ("file", "content", "options", "captions"),
    [
        ("all.json", MSRVTT, ["--split", "train"], {"video1.mp4": ("second", " 第二 "), "video0.mp4": ("first",)}),
        ("all.json", MSRVTT, ["--list", "LIST"], {"video0.mp4": ("first",), "video2.mp4": ("third",)}),
        ("all.json", NO_SPLIT, [], {"video0.mp4": ("first",)}),
        ("1kA.csv", ONE_K_A, [], {"video2.mp4": ("a man",), "video0.mp4": ("one, two",)}),
        ("video_corpus.csv", MSVD, [], {"id-1_2_10.avi": ("A bird.", "A bird flies.")}),
        ("video_corpus.csv", MSVD, ["--language", "German"], {"id-1_2_10.avi": ("Ein Vogel.",)}),
        (
            "own.json",
            {"video0": None, "video1": [None, "x", math.nan, 7, "a <image>", "a\0b", ["deep"]], "video2": "\ufeffy"},
            ["--max-rejected", "0.5"],
            {"video1.mp4": ("x",), "video2.mp4": ("y",)},
        ),
        (
            "own.json",
            [{"video": "clips/a.mkv", "caption": "one"}, {"video": "video1", "caption": ["x", "y"]}],
            [],
            {"clips/a.mkv": ("one",), "video1.mp4": ("x", "y")},
        ),
        ("own.json", {"clips/a": ["one", "two"]}, [], {"clips/a.mkv": ("one", "two")}),
    ],
)
def test_all_caption_formats_are_converted(videos, tmp_path, file, content, options, captions):
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    (tmp_path / "list.txt").write_text("video2\nvideo0.mp4\n")
    options = [str(tmp_path / "list.txt") if option == "LIST" else option for option in options]
    pairs = convert(videos, tmp_path / "dest", "--captions", tmp_path / file, *options)
    keys = [f"{number + ('--max-rejected' in options):08d}" for number in range(len(captions))]
    assert pairs == [
        Pair(
            key,
            "videos",
            "retrieval",
            Item(QUERY, video=(videos / name).read_bytes()),
            Item(texts[0]),
            alternatives=texts[1:],
        )
        for key, (name, texts) in zip(keys, captions.items(), strict=True)
    ]


def test_unusable_videos_are_rejected_with_cause(videos, tmp_path):
    (videos / "broken.mp4").write_bytes(film(9, "mp4")[:300])
    (videos / "text.avi").write_bytes(b"#EXTM3U\n/etc/passwd")
    (tmp_path / "secret.mp4").write_bytes(film(1, "mp4"))
    names = ["video0", "broken", "text", "missing", "../secret", str(tmp_path / "secret.mp4"), "clips", "nul\0"]
    captions = {name: ["a caption"] for name in names} | {"video1": [" ", None], "video2": ["a <video> of <video>"]}
    (tmp_path / "own.json").write_text(json.dumps(captions))
    pairs = convert(videos, tmp_path / "dest", "--captions", tmp_path / "own.json", "--max-rejected", "0.9")
    assert [pair.key for pair in pairs] == ["00000000"]
    rejected = [json.loads(line) for line in (tmp_path / "dest/rejected.jsonl").read_text().splitlines()]
    assert [line["row"] for line in rejected] == [f"video {name}" for name in [*names[1:], "video1", "video2"]]
    assert [line["cause"] for line in rejected if line["row"] != "video nul\0"] == [
        "broken video",
        "broken video",
        "missing file",
        "path leaves the source",
        "path leaves the source",
        "missing file",
        "no caption",
        "marks and files differ",
    ]


def test_listed_videos_without_captions_are_rejected_by_name(videos, tmp_path):
    (tmp_path / "all.json").write_text(json.dumps(MSRVTT))
    (tmp_path / "list.txt").write_text("video9\nvideo1.mp4\n\nclips/a.mkv\nvideo0\nvideo9\n")
    more = ("--captions", tmp_path / "all.json", "--list", tmp_path / "list.txt")
    pairs = convert(videos, tmp_path / "dest", *more, "--max-rejected", "0.5")
    assert [pair.target.text for pair in pairs] == ["second", "first"]
    rejected = [json.loads(line) for line in (tmp_path / "dest/rejected.jsonl").read_text().splitlines()]
    assert [(line["row"], line["cause"]) for line in rejected] == [
        ("video video9", "no caption"),
        ("video clips/a", "no caption"),
    ]
    (tmp_path / "list.txt").write_text("video9\n")
    with pytest.raises(PipelineError, match="has no captions of the selected videos"):
        convert(videos, tmp_path / "other", *more)


@pytest.mark.parametrize(
    ("file", "content", "options", "reason"),
    [
        ("raw-captions.pkl", b"\x80\x04}\x94.", [], r"neither \.json nor \.csv; for MSVD use video_corpus\.csv: "),
        ("all.json", "{", [], r"all\.json is damaged: it is not JSON"),
        pytest.param("all.json", "[" * 200_000, [], r"all\.json is damaged: it is nested too deeply", id="deep"),
        ("all.json", "1", [], r"all\.json has none of the forms"),
        ("all.json", "[1]", [], r"all\.json has none of the forms"),
        ("all.json", '{"info": {}, "annotations": [{"caption": "a"}]}', [], "captions of 'info' are neither a text"),
        ("all.json", json.dumps(NO_SPLIT), ["--split", "train"], "has no split 'train': it has test$"),
        ("all.json", '{"videos": [{}], "sentences": []}', [], "has no captions of the selected videos"),
        ("all.json", "[]".encode("utf-16-le"), [], r"all\.json is UTF-16: convert it with iconv -f UTF-16LE -t UTF-8"),
        ("all.csv", MSVD.encode("utf-16"), [], r"all\.csv is UTF-16: convert it with iconv -f UTF-16 -t UTF-8"),
        ("all.csv", "a,b\n1,2\n", [], r"all\.csv has none of the forms"),
        pytest.param("all.csv", '"' + "c" * 200_000, [], r"all\.csv has none .*: field larger", id="quote"),
        ("all.csv", "", [], "has no captions of the selected videos"),
        ("all.json", json.dumps(MSRVTT), ["--split", "training"], "has no split 'training': it has test, train"),
        ("all.json", '{"a": "b"}', ["--split", "train"], "has no split 'train': it has none"),
        (
            "all.json",
            json.dumps(MSRVTT),
            ["--list", "/nowhere.txt"],
            "No such file.*nowhere.txt",
        ),
        ("all.json", json.dumps(MSRVTT), ["--query", "Describe it."], "must have one <video>"),
    ],
)
def test_invalid_caption_files_and_options_are_refused(videos, tmp_path, file, content, options, reason):
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((PipelineError, FileNotFoundError), match=reason):
        convert(videos, tmp_path / "dest", "--captions", tmp_path / file, *options)
    assert not (tmp_path / "dest").exists()
