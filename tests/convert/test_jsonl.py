"""The jsonl format: every field and file reaches the shards; every bad row is rejected with its line and the cause."""

import gzip
import io
import json
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import webdataset
from conversion import content, error_of, make_shards, picture, read_all
from PIL import Image

from pipeline.convert import jsonl
from pipeline.data.index import Index, load_sidecar
from pipeline.data.sample import Item, Pair
from pipeline.data.tiles import decode_image


def clip() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=5, width=32, height=32, pix_fmt="yuv420p")
        for shade in (0, 80, 160):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade, np.uint8))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


def row(number: int, **more: object) -> dict:
    query = {"text": "<image>\nWhat is it?", "images": [f"photos/{number}.png"]}
    return {"query": query, "target": {"text": f"thing {number} ü"}, **more}


def write(folder: Path, *rows: dict | bytes) -> Path:
    """Write these rows or raw lines to a jsonl file."""
    lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in rows]
    (folder / "pairs.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder / "pairs.jsonl"


@pytest.fixture
def source(tmp_path) -> Path:
    """Create a folder with three images, a clip and an invalid file."""
    folder = tmp_path / "source"
    (folder / "photos").mkdir(parents=True)
    for number in range(3):
        (folder / f"photos/{number}.png").write_bytes(picture(8 + number, 8))
    (folder / "clip.mp4").write_bytes(clip())
    return folder


def test_all_fields_are_converted(source, tmp_path):
    negative = {"text": "<image> or <image>", "images": ["photos/2.png", "photos/1.png"]}
    target = {"text": "<video> so", "video": "clip.mp4", "alternatives": ["other <video>", "<video>"]}
    file = write(
        source,
        row(0),
        b"",
        row(1, negatives=[negative, {"text": "no"}], task="vqa"),
        b"  ",
        {"query": {"text": "Frage\n图"}, "target": target},
    )
    make_shards("jsonl", file, tmp_path / "out")
    pictures = [(source / f"photos/{number}.png").read_bytes() for number in range(3)]
    asked = [Item("<image>\nWhat is it?", (each,)) for each in pictures]
    negatives = (Item("<image> or <image>", (pictures[2], pictures[1])), Item("no"))
    film = Item("<video> so", video=(source / "clip.mp4").read_bytes())
    assert read_all(str(tmp_path / "out")) == [
        Pair("00000001", "pairs", "", asked[0], Item("thing 0 ü")),
        Pair("00000003", "pairs", "vqa", asked[1], Item("thing 1 ü"), negatives),
        Pair("00000005", "pairs", "", Item("Frage\n图"), film, alternatives=("other <video>", "<video>")),
    ]
    assert (tmp_path / "out/rejected.jsonl").read_bytes() == b""


def test_positives_weights_and_scores_are_converted(source, tmp_path):
    image = {"text": "<image>", "images": ["photos/1.png"]}
    positives = [image | {"weight": 0.5}, {"text": "<video>", "video": "clip.mp4"}]
    target = {"text": "thing", "alternatives": ["the thing"], "weight": 2}
    negatives = [{"text": "no"}]

    def scored(entry: dict, score: float) -> dict:
        return entry | {"score": score}

    judged = {"target": scored(target, 3), "negatives": [scored(negatives[0], -0.5)]}
    file = write(
        source,
        row(0, positives=positives, negatives=negatives) | {"target": target},
        row(0, positives=[scored(positives[0], 2.5), scored(positives[1], 0)]) | judged,
        row(0) | {"target": {"text": "alone", "score": 1}},
    )
    make_shards("jsonl", file, tmp_path / "out")
    pictures = [(source / f"photos/{number}.png").read_bytes() for number in range(2)]
    right = (Item("<image>", (pictures[1],)), Item("<video>", video=(source / "clip.mp4").read_bytes()))
    asked = Item("<image>\nWhat is it?", (pictures[0],))
    first = Pair("00000001", "pairs", "", asked, Item("thing"), (Item("no"),), ("the thing",), None, right, (2, 0.5, 1))
    assert read_all(str(tmp_path / "out")) == [
        first,
        replace(first, key="00000002", scores=(3.0, 2.5, 0.0, -0.5)),
        Pair("00000003", "pairs", "", asked, Item("alone"), scores=(1.0,)),
    ]


def test_rows_are_split_by_dataset(source, tmp_path):
    """An unreadable row belongs to the dataset of the row before it, or, at the start, of the first readable row."""
    rows = [b"?", row(0, dataset="B"), row(1), b"?", row(2, dataset="A"), row(0, dataset="B"), b"?"]
    file = write(source, *rows)
    make_shards("jsonl", file, tmp_path / "out", "--dataset", "Rest", "--images", source, "--max-rejected", 0.9)
    keys = {name: [pair.key for pair in read_all(str(tmp_path / "out" / name))] for name in ("A", "B", "Rest")}
    assert keys == {"A": ["00000005"], "B": ["00000002", "00000006"], "Rest": ["00000003"]}
    rejected = {name: lines(tmp_path / "out" / name) for name in keys}
    assert rejected == {"A": [], "B": ["line 1", "line 7"], "Rest": ["line 4"]}
    assert Index.load(str(tmp_path / "out/B")).dataset == "B"


def lines(folder: Path) -> list[str]:
    return [json.loads(line)["row"] for line in (folder / "rejected.jsonl").read_text().splitlines()]


TEXT = {"text": "t"}


def asking(text: str, **files: object) -> dict:
    return {"query": {"text": text, **files}, "target": TEXT}


BAD_ROWS = [
    (b'{"query": ', "not JSON", "EOF while parsing a value at column"),
    (b'{"query": {"text": "\\ud800"}, "target": {"text": "t"}}', "not JSON", "hex escape at column 27"),
    (b"[" * 100_000, "not JSON", "recursion"),
    (b'{"query": {"text": "\xff"}, "target": {"text": "t"}}', "not UTF-8", "byte 21 of the line"),
    (b"[]", "wrong fields", "object"),
    ({"query": TEXT}, "wrong fields", "target is missing"),
    ({"query": TEXT, "target": TEXT, "negative": []}, "wrong fields", "negative is unknown, did you mean negatives?"),
    ({"query": TEXT, "target": {"text": "t", "image": "x"}}, "wrong fields", "image is unknown, did you mean images?"),
    ({"query": TEXT, "target": TEXT, "Negatives": []}, "wrong fields", "Negatives is unknown, did you mean negatives?"),
    ({"query": TEXT, "target": TEXT, "negatives": [{"txt": "t"}]}, "wrong fields", "negatives.0.txt is unknown"),
    ({"query": TEXT, "target": TEXT, "weight": 3}, "wrong fields", "weight is unknown: the known ones are query, t"),
    (b'{"query": {"text": "a", "text": "b"}, "target": {"text": "t"}}', "wrong fields", "has the key 'text' twice"),
    (
        {"query": {"text": "t", "alternatives": []}, "target": TEXT},
        "wrong fields",
        "query.alternatives is unknown",
    ),
    ({"query": TEXT, "target": {"text": 1}}, "wrong fields", "target.text"),
    ({"query": TEXT, "target": TEXT, "dataset": "../up"}, "wrong fields", "dataset"),
    ({"query": TEXT, "target": TEXT, "negatives": [TEXT] * 256}, "wrong fields", "negatives"),
    (asking("<image>" * 256, images=["photos/0.png"] * 256), "wrong fields", "query.images"),
    (
        {"query": TEXT, "target": TEXT, "negatives": 2 * [{"text": "<image>" * 128, "images": ["photos/0.png"] * 128}]},
        "wrong fields",
        "more than 255",
    ),
    ({"query": TEXT, "target": TEXT, "positives": [TEXT], "negatives": [TEXT] * 255}, "wrong fields", "more than 255"),
    ({"query": TEXT, "target": TEXT, "positives": [TEXT | {"score": 1}]}, "wrong fields", "has a score for only some"),
    ({"query": TEXT, "target": TEXT | {"score": 1}, "negatives": [TEXT]}, "wrong fields", "has a score for only some"),
    ({"query": TEXT | {"score": 1}, "target": TEXT}, "wrong fields", "query.score is unknown"),
    ({"query": TEXT, "target": TEXT, "negatives": [TEXT | {"weight": 1}]}, "wrong fields", "negatives.0.weight is unk"),
    ({"query": TEXT, "target": TEXT | {"weight": 0}}, "wrong fields", "target.weight"),
    ({"query": TEXT, "target": TEXT | {"score": True}}, "wrong fields", "target.score"),
    (b'{"query": {"text": "q"}, "target": {"text": "t", "score": 1e999}}', "wrong fields", "target.score"),
    ({"query": TEXT, "target": TEXT, "positives": [{"text": ""}]}, "empty text", "''"),
    ({"query": TEXT, "target": {"text": " "}}, "empty text", "' '"),
    ({"query": TEXT, "target": TEXT, "negatives": [TEXT, {"text": ""}]}, "empty text", "''"),
    ({"query": TEXT, "target": {"text": "t", "alternatives": [""]}}, "empty text", "''"),
    (asking("a\0b"), "NUL character", "is its file UTF-16? Convert it to UTF-8: 'a\\x00b'"),
    (b'{"query": {"text": NaN}, "target": {"text": "t"}}', "wrong fields", "query.text"),
    (asking("<image>"), "marks and files differ", "1 <image> for 0 files"),
    (asking("t", images=["photos/0.png"]), "marks and files differ", "0 <image> for 1 files"),
    (asking("<video>"), "marks and files differ", "1 <video> for 0 files"),
    (asking("t", video="clip.mp4"), "marks and files differ", "0 <video> for 1 files"),
    ({"query": TEXT, "target": {"text": "t", "alternatives": ["<image>"]}}, "marks and files differ", "1 <image>"),
    (row(9), "missing file", "photos/9.png is not in "),
    (asking("<image>", images=["photos/0.JPG"]), "missing file", "; 0.png is there"),
    (asking("<image>", images=["photos"]), "missing file", "is not a file"),
    (asking("<image>", images=["photos/0\0.png"]), "missing file", "'photos/0\\x00.png'"),
    (asking("<image>", images=["circle"]), "missing file", "circle"),
    (asking("<image>", images=["x" * 260]), "unreadable file", "File name too long"),
    (asking("<image>", images=["pipe"]), "missing file", "pipe"),
    (asking("<video>", video="photos/9.mp4"), "missing file", "photos/9.mp4"),
    (asking("<image>", images=["../secret.png"]), "path leaves the source", "../secret.png"),
    (asking("<image>", images=["{secret}"]), "path leaves the source", "/secret.png"),
    (asking("<image>", images=["photos/link.png"]), "path leaves the source", "photos/link.png"),
    (asking("<video>", video="../secret.png"), "path leaves the source", "../secret.png"),
    (asking("<image>", images=["broken.png"]), "broken image", "broken.png: undecodable image: not a PNG or JPEG"),
    (asking("<image>", images=["cut.png"]), "broken image", "cut.png"),
    (asking("<image>", images=["huge.png"]), "broken image", "huge.png"),
    (asking("<image>", images=["clip.mp4"]), "broken image", "clip.mp4"),
    (asking("<video>", video="photos/0.png"), "broken video", "photos/0.png"),
]


def huge_png() -> bytes:
    """Return the header of an image of 60,000 x 60,000 pixels, which would take 10 GB."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def test_hostile_rows_are_rejected_without_touching_other_files(source, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(9, 9))
    (source / "photos/link.png").symlink_to(secret)
    (source / "circle").symlink_to(source / "circle")
    (source / "broken.png").write_bytes(b"no picture")
    (source / "cut.png").write_bytes(picture(64, 64)[:-2000])
    (source / "huge.png").write_bytes(huge_png())
    os.mkfifo(source / "pipe")
    rows = [bad for bad, _, _ in BAD_ROWS]
    file = write(source, *rows, row(0))
    file.write_bytes(file.read_bytes().replace(b"{secret}", str(secret).encode()))
    before = listing(tmp_path)
    dest = tmp_path / "out"
    make_shards("jsonl", file, dest, "--max-rejected", 0.99)
    assert {name: data for name, data in listing(tmp_path).items() if not name.startswith("out/")} == before
    assert [each.target.text for each in read_all(str(dest))] == ["thing 0 ü"]
    rejected = [json.loads(line) for line in (dest / "rejected.jsonl").read_text().splitlines()]
    assert [(each["row"], each["cause"]) for each in rejected] == [
        (f"line {number}", cause) for number, (_, cause, _) in enumerate(BAD_ROWS, 1)
    ]
    for each, (_, _, detail) in zip(rejected, BAD_ROWS, strict=True):
        assert detail in each["detail"]


def listing(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_overlong_lines_are_rejected_in_bounded_memory(source, tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE", 200)
    for length in (200, 201, 399, 402, 403, 1000):
        file = write(source, row(0), b"x" * length, row(1), b"y" * length)
        places, _ = jsonl._scan(file, jsonl.ImageFolder(source), "pairs")
        assert places["pairs"][:, 0].tolist() == [1, 2, 3, 4]
        with file.open("rb") as opened:
            assert all(len(line) <= 201 for _, line in jsonl._lines(opened))
    make_shards("jsonl", file, tmp_path / "out", "--max-rejected", 0.5)
    assert [pair.key for pair in read_all(str(tmp_path / "out"))] == ["00000001", "00000003"]
    assert '"line 2", "cause": "line too long"' in (tmp_path / "out/rejected.jsonl").read_text()


def test_only_larger_images_are_reencoded(source, tmp_path):
    Image.new("RGBA", (300, 100), (200, 0, 0, 255)).save(source / "wide.png")
    (source / "edge.png").write_bytes(picture(150, 20))
    rows = [asking("<image>", images=[name]) for name in ("wide.png", "edge.png", "photos/0.png")]
    file = write(source, *rows)
    make_shards("jsonl", file, tmp_path / "out", "--image-max-side", 150, "--image-quality", 40)
    wide, edge, small = (pair.query.images[0] for pair in read_all(str(tmp_path / "out")))
    assert edge == (source / "edge.png").read_bytes()
    assert small == (source / "photos/0.png").read_bytes()
    scaled = Image.open(io.BytesIO(wide))
    assert (scaled.format, scaled.size, scaled.mode) == ("JPEG", (150, 50), "RGB")
    assert np.abs(np.asarray(scaled).astype(int) - [200, 0, 0]).max() <= 4
    make_shards("jsonl", file, tmp_path / "plain")
    assert read_all(str(tmp_path / "plain"))[0].query.images[0] == (source / "wide.png").read_bytes()


def test_rotated_photos_are_kept_or_scaled_with_upright_sizes(source, tmp_path):
    """Use photos that are red at the top, stored rotated with red at the left; and a 16-bit scan."""
    photo, exif = Image.new("RGB", (300, 200), (0, 0, 255)), Image.Exif()
    photo.paste((255, 0, 0), (0, 0, 75, 200))
    exif[0x0112] = 6
    photo.save(source / "phone.jpg", exif=exif, quality=95)
    photo.save(source / "both.jpg", "MPO", save_all=True, append_images=[photo], exif=exif, quality=95)
    Image.fromarray(np.linspace(0, 65535, 60_000).astype(np.uint16).reshape(300, 200)).save(source / "scan.png")
    rows = [asking("<image>", images=[name]) for name in ("phone.jpg", "both.jpg", "scan.png")]
    file = write(source, *rows)
    for options, width, height in (((), 200, 300), (("--image-max-side", 150), 100, 150)):
        url = str(tmp_path / f"out{width}")
        make_shards("jsonl", file, url, *options)
        (shard,) = Index.load(url).shards
        assert load_sidecar(url, shard)["image_sizes"].tolist() == [[[width, height]]] * 3
        phone, both, scan = (pair.query.images[0] for pair in read_all(url))
        if not options:
            assert (phone, both) == tuple((source / name).read_bytes() for name in ("phone.jpg", "both.jpg"))
        for data in (phone, both):
            pixels = np.asarray(decode_image(data)).astype(int)
            assert pixels.shape == (height, width, 3)
            assert np.abs(pixels[: height // 5] - [255, 0, 0]).max() < 12
            assert np.abs(pixels[height // 3 :] - [0, 0, 255]).max() < 12
        ramp = np.asarray(decode_image(scan)).astype(int)[..., 0].mean(1)
        assert np.abs(ramp - np.linspace(0, 255, height)).max() < 3
        names = webdataset.WebDataset([str(path) for path in tmp_path.glob(f"out{width}/*.tar")], shardshuffle=False)
        assert [{"query.0.jpg", "query.0.png"} & sample.keys() for sample in names] == (
            [{"query.0.jpg"}, {"query.0.jpg"}, {"query.0.jpg" if options else "query.0.png"}]
        )


def test_shards_have_requested_size(source, tmp_path):
    (source / "large.png").write_bytes(picture(100, 100))
    file = write(source, *[asking("<image>", images=["large.png"])] * 110)
    make_shards("jsonl", file, tmp_path / "out", "--shard-mb", 1)
    sizes = [shard.size for shard in Index.load(str(tmp_path / "out")).shards]
    assert len(sizes) == 4
    assert all(abs(size - (1 << 20)) < 40_000 for size in sizes[:-1])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no rows: it is empty"),
        (b"\n \n", "has no rows: it is empty"),
        (b"\xef\xbb\xbf", "has no rows: it is empty"),
        (
            json.dumps([row(0), row(1)]).encode(),
            "does not have one object per line: write it so with jq -c 'if type",
        ),
        (json.dumps([row(0)], indent=1).encode(), "does not have one object per line"),
        (json.dumps(row(0), indent=1).encode(), "does not have one object per line"),
        (json.dumps(row(0)).encode("utf-16"), "is UTF-16: convert it with iconv -f UTF-16 -t UTF-8"),
        (json.dumps(row(0)).encode("utf-16-le"), "is UTF-16: convert it with iconv -f UTF-16LE -t UTF-8"),
        (gzip.compress(b"{}", mtime=0), "is compressed by gzip: unpack it"),
    ],
)
def test_file_in_other_format_is_refused(source, tmp_path, content, said):
    (source / "pairs.jsonl").write_bytes(content)
    assert f"pairs.jsonl {said}" in error_of("jsonl", source / "pairs.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_exceeded_rejection_limit_leaves_plan_and_rejected_rows(source, tmp_path):
    text = error_of("jsonl", write(source, b"{]", row(0)), tmp_path / "out")
    assert "1 not JSON; the first: line 1: not JSON: Invalid JSON" in text
    assert "/index.json" not in content(str(tmp_path / "out"))
    assert lines(tmp_path / "out") == ["line 1"]


def test_byte_order_marks_are_stripped_from_rows_and_texts(source, tmp_path):
    target = {"text": "\ufeff t \n", "alternatives": ["\ufeff other"]}
    marked = {"query": {"text": "\ufeffq"}, "target": target, "negatives": [{"text": "\ufeffn"}]}
    file = write(source, row(0), marked, b"\xef\xbb\xbf" + json.dumps(row(2)).encode())
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    make_shards("jsonl", file, tmp_path / "out", "--max-rejected", 0)
    first, second, last = read_all(str(tmp_path / "out"))
    assert (first.key, last.key) == ("00000001", "00000003")
    expected = Pair("00000002", "pairs", "", Item("q"), Item(" t \n"), (Item("n"),), alternatives=(" other",))
    assert second == expected
