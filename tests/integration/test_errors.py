"""User errors: one clear line, a nonzero exit status, and no traceback."""

import pytest
from launch import launch

from pipeline.convert.demo import TrainingPairs
from pipeline.convert.sharding import convert
from pipeline.jobs.status import Status
from pipeline.storage import objects

URL = "s3://pipeline-tests/errors"


@pytest.fixture(scope="module")
def dataset(s3) -> str:
    """Create a dataset in S3 and damage one of its shards after the upload."""
    convert({URL: TrainingPairs("Scene-CLS", 0, 60)}, options={})
    shard = f"{URL}/000000.tar"
    content = bytearray(objects.read(shard))
    content[len(content) // 3] ^= 1
    objects.write(shard, bytes(content))
    return URL


def error_of(overrides: list[str], world: int = 1) -> str:
    common = ["data.datasets=[]", f"data.url={URL}", "evaluation=null", "batch.global_batch=16", "steps=3"]
    ended = launch(["-m", "pipeline.train", "pipeline/recipes/demo.yaml", *common, *overrides], world)
    assert all(status not in (0, None) for status in ended.status), ended.output[-3000:]
    assert "Traceback" not in ended.output, ended.output[-3000:]
    errors = [line for line in ended.output.splitlines() if line.startswith("error")]
    assert len(errors) == world, ended.output[-3000:]
    return errors[0]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["optimiser.lr=1"], "did you mean optimizer?"),
        (["data.url=s3://pipeline-nowhere/x"], "pipeline-nowhere"),
        (["data.lanes=5"], "lanes that do: 1, 2, 4, 8"),
        (["deepspeed=ds_configs/zero9.json"], "zero3.json"),
    ],
)
def test_recipe_errors_are_reported_before_start(dataset, tmp_path, overrides, named):
    assert named in error_of([f"run={tmp_path}/run", *overrides])
    if (tmp_path / "run").exists():  # the recipe, which names this folder, was read
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["status.json"]
        assert named in Status.read(tmp_path / "run").reason


def test_wrong_secret_is_reported_without_its_value(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-not-to-be-shown")
    error = error_of([f"run={tmp_path}/run"])
    assert "AWS_SECRET_ACCESS_KEY" in error
    assert "not-to-be-shown" not in error


def test_world_size_that_does_not_divide_lanes_is_refused(dataset, tmp_path):
    error = error_of([f"run={tmp_path}/run", "batch.global_batch=24", "data.lanes=8"], world=3)
    assert "could be 1, 2, 4, 8" in error


def test_damaged_shard_stops_the_run_and_is_named(dataset, tmp_path, tiny_model):
    error = error_of([f"run={tmp_path}/run", f"model.path={tiny_model}", "data.workers=1"], world=2)
    assert "000000.tar is damaged" in error


def test_torchrun_prints_one_error_before_any_traceback(dataset, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    recipe = ["pipeline.train", "pipeline/recipes/demo.yaml", f"run={tmp_path}/run", "data.url=s3://pipeline-nowhere/x"]
    ended = launch([*torchrun, *recipe], 1)
    assert ended.status not in ([0], [None])
    before, error, _ = ended.output.partition("error: s3://pipeline-nowhere")
    assert error
    assert "Traceback" not in before
    assert ended.output.count("error: s3://") == 1  # once, not once per rank
