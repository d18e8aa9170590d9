import argparse
import bz2
import gzip
import hashlib
import io
import json
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conversion import make_shards
from PIL import Image

from pipeline.convert import img2dataset
from pipeline.convert.img2dataset import Tape, read_tape
from pipeline.data.index import Index, load_sidecar, read_records, read_samples
from pipeline.data.sample import Item, Pair
from pipeline.data.shards import members_of, parse_sample
from pipeline.errors import PipelineError
from pipeline.storage import objects

QUERY = "<image>\nFind an image caption describing the given everyday image."


def picture(number: int, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20 + number, 30), (number, 0, 0)).save(buffer, format)
    return buffer.getvalue()


def members(number: int) -> dict[str, bytes]:
    """Return a valid sample: an image, a short caption and a column of long captions."""
    described = {
        "url": f"http://x/{number}",
        "caption_long": [f"A long caption, number {number}.", f"ünïcode {number}"],
    }
    return {
        "jpg": picture(number),
        "txt": f"short {number}\n".encode(),
        "json": json.dumps(described).encode(),
    }


BAD = {
    "noimage": {"txt": b"a caption", "json": b"{}"},
    "broken": {"jpg": picture(3)[:200], "txt": b"a caption"},
    "nocaption": {"jpg": picture(4), "txt": b" \n", "json": b'{"caption_long": null}'},
    "latin": {"jpg": picture(5), "txt": "Bär".encode("latin-1"), "json": b"{}"},
    "../escape": {"jpg": picture(6), "txt": b"a caption"},
    "/absolute": {"jpg": picture(7), "txt": b"a caption"},
    "image": {"jpg": picture(8), "txt": b"see <image> here"},
    "video": {"jpg": picture(9), "txt": b"a <video>", "json": b'{"caption_long": ["a <video> clip"]}'},
}


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for key, content in samples.items():
            writer.write({"__key__": key, **content})


def make_source(folder: Path) -> dict[str, list[Pair]]:
    """Write three tars, one of them with bad samples. Return the pairs of the valid ones by tar."""
    folder.mkdir()
    tars, expected = {}, {}
    for tar in range(3):
        name = f"{tar:05d}.tar"
        tars[name] = {f"{tar}{number:04d}": members(10 * tar + number) for number in range(5 + tar)}
        expected[name] = [
            Pair(
                key,
                "",
                "retrieval",
                Item(QUERY, (content["jpg"],)),
                Item(f"short {int(key[1:]) + 10 * tar}\n"),
                alternatives=tuple(json.loads(content["json"])["caption_long"]),
            )
            for key, content in tars[name].items()
        ]
    good = list(tars["00001.tar"].items())
    tars["00001.tar"] = dict([*good[:2], *BAD.items(), *good[2:]])
    for name, samples in tars.items():
        write_tar(folder / name, samples)
    (folder / "00000_stats.json").write_text("{}")  # img2dataset leaves such files next to the tars
    return expected


