"""The conversion engine: same bytes for any number of processes and after any stop; omitted rows are reported."""

import json
import os
import re
import signal
import subprocess
import tarfile
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from conversion import content, error_of, make_shards, picture, read_all, start
from limits import HANG_SECONDS

from pipeline.convert.command import _content
from pipeline.convert.engine import _folders
from pipeline.convert.sharding import Rejection, convert
from pipeline.data.index import Index
from pipeline.data.sample import Item, Pair
from pipeline.errors import PipelineError
from pipeline.storage import lock, objects

ROWS = 400
BROKEN = 7  # the number of the row with an invalid image


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Create a jsonl file of two datasets whose conversion writes many shards and omits one row."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(20):
        (folder / f"{number}.png").write_bytes(picture(60 + number, 60, number))
    (folder / f"{BROKEN}.png").write_bytes(b"none")
    (folder / "none.png").write_bytes(b"none")
    rows = []
    for number in range(ROWS):
        image = f"{number % 20}.png" if number % 20 != BROKEN else "1.png"
        query = {"text": f"<image>\nquery {number}", "images": ["none.png" if number == BROKEN else image]}
        rows.append({"query": query, "target": {"text": f"target {number}"}, "dataset": "AB"[number // 280]})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def arguments(source: Path, dest: str, *more: object) -> tuple:
    return ("jsonl", source, dest, "--shards", 12, *more)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> dict[str, bytes]:
    """Return the files that a conversion by one process writes."""
    dest = str(tmp_path_factory.mktemp("dest") / "out")
    make_shards(*arguments(source, dest))
    written = content(dest)
    assert len(written) == 2 * (2 * 12 + 2)
    assert not any(path.name == ".unfinished" for path in Path(dest).rglob("*"))
    return written


def test_samples_follow_row_order(source, tmp_path):
    dest = tmp_path / "out"
    make_shards("jsonl", source, dest, "--shard-mb", 1)
    samples = {name: read_all(str(dest / name)) for name in "AB"}
    for name, numbers in (("A", range(280)), ("B", range(280, ROWS))):
        kept = [number for number in numbers if number != BROKEN]
        assert [sample.key for sample in samples[name]] == [f"{number + 1:08d}" for number in kept]
        assert [sample.target.text for sample in samples[name]] == [f"target {number}" for number in kept]
        sizes = [shard.size for shard in Index.load(str(dest / name)).shards]
        assert len(sizes) > 1
        assert all(0.9 < size / (1 << 20) < 1.1 for size in sizes[:-1])
    (listed,) = map(json.loads, (dest / "A/rejected.jsonl").read_text().splitlines())
    assert (listed["row"], listed["cause"]) == ("line 8", "broken image")
    assert listed["detail"].startswith("none.png: undecodable image")
    assert (dest / "B/rejected.jsonl").read_bytes() == b""


def state(path: str | Path) -> tuple[int, int]:
    """Return values that change when a file is rewritten."""
    found = Path(path).stat()
    return found.st_ino, found.st_mtime_ns


def records(dest: str) -> list[str]:
    return [name for name in objects.list_under(dest) if "/.unfinished/0" in name and name.endswith(".json")]


def wait_for_records(process: subprocess.Popen, dest: str, count: int) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while len(records(dest)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_conversion_resumes_without_rewriting_shards(source, undisturbed, tmp_path):
    """Two processes start and three finish; the bytes equal those of one process."""
    dest = str(tmp_path / "out")
    process = start(*arguments(source, dest, "--processes", 2))
    wait_for_records(process, dest, 5)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=HANG_SECONDS)
    assert alive == []
    done = [name.replace("/.unfinished", "").replace(".json", ".tar") for name in records(dest)]
    assert 5 <= len(done) < 24
    before = {name: state(name) for name in done}
    assert not Path(dest, "B/index.json").exists()

    make_shards(*arguments(source, dest, "--processes", 3))
    assert content(dest) == undisturbed
    assert {name: state(name) for name in done} == before


def test_interrupted_s3_conversion_stops_cleanly_and_resumes(s3, source, undisturbed, tmp_path, monkeypatch):
    dest = f"s3://pipeline-tests/engine/{tmp_path.name}"
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    process = start(*arguments(source, dest, "--processes", 2))
    wait_for_records(process, dest, 3)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130, output
    assert output[1].splitlines()[-1] == "interrupted: the same command continues from here"
    assert "Traceback" not in output[1]
    _, alive = psutil.wait_procs(children, timeout=HANG_SECONDS)
    assert alive == []
    assert list((tmp_path / "tmp").glob("make-shards-*")) == []

    first, second, *others = records(dest)
    assert len(others) < 22
    kept, lost = (name.replace("/.unfinished", "").replace(".json", ".tar") for name in (first, second))
    objects.write(kept, bytes(objects.size(kept)))  # a second conversion would repair it
    objects.delete(lost)
    make_shards(*arguments(source, dest))
    written = content(dest)
    assert written.pop(kept.removeprefix(dest)).strip(b"\0") == b""
    assert written == {name: data for name, data in undisturbed.items() if name != kept.removeprefix(dest)}


@dataclass(frozen=True)
class Numbers:
    """Rows that contain their number; some are rejected."""

    count: int
    rejected: frozenset[int] = frozenset()
    dataset: str = "Numbers"
    size: int = 1000

    def sizes(self) -> np.ndarray:
        return np.full(self.count, self.size)

    def name(self, number: int) -> str:
        return f"number {number}"

    def sample(self, number: int) -> Pair:
        if number in self.rejected:
            raise Rejection("even" if number % 2 == 0 else "odd", f"{number}\nis not wanted " + "x" * 1000)
        return Pair(f"{number:08d}", self.dataset, "", Item(f"q{number}"), Item(f"t{number}"))

    def files(self) -> dict[str, bytes]:
        return {"more.bin": b"more"}


def test_upload_folder_depends_on_server_and_dest(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for server, dest in (("a", "s3://b/d"), ("b", "s3://b/d"), ("a", "s3://c/d"), ("a", "s3://b/d")):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")
        with _folders([conversion := Namespace(dest=dest, remote=True)]):
            found.append(conversion.folder)
    assert len(set(found[:3])) == 3 and found[3] == found[0]  # an earlier start's files are found


def test_rejected_rows_are_listed_in_order_and_empty_shards_omitted(tmp_path, capsys):
    rows = Numbers(100, frozenset({3, 50, *range(20, 30)}))
    dest = str(tmp_path / "out")
    (index,) = convert({dest: rows}, options={}, shards=10, max_rejected=0.12).values()
    assert [shard.file for shard in index.shards] == [f"{n:06d}.tar" for n in range(10) if n != 2]
    assert not (tmp_path / "out/000002.tar").exists()
    listed = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [each["row"] for each in listed] == [f"number {n}" for n in (3, *range(20, 30), 50)]
    assert listed[0]["cause"] == "odd"
    assert listed[0]["detail"].startswith("3 is not wanted xxx")
    assert len(listed[0]["detail"]) == 300
    assert [int(sample.key) for sample in read_all(dest)] == [n for n in range(100) if n not in rows.rejected]
    assert (tmp_path / "out/more.bin").read_bytes() == b"more"
    summary = capsys.readouterr().out
    assert f"{dest}: 88 samples in 9 shards, " in summary
    assert summary.endswith("12 rejected (6 odd, 6 even)\n")


def test_corrupt_listing_leaves_no_records(tmp_path, monkeypatch):
    listed, damaged = objects.list_under, []

    def once_damaged(url: str) -> list[str]:
        found = listed(url)
        if (tmp_path / "index.json").exists() and not damaged:
            damaged.append(found.pop())
            found.append(f"{damaged[0]}x")
        return found

    monkeypatch.setattr(objects, "list_under", once_damaged)
    convert({str(tmp_path): Numbers(8)}, options={}, shards=4)
    assert damaged
    assert not (tmp_path / ".unfinished").exists()


def test_too_many_rejections_stop_conversion_and_higher_limit_resumes(tmp_path):
    dest = str(tmp_path / "out")
    rows = Numbers(100, frozenset({13, 14, 33, 75}))
    with pytest.raises(PipelineError) as caught:
        convert({dest: rows}, options={}, shards=100, max_rejected=0.02)
    text = str(caught.value)
    assert "\n" not in text
    assert "more than --max-rejected 0.02 allows: 2 odd, 1 even; the first: number 13: odd: 13 is not wanted" in text
    assert "number 14: even" in text
    assert "raise --max-rejected" in text
    assert text.endswith(f"delete {dest} and start again")
    read = re.search("out: 3 rows are rejected so far, of ([0-9]+) rows read, ", text)
    assert 3 <= int(read[1]) < 100
    listed = [json.loads(line)["row"] for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert listed[:3] == ["number 13", "number 14", "number 33"]
    done = {name[-11:-5] for name in records(dest)}
    assert {"000013", "000014", "000033"} <= done
    assert len(done) < 100  # it stopped as soon as the result was certain
    before = state(tmp_path / "out/000012.tar")
    convert({dest: rows}, options={}, shards=100, max_rejected=0.04)
    assert state(tmp_path / "out/000012.tar") == before
    assert len(read_all(dest)) == 96


def test_too_many_rejections_stop_conversion_inside_shard(tmp_path, capsys):
    class Counted(Numbers):
        asked = 0

        def sample(self, number: int) -> Pair:
            Counted.asked += 1
            return super().sample(number)

    rows, dest = Counted(100, frozenset(range(1, 100))), tmp_path / "out"
    with pytest.raises(PipelineError, match=r"of 7 rows read, .* 3 odd, 3 even; the first: number 1"):
        convert({str(dest): rows}, options={}, max_rejected=0.05)
    assert Counted.asked == 7
    assert len((dest / "rejected.jsonl").read_text().splitlines()) == 6
    assert content(str(dest)).keys() == {"/.unfinished/plan.json", "/rejected.jsonl"}  # the shard is not recorded
    assert re.findall(r"converting: *(\d+)%", capsys.readouterr().err)[-1] == "0"
    (dest / "mine.tar").touch()
    with pytest.raises(PipelineError, match=r"\*\.idx\.npy and, unless they are SOURCE, \*\.tar in DEST"):
        convert({str(dest): rows}, options={}, max_rejected=0.05)


def test_error_stops_the_next_job_of_the_only_process(tmp_path):
    class Slow(Numbers):
        asked = 0

        def sample(self, number: int) -> Pair:
            if number >= 500:
                Slow.asked += 1
                time.sleep(0.02)
            return super().sample(number)

    with pytest.raises(PipelineError, match="1 rows are rejected so far, of 500 rows read"):
        convert({str(tmp_path / "out"): Slow(1000, frozenset({499}))}, options={}, shards=2, max_rejected=0)
    assert Slow.asked < 500


@pytest.mark.parametrize("percent", [0, 1, 29, 57, 58, 99])  # 0.29 * 100 is less than 29 in floating point
def test_allowed_rejections_round_down(tmp_path, percent):
    convert({str(tmp_path / "out"): Numbers(100, frozenset(range(percent)))}, options={}, max_rejected=percent / 100)
    with pytest.raises(PipelineError, match=f"{percent + 1} rows are rejected"):
        more = Numbers(100, frozenset(range(percent + 1)))
        convert({str(tmp_path / "more"): more}, options={}, max_rejected=percent / 100)


def test_source_without_usable_rows_is_refused(tmp_path):
    with pytest.raises(PipelineError, match="no row is usable"):
        convert({str(tmp_path / "out"): Numbers(5, frozenset(range(5)))}, options={}, max_rejected=1)
    assert len((tmp_path / "out/rejected.jsonl").read_text().splitlines()) == 5
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    assert "no row is usable, SOURCE has none" in error_of("img2dataset", tmp_path, tmp_path / "none")
    with pytest.raises(PipelineError, match="Numbers: the source has no rows"):
        convert({str(tmp_path / "out"): Numbers(0)}, options={})


def test_oversized_sample_is_rejected(tmp_path, monkeypatch):
    with pytest.raises(PipelineError, match="3 too large; the first: number 0: too large: more than 1024 MiB"):
        convert({str(tmp_path / "out"): Numbers(3, size=(1 << 30) + 1)}, options={}, shards=1, max_rejected=0.7)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"options": {"query": "b"}}, "whose query was 'a' and is now 'b'"),
        ({"shards": 5}, "whose shards was 10 and is now 5"),
        ({"rows": Numbers(100, dataset="Other")}, "whose dataset was 'Numbers' and is now 'Other'"),
    ],
)
def test_resume_with_changed_options_is_refused(tmp_path, change, named):
    dest = str(tmp_path / "out")
    with pytest.raises(PipelineError, match="max-rejected"):
        convert({dest: Numbers(100, frozenset({55}))}, options={"query": "a"}, shards=10, max_rejected=0)
    Path(dest, "pairs.jsonl").touch()  # so DEST itself must not be deleted
    left = content(dest)
    given = {"rows": Numbers(100), "options": {"query": "a"}, "shards": 10} | change
    with pytest.raises(PipelineError) as caught:
        convert({dest: given.pop("rows")}, **given)
    assert f"{dest} contains an unfinished conversion {named}" in str(caught.value)
    assert (
        "give the same command with the same source, or delete .unfinished, rejected.jsonl, *.idx.npy and, unless"
        in str(caught.value)
    )
    assert content(dest) == left


def test_finished_dataset_is_not_overwritten(tmp_path):
    dest = str(tmp_path / "out")
    convert({dest: Numbers(10)}, options={})
    before = content(dest)
    named = "choose another DEST, or delete index.json, rejected.jsonl and *.idx.npy there, and the *.tar if"
    with pytest.raises(PipelineError, match="out already contains a dataset: " + re.escape(named)):
        convert({str(tmp_path / "new"): Numbers(10), dest: Numbers(10)}, options={})
    assert content(dest) == before
    assert content(str(tmp_path / "new")) == {}


@pytest.mark.parametrize("rows", [Numbers(101), Numbers(100, size=1001)])
def test_resume_with_changed_source_is_refused(tmp_path, rows):
    dest = str(tmp_path / "out")
    with pytest.raises(PipelineError, match="max-rejected"):
        convert({dest: Numbers(100, frozenset({55}))}, options={}, shards=10, max_rejected=0)
    with pytest.raises(PipelineError, match="SOURCE has changed since the conversion began: restore it, or delete"):
        convert({dest: rows}, options={}, shards=10)


def test_changed_line_of_same_length_counts_as_changed_source(source, tmp_path):
    file, dest = tmp_path / "pairs.jsonl", tmp_path / "out"
    given = ("jsonl", file, dest, "--images", source.parent)
    file.write_bytes(source.read_bytes())
    error_of(*given, "--max-rejected", 0)
    file.write_bytes(source.read_bytes().replace(b"target 399", b"target 398"))
    assert "SOURCE has changed since the conversion began" in error_of(*given)
    file.write_bytes(source.read_bytes())
    make_shards(*given)


def test_parquet_mtime_change_counts_as_changed_source(tmp_path):
    (tmp_path / "set").mkdir()
    file = tmp_path / "set/rows.parquet"
    file.write_bytes(b"rows")
    before = _content(Namespace(source=tmp_path))
    assert before == _content(Namespace(source=tmp_path))
    os.utime(file, ns=(1, 1))
    assert _content(Namespace(source=tmp_path)) != before


@pytest.mark.parametrize("name", ["000001.tar", "000001.idx.npy", "rejected.jsonl", "more.bin"])
def test_foreign_files_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(PipelineError, match=f"{re.escape(name)} exists and would be overwritten"):
        convert({str(tmp_path): Numbers(10)}, options={}, shards=2)
    assert content(str(tmp_path)) == {f"/{name}": b"precious"}
    with pytest.raises(PipelineError, match=f"{re.escape(name)} exists and would be overwritten"):
        convert({str(tmp_path / "out"): Numbers(10)}, options={}, files=[(str(tmp_path / name), b"")])


def test_locked_destination_is_refused(s3, tmp_path):
    for dest in (str(tmp_path / "out"), f"s3://pipeline-tests/lock/{tmp_path.name}"):
        with lock.held([dest]):
            there = objects.list_under(dest)
            with pytest.raises(PipelineError, match=f"{dest} is in use by process {os.getpid()} on .*: wait for it"):
                convert({dest: Numbers(10)}, options={})
            assert objects.list_under(dest) == there
        convert({dest: Numbers(10)}, options={})
        assert not [name for name in objects.list_under(dest) if "/." in name.removeprefix(dest)]


def test_lock_is_held_during_conversion(tmp_path):
    class Looking(Numbers):
        def sample(self, number: int) -> Pair:
            found.add(len(list((tmp_path / "out" / lock.FOLDER).iterdir())))
            return super().sample(number)

    found: set[int] = set()
    convert({str(tmp_path / "out"): Looking(3)}, options={})
    assert found == {1}


def test_resumed_upload_removes_temporary_folders(s3, source, tmp_path, monkeypatch):
    dest, tmp = f"s3://pipeline-tests/killed/{tmp_path.name}", tmp_path / "tmp"
    tmp.mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it is found again
    process = start(*arguments(source, dest, "--processes", 2))
    wait_for_records(process, dest, 3)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=HANG_SECONDS)
    assert alive == []
    assert len(list(tmp.glob("make-shards-*"))) == 2  # one per dataset
    make_shards(*arguments(source, dest))
    assert list(tmp.glob("make-shards-*")) == []


