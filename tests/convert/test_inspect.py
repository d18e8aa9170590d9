import argparse
import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.convert import img2dataset, inspect
from pipeline.convert.command import Command
from pipeline.data.index import Index, load_sidecar, record_checksums
from pipeline.data.sample import Item, Pair, Single
from pipeline.data.shards import sample_bytes, write_shards
from pipeline.errors import PipelineError
from pipeline.storage import objects


def run(command: Command, *arguments: str | Path) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(argument) for argument in arguments]))


def verify(dest: str | Path) -> None:
    run(inspect.VERIFY, dest, "--processes", "1")


def picture(number: int, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (10 + number, 40), (number, 0, 0)).save(buffer, format)
    return buffer.getvalue()


def film() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as file:
        stream = file.add_stream("mpeg4", rate=5, width=48, height=32, pix_fmt="yuv420p")
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8))))
        file.mux(stream.encode())
    return buffer.getvalue()


def make_pairs() -> list[Pair]:
    pairs = [
        Pair(
            f"{number:08d}",
            "Pairs",
            "vqa",
            Item("<image>" * (number % 3) + f"question {number} 图", tuple(map(picture, range(number % 3)))),
            Item(f"answer {number // 2}"),
            (Item("<image>\nwrong", (picture(20, "JPEG"),)),) * (number % 2),
            ("another answer",) * (number % 2),
        )
        for number in range(12)
    ]
    pairs[5] = replace(pairs[5], query=Item("<video>\nWhat?", video=film()))
    return pairs


