"""Comparisons of runs that several tests share: a step with one process, an evaluation with another."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.evaluation.report import DatasetResult


def zero_config(name: str, folder: Path) -> str:
    """Return the project's config, changed so that ZeRO-3 partitions even small parameters."""
    config = json.loads(Path(f"ds_configs/{name}.json").read_text())
    if name.startswith("zero3"):
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return str(path)


def assert_equal(out: Path, name: str) -> None:
    """Check all results that a worker wrote. name: the worker's job, for the printed output."""
    for result in json.loads(out.read_text()):
        print(f"{name}: {result}")
        assert result["loss"] < 1e-5, result
        assert result["grad_norm"] < 1e-5, result
        assert result["part_norms"] < 1e-5, result
        assert result["parameters"] < 1e-5, result
        assert result["temperature"] < 1e-5, result
        assert (result["learnt"] > 1e-5) == ("learn_temperature" in result["case"]), result


def assert_results_alike(ours: Mapping[str, DatasetResult], theirs: Mapping[str, DatasetResult]) -> None:
    """Assert that two evaluations used the same vectors up to rounding.

    If two similarities are nearly equal, rounding may swap them or move one across a bin's edge. Therefore one query
    per direction may differ by one rank. The worst queries are not compared.
    """
    assert ours.keys() == theirs.keys()
    for name, result in ours.items():
        other, share = theirs[name], 1 / min(result.queries.values())
        metrics = replace(result, metrics={}, similarities=None, worst=[], ties=0)
        assert metrics == replace(other, metrics={}, similarities=None, worst=[], ties=0)
        assert result.metrics.keys() == other.metrics.keys()
        for metric, value in result.metrics.items():
            allowed = 1 if metric.endswith("MdR") else share  # MnR is a mean
            assert abs(value - other.metrics[metric]) <= allowed + 1e-9, (name, metric)
        for kind in ("positive", "hardest_negative"):
            counts = [getattr(each.similarities, kind) for each in (result, other)]
            assert np.abs(np.subtract(*counts)).sum() <= 2 * len(result.queries), (name, kind)
