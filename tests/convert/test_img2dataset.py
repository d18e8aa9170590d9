import argparse
import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.convert import img2dataset
from pipeline.convert.img2dataset import Tape, read_tape
from pipeline.data import objects
from pipeline.data.index import Index, load_sidecar, read_records, read_samples
from pipeline.data.sample import Item, Pair
from pipeline.data.shards import parse_sample
from pipeline.errors import PipelineError

QUERY = "<image>\nFind an image caption describing the given everyday image."


def picture(number: int, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20 + number, 30), (number, 0, 0)).save(buffer, format)
    return buffer.getvalue()


def members(number: int) -> dict[str, bytes]:
    """A good sample: an image, a short caption and a column of long ones."""
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
    "video": {"jpg": picture(9), "txt": b"a caption", "json": b'{"caption_long": ["good", "a <video> clip"]}'},
}


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for key, content in samples.items():
            writer.write({"__key__": key, **content})


def make_source(folder: Path) -> dict[str, list[Pair]]:
    """Three tars, one of them with bad samples. Returns the pairs of the good ones, by tar."""
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
                Item(f"short {int(key[1:]) + 10 * tar}"),
                alternatives=tuple(json.loads(content["json"])["caption_long"]),
            )
            for key, content in tars[name].items()
        ]
    good = list(tars["00001.tar"].items())
    tars["00001.tar"] = dict([*good[:2], *BAD.items(), *good[2:]])
    for name, samples in tars.items():
        write_tar(folder / name, samples)
    (folder / "00000_stats.json").write_text("{}")  # img2dataset leaves this and more beside the tars
    return expected


def index(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    img2dataset.COMMAND.add_arguments(parser)
    img2dataset.COMMAND.run(parser.parse_args([str(argument) for argument in arguments]))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pairs_of(dest: str) -> dict[str, list[Pair]]:
    """Every sample read back as training reads it: records by the block, and samples by them."""
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
    """(source, destination, the pairs there are)."""
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


def test_every_good_sample_is_read_back_and_every_bad_one_is_listed(places):
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


def test_the_result_is_the_same_on_any_number_of_processes_and_after_a_break(tmp_path, monkeypatch):
    make_source(tmp_path / "source")
    index(tmp_path / "source", tmp_path / "one", *OPTIONS)
    index(tmp_path / "source", tmp_path / "two", *OPTIONS, "--processes", "2")
    assert files(tmp_path / "two") == files(tmp_path / "one")

    last = tmp_path / "source/00002.tar"
    whole = last.read_bytes()
    last.write_bytes(whole[:3000])
    with pytest.raises(PipelineError, match=r"00002\.tar is no tar, or a damaged one"):
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
    assert "00002.tar" in read and not read & (recorded - {"00000.tar"})  # of which the columns are looked at


def test_a_tar_that_changed_since_the_break_is_indexed_again(tmp_path):
    make_source(tmp_path / "source")
    last = tmp_path / "source/00002.tar"
    whole = last.read_bytes()
    last.write_bytes(whole[:3000])
    with pytest.raises(PipelineError, match=r"00002\.tar is no tar"):
        index(tmp_path / "source", tmp_path / "dest", *OPTIONS)
    last.write_bytes(whole)
    write_tar(tmp_path / "source/00000.tar", {"new": members(0)})
    index(tmp_path / "source", tmp_path / "dest", *OPTIONS)
    index(tmp_path / "source", tmp_path / "fresh", *OPTIONS)
    assert files(tmp_path / "dest") == files(tmp_path / "fresh")


def test_other_options_are_another_indexing(tmp_path):
    make_source(tmp_path / "source")
    with pytest.raises(PipelineError, match=r"more than --max-rejected 0\.01 allows: 2 unsafe name, 1 no image"):
        index(tmp_path / "source", tmp_path / "dest", "--processes", "1")
    with pytest.raises(PipelineError, match="unfinished conversion whose captions"):
        index(tmp_path / "source", tmp_path / "dest", "--processes", "1", "--query", "<image>")
    index(tmp_path / "source", tmp_path / "dest", "--processes", "1", "--max-rejected", "0.5")
    with pytest.raises(PipelineError, match="holds a dataset already"):
        index(tmp_path / "source", tmp_path / "dest")


def test_a_column_that_the_first_tar_lacks_is_an_error_that_lists_those_it_has(tmp_path):
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
    """Name -> (bytes, what is said of them)."""
    good = tar_of(("a.jpg", picture(1)), ("a.txt", b"a"))
    second = 512 + len(picture(1)) // 512 * 512 + 512  # where the second member begins
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
        "cut between members": (good[:second], "it ends without an end of archive"),
        "compressed": (gzip.compress(bytes(1 << 20)), "bad checksum"),
        "a damaged header": (good[:second] + b"x" + good[second + 1 :], f"no header at byte {second}"),
        "a damaged last header": (last[:second] + b"x" + last[second + 1 :], f"no header at byte {second}"),
        "two tars in one": (good + good, "more after the end of the archive"),
        "a size below zero": (bytes(negative), "it leads backwards"),
        "a name of a terabyte": (huge.tobuf(tarfile.GNU_FORMAT) + good, f"a header of {1 << 40} bytes"),
        "noise": (np.random.default_rng(0).bytes(3000), "invalid header"),
    }


