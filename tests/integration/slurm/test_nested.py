"""How a program interprets its environment if srun did not start it directly, but another process of a job did."""

import re
import subprocess
import sys

from cluster import ROOT, SlurmCluster
from limits import HANG_SECONDS

PROBE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pipeline.jobs import launch
launch.init_from_environment()
print("place", *(os.environ.get(name, "-") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
"""
TWO = ["0 2 0 1", "1 2 0 1"]


def places(printed: str) -> list[str]:
    return sorted(re.findall(r"place (.*?)\s*$", printed, re.MULTILINE))


def in_a_terminal(slurm: SlurmCluster, *command: str) -> str:
    ended = subprocess.run(
        ["script", "--quiet", "--return", "--command", " ".join(command), "/dev/null"],
        env=slurm.environment | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    return ended.stdout


def test_program_in_interactive_step_gets_no_rank_and_an_error(slurm, tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    python = f"{sys.executable} {probe} {ROOT}"
    lines = tmp_path / "typed.sh"  # the lines typed into the shell
    lines.write_text(f"{python}\nsrun {python}\nsrun bash -c '{python}; true'\n")
    shell = ("srun", "--interactive", "--preserve-env", "--pty", "bash")  # Slurm's default InteractiveStepOptions
    printed = in_a_terminal(slurm, "salloc", "--nodes=2", "--ntasks-per-node=1", *shell, str(lines))
    assert places(printed) == ["- - - -", *sorted(TWO + TWO)], printed

    # A shell in one task, after the other tasks have ended.
    printed = in_a_terminal(slurm, "srun", "--nodes=2", "--ntasks=2", "--pty", "bash", "-c", f"'{python}; true'")
    assert places(printed) == ["- - - -"], printed

    evaluate = f"{sys.executable} -m pipeline.evaluate no-such-model no-such-tasks"
    printed = in_a_terminal(slurm, "salloc", "--nodes=2", "--ntasks-per-node=1", *shell, "-c", f"'{evaluate}; true'")
    assert "error: the job has 2 tasks, and this process is none of them: start it with srun" in printed
    assert "Traceback" not in printed


def test_steps_of_a_nested_job_get_their_own_ranks(slurm, tmp_path):
    """Check this also below a launcher in the outer job, and with the same number of tasks."""
    probe, inner, outer = (tmp_path / name for name in ("probe.py", "inner.sh", "outer.sh"))
    probe.write_text(PROBE)
    python = f"{sys.executable} {probe} {ROOT}"
    # An outer job's --mem-per-cpu next to this job's --mem would make srun fail.
    requests = "export SLURM_MEM_PER_CPU=100 SLURM_MEM_PER_NODE=200"
    direct, clean = f"{python} >> direct.txt", f"{requests}\nsource slurm/setup.sh\ncd -\n{python} >> clean.txt"
    steps = f"srun {python} >> steps.txt"
    inner.write_text(f"#!/bin/bash\ncd {tmp_path}\n{direct}\n{steps}\ncd {ROOT}\n{clean}\n{steps}\n")
    leaked = "RANK=5 WORLD_SIZE=8 LOCAL_RANK=5 MASTER_ADDR=nowhere TORCHELASTIC_RUN_ID=x"
    sbatch = f"sbatch --wait --nodes=2 --ntasks-per-node=1 --output={tmp_path}/inner.out {inner}"
    outer.write_text(f"#!/bin/bash\nsrun bash -c '[ $SLURM_PROCID = 1 ] || ({sbatch} && {leaked} {sbatch})'\n")
    slurm.wait(slurm.submit(outer, nodes=2, ntasks_per_node=1), "COMPLETED", 100)
    printed = (tmp_path / "inner.out").read_text()
    found = {path.stem: places(path.read_text()) for path in tmp_path.glob("*.txt")}
    assert found["steps"] == sorted(4 * TWO), printed
    assert found["clean"] == 2 * ["- - - -"], printed
    # The second job was submitted below a launcher; without setup.sh nothing shows that it has no launcher itself.
    assert found["direct"] == ["- - - -", "5 8 5 -"], printed