@pytest.fixture
def folder(tmp_path) -> Path:
    """Create a dataset of pairs in three shards, next to one of single items and one of img2dataset's tars."""
    pairs = make_pairs()
    index = write_shards(pairs, tmp_path / "all/pairs", dataset="Pairs", shard_bytes=sum(map(size, pairs)) * 3 // 10)
    assert len(index.shards) == 3
    singles = [Single(str(number), "Singles", "vqa", Item(f"item {number}")) for number in range(3)]
    write_shards(singles, tmp_path / "all/singles", dataset="Singles")
    (tmp_path / "cc").mkdir()
    with webdataset.TarWriter(str(tmp_path / "cc/00000.tar"), encoder=False) as writer:
        for number in range(4):
            image = picture(number, "JPEG") if number != 2 else b"broken"
            writer.write({"__key__": f"{number}", "jpg": image, "txt": f"caption {number}".encode()})
    run(img2dataset.COMMAND, tmp_path / "cc", tmp_path / "all/cc", "--processes", "1", "--max-rejected", "0.5")
    return tmp_path / "all"


def size(pair: Pair) -> int:
    return len(sample_bytes(pair))


def test_verify_prints_one_line_for_intact_datasets(folder, capsys):
    capsys.readouterr()
    verify(folder)
    assert capsys.readouterr().out == f"{folder}: 18 samples in 5 shards are intact\n"
    verify(folder / "pairs")
    assert capsys.readouterr().out == f"{folder / 'pairs'}: 12 samples in 3 shards are intact\n"


@pytest.mark.slow
def test_verify_on_s3_with_several_processes(folder, s3, capsys):
    dest = f"s3://pipeline-tests/inspect/{folder.parent.name}"
    for path in (folder / "pairs").iterdir():
        objects.write(f"{dest}/pairs/{path.name}", path)
    capsys.readouterr()
    run(inspect.VERIFY, dest, "--processes", "2")
    assert capsys.readouterr().out == f"{dest}: 12 samples in 3 shards are intact\n"
    objects.delete(f"{dest}/pairs/000001.tar")
    with pytest.raises(PipelineError, match=r"pairs/000001\.tar: there is no such"):
        verify(dest)


def change(path: Path, edit: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


def flip(place: int) -> Callable[[bytearray], object]:
    return lambda data: data.__setitem__(place, data[place] ^ 1)


@pytest.mark.parametrize(
    ("file", "edit", "faults"),
    [
        ("000000.tar", flip(-1), [r": its sha256 is not the index's"]),
        ("000001.tar", lambda data: data.__delitem__(slice(-512, None)), [r": \d+ bytes, but the index says \d+"]),
        ("000002.tar", lambda data: data.clear(), [": 0 bytes, but the index says"]),
        ("000001.idx.npy", flip(-9), ["is damaged"]),
        # In the middle of an image: its content changes, and it may no longer decode.
        ("000000.tar", lambda data: flip(data.index(b"IDAT") + 6)(data), [r"#\d: ", "its sha256 is not"]),
        # In the padding after a text.
        ("000000.tar", lambda data: flip(data.index(b"negatives") + 300)(data), ["#0: its record's crc32 is wrong"]),
        # In a letter of a text.
        (
            "000000.tar",
            lambda data: flip(data.index(b"answer"))(data),
            ["#0: its record's crc32 is wrong", "#0: its record's target_hash is wrong", "its sha256 is not"],
        ),
        # In a header's checksum.
        ("000000.tar", flip(150), ["#0: not a tar", "its sha256 is not"]),
    ],
)
def test_verify_lists_damage(folder, file, edit, faults):
    change(folder / "pairs" / file, edit)
    with pytest.raises(PipelineError, match=r"is not intact:\n") as caught:
        verify(folder)
    for fault in faults:
        caught.match(f"pairs/{file}.*{fault}")
    assert "singles" not in str(caught.value) and "cc" not in str(caught.value)


def forge(folder: Path, edit: Callable[[np.ndarray], object] = len, **entry: object) -> None:
    """Change the first shard's records and index entry, and update all checksums."""
    index = Index.load(str(folder))
    shard = index.shards[0]
    records = load_sidecar(str(folder), shard).copy()
    edit(records)
    records["checksum"] = record_checksums(records)
    np.save(folder / shard.sidecar, records)
    sidecar = (folder / shard.sidecar).read_bytes()
    shard = replace(shard, sidecar_sha256=hashlib.sha256(sidecar).hexdigest(), sidecar_bytes=len(sidecar), **entry)
    (folder / "index.json").write_text(replace(index, shards=(shard, *index.shards[1:])).to_json())


def put(field: str, value: object, place: object = 1) -> Callable[[np.ndarray], object]:
    return lambda records: records[field].__setitem__(place, value)


@pytest.mark.parametrize("dataset", ["pairs", "singles", "cc"])
def test_verify_accepts_rewritten_unchanged_records(folder, dataset):
    forge(folder / dataset)
    verify(folder)


@pytest.mark.parametrize(
    ("dataset", "changed", "fault"),
    [
        ("pairs", {"edit": put("query_hash", 7)}, "#1: its record's query_hash is wrong"),
        ("pairs", {"edit": put("target_hash", 7)}, "#1: its record's target_hash is wrong"),
        ("pairs", {"edit": put("negative_text", 7)}, "#1: its record's negative_text is wrong"),
        ("pairs", {"edit": put("query_images", 7)}, "#1: its record's query_images is wrong"),
        ("pairs", {"edit": put("image_sizes", (7, 7), (1, 0))}, "#1: its record's image_sizes is wrong"),
        ("singles", {"edit": put("target_hash", 7)}, "#1: its record's target_hash is wrong"),
        ("cc", {"edit": put("target_text", 7)}, "#1: its record's target_text is wrong"),
        ("pairs", {"edit": put("length", 512)}, "#1: "),
        ("pairs", {"edit": put("offset", 0)}, "its records are inconsistent"),
        ("singles", {"edit": put("offset", 1 << 40, 2)}, "its records are inconsistent"),
        ("cc", {"edit": put("offset", 0)}, "its records are inconsistent"),
        ("cc", {"edit": put("length", 1 << 20, 2)}, "its records are inconsistent"),
        ("pairs", {"text_bytes": 7}, "the index's text_bytes is wrong"),
        ("pairs", {"tasks": {"vqa": 7}}, "the index's tasks is wrong"),
        ("pairs", {"videos": 7}, "the index's videos is wrong"),
        ("cc", {"image_sizes": ((7, 7),)}, "the index's image_sizes is wrong"),
    ],
)
def test_verify_finds_index_contradicting_tars(folder, dataset, changed, fault):
    forge(folder / dataset, **changed)
    with pytest.raises(PipelineError, match=f"all/{dataset}/.*{fault}" if dataset != "cc" else fault):
        verify(folder)


def test_verify_ignores_samples_skipped_by_webdataset(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "0.tar"), encoder=False) as writer:
        for number, folder in enumerate(("", "__meta__/", "")):
            writer.write({"__key__": f"{folder}{number}", "jpg": picture(1, "JPEG"), "txt": b"a caption"})
    run(img2dataset.COMMAND, tmp_path, tmp_path, "--processes", "1")
    assert Index.load(str(tmp_path)).samples == 2
    verify(tmp_path)


def test_verify_accepts_image_sizes_before_exif_rotation(tmp_path):
    exif, data = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(data, "JPEG", exif=exif)
    write_shards([Pair("0", "d", "t", Item("<image>", (data.getvalue(),)), Item("a"))], tmp_path, dataset="d")
    assert Index.load(str(tmp_path)).shards[0].image_sizes == ((20, 30),)
    verify(tmp_path)
    forge(tmp_path, put("image_sizes", (30, 20), (0, 0)), image_sizes=((30, 20),))
    verify(tmp_path)
    forge(tmp_path, put("image_sizes", (30, 30), (0, 0)))
    with pytest.raises(PipelineError, match="its record's image_sizes is wrong"):
        verify(tmp_path)


def test_verify_lists_at_most_ten_undecodable_samples(folder):
    pair = make_pairs()[1]
    broken = [
        replace(pair, key=f"{number}", query=Item("<image>", (picture(3)[:60],)), negatives=()) for number in range(15)
    ]
    write_shards(broken, folder / "broken", dataset="Broken")
    with pytest.raises(PipelineError) as caught:
        verify(folder / "broken")
    lines = str(caught.value).splitlines()
    assert len(lines) == 12 and "000000.tar#9: undecodable image" in lines[10]
    assert lines[11] == "(and 5 more)"


def test_commands_refuse_folder_without_index(tmp_path):
    for command, more in ((inspect.VERIFY, ()), (inspect.STATS, ()), (inspect.SHOW, ("0",))):
        with pytest.raises(PipelineError, match=r"neither .* nor a folder below it contains index\.json"):
            run(command, tmp_path, *more)


def shown(capsys, *arguments: str | Path) -> str:
    capsys.readouterr()
    run(inspect.SHOW, *arguments)
    return " ".join(capsys.readouterr().out.split())


def test_show_prints_every_sample(folder, capsys):
    for number, pair in enumerate(make_pairs()):
        printed = shown(capsys, folder / "pairs", number)
        assert f"key '{pair.key}'" in printed and "task 'vqa'" in printed
        assert f"query {pair.query.text!r}" in printed and f"target {pair.target.text!r}" in printed
        assert all(f"hash {item.content_hash:016x}" in printed for item in pair.items)
        assert printed.count("another answer") == len(pair.alternatives)
        assert shown(capsys, folder / "pairs", "--key", pair.key) == printed
    assert "image jpg, 30 x 40," in printed  # the negative of the last pair
    assert "video avi, 48 x 32," in shown(capsys, folder / "pairs", 5)
    assert "item 'item 2'" in shown(capsys, folder / "singles", 2)
    assert "cc/00000.tar, sample 2" in (printed := shown(capsys, folder / "cc", "--key", "3"))
    assert "target 'caption 3'" in printed


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["pairs", "12"], "has no sample 12: the samples are 0 to 11"),
        (["pairs", "--key", "x"], "has no sample with key 'x'"),
        (["", "0"], r"all is not a dataset; show one of those below it: \S+all/cc, \S+all/pairs, \S+all/singles$"),
        (["cc", "--key", "2"], r"'2' in 00000\.tar of .* was rejected: see rejected\.jsonl"),
    ],
)
def test_show_of_missing_sample_is_refused(folder, arguments, reason):
    with pytest.raises(PipelineError, match=reason):
        run(inspect.SHOW, folder / arguments[0], *arguments[1:])


