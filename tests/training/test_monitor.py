import json

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.evaluation.report import Report
from pipeline.evaluation.results import BINS, Result, Similarities
from pipeline.training.monitor import Monitor, StepLog


def test_a_continued_log_drops_the_steps_taken_again_and_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    log = StepLog(path, 0)
    for step in range(1, 6):
        log.write({"step": step, "try": 1})
    with path.open("a") as file:
        file.write('{"step": 6, "tr')
    log = StepLog(path, 3)
    log.write({"step": 4, "try": 2})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["try"]) for line in lines] == [(1, 1), (2, 1), (3, 1), (4, 2)]


def test_tensorboard_shows_metrics_speed_and_histograms(tmp_path):
    with Monitor(tmp_path, 0, 0, 2, ledger=False) as monitor:
        for step in (1, 2):
            metrics = {"step": step, "loss": 1 / step, "positive_similarity": None}
            monitor.step(metrics, {"seconds": 0.5}, {"positive": np.array([0.1])})
        none = Similarities(*[[0] * (len(BINS) - 1)] * 2)
        vqa = Result("vqa", True, "en", {"": 10}, {"P@1": 0.5}, 0.1, 0, none)
        clips = Result("text-video", None, "en", {"t2v": 10}, {"t2v R@1": 0.3, "t2v MdR": 4.0}, 0.1, 0, none)
        monitor.evaluation(2, Report("model", {"Scene-VQA": vqa, "clips": clips}))
    assert Report.read(tmp_path / "evaluation/step-00000002.json").averages()["vqa"] == 0.5
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("train/loss")] == [1.0, 0.5]
    assert [event.value for event in board.Scalars("evaluation/vqa")] == [0.5]
    tags = board.Tags()
    assert {"speed/seconds", "evaluation_datasets/Scene-VQA/P@1"} <= set(tags["scalars"])
    assert [event.value for event in board.Scalars("evaluation_datasets/clips/t2v MdR")] == [4.0]
    assert tags["histograms"] == ["similarity/positive"]
    assert "train/positive_similarity" not in tags["scalars"]
