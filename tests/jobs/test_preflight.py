"""Preflight reports what would stop a run, without long waits. On one machine, two processes act as nodes."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from limits import HANG_SECONDS

from pipeline.config import load_recipe
from pipeline.convert.demo import TrainingPairs
from pipeline.convert.sharding import convert
from pipeline.data.sample import Single
from pipeline.data.source import Source
from pipeline.errors import PipelineError
from pipeline.jobs.preflight import check as preflight_check
from pipeline.jobs.preflight import nodes as preflight_nodes
from pipeline.jobs.preflight.attention import attention
from pipeline.jobs.preflight.check import Check, check, green
from pipeline.jobs.preflight.job import Job, checkpoint_bytes, disk_space, memory, model, model_bytes
from pipeline.jobs.preflight.nodes import Nodes, judge
from pipeline.jobs.preflight.run import over_nodes, preflight
from pipeline.jobs.status import Status
from pipeline.preflight import packages
from pipeline.training import manifest
from pipeline.training.conditions import conditions_of_run

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "pipeline/recipes/demo.yaml"
URL = "s3://pipeline-tests/preflight"
INSTALLED = Check("packages", "green", "all")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="module")
def overrides(s3, tiny_model) -> list[str]:
    """Return overrides for the demo with a few pairs in S3 and an existing model."""
    convert({URL: TrainingPairs("Scene-CLS", 0, 60)}, options={})
    data = [f"data.url={URL}", "data.datasets=[]", f"evaluation.urls=[{URL}]", "batch.global_batch=16"]
    return [*data, f"model.path={tiny_model}", "data.timeout_s=20"]


def found(capsys: pytest.CaptureFixture, overrides: list[str], nodes: Nodes | None = None, **options) -> tuple:
    """Run all checks in this process; return the exit status, the output, and the lines of stderr."""
    options = {"world": None, "slurm": False, "began": time.monotonic()} | options
    status = preflight(load_recipe(DEMO, overrides), nodes or Nodes(name="n1"), INSTALLED, **options)
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    return status, said.out, said.err.splitlines()


def test_valid_recipe_passes_and_leaves_no_files(overrides, tmp_path, capsys):
    status, table, errors = found(capsys, [*overrides, f"run={tmp_path}/run"])
    assert (status, errors) == (0, []), table
    assert "60 samples in 1 datasets" in table
    assert "2 (--world sets it): 8 of 16 pairs and 4 of 8 lanes each, 3 steps" in table
    assert "starts from the beginning" in table
    assert "\x1b" not in table  # no colours in a log
    assert table.splitlines()[-1].startswith("10 ok, 0 warn, 0 FAIL, 4 skip; ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "options", "error"),
    [
        (
            ["data.url=s3://pipeline-nowhere/x"],
            {},
            "data: s3://pipeline-nowhere/x/index.json: there is no such bucket: create it, or correct the name",
        ),
        (
            ["evaluation.urls=[s3://pipeline-tests/nothing]"],
            {},
            "evaluation: nothing to evaluate at s3://pipeline-tests",
        ),
        (["model.path=/nowhere/llave"], {}, "model: there is no folder /nowhere/llave: correct model.path"),
        (
            ["model.path=nobody/nothing"],
            {},
            "model: nobody/nothing is not a folder, and not complete in the hub's cache",
        ),
        (["model.attention=flash_attn"], {}, "attention: model.attention=flash_attn cannot run here: "),
        ([], {"world": 3}, "processes: 3 processes do not divide batch.global_batch=16"),
        (["batch.global_batch=48"], {"world": 16}, "processes: 16 processes cannot share 8 lanes equally: the number"),
        (["epochs=0.01"], {}, "processes: epochs=0.01 of 3 steps is less than a step: raise it, or set steps"),
        (["run=/proc/run"], {}, "run directory: /proc: "),
    ],
)
def test_each_blocking_problem_is_reported(overrides, tmp_path, capsys, monkeypatch, changes, options, error):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    status, table, errors = found(capsys, [*overrides, f"run={tmp_path}/run", *changes], **options)
    assert status == 2
    assert errors[0].startswith(f"error: preflight: {error}"), errors
    assert len(errors) == 1 or changes[0].startswith("run="), errors
    assert "FAIL" in table


def test_wrong_secret_is_reported_without_its_value(overrides, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-not-to-be-shown")
    status, table, errors = found(capsys, [*overrides, f"run={tmp_path}/run"])
    assert status == 2
    assert "preflight: data: s3://pipeline-tests/preflight/index.json: the secret key is wrong" in errors[0]
    assert "not-to-be-shown" not in table + "".join(errors)


class Items(TrainingPairs):
    """The items of an evaluation set, which are not pairs."""

    def sample(self, number: int) -> Single:
        pair = super().sample(number)
        return Single(pair.key, pair.dataset, pair.task, pair.query)


def test_shards_without_pairs_are_refused(overrides, tmp_path, capsys):
    convert({f"{tmp_path}/items": Items("Scene-CLS", 0, 20)}, options={})
    capsys.readouterr()
    status, _, errors = found(capsys, [*overrides, f"run={tmp_path}/run", f"data.url={tmp_path}/items"])
    assert status == 2
    assert errors == [
        f"error: preflight: data: {tmp_path}/items/000000.tar: an item of an evaluation set, not a pair to train on - "
        "name shards of pairs in data.url and data.datasets"
    ]


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Path]:
    """Create a file system of 1 MB."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False
    )
    if not mount or mount.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_is_reported(overrides, full_disk, capsys):
    status, _, errors = found(capsys, [*overrides, f"run={full_disk}/run"])
    assert status == 2
    assert errors[0].startswith(f"error: preflight: run directory: {full_disk}: No space left on device - free space")
    assert errors[1].startswith("error: preflight: disk space: 0.00 GB free, ")
    assert list(full_disk.iterdir()) == []


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("*.safetensors", "has no weights"),
        ("config.json", "it has no config.json"),
        ("tokenizer*", "tokenizer"),
        ("*processor*", "processor"),
    ],
)
def test_missing_model_file_is_reported(tiny_model, tmp_path, missing, named):
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns(missing))
    job = Job(load_recipe(DEMO, [f"model.path={tmp_path}/model"]), 2, 0, False)
    result = model(job)
    assert result.state == "red"
    assert named in result.found
    assert job.plan is None