def test_show_by_key_reads_only_that_sample(folder, capsys):
    expected = shown(capsys, folder / "pairs", 1)
    change(folder / "pairs/000000.tar", flip(600))  # in the content of sample 0
    assert shown(capsys, folder / "pairs", "--key", "00000001") == expected
    with pytest.raises(PipelineError, match=r"000000\.tar is damaged"):
        run(inspect.SHOW, folder / "pairs", "--key", "00000000")
    change(folder / "pairs/000000.tar", flip(150))  # in a header
    with pytest.raises(PipelineError, match=r"000000\.tar is not a tar, or is damaged"):
        run(inspect.SHOW, folder / "pairs", "--key", "00000001")


def test_show_prints_why_a_video_cannot_be_decoded(tmp_path, capsys):
    pairs = [Pair("k", "d", "t", Item("<video>\nWhat?", video=film()[:300]), Item("a target"))]
    write_shards(pairs, tmp_path, dataset="D")
    printed = shown(capsys, tmp_path, 0)
    assert "video avi, undecodable video" in printed and "300 bytes" in printed and "target 'a target'" in printed


def test_show_escapes_control_characters(tmp_path, capsys):
    write_shards([Pair("k", "d", "\x1b[31m", Item("a\x1b[2Jb [red]c"), Item("\x9b2J"))], tmp_path, dataset="D")
    printed = shown(capsys, tmp_path, 0)
    assert "\x1b" not in printed and "\x9b" not in printed
    assert r"'a\x1b[2Jb [red]c'" in printed


