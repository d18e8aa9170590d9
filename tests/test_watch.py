"""The terminal's view of a run, from files that the run itself writes."""

import json
import os
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import watch
from pipeline.jobs import status
from pipeline.phases import Place
from pipeline.training.monitor import Monitor
from pipeline.training.watchdog import FOLDER, Note

STEPS, DONE = 200, 60


@pytest.fixture
def run(tmp_path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    status.begin(run)
    with Monitor(run, 0, 0, STEPS, ledger=False) as monitor:
        for step in range(1, DONE + 1):
            metrics = {"step": step, "loss": 9.0 / step, "precision": step / 100, "lr": 1e-4, "grad_norm": 2.0}
            speed = {"seconds": 2.0, "waiting_for_data": 0.5, "samples_per_second": 32.0, "tokens_per_second": 4096.0}
            monitor.step(metrics, speed | {"seconds/checkpoint": 60.0 if step == 50 else 0.0}, {})
        monitor.warnings.write("the source of the data is slow")
    (run / "checkpoints/step-00000050").mkdir(parents=True)
    return run


def shown(run: Path, later: float = 0.0) -> str:
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(watch.view(run, 120, datetime.now(UTC) + timedelta(seconds=later)))
    return console.export_text()


def test_view_has_state_progress_curves_and_warnings(run):
    text = shown(run)
    assert "running" in text and "60 of 200 (30%)" in text
    assert "3.2 s a step, 0:07:28 left" in text  # of 50 steps of 2 s and a checkpoint of 60 s: 3.2 s
    assert "▁" in text and "█" in text and "0.15" in text and "60.0%" in text
    assert "samples/s 32.0" in text and "waiting 25%" in text
    assert "step-00000050" in text and "the source of the data is slow" in text
    assert "stuck" not in text


def test_rank_that_others_wait_for_is_shown_before_the_collective_times_out(run):
    start = status.Status.read(run).launch
    for rank, phase in ((0, "optimizer"), (1, "first_pass")):
        place = Place(100 - rank, 61, phase, 0.0)
        (run / FOLDER).mkdir(exist_ok=True)
        Note(rank, f"node{rank}", start, place, "code (file.py:1)", "", 5.0).write(run / FOLDER)
    text = " ".join(shown(run, later=3610).split())
    assert re.search(r"no step for 36\d\d s", text)
    assert "rank 1 on node1 is in step 61, first_pass" in text
    # A note that is left from a start with more processes is of no rank that others wait for.
    (run / "recipe.yaml").write_text("# 2 processes; Python 3.11\n")
    Note(2, "node2", "before", Place(7, 1, "data", 0.0), "code (file.py:1)", "", 5.0).write(run / FOLDER)
    text = " ".join(shown(run, later=3610).split())
    assert "rank 1 on node1 is in step 61, first_pass" in text and "rank 2" not in text
    status.note(run, "finished", reason="")
    assert "stuck" not in shown(run, later=3610)


@pytest.mark.parametrize("content", ["", "{", '{"state": "unheard of"}'])
def test_damaged_files_do_not_end_the_watch(run, content):
    for name in ("metrics.jsonl", "speed.jsonl", "warnings.jsonl"):
        (run / name).write_text('{"step": 1, "loss": null}\n[1]\n{"step": 2, "lo')
    (run / "status.json").write_text(content)
    (run / "evaluation").mkdir()
    (run / "evaluation/step-00000050.json").write_text("{")
    assert "failed" in shown(run)


def test_sparkline_is_as_wide_as_asked_and_skips_what_is_missing():
    assert watch.sparkline([1.0, None, float("nan"), 2.0], 10) == "▁█"
    assert watch.sparkline([3.0] * 5, 10) == "▁" * 5
    assert len(watch.sparkline(list(range(1000)), 40)) == 40
    assert watch.sparkline([None], 10) == ""


def test_once_prints_and_exits(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["watch", str(run), "--once"])
    watch.main()
    assert "60 of 200" in capsys.readouterr().out
    assert json.loads((run / "status.json").read_text())["step"] == DONE  # it changes nothing