def test_finishable_datasets_finish_before_error_is_raised(tmp_path):
    """The first dataset's long record is still being written when the second dataset fails."""

    class Failing(Numbers):
        def sample(self, number: int) -> Pair:
            raise PipelineError("no more")

    many = Numbers(20_000, frozenset(range(1, 20_000)), dataset="many")
    with pytest.raises(PipelineError, match="no more"):
        convert({str(tmp_path / "many"): many, str(tmp_path / "none"): Failing(1)}, options={}, max_rejected=1)
    assert Index.load(str(tmp_path / "many")).samples == 1
    assert not (tmp_path / "many/.unfinished").exists()
    assert (tmp_path / "none/.unfinished/plan.json").exists()


@pytest.mark.parametrize("tidy", [True, False])
def test_finished_datasets_are_not_converted_again(tmp_path, tidy):
    """Without `tidy`, the stop came between writing a dataset's index and removing its plan."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    both = {first: Numbers(10, dataset="first"), second: Numbers(10, frozenset({5}), dataset="second")}
    with pytest.raises(PipelineError, match="second: 1 rows are rejected so far, of 6 rows read"):
        convert(both, options={}, max_rejected=0)
    assert (tmp_path / "first/index.json").exists()
    assert not (tmp_path / "first/.unfinished").exists()
    if not tidy:
        plan = (tmp_path / "second/.unfinished/plan.json").read_bytes()
        objects.write(f"{first}/.unfinished/plan.json", plan.replace(b"second", b"first"))
    before = state(tmp_path / "first/000000.tar")
    indexes = convert(both, options={}, max_rejected=0.1)
    assert state(tmp_path / "first/000000.tar") == before
    assert [index.samples for index in indexes.values()] == [10, 9]
    assert not (tmp_path / "first/.unfinished").exists()
    with pytest.raises(PipelineError, match="first already contains a dataset"):
        convert(both, options={}, max_rejected=0.1)


class Stopping(Numbers):
    """Rows of which the last one ends the conversion."""

    def sample(self, number: int) -> Pair:
        if number == self.count - 1:
            raise PipelineError("no more")
        return super().sample(number)


def test_missing_or_truncated_shards_are_rewritten(tmp_path):
    dest, whole = tmp_path / "out", tmp_path / "whole"
    convert({str(whole): Numbers(100)}, options={}, shards=10)
    with pytest.raises(PipelineError, match="no more"):
        convert({str(dest): Stopping(100)}, options={}, shards=10)
    (dest / "000002.tar").unlink()
    (dest / "000004.idx.npy").write_bytes(b"short")
    (dest / ".000004.idx.npy.1.partial").write_bytes(b"what a kill leaves")
    (dest / ".000004.tar.1.partial").write_bytes(b"what a kill leaves")
    (dest / ".unfinished/.000009.json.1.partial").write_bytes(b"what a kill leaves")
    convert({str(dest): Numbers(100)}, options={}, shards=10)
    assert content(str(dest)) == content(str(whole))


@dataclass(frozen=True)
class Deadly(Numbers):
    def sample(self, number: int) -> Pair:
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker_is_reported_as_one_error(tmp_path):
    with pytest.raises(PipelineError, match="a process was killed: if memory ran out, use fewer --processes"):
        convert({str(tmp_path / "out"): Deadly(10)}, options={}, shards=2, processes=2)


def test_invalid_command_lines_are_refused(source, tmp_path):
    for arguments, reason in [
        (("jsonl", tmp_path / "none.jsonl", tmp_path / "out"), "none.jsonl: No such file"),
        (("jsonl", source, tmp_path / "out", "--images", tmp_path / "none"), "none is not a folder"),
        (("jsonl", source, tmp_path / "out", "--dataset", "a b"), "is not a valid dataset name"),
        (("jsonl", source, "/proc/none/out"), "/proc/none"),
        (("jsonl", source, "s3://me:hidden@bucket/x"), "carries credentials"),
        (("jsonl", "s3://bucket/p.jsonl", tmp_path / "out"), "SOURCE s3://bucket/p.jsonl must be a local file"),
        (("mmeb-train", tmp_path, f"{tmp_path}/"), "is SOURCE: choose another DEST"),
        (("jsonl", source, tmp_path / "out", "--image-quality", 80), "give both, or neither"),
    ]:
        text = error_of(*arguments)
        assert reason in text
        assert "hidden" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"<html>busy</html>", b"[]", b'{"shard": null}', b'{"rows": 1.5'])
def test_damaged_plan_is_refused_and_damaged_records_are_redone(tmp_path, damage):
    rows, dest = Numbers(40, frozenset(range(40))), str(tmp_path / "out")
    with pytest.raises(PipelineError, match="rows are rejected"):
        convert({dest: rows}, options={}, shards=10, max_rejected=0.1)
    good = Numbers(40)
    undisturbed = convert({str(tmp_path / "other"): good}, options={}, shards=10)
    plan = tmp_path / "out/.unfinished/plan.json"
    for path in (tmp_path / "out/.unfinished").glob("0*.json"):
        path.write_bytes(damage)
    whole = plan.read_bytes()
    for name in ("000000", "000001"):
        (plan.parent / f"{name}.json").write_bytes(damage)
    plan.write_bytes(damage)
    with pytest.raises(PipelineError, match=r"plan\.json .*: delete .*/out and start again$|n whose shard_b"):
        convert({dest: good}, options={}, shards=10)
    plan.write_bytes(whole)  # the records are still damaged
    (index,) = convert({dest: good}, options={}, shards=10).values()
    assert index == next(iter(undisturbed.values()))
    assert not plan.parent.exists()


def test_record_naming_path_outside_dest_is_ignored(tmp_path):
    dest = tmp_path / "out"
    with pytest.raises(PipelineError, match="no more"):
        convert({str(dest): Stopping(40)}, options={}, shards=10)
    record = dest / ".unfinished/000000.json"
    result = json.loads(record.read_text())
    result["shard"]["file"] = "../000000.tar"
    record.write_text(json.dumps(result))
    (index,) = convert({str(dest): Numbers(40)}, options={}, shards=10).values()
    assert index.samples == 40


def test_resume_without_earlier_option_is_refused(tmp_path):
    dest = tmp_path / "out"
    with pytest.raises(PipelineError, match="rows are rejected"):
        convert({str(dest): Numbers(40, frozenset({39}))}, options={"scale": 2}, shards=10, max_rejected=0.0)
    with pytest.raises(PipelineError, match="unfinished conversion whose scale was 2 and is now None"):
        convert({str(dest): Numbers(40)}, options={}, shards=10)