def index(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    img2dataset.COMMAND.add_arguments(parser)
    img2dataset.COMMAND.run(parser.parse_args([str(argument) for argument in arguments]))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pairs_of(dest: str) -> dict[str, list[Pair]]:
    """Read every sample as training does: first the records of a block, then the samples."""
    loaded = Index.load(dest)
    pairs = {}
    for shard in loaded.shards:
        records = [read_records(dest, shard, start, start + 1) for start in range(shard.samples)]
        read = [read_samples(loaded.shards_url or dest, shard, record)[0] for record in records]
        assert (np.concatenate(records) == load_sidecar(dest, shard)).all()
        pairs[shard.file] = [parse_sample(data, loaded.captions) for data in read]
    return pairs


OPTIONS = ("--captions", "txt", "caption_long", "--max-rejected", "0.5", "--processes", "1")


@pytest.fixture(params=["beside the tars", "elsewhere", "s3"])
def places(request, tmp_path) -> tuple[str, str, dict[str, list[Pair]]]:
    """Return (source, destination, expected pairs by tar)."""
    expected = make_source(tmp_path / "source")
    if request.param == "beside the tars":
        return str(tmp_path / "source"), str(tmp_path / "source"), expected
    if request.param == "elsewhere":
        return str(tmp_path / "source"), str(tmp_path / "index"), expected
    request.getfixturevalue("s3")
    source = f"s3://pipeline-tests/img2dataset/{tmp_path.name}"
    for name, content in files(tmp_path / "source").items():
        objects.write(objects.join(source, name), content)
    return source, source + "-index", expected


def test_valid_samples_are_read_back_and_bad_ones_listed(places):
    source, dest, expected = places
    before = {url: objects.read(url) for url in objects.list_under(source)}
    index(source, dest, *OPTIONS)
    assert pairs_of(dest) == expected
    loaded = Index.load(dest)
    assert loaded.shards_url == ("" if source == dest else source)
    assert loaded.dataset == source.rpartition("/")[2]
    rejected = [json.loads(line) for line in objects.read(objects.join(dest, "rejected.jsonl")).splitlines()]
    assert [line["row"] for line in rejected] == [f"00001.tar: {key}" for key in BAD]
    assert [line["cause"] for line in rejected][:3] == ["no image", "broken image", "no caption in txt, caption_long"]
    assert [line["cause"] for line in rejected][4:] == ["unsafe name"] * 2 + ["marks and files differ"] * 2
    after = {url: objects.read(url) for url in objects.list_under(source)}
    assert before.items() <= after.items()
    written = {"index.json", "rejected.jsonl", *(f"{tar:05d}.idx.npy" for tar in range(3))}
    assert {url.removeprefix(dest + "/") for url in objects.list_under(dest)} - {
        url.removeprefix(source + "/") for url in before
    } == written


@pytest.mark.slow
def test_index_is_identical_across_processes_and_after_failure(tmp_path, monkeypatch):
    make_source(tmp_path / "source")
    index(tmp_path / "source", tmp_path / "one", *OPTIONS)
    index(tmp_path / "source", tmp_path / "two", *OPTIONS, "--processes", "2")
    assert files(tmp_path / "two") == files(tmp_path / "one")

    last = tmp_path / "source/00002.tar"
    whole = last.read_bytes()
    last.write_bytes(whole[:3000])
    with pytest.raises(PipelineError, match=r"00002\.tar is not a tar, or is damaged"):
        index(tmp_path / "source", tmp_path / "three", *OPTIONS)
    assert not (tmp_path / "three/index.json").exists()
    recorded = {path.name[:9] for path in (tmp_path / "three/.unfinished").glob("*.tar.*")}
    assert "00002.tar" not in recorded
    last.write_bytes(whole)
    read, original = [], objects.read
    monkeypatch.setattr(objects, "read", lambda url, *arguments: read.append(url) or original(url, *arguments))
    index(tmp_path / "source", tmp_path / "three", *OPTIONS)
    assert files(tmp_path / "three") == files(tmp_path / "one")
    read = {Path(url).name for url in read if url.endswith(".tar")}
    assert "00002.tar" in read and not read & (recorded - {"00000.tar"})  # the first tar is read to find the columns


def test_tar_changed_since_failure_is_indexed_again(tmp_path):
    make_source(tmp_path / "source")
    last = tmp_path / "source/00002.tar"
    whole = last.read_bytes()
    last.write_bytes(whole[:3000])
    with pytest.raises(PipelineError, match=r"00002\.tar is not a tar"):
        index(tmp_path / "source", tmp_path / "dest", *OPTIONS)
    last.write_bytes(whole)
    write_tar(tmp_path / "source/00000.tar", {"new": members(0)})
    index(tmp_path / "source", tmp_path / "dest", *OPTIONS)
    index(tmp_path / "source", tmp_path / "fresh", *OPTIONS)
    assert files(tmp_path / "dest") == files(tmp_path / "fresh")


def test_resume_with_changed_options_is_refused(tmp_path):
    make_source(tmp_path / "source")
    with pytest.raises(PipelineError, match=r"more than --max-rejected 0\.01 allows: 2 unsafe name, 2 marks"):
        index(tmp_path / "source", tmp_path / "dest", "--processes", "1")
    with pytest.raises(PipelineError, match="unfinished conversion whose captions"):
        index(tmp_path / "source", tmp_path / "dest", "--processes", "1", "--query", "<image>")
    index(tmp_path / "source", tmp_path / "dest", "--processes", "1", "--max-rejected", "0.5")
    with pytest.raises(PipelineError, match="already contains a dataset"):
        index(tmp_path / "source", tmp_path / "dest")


def test_missing_caption_column_error_lists_available_columns(tmp_path):
    make_source(tmp_path / "source")
    with pytest.raises(PipelineError, match=r"no sample of .*00000.tar has longcaption; it has caption_long, txt, url"):
        index(tmp_path / "source", tmp_path / "dest", "--captions", "txt", "longcaption")
    assert not (tmp_path / "dest").exists()
    with pytest.raises(PipelineError, match="must have one <image>"):
        index(tmp_path / "source", tmp_path / "dest", "--query", "Describe it.")


def tar_of(*named: tuple[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in named:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def broken_tars() -> dict[str, tuple[bytes, str]]:
    """Return {name: (bytes, error message)}."""
    good = tar_of(("a.jpg", picture(1)), ("a.txt", b"a"))
    second = 512 + len(picture(1)) // 512 * 512 + 512  # offset of the second member
    negative = bytearray(good)
    member = tarfile.TarInfo("a.txt")
    member.size = -512
    negative[second : second + 512] = member.tobuf(tarfile.GNU_FORMAT)
    huge = tarfile.TarInfo("a.jpg")
    huge.type, huge.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    last = tar_of(("a.jpg", picture(1)), ("a.txt", b""))
    return {
        "nothing": (b"", "empty file"),
        "cut in a member": (good[:700], "unexpected end of data"),
        "cut between members": (good[:second], "its end is missing"),
        "compressed": (gzip.compress(good), "it is compressed by gzip"),
        "a damaged header": (good[:second] + b"x" + good[second + 1 :], f"no header at byte {second}"),
        "a damaged last header": (last[:second] + b"x" + last[second + 1 :], f"no header at byte {second}"),
        "two tars in one": (good + good, "more data after the end of the archive"),
        "a size below zero": (bytes(negative), "a header points backwards"),
        "a name of a terabyte": (huge.tobuf(tarfile.GNU_FORMAT) + good, f"a header of {1 << 40} bytes"),
        "noise": (np.random.default_rng(0).bytes(3000), "invalid header"),
    }


@pytest.mark.parametrize("name", broken_tars())
def test_broken_tar_error_names_file_and_cause(tmp_path, name):
    write_tar(tmp_path / "00000.tar", {"a": members(1)})
    data, reason = broken_tars()[name]
    (tmp_path / "00001.tar").write_bytes(data)
    with pytest.raises(PipelineError, match=rf"00001.tar is not a tar, or is damaged \(.*{reason}.*\): repair it"):
        index(tmp_path, tmp_path / "dest", "--processes", "1")


def test_empty_tar_is_omitted(tmp_path):
    (tmp_path / "00000.tar").write_bytes(tar_of())
    write_tar(tmp_path / "00001.tar", {"a": members(1)})
    index(tmp_path, tmp_path, "--processes", "1")
    assert list(pairs_of(str(tmp_path))) == ["00001.tar"]


def test_one_usable_caption_suffices_and_unread_members_are_listed(tmp_path, caplog):
    deep, marked = b"[" * 200_000, b'{"caption_long": ["a <video>", "b"]}'
    samples = {
        "deep": members(0) | {"json": deep},
        "alone": {"jpg": picture(0), "json": deep},
        "text": members(1) | {"txt": "a caption".encode("utf-16-le"), "npy": b"1", "seg.PNG": picture(1)},
        "long": members(2) | {"txt": "Bär".encode("latin-1"), "json": marked, "npy": b"1"},
        "nul": {"jpg": picture(0), "txt": "a caption".encode("utf-16-le"), "cls": b"1"},
        "two": members(3) | {"png": picture(3, "PNG")},
        "scan": {"tif": picture(4, "TIFF"), "txt": b"a caption"},
    }
    write_tar(tmp_path / "0.tar", samples)
    index(tmp_path, tmp_path, *OPTIONS, "--max-rejected", "0.9")
    texts = {pair.key: pair.texts for pair in pairs_of(str(tmp_path))["0.tar"]}
    assert texts == {"deep": ("short 0\n",), "text": ("A long caption, number 1.", "ünïcode 1"), "long": ("b",)}
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [(line["row"][7:], line["cause"], line["detail"]) for line in rejected] == [
        ("alone", "its json is malformed", "alone, caption_long"),
        ("nul", "NUL character", f"is its file UTF-16? Convert it to UTF-8: {NUL_TEXT!r}"),
        ("two", "several images", "keep only one of jpg, png"),
        ("scan", "no image", "it has tif, txt"),
    ]
    assert sorted(message.removeprefix(f"{tmp_path}: ") for message in caplog.messages) == [
        "1 members .cls, which nothing reads",
        "1 members .seg.png, which nothing reads",
        "1 members .tif, which nothing reads",
        "1 unusable captions skipped: NUL character",
        "1 unusable captions skipped: a text is not UTF-8",
        "1 unusable captions skipped: its json is malformed",
        "1 unusable captions skipped: marks and files differ",
        "2 members .npy, which nothing reads",
    ]


NUL_TEXT = "a caption".encode("utf-16-le").decode()


def test_macos_leftovers_in_tars_are_skipped(tmp_path):
    named = [(f"d/{number}.{name}", each) for number in range(2) for name, each in members(number).items()]
    leftovers = [("d/.DS_Store", b"x"), *((name.replace("d/", "d/._"), b"fork") for name, _ in named)]
    leftovers += [(f"__MACOSX/{name}", b"fork") for name, _ in leftovers]
    mixed = [each for some in zip(named, leftovers, leftovers[7:], strict=False) for each in some]
    (tmp_path / "0.tar").write_bytes(tar_of(*mixed))
    index(tmp_path, tmp_path, "--processes", "1", "--max-rejected", "0")
    assert [pair.key for pair in pairs_of(str(tmp_path))["0.tar"]] == ["d/0", "d/1"]
    make_shards("verify", tmp_path)


def test_folder_without_tars_is_refused(tmp_path):
    with pytest.raises(PipelineError, match=r"contains no \.tar files"):
        index(tmp_path, tmp_path / "dest")
    (tmp_path / "00000.tar.gz").write_bytes(b"")
    with pytest.raises(PipelineError, match=r"00000\.tar\.gz is compressed"):
        index(tmp_path, tmp_path / "dest")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_folders_and_links_match_webdataset(tmp_path, format):
    keys = [f"{'deep/' * 30}{'ü' * 60}{number}" for number in range(3)]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for number, key in enumerate(keys):
            folder = tarfile.TarInfo(f"folder{number}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for name, content in members(number).items():
                member = tarfile.TarInfo(f"{key}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                link = tarfile.TarInfo(f"{key}.link{name}")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(link)
    (tmp_path / "0.tar").write_bytes(buffer.getvalue())
    index(tmp_path, tmp_path, "--processes", "1")
    pairs = pairs_of(str(tmp_path))["0.tar"]
    assert [(pair.key, pair.query.images) for pair in pairs] == [(key, (picture(n),)) for n, key in enumerate(keys)]
    plain = webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False)
    assert [sample["__key__"] for sample in plain] == keys


def foreign_members() -> list[tuple[str, bytes]]:
    """Return members that other tools write between, before and within samples; webdataset still reads the samples."""
    a, b, c, d = (members(number) for number in range(4))
    return [
        (".DS_Store", b"finder"),
        ("._a.jpg", b"fork"),
        ("a.jpg", a["jpg"]),
        ("._a.txt", b"fork"),
        ("a.txt", a["txt"]),
        ("__notes__", b"{}"),
        ("__meta__/b.txt", b"not b's"),
        ("./._b.jpg", b"fork"),
        ("README", b"no suffix"),
        ("./b.JPG", b["jpg"]),
        ("./.hidden", b""),
        ("LICENSE", b""),
        ("./b.TXT", b["txt"]),
        ("folder.v1/c.seg.jpg", c["jpg"]),  # a suffix that contains a dot
        ("folder.v1/c.jpg", c["jpg"]),
        ("folder.v1/noext", b""),
        ("folder.v1/c.txt", c["txt"]),
        ("__d.jpg", d["jpg"]),
        ("__MACOSX", b"no suffix"),
        ("__d.txt", d["txt"]),
        ("photos/e.jpg", a["jpg"]),
        ("photos/between.txt", b"a sample of another key"),
        ("photos/e.txt", a["txt"]),
        ("a.jpg", b["jpg"]),  # a key that occurs again, with a complete sample
        ("a.txt", b["txt"]),
        ("__x__.jpg", a["jpg"]),
        ("__x__.txt", a["txt"]),
        (".notes/f.jpg", a["jpg"]),
        (".notes/f.txt", a["txt"]),
        ("..jpg", a["jpg"]),
        ("g..jpg", a["jpg"]),
    ]


def foreign_tar(format: int, v7: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, pax_headers={"comment": "of all"}) as tar:
        for number, (name, content) in enumerate(foreign_members()):
            for other, kind in (("folder.jpg", tarfile.DIRTYPE), ("a.link", tarfile.SYMTYPE), ("b.h", tarfile.LNKTYPE)):
                extra = tarfile.TarInfo(other)
                extra.type, extra.linkname = kind, "a.jpg"
                if number % 5 == 0:
                    tar.addfile(extra)
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1e9 + number / 3
            if format == tarfile.PAX_FORMAT and number % 2:
                member.pax_headers = {"SCHILY.xattr.com.apple": "x", "comment": "ü"}
            tar.addfile(member, io.BytesIO(content))
    data = bytearray(buffer.getvalue())
    if v7:  # without magic bytes; files have type NUL, as have folders, whose names end in a slash
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            written = tar.getmembers()
        for member in written:
            header = data[member.offset : member.offset + 512]
            header[156:157], header[257:512] = (
                header[156:157] if member.islnk() or member.issym() else b"\0",
                bytes(255),
            )
            header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
            data[member.offset : member.offset + 512] = header
    return bytes(data)


@pytest.mark.parametrize("format", ["ustar", "gnu", "pax", "v7"])
def test_samples_of_foreign_tars_match_webdataset(tmp_path, format):
    kinds = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
    (tmp_path / "0.tar").write_bytes(foreign_tar(kinds.get(format, tarfile.USTAR_FORMAT), format == "v7"))
    own = list(webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False))
    tape = Tape(str(tmp_path / "0.tar"))
    ours = [(sample.key, members_of(tape.between(sample.begin, sample.end))) for sample in read_tape(tape)]
    assert [key for key, _ in ours] == [sample["__key__"] for sample in own]
    for (key, read), theirs in zip(ours, own, strict=True):
        lower = {name.lower(): content for name, content in read[1].items()}
        assert (read[0], lower) == (key, {name: each for name, each in theirs.items() if not name.startswith("__")})
    index(tmp_path, tmp_path / "dest", "--processes", "1", "--max-rejected", "0.9")
    whole = [(sample["__key__"], sample["jpg"]) for sample in own if {"jpg", "txt"} <= sample.keys()]
    assert [key for key, _ in whole] == ["a", "./b", "folder.v1/c", "__d", "a", "__x__", ".notes/f"]
    pairs = pairs_of(str(tmp_path / "dest"))["0.tar"]
    assert [(pair.key, pair.query.images[0]) for pair in pairs] == whole
    rejected = [json.loads(line) for line in (tmp_path / "dest/rejected.jsonl").read_text().splitlines()]
    causes = {line["row"].removeprefix("0.tar: "): line["cause"] for line in rejected}
    assert causes.pop("photos/e") == "members apart" and set(causes.values()) == {"no image"}


def test_nonconsecutive_members_are_rejected_once_per_sample(tmp_path):
    named = [(f"{n}.{name}", members(n)[name]) for name in ("jpg", "json", "txt") for n in range(3)]
    whole = [(f"{n}.{name}", content) for n in (7, 8) for name, content in members(n).items()]
    again = [(f"7.{name}", content) for name, content in (members(9) | {"jpg": b"broken"}).items()]
    (tmp_path / "0.tar").write_bytes(tar_of(*named, *whole, *again, ("8.json", b"{}"), ("9.txt", b"a caption")))
    index(tmp_path, tmp_path, *OPTIONS, "--max-rejected", "0.9")
    assert [pair.key for pair in pairs_of(str(tmp_path))["0.tar"]] == ["7", "8"]
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [(line["row"][7:], line["cause"]) for line in rejected] == [
        *((str(n), "members apart") for n in range(3)),
        ("7", "broken image"),
        ("8", "members apart"),  # the column of captions is missing
        ("9", "no image"),
    ]
    assert rejected[0]["detail"] == (
        "the members of key 0 are not consecutive in 0.tar, as WebDataset requires: "
        "repack it sorted by name, for example with tar --sort=name"
    )
    for magic, name in ((gzip.compress(b""), "gzip"), (bz2.compress(b""), "bzip2"), (lzma.compress(b""), "xz")):
        (tmp_path / "0.tar").write_bytes(magic)
        with pytest.raises(PipelineError, match=rf"0\.tar is .*compressed by {name}, .*: decompress it"):
            index(tmp_path, tmp_path / "packed")


def test_hostile_members_are_rejected_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(img2dataset, "_MAX_SAMPLE", 100_000)
    monkeypatch.setattr(img2dataset, "_PIECE", 30_000)
    good = [(f"{n}.{name}", content) for n in range(3) for name, content in members(n).items()]
    noise = np.random.default_rng(0).bytes(90_000)
    data = tar_of(
        *good[:3],
        ("large.jpg", noise),
        ("large.txt", noise),
        ("same.jpg", picture(1)),
        ("same.txt", b"a"),
        ("same.jpg", picture(2)),
        *good[3:6],
        ("bad\udcff.jpg", picture(1)),
        ("bad\udcff.txt", b"a"),
        *good[6:],
        format=tarfile.GNU_FORMAT,
    )
    sparse = tarfile.TarInfo("sparse.jpg")
    sparse.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[386:398] = b"%011o\0" % 0  # one data run at offset 0, with length 0
    header[398:410] = b"%011o\0" % 0
    header[483:495] = b"%011o\0" % (1 << 30)  # the file claims to have a gigabyte
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    (tmp_path / "0.tar").write_bytes(bytes(header) + data)
    index(tmp_path, tmp_path / "dest", "--processes", "1", "--max-rejected", "0.9")
    assert [pair.key for pair in pairs_of(str(tmp_path / "dest"))["0.tar"]] == ["0", "1", "2"]
    rejected = [json.loads(line) for line in (tmp_path / "dest/rejected.jsonl").read_text().splitlines()]
    assert [(line["row"], line["cause"]) for line in rejected] == [
        ("0.tar: sparse", "the tar contains a sparse file"),
        ("0.tar: large", "too large"),
        ("0.tar: same", "two members of one name"),
        ("0.tar: bad\\udcff", "unprintable name"),
    ]


def test_tape_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(img2dataset, "_PIECE", 20_000)
    monkeypatch.setattr(img2dataset, "_MAX_SAMPLE", 50_000)
    data = tar_of(*((f"{n}.jpg", bytes([n]) * (200_000 if n == 7 else 10_000)) for n in range(20)))
    (tmp_path / "0.tar").write_bytes(data)
    tape, kept = Tape(str(tmp_path / "0.tar")), []
    for sample in read_tape(tape):
        assert (sample.fault is not None) == (sample.key == "7")
        if sample.fault is None:
            assert tape.between(sample.begin, sample.end) == data[sample.begin : sample.end]
        kept.append(len(tape._kept))
    assert max(kept) < 50_000
    assert tape.sha256.hexdigest() == hashlib.sha256(data).hexdigest()