@pytest.mark.parametrize("name", broken_tars())
def test_a_broken_tar_is_an_error_by_name(tmp_path, name):
    write_tar(tmp_path / "00000.tar", {"a": members(1)})
    data, reason = broken_tars()[name]
    (tmp_path / "00001.tar").write_bytes(data)
    with pytest.raises(PipelineError, match=rf"00001.tar is no tar, or a damaged one \(.*{reason}.*\): mend it"):
        index(tmp_path, tmp_path / "dest", "--processes", "1")


def test_a_tar_without_samples_is_left_out(tmp_path):
    (tmp_path / "00000.tar").write_bytes(tar_of())
    write_tar(tmp_path / "00001.tar", {"a": members(1)})
    index(tmp_path, tmp_path, "--processes", "1")
    assert list(pairs_of(str(tmp_path))) == ["00001.tar"]


def test_json_too_deep_to_be_read_costs_its_sample_alone(tmp_path):
    write_tar(tmp_path / "0.tar", {"deep": members(0) | {"json": b"[" * 200_000}, "good": members(1)})
    index(tmp_path, tmp_path, *OPTIONS)
    assert [pair.key for pair in pairs_of(str(tmp_path))["0.tar"]] == ["good"]


def test_what_is_no_folder_of_tars_is_an_error(tmp_path):
    with pytest.raises(PipelineError, match=r"holds no \.tar files"):
        index(tmp_path, tmp_path / "dest")
    (tmp_path / "00000.tar.gz").write_bytes(b"")
    with pytest.raises(PipelineError, match=r"00000\.tar\.gz is compressed"):
        index(tmp_path, tmp_path / "dest")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_folders_and_links_are_read_as_webdataset_reads_them(tmp_path, format):
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
    header[386:398] = b"%011o\0" % 0  # one run of data, at 0, without a byte
    header[398:410] = b"%011o\0" % 0
    header[483:495] = b"%011o\0" % (1 << 30)  # of a file that claims a gigabyte
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    (tmp_path / "0.tar").write_bytes(bytes(header) + data)
    index(tmp_path, tmp_path / "dest", "--processes", "1", "--max-rejected", "0.9")
    assert [pair.key for pair in pairs_of(str(tmp_path / "dest"))["0.tar"]] == ["0", "1", "2"]
    rejected = [json.loads(line) for line in (tmp_path / "dest/rejected.jsonl").read_text().splitlines()]
    assert [(line["row"], line["cause"]) for line in rejected] == [
        ("0.tar: sparse", "a sparse file in the tar"),
        ("0.tar: large", "too large"),
        ("0.tar: same", "two members of one name"),
        ("0.tar: bad\\udcff", "unprintable name"),
    ]


def test_a_tape_keeps_no_more_than_the_largest_sample_and_a_piece(tmp_path, monkeypatch):
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
