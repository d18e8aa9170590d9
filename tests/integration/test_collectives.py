"""How often a step communicates, and that weights gathered inside each node (hpZ) change nothing."""

import json
from pathlib import Path

import pytest
from launch import launch

from pipeline.errors import PipelineError
from pipeline.training.partitions import check_nodes

WORKER = str(Path(__file__).with_name("collectives.py"))


@pytest.fixture(scope="module")
def results(tiny_model, tmp_path_factory) -> dict[str, dict]:
    """Run all cases on four processes, which are two nodes of two for the cases by node."""
    ended = launch([WORKER, tiny_model, str(tmp_path_factory.mktemp("collectives"))], 4)
    assert ended.status == [0] * 4, ended.output[-4000:]
    return json.loads(next(line for line in ended.output.splitlines() if line.startswith("{")))


def test_steps_embeddings_and_resumed_steps_are_equal_by_node(results):
    for name in ("zero3 by node", "adapters by node"):
        for what in ("steps", "embeddings", "parameters", "resumed step", "resumed parameters"):
            assert results[name][what] < 1e-6, (name, what)


def test_steps_are_equal_with_the_layers_that_run_on_a_gpu(results):
    """Fused layers hand sums and inputs to each other, and DeepSpeed's hooks see that."""
    # float32: rounding in another order. bf16: also of activations, which the first factors of adapters magnify.
    for name, closeness in (("zero3 as on a GPU", 1e-4), ("adapters as on a GPU", 0.2)):
        for what in ("steps", "embeddings", "parameters"):
            assert 0 < results[name][what] < closeness, (name, what)


def test_zero1_reduces_gradients_once_and_higher_stages_once_per_chunk(results):
    chunks = results["zero1"]["backward passes"]
    assert chunks > 2
    for name in ("zero2", "zero3", "zero3 by node"):
        assert results[name]["backward passes"] == chunks
        assert results[name]["reduce of 4"] - results["zero1"]["reduce of 4"] == chunks - 1


def test_groups_that_would_span_nodes_are_refused():
    for ranks in (2, 4, 8):
        check_nodes({"zero_hpz_partition_size": 2}, ranks)
        check_nodes({}, ranks)
    for size, ranks in ((8, 4), (2, 3)):
        with pytest.raises(PipelineError, match=f"={size} does not divide the {ranks} processes of a node: set it to"):
            check_nodes({"zero_hpz_partition_size": size}, ranks)


def test_by_node_each_trained_weight_is_gathered_from_all_ranks_once_per_step(results):
    """Embeddings, labels and paddings come on top, hence a few percent."""
    for name in ("zero3", "adapters"):
        plain, by_node = results[name], results[f"{name} by node"]
        assert plain["elements, gather of 4"] > 10 * plain["trained"]
        assert "gather of 2" not in plain
        assert plain["trained"] <= by_node["elements, gather of 4"] < 1.2 * plain["trained"]
        gathered = by_node["elements, gather of 2"] + by_node["elements, gather of 4"]
        assert gathered == pytest.approx(plain["elements, gather of 4"], rel=0.01)