def test_resumable_checkpoint_passes_and_changed_conditions_fail(overrides, tmp_path, capsys):
    folder = tmp_path / "run/checkpoints/step-00000004"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text("step-00000004\n")
    recipe = load_recipe(DEMO, overrides)
    conditions = conditions_of_run(recipe, Source.open(recipe.data), {"stage": 3})
    (folder / "conditions.json").write_text(json.dumps(conditions))
    status, table, _ = found(capsys, [*overrides, f"run={tmp_path}/run"])
    assert status == 0
    assert "continues from step-00000004" in table
    shutil.copytree(folder, damaged := folder.with_name("step-00000008"))
    manifest.write(damaged, 8, manifest.sums(damaged, ["conditions.json"]))
    (damaged / "conditions.json").write_text("")
    (folder.parent / "latest").write_text("")
    status, table, _ = found(capsys, [*overrides, f"run={tmp_path}/run"])
    assert status == 0
    assert "continues from step-00000004" in table
    shutil.rmtree(damaged)
    (folder / "conditions.json").write_text(json.dumps(conditions | {"seed": None}))
    status, _, errors = found(capsys, [*overrides, f"run={tmp_path}/run"])
    assert status == 2
    assert "preflight: resuming: " in errors[0]
    assert "seed was None and is now 0" in errors[0]