def test_stats_print_totals_and_duplicates(folder, capsys):
    capsys.readouterr()
    run(inspect.STATS, folder)
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    pairs = make_pairs()
    images = sum(len(item.images) for pair in pairs for item in pair.items)
    assert f"'Pairs' 12 3 0 {images} 1 'vqa' 12" in printed
    assert f"all 18 5 0.1 {images + 3} 1" in printed
    assert "mean p1 p10 p50 p90 p99 most" in printed
    counts = [sum(len(item.images) for item in pair.items) for pair in pairs] + [1, 1, 1] + [0, 0, 0]
    spread = [*np.percentile(counts, (1, 10, 50, 90, 99)), 3]
    mean = f"{np.mean(counts):.1f}"
    assert " ".join(["images of a sample", mean, *(f"{number:.0f}" for number in spread)]) in printed
    assert "longer side of an image 40.0 40 40 40 40 40 40" in printed
    assert "items: 3 distinct, 0 of 3 are duplicates" in printed
    assert "queries: 15 distinct, 0 of 15 are duplicates" in printed
    assert "targets: 9 distinct, 6 of 15 are duplicates" in printed
    assert "pairs: 15 distinct, 0 of 15 are duplicates" in printed


def test_stats_count_by_task_and_escape_control_characters(tmp_path, capsys):
    tasks = ["\x1b[31m", "vqa", "vqa", "vqa", "\x1b[31m", "retrieval"]
    pairs = [Pair(str(number), "D", task, Item(f"q{number}"), Item("a")) for number, task in enumerate(tasks)]
    assert len(write_shards(pairs, tmp_path, dataset="\x1b[2J", shard_bytes=4096).shards) > 1
    capsys.readouterr()
    run(inspect.STATS, tmp_path)
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if line.split()[:1] == [r"'\x1b[2J'"])
    assert line.strip().endswith(r"'vqa' 3, '\x1b[31m' 2, 'retrieval' 1")
    assert "\x1b" not in printed
    assert any(line.startswith("targets: 1 distinct, 5 of 6") for line in printed.splitlines())
    assert "items:" not in printed


