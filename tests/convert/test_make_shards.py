"""The command line: help for every command; folders and S3 behave alike; one clear line per mistake."""

import signal
import socket
from collections.abc import Iterator

import pytest
from conversion import content, error_of, make_shards, read_all, start
from limits import HANG_SECONDS

from pipeline import make_shards as tool
from pipeline.convert.engine import run_conversions
from pipeline.demo import captioned, tasks


@pytest.mark.parametrize("command", tool.COMMANDS)
def test_help_shows_example_within_120_columns(command, capsys):
    with pytest.raises(SystemExit) as ended:
        make_shards(command, "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"python tools/make_shards.py {command} " in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_help_lists_commands(capsys):
    with pytest.raises(SystemExit):
        make_shards("--help")
    text = capsys.readouterr().out
    for name, command in tool.COMMANDS.items():
        assert name in text
        assert " ".join(command.description.splitlines()[0].split()) in " ".join(text.split())


@pytest.mark.slow
def test_demo_command_writes_all_datasets(tmp_path, capsys):
    url = str(tmp_path)
    make_shards("demo", 3, url, "--pairs", 20, "--queries", 3)
    summaries = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    captions = {f"{url}/captions/train/{name}": name for name in captioned.DATASETS}
    assert summaries.keys() == {f"{url}/train/{name}" for name in tasks.DATASETS} | captions.keys()
    for folder, summary in summaries.items():
        assert summary.startswith(f"{5 if folder.endswith('/sentences') else 20} samples in 1 shards, ")
    for name in tasks.DATASETS:
        assert read_all(f"{url}/train/{name}") == [tasks.training_pair(name, 3, index) for index in range(20)]
    for folder, name in captions.items():
        pairs = read_all(folder)
        assert pairs == [captioned.training_pair(name, 3, index) for index in range(len(pairs))]
    assert content(f"{url}/eval/") == dict(tasks.evaluation_files(3, 3))
    assert content(f"{url}/captions/eval/") == dict(captioned.evaluation_files(3, 3))


def test_missing_bucket_is_reported_before_reading_source(s3, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("not looked at\n")
    assert error_of("jsonl", tmp_path / "pairs.jsonl", "s3://nope/x") == (
        "s3://nope/x/index.json: there is no such bucket: create it, or correct the name or AWS_ENDPOINT_URL"
    )


def test_occupied_destination_is_reported_before_reading_source(tmp_path):
    (tmp_path / "index.json").write_text("{}")
    assert "already contains a dataset" in error_of("jsonl", tmp_path / "none.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("jsonl", "", "out"), "argument SOURCE: it is empty"),
        (("jsonl", "pairs.jsonl", ""), "argument DEST: it is empty"),
        (("img2dataset", "tars", ""), "argument DEST: it is empty"),
        (("mmeb-train", "", "out"), "argument SOURCE: it is empty"),
        (("mmeb-eval", "x", "out", "--images", ""), "argument --images: it is empty"),
        (("demo", "-1", "out"), "-1"),
        (("jsonl", "x", "out", "--max-rejected", "1%"), "argument --max-rejected: 1% is not a number between 0 and 1"),
        (
            ("jsonl", "x", "out", "--image-max-side", 9, "--image-quality", 96),
            "96 is not a whole number between 1 and 95",
        ),
        (("jsonl", "x", "out", "--shards", 2, "--shard-mb", 2), "not allowed with argument"),
    ],
)
def test_invalid_arguments_exit_with_reason(arguments, reason, capsys):
    with pytest.raises(SystemExit) as ended:
        make_shards(*arguments)
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_failed_file_generation_leaves_no_files(tmp_path):
    with pytest.raises(ValueError, match="nothing"):

        def files() -> Iterator[tuple[str, bytes]]:
            raise ValueError("nothing")
            yield

        run_conversions({str(tmp_path / "out"): None}, unit="", processes=1, max_rejected=0, files=files())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"),
    [("verify", "interrupted"), ("jsonl", "interrupted: the same command continues from here")],
)
def test_interruption_message_offers_resume_only_for_conversions(command, said, tmp_path, monkeypatch):
    """Both commands wait for a server that does not answer."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    source = ("pairs.jsonl",) if command == "jsonl" else ()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(HANG_SECONDS)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        process = start(command, *source, "s3://bucket/x")
        with server.accept()[0]:
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130
    assert error.endswith(f"\n{said}\n")
