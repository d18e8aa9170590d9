"""What TensorBoard shows of a run: groups, descriptions, charts, the recipe, one row of hyperparameters, warnings."""

import json
import logging
import math
import re

import numpy as np
import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler

from pipeline.config import load_recipe
from pipeline.errors import PipelineError
from pipeline.models.shown import View
from pipeline.phases import phase
from pipeline.training.monitor import Monitor
from pipeline.training.pictures import Candidate, Row
from pipeline.training.scalars import CHARTS, SCALARS, charts, scalar_of

RECIPE = load_recipe("demo.yaml", ["optimizer.lr=0.25", "data.datasets=[a, b]"])


def metrics_of(step: int) -> dict:
    figures = {"loss": 8.0 / step, "precision": 0.25, "precision/a": 0.5, "masked_pairs": 0.01, "grad_norm": 2.0}
    return {"step": step, "epoch": 0, "samples": 64 * step, "valid": 64} | figures | {"share/a": 0.125}


def speed_of(step: int) -> dict:
    return {"seconds": 0.5, "samples_per_second": 128.0, "seconds/loss": 0.1, "padding": 0.2, "peak_memory": 0.5}


def run_steps(folder, start: int, stop: int, end: int, *, finish: bool = False) -> None:
    with Monitor(folder, 0, start, end, ledger=False) as monitor:
        monitor.describe(RECIPE, 2, "# 2 processes\nrun: here\n")
        for step in range(start + 1, stop + 1):
            monitor.step(metrics_of(step), speed_of(step), {"positive": np.array([0.1, math.nan])})
        if finish:
            monitor.board.finished()


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run that was killed after step 4 and resumed from step 2."""
    folder = tmp_path_factory.mktemp("runs") / "resumed"
    run_steps(folder, 0, 4, 6)
    run_steps(folder, 2, 6, 6, finish=True)
    return folder


@pytest.fixture(scope="module")
def board(resumed):
    return EventAccumulator(str(resumed / "tensorboard")).Reload()


@pytest.fixture(scope="module")
def provider(resumed):
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(resumed.parent))
    multiplexer.Reload()
    return MultiplexerDataProvider(multiplexer, str(resumed.parent))


def test_scalars_have_groups_descriptions_and_percents(board):
    shown = {tag: [event.value for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert shown["learning/loss"] == pytest.approx([8.0 / step for step in range(1, 7)])
    assert shown["learning/precision_at_1"] == [25.0] * 6
    assert shown["learning/precision_at_1/a"] == [50.0] * 6
    assert shown["data/share/a"] == [12.5] * 6
    assert shown["speed/seconds/loss"] == pytest.approx([0.1] * 6)
    assert shown["memory/peak"] == [50.0] * 6
    assert {tag.partition("/")[0] for tag in shown} == {"learning", "speed", "data", "memory"}
    assert "percent" in board.SummaryMetadata("learning/precision_at_1/a").summary_description
    assert all(board.SummaryMetadata(tag).summary_description for tag in shown)


def test_every_listed_scalar_is_named_once_and_described():
    assert len({scalar.tag for scalar in SCALARS.values()}) == len(SCALARS)
    assert all(scalar.text.endswith(".") and len(scalar.text) > 10 for scalar in SCALARS.values())
    assert scalar_of("valid", "learning") is None
    assert scalar_of("seconds", "speed").tag == "speed/step_seconds"
    assert scalar_of("seconds/loss", "speed").tag == "speed/seconds/loss"
    assert scalar_of("of another objective", "learning").tag == "learning/of another objective"


def test_charts_have_only_what_there_is(provider, board):
    plugin = CustomScalarsPlugin(TBContext(data_provider=provider))
    layout = plugin.layout_impl(RequestContext(), "")
    pages = {page["title"]: [chart["title"] for chart in page["chart"]] for page in json.loads(layout)["category"]}
    assert pages["learning"][:3] == ["loss", "in-batch Precision@1 (%)", "in-batch Precision@1 by dataset (%)"]
    assert set(pages) == {"learning", "speed", "data", "memory"}  # nothing was evaluated
    tags, titles = board.Tags()["scalars"], {title for page in pages.values() for title in page}
    for page in CHARTS.values():
        for title, pattern in page.items():
            assert (title in titles) == any(re.fullmatch(pattern, tag) for tag in tags)
    everything = [scalar.tag for scalar in SCALARS.values()]
    parts = [f"{tag}/x" for tag in everything] + ["evaluation/overall", "evaluation/overall@64"]
    assert charts(everything + parts).keys() == CHARTS.keys()
    assert all(charts(everything + parts)[page].keys() == CHARTS[page].keys() for page in CHARTS)


def test_run_is_one_row_of_hyperparameters_after_a_resume(provider):
    statuses = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING]
    request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=9, allowed_statuses=statuses)
    request.aggregation_type = api_pb2.AGGREGATION_AVG
    context = Context(TBContext(data_provider=provider))
    handler = Handler(request_context=RequestContext(), backend_context=context, experiment_id="", request=request)
    (group,) = handler.run().session_groups
    (session,) = group.sessions
    assert session.status == api_pb2.STATUS_SUCCESS
    assert group.hparams["optimizer.lr"].number_value == 0.25
    assert group.hparams["processes"].number_value == 2
    assert group.hparams["data.datasets"].string_value
    values = {value.name.tag: value.value for value in group.metric_values}
    assert values["learning/loss"] == pytest.approx(8 / 6)
    assert values["speed/samples_per_second"] == 128.0


def test_recipe_warnings_and_pictures_are_shown(tmp_path):
    rows = [
        Row(
            View("a query"),
            Candidate(0.5, View("its target")),
            [Candidate(0.75, View("near", np.zeros((3, 8, 8), np.uint8), 2.0))],
        )
    ]
    with pytest.raises(PipelineError), Monitor(tmp_path, 0, 0, 2, ledger=False) as monitor:
        monitor.describe(RECIPE, 2, "run: here\n")
        with phase("report", 1):
            monitor.step(metrics_of(1) | {"loss": math.nan}, speed_of(1), {})
            logging.getLogger("pipeline.training").warning("look at %s", "this")
            logging.getLogger("pipeline.training").info("not at that")
            monitor.pictures(1, rows)
            raise PipelineError("the disk is full")
    logging.getLogger("pipeline.training").warning("after the run")
    texts = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert [(line["step"], line["text"]) for line in texts] == [
        (1, "look at this"),
        (1, "the run failed: the disk is full"),
    ]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None  # strict JSON
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    def shown(tag: str) -> list[str]:
        return [event.tensor_proto.string_val[0].decode() for event in board.Tensors(f"{tag}/text_summary")]

    assert shown("warnings") == ["look at this", "the run failed: the disk is full"]
    assert "run: here" in shown("recipe")[0]
    assert "a query" in shown("hardest_negatives")[0] and "**0.750** near" in shown("hardest_negatives")[0]
    (image,) = board.Images("pictures/hardest_negatives")
    assert (image.width, image.height) == (1000, 240)