def test_job_with_four_unreported_failures_is_refused(overrides, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for start, expected in ((0, 0), (1, 0), (2, 0), (3, 0), (4, 2)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        status, table, errors = found(capsys, [*overrides, f"run={tmp_path}/run"], slurm=True)
        assert status == expected, table
    assert errors[0].startswith("error: preflight: earlier starts: failed 4 times from the checkpoint")
    kept = Status.read(tmp_path / "run")
    assert (kept.state, len(kept.failures)) == ("refused", 4)


def planned(*overrides: str) -> Job:
    job = Job(load_recipe(DEMO, list(overrides)), 2, 0, False, zero={"stage": 3, "reduce_bucket_size": 1000})
    assert model(job).state == "green"
    return job


def test_memory_check_names_the_setting_to_lower():
    job = planned("batch.chunk_tokens=100000", "batch.kept_chunks=0")
    assert memory(job, 80 * 10**9).state == "green"
    needed = job.plan.total(100_000, job.plan.states(3, job.zero))
    assert (memory(job, needed - 1).state, memory(job, needed).state) == ("red", "yellow")
    too_much = memory(job, 10**9)
    assert too_much.state == "red"
    tokens = int(too_much.do.removeprefix("lower batch.chunk_tokens to ").replace(",", ""))
    assert memory(planned(f"batch.chunk_tokens={tokens}", "batch.kept_chunks=0"), 10**9).state == "green"
    assert "model.train.lora" in memory(job, 10**6).do
    assert memory(job, 0).state == "skipped"


def test_estimated_disk_space_matches_real_checkpoints(tmp_path):
    """Compare with the sizes of a demo run: 667,264 parameters, and a few KB of DeepSpeed's metadata."""
    job = planned(f"run={tmp_path}")
    for stage, written in ((0, 8_058_780), (1, 10_656_284), (2, 10_656_284), (3, 8_058_545)):
        job.zero = {"stage": stage}
        assert checkpoint_bytes(job) == pytest.approx(written, rel=0.01)
    assert model_bytes(job) == pytest.approx(2_685_952 + 2_684_432, rel=0.01)
    anew = disk_space(job).found
    old = tmp_path / "checkpoints/step-00000004/state.pt"
    old.parent.mkdir(parents=True)
    old.write_bytes(bytes(20_000_000))
    assert "0.03 GB needed" in anew
    assert "0.01 GB needed" in disk_space(job).found


def test_missing_gpu_kernels_fail_only_where_training_runs(monkeypatch):
    recipe, cpu = load_recipe(DEMO, ["model.attention=varlen", "precision=bf16"]), torch.device("cpu")
    assert attention(recipe, cpu, slurm=True).state == "red"
    monkeypatch.delenv("DS_ACCELERATOR")
    assert attention(recipe, cpu, slurm=True).state == "red"
    assert attention(recipe, cpu, slurm=False).state == "yellow"  # for example on a login node


def gpu_node(count: int, free: float = 1.0, name: str = "H100") -> list:
    return [[name, 80 * 10**9, int(free * 80 * 10**9)]] * count


def test_unequal_missing_or_occupied_gpus_are_reported():
    def judged(*nodes: list, meant_for_cpu: bool = False) -> Check:
        return judge(list(nodes), [f"n{number}" for number in range(1, len(nodes) + 1)], meant_for_cpu)

    assert judged(gpu_node(8), gpu_node(8)).found == "8 x H100, 80 GB on each node"
    lacking = judged(gpu_node(8), gpu_node(8), gpu_node(7))
    assert lacking.state == "red"
    assert "but n3 has 7 x H100" in lacking.found
    assert judged(gpu_node(8), gpu_node(8), gpu_node(8, name="A100")).state == "yellow"
    assert "GPU 0 of n2 has 40 of 80 GB free" in judged(gpu_node(1), gpu_node(1, 0.5)).found
    assert judged(gpu_node(0)).state == "yellow"
    assert judged(gpu_node(0), meant_for_cpu=True).state == "skipped"


def test_result_line_names_the_nodes_that_differ():
    def checks(state: str, text: str) -> list[Check]:
        return [Check("data", state, text)]

    many = [(f"n{number}", checks("green", "fine")) for number in range(1, 7)]
    assert over_nodes(many)[0].found == "fine"
    for number in (2, 4, 5, 6):
        many[number - 1] = (f"n{number}", checks("red", "refused"))
    assert over_nodes(many)[0].found == "n2, n4, n5 and 1 more: refused"
    assert over_nodes(many)[0].state == "red"


def test_hanging_or_raising_check_fails_without_showing_secrets(monkeypatch):
    @check("slow", seconds=0.05, if_late="wake it")
    def slow() -> Check:
        time.sleep(1)
        return green("late")

    @check("broken", seconds=HANG_SECONDS, if_late="")
    def broken() -> Check:
        raise RuntimeError(f"cannot sign in with {os.environ['SOME_TOKEN']}\nand more")

    @check("slow too", seconds=HANG_SECONDS, if_late="")
    def slow_too() -> Check:
        time.sleep(0.3)
        return green("at last")

    monkeypatch.setenv("SOME_TOKEN", "hf_12345")
    monkeypatch.setattr(preflight_check, "_AFTER_TIMEOUT_SECONDS", 0.1)
    preflight_check.timed_out.clear()
    assert slow_too() == Check("slow too", "green", "at last")
    assert slow() == Check("slow", "red", "no answer within 0.05 s", "wake it")
    assert broken() == Check("broken", "red", "RuntimeError: cannot sign in with ***")
    assert slow_too().found == "no answer within 0.1 s"  # later checks get less time after a timeout
    preflight_check.timed_out.clear()


def test_outdated_and_untested_packages_are_reported(monkeypatch):
    installed = packages()
    assert installed.state == "green", installed
    original = packages.__wrapped__.__globals__["version"]
    monkeypatch.setitem(
        packages.__wrapped__.__globals__, "version", lambda name: "1.26.1" if name == "urllib3" else original(name)
    )
    refused = packages()
    assert (refused.state, refused.found) == ("red", "urllib3 1.26.1 is not >=2")


def slurm(node: int, port: int, *, tasks: int = 1) -> dict[str, str]:
    """Return the environment of a task that srun starts on the first or second of two nodes."""
    step = {"STEP_NUM_TASKS": 2 * tasks, "STEP_TASKS_PER_NODE": f"{tasks}(x2)", "STEP_NODELIST": "n[1-2]", "STEP_ID": 0}
    place = {"PROCID": node * tasks, "NODEID": node, "LOCALID": 0, "JOB_ID": 7} | step
    slurm = {f"SLURM_{name}": str(value) for name, value in place.items()}
    return slurm | {"SLURMD_NODENAME": f"n{node + 1}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_slurm_place_is_read_from_the_task_environment():
    assert Nodes.of_slurm(slurm(1, 4000)) == Nodes(1, 2, "n2", "127.0.0.1", 4000)
    with pytest.raises(PipelineError, match="'RANK' is not in the environment"):
        Nodes.of_slurm({})
    with pytest.raises(PipelineError, match="one task on each node"):
        Nodes.of_slurm(slurm(1, 4000, tasks=8))


def test_failed_rendezvous_names_node_and_address(overrides, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preflight_nodes, "MEET_SECONDS", 1)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    port = free_port()
    arguments = [*overrides, f"run={tmp_path}/run"]
    for node in (1, 0):  # each runs without the other
        status, table, errors = found(capsys, arguments, Nodes.of_slurm(slurm(node, port)), slurm=True)
        assert (status, len(errors)) == (2, 1)
        assert f"nodes meet: n{node + 1}, node {node} of 2, did not reach all at 127.0.0.1:{port}" in errors[0]
        assert "NCCL_SOCKET_IFNAME=ib0" in errors[0]
        assert ("FAIL" in table) == (node == 0)
    assert "no answer from node 1" in errors[0]


def on_two_nodes(overrides: list[str], second: list[str]) -> list[tuple[str, str, int]]:
    """Return each node's output, errors and exit status. second: the command that starts it on the second node."""
    port, command = (
        free_port(),
        [sys.executable, str(ROOT / "tools/preflight.py"), str(DEMO), "--slurm", "--world", "4"],
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [*(second if node else []), *command, *overrides],
            env=environment | slurm(node, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    try:
        return [(*node.communicate(timeout=HANG_SECONDS), node.returncode) for node in nodes]
    finally:
        for node in nodes:
            node.kill()


def test_two_valid_nodes_pass(overrides, tmp_path):
    (table, errors, status), other = on_two_nodes([*overrides, f"run={tmp_path}/run"], [])
    assert (status, errors) == (0, ""), table
    assert other == ("", "", 0)
    assert "n1, n2" in table
    assert "gloo: 64 MiB at" in table
    assert "4: 4 of 16 pairs and 2 of 8 lanes each" in table
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "status.json"]
    assert Status.read(tmp_path / "run").state == "starting"


def test_differing_folders_and_secrets_of_nodes_are_reported(overrides, tmp_path):
    """The second node has a different file system and a wrong secret."""
    shared = tmp_path / "shared"
    shared.mkdir()
    apart = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'mount -t tmpfs tmpfs {shared} && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    second = [*apart, "env", "AWS_SECRET_ACCESS_KEY=wrong-and-not-to-be-shown"]
    (table, errors, status), other = on_two_nodes([*overrides, f"run={shared}/run"], second)
    assert (status, other[2]) == (2, 0)
    folder, data = errors.splitlines()
    assert folder.startswith(f"error: preflight: run directory: n2: {shared}/run is not the same folder as on n1 - set")
    assert data.startswith("error: preflight: data: n2: s3://pipeline-tests/preflight/index.json: the secret key is wr")
    assert "not-to-be-shown" not in table + errors + "".join(map(str, other))
    assert [path.name for path in shared.rglob("*")] == ["run", "status.json"]
    kept = Status.read(shared / "run")
    assert (kept.state, kept.reason) == (
        "refused",
        "; ".join(line.removeprefix("error: ") for line in errors.splitlines()),
    )


def test_help_imports_no_heavy_packages():
    seen = "import sys; sys.path.insert(0, 'tools'); sys.argv = ['preflight', '--help']; import preflight\n"
    seen += (
        "try: preflight.main()\nexcept SystemExit: print('heavy:', {'torch', 'rich', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", seen], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert "--slurm" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy: set()"