def test_verify_groups_many_shards_into_jobs(folder, capsys, monkeypatch):
    shards = Index.load(str(folder / "pairs")).shards
    for count in (1, 512, 513, 5000):
        groups = list(inspect._grouped(shards[:1] * count))
        assert sum(map(len, groups)) == count and len(groups) <= 512
    assert [len(group) for group in inspect._grouped(shards)] == [1, 1, 1]
    monkeypatch.setattr(inspect, "_MOST_JOBS", 2)
    capsys.readouterr()
    verify(folder)
    assert capsys.readouterr().out == f"{folder}: 18 samples in 5 shards are intact\n"
    for file in ("000000.tar", "000001.tar"):  # of one job
        change(folder / "pairs" / file, flip(150))
    with pytest.raises(PipelineError, match=r"000000\.tar#0: not a tar(.|\n)*000001\.tar#0: not a tar"):
        verify(folder)


def test_verify_names_missing_files_and_checks_the_rest(tmp_path):
    folder = tmp_path / "pairs"
    for number in range(4):  # the shards of one index
        write_shards(
            [Pair(f"{number}", "X", "t", Item(f"q{number}"), Item("t"))], tmp_path / f"part{number}", dataset="X"
        )
    folder.mkdir()
    shards = []
    for number in range(4):
        (shard,) = Index.load(str(tmp_path / f"part{number}")).shards
        shards.append(replace(shard, file=f"[{number}] a.tar"))
        (tmp_path / f"part{number}" / shard.file).rename(folder / shards[-1].file)
        (tmp_path / f"part{number}" / shard.sidecar).rename(folder / shards[-1].sidecar)
    (folder / "index.json").write_text(Index("X\x1b[2J", tuple(shards)).to_json())
    run(inspect.VERIFY, folder, "--processes", "1")
    (folder / shards[0].file).unlink()
    (folder / shards[1].sidecar).write_bytes(b"x")
    data = bytearray((folder / shards[3].file).read_bytes())
    data[700] ^= 1
    (folder / shards[3].file).write_bytes(data)
    with pytest.raises(PipelineError) as caught:
        run(inspect.VERIFY, folder, "--processes", "1")
    lines = str(caught.value).splitlines()
    assert lines[1] == f"{folder}/[0] a.tar: there is no such file"
    assert lines[2].startswith(f"{folder}/[1] a.idx.npy is damaged")
    assert len(lines) > 3 and all(line.startswith(f"{folder}/[3] a.tar") for line in lines[3:])


def test_show_and_stats_escape_control_characters_in_names(tmp_path, capsys):
    pairs = [Pair("k\x1b[1m", "X\x1b[2J[/red]", "[/t]\x9b", Item("q"), Item("t"))]
    write_shards(pairs, tmp_path, dataset="X\x1b[2J[/red]")
    (tmp_path / "000000.tar").rename(tmp_path / "[bold].tar")
    (tmp_path / "000000.idx.npy").rename(tmp_path / "[bold].idx.npy")
    index = Index.load(str(tmp_path))
    renamed = tuple(replace(shard, file="[bold].tar") for shard in index.shards)
    (tmp_path / "index.json").write_text(replace(index, shards=renamed).to_json())
    run(inspect.SHOW, tmp_path, "0")
    run(inspect.STATS, tmp_path)
    shown = capsys.readouterr().out
    assert "[bold].tar" in shown and r"X\x1b[2J[/red]" in shown and r"[/t]\x9b" in shown and r"k\x1b[1m" in shown
    assert "\x1b[2J" not in shown and "\x9b" not in shown


def test_show_prints_positives_weights_and_scores(tmp_path, capsys):
    one = Pair("0", "d", "t", Item("q"), Item("right"), (Item("no"),), positives=(Item("also"),))
    scored = replace(one, key="1", weights=(1.0, 0.25), scores=(0.75, 3.0, -1e-3))
    write_shards([one, scored], tmp_path, dataset="D")
    printed = shown(capsys, tmp_path, 0)
    assert "positive 'also'" in printed and "weight" not in printed and "score" not in printed
    printed = shown(capsys, tmp_path, 1)
    found = re.findall(r"(target|positive|negative|weight|score) (\S+)", printed)
    expected = [("target", "'right'"), ("weight", "1"), ("score", "0.75"), ("positive", "'also'"), ("weight", "0.25")]
    assert found == [*expected, ("score", "3"), ("negative", "'no'"), ("score", "-0.001")]
    verify(tmp_path)
