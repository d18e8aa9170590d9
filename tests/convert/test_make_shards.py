"""The command line: every command explains itself; folders and S3 alike; one clear line for a mistake."""

import pytest
from conversion import content, error_of, make_shards, read_all

from pipeline.demo import tasks
from tools import make_shards as tool


@pytest.mark.parametrize("command", tool.COMMANDS)
def test_help_names_every_option_and_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        make_shards(command, "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"python tools/make_shards.py {command} " in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        make_shards("--help")
    text = capsys.readouterr().out
    for name, command in tool.COMMANDS.items():
        assert name in text
        assert " ".join(command.description.splitlines()[0].split()) in " ".join(text.split())


def test_demo(s3, tmp_path, capsys):
    url = f"s3://pipeline-tests/make-shards/{tmp_path.name}"
    make_shards("demo", 3, url, "--pairs", 20, "--queries", 3)
    summaries = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert summaries.keys() == {f"{url}/train/{name}" for name in tasks.DATASETS}
    assert all(summary.startswith("20 samples in 1 shards, ") for summary in summaries.values())
    for name in tasks.DATASETS:
        assert read_all(f"{url}/train/{name}") == list(tasks.training_pairs(name, 3, 20))
    tasks.write_evaluation(tmp_path, 3, 3)
    assert content(f"{url}/eval") == content(str(tmp_path))


def test_a_missing_bucket_is_found_before_the_source_is_read(s3, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("not looked at\n")
    assert error_of("jsonl", tmp_path / "pairs.jsonl", "s3://nope/x") == (
        "s3://nope/x/index.json: there is no such bucket: create it, or correct the name or AWS_ENDPOINT_URL"
    )


def test_an_occupied_folder_is_found_before_the_source_is_read(tmp_path):
    (tmp_path / "index.json").write_text("{}")
    assert "holds a dataset already" in error_of("jsonl", tmp_path / "none.jsonl", tmp_path)
