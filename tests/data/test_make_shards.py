import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.data import objects
from pipeline.data.index import Index, load_sidecar, read_samples
from pipeline.data.shards import parse_sample
from tools import make_shards as tool

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def make_shards(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run the command line from a folder that is not the repository."""
    command = [sys.executable, str(TOOLS / "make_shards.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/", env=os.environ | environment)


def read_all(url: str) -> list:
    pairs = []
    for shard in Index.load(url).shards:
        data = read_samples(url, shard, load_sidecar(url, shard), 0, shard.samples)
        pairs += map(parse_sample, data)
    return pairs


def row(number: int, **more: object) -> dict:
    return {
        "query": {"text": "<image>\nWhat is it?", "images": [f"photos/{number}.png"]},
        "target": {"text": f"thing {number} ü"},
        **more,
    }


@pytest.fixture
def source(tmp_path):
    """Returns a function that writes rows (or raw lines) to a jsonl file beside which three pictures lie."""
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (8 + number, 8), (number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")

    def write(*rows: dict | str) -> Path:
        lines = [each if isinstance(each, str) else json.dumps(each) for each in rows]
        path = tmp_path / "pairs.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.mark.parametrize("place", ["file", "s3"])
def test_jsonl(source, tmp_path, place, request, monkeypatch, capsys):
    dest = str(tmp_path / "out")
    if place == "s3":
        request.getfixturevalue("s3")
        dest = f"s3://pipeline-tests/jsonl/{tmp_path.name}"
    negative = {"text": "<image> or <image>", "images": ["photos/2.png", "photos/1.png"]}
    file = source(row(0), "", row(1, negatives=[negative, {"text": "no"}], task="vqa"))
    done = make_shards("jsonl", file, dest)
    assert done.returncode == 0, done.stderr
    assert "2 samples in 1 shards" in done.stdout
    first, second = read_all(dest)
    assert (first.key, first.dataset, first.task) == ("00000001", "pairs", "")
    assert (second.key, second.task) == ("00000003", "vqa")  # the line number; line 2 is empty
    assert first.target.text == "thing 0 ü"
    assert first.query.images == ((tmp_path / "photos/0.png").read_bytes(),)
    assert [len(item.images) for item in second.negatives] == [2, 0]
    assert second.negatives[0].images[0] == (tmp_path / "photos/2.png").read_bytes()

    text = in_process_error("jsonl", file, dest, monkeypatch=monkeypatch, capsys=capsys)
    assert "holds a dataset already" in text


def test_jsonl_of_several_datasets(source, tmp_path, monkeypatch):
    rows = [row(0, dataset="B"), row(1), row(2, dataset="A"), row(0, dataset="B")]
    arguments = ["jsonl", source(*rows), tmp_path / "out", "--dataset", "Rest", "--images", tmp_path]
    monkeypatch.setattr(sys, "argv", ["make_shards.py", *map(str, arguments)])
    tool.main()
    keys = {name: [pair.key for pair in read_all(str(tmp_path / "out" / name))] for name in ("A", "B", "Rest")}
    assert keys == {"A": ["00000003"], "B": ["00000001", "00000004"], "Rest": ["00000002"]}
    assert Index.load(str(tmp_path / "out/B")).dataset == "B"


TEXT = {"text": "t"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"query": ', "Invalid JSON: EOF while parsing a value at column"),
        ("[]", "object"),
        ('{"query": {"text": "\\ud800"}, "target": {"text": "t"}}', "Invalid JSON"),
        ({"query": TEXT}, "target Field required"),
        ({"query": TEXT, "target": TEXT, "negative": []}, "unknown field 'negative'"),
        ({"query": TEXT, "target": {"text": "t", "image": "x"}}, "unknown field 'target.image'"),
        ({"query": TEXT, "target": {"text": 1}}, "target.text"),
        ({"query": TEXT, "target": {"text": " "}}, "target is empty"),
        ({"query": TEXT, "target": TEXT, "negatives": [TEXT, {"text": ""}]}, "negatives.1 is empty"),
        ({"query": {"text": "<image>"}, "target": TEXT}, "query has 1 <image> marks in its text for 0 images"),
        ({"query": {"text": "t", "images": ["photos/0.png"]}, "target": TEXT}, "has 0 <image> marks"),
        ({"query": {"text": "<video>"}, "target": TEXT}, "rows carry no video"),
        ({"query": TEXT, "target": TEXT, "dataset": "../up"}, "dataset"),
        (row(9), "there is no image file"),
        (row(0) | {"query": {"text": "<image>", "images": ["../../etc/hostname"]}}, "leads out of the images"),
        (row(0) | {"query": {"text": "<image>", "images": ["/etc/hostname"]}}, "leads out of the images"),
        (row(0) | {"query": {"text": "<image>", "images": ["photos/link.png"]}}, "leads out of the images"),
        (row(0) | {"query": {"text": "<image>", "images": ["photos/broken.png"]}}, "cannot be read as a PNG"),
    ],
)
def test_jsonl_error_names_the_line(source, tmp_path, bad, reason, monkeypatch, capsys):
    (tmp_path / "photos" / "link.png").symlink_to("/etc/hostname")
    file = source(row(0), row(1), bad)
    text = in_process_error("jsonl", file, tmp_path / "out", monkeypatch=monkeypatch, capsys=capsys)
    assert text.startswith(f"error: {file}, line 3: ")
    assert reason in text
    assert not (tmp_path / "out" / "index.json").exists()


def in_process_error(*arguments: object, monkeypatch, capsys) -> str:
    """What the command line prints when it fails, without the seconds a new interpreter takes."""

    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        assert status == 2
        raise Ended

    monkeypatch.setattr(sys, "argv", ["make_shards.py", *map(str, arguments)])
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended):
        tool.main()
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1, text
    return text


def test_missing_bucket_is_one_line(s3, source):
    done = make_shards("jsonl", source(row(9)), "s3://nope/x")  # before the rows are looked at
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: s3://nope/x/index.json: there is no such bucket: create it, or correct the name or AWS_ENDPOINT_URL"
    ]


def test_other_mistakes_of_the_command_line(source, tmp_path, monkeypatch, capsys):
    file = source(row(0))
    for arguments, reason in [
        (("jsonl", tmp_path / "none.jsonl", tmp_path / "out"), "none.jsonl"),
        (("jsonl", file, tmp_path / "out", "--images", tmp_path / "none"), "no such folder"),
        (("jsonl", file, tmp_path / "out", "--dataset", "a b"), "cannot name a dataset"),
        (("jsonl", file, "/proc/none/out"), "/proc/none"),
        (("jsonl", file, "s3://me:hidden@bucket/x"), "carries credentials"),
    ]:
        text = in_process_error(*arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert reason in text
        assert "hidden" not in text


def test_demo(s3, tmp_path):
    dest = f"s3://pipeline-tests/demo/{tmp_path.name}"
    done = make_shards("demo", 3, dest, "--pairs", 20, "--queries", 3)
    assert done.returncode == 0, done.stderr
    for name in ("Scene-CLS", "Scene-VQA", "Scene-T2I", "Scene-I2T", "Scene-Ground"):
        pairs = read_all(f"{dest}/train/{name}")
        assert len(pairs) == 20
        assert {pair.dataset for pair in pairs} == {name}
    files = objects.list_under(f"{dest}/eval")
    assert f"{dest}/eval/tasks.json" in files
    assert any(file.endswith(".parquet") for file in files)


def test_server_stops_with_its_command(tmp_path):
    command = [sys.executable, str(TOOLS / "s3_server.py"), "--dir", str(tmp_path), "--bucket", "abc", "--"]
    code = "echo $AWS_ENDPOINT_URL; exit 7"
    done = subprocess.run([*command, "bash", "-c", code], capture_output=True, text=True, timeout=90)
    assert done.returncode == 7, done.stderr
    assert list(tmp_path.iterdir()) == []
    assert refuses(done.stdout.strip())

    code = "echo $AWS_ENDPOINT_URL; exec sleep 99"
    sleeper = subprocess.Popen([*command, "bash", "-c", code], stdout=subprocess.PIPE, text=True)
    url = sleeper.stdout.readline().strip()
    assert not refuses(url)
    sleeper.terminate()
    assert sleeper.wait(30) == 143
    assert list(tmp_path.iterdir()) == []
    assert refuses(url)


def refuses(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) != 0
