"""A real Slurm cluster of two nodes, n1 and n2, on this machine, with its own files and ports."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
from limits import HANG_SECONDS

from tools.s3_server import free_ports

ROOT = Path(__file__).parents[3]
NODES = ("n1", "n2")
KILL_WAIT = 30  # seconds from SIGTERM to SIGKILL
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "setpriv")
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

# No cgroups. The nodes have the resources that the job scripts request, whatever the machine has. A node that does not
# answer is down after SlurmdTimeout: a few seconds, but longer than a busy machine needs to answer. A node that a test
# sets down stays down; with ReturnToService=2 it would return at its next answer. Records of ended jobs are kept. Jobs
# in the partition urgent preempt those in test, whose steps get a signal GraceTime seconds before.
_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
ReturnToService=1
JobRequeue=1
MinJobAge=86400
KillWait={kill_wait}
SlurmctldTimeout=15
SlurmdTimeout=120
MessageTimeout=60
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=96 RealMemory=1000000 Gres=gpu:8 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=96 RealMemory=1000000 Gres=gpu:8 State=UNKNOWN
PartitionName=test Nodes=n1,n2 Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 State=UP PriorityTier=2
"""


class SlurmFailure(Exception):
    """A client command failed, or a wait ended without success; includes the output of the job or the daemons."""


def unavailable() -> str:
    """Return why no cluster can run on this machine, or an empty string."""
    if absent := [name for name in _PROGRAMS if not shutil.which(name, path=_PATH)]:
        return f"no {', '.join(absent)} here: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "a Slurm of our own runs as root only"


class SlurmCluster:
    """Two nodes that claim 96 CPUs and 8 GPUs each, as a context manager.

    Jobs run as root in the repository's root, with this process's environment, and with this Python first in PATH.
    The daemons are child processes; they and all jobs' processes end with the context.
    folder: contains all files of the cluster, and is removed at the end. daemons: by name; a slurmd by its node's name.
    """

    def __init__(self) -> None:
        self.folder = Path()
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "SlurmCluster":
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # paths of sockets must be short
        try:
            self._configure()
            files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
            files = [f"--{option}={self.folder}/munge.{name}" for option, name in files.items()]
            self._launch("munged", "munged", "--foreground", "--force", *files)
            self._until((self.folder / "munge.socket").exists, "munged has no socket")
            self._launch("slurmctld", "slurmctld", "-D")
            self._until(self._answers, "slurmctld does not answer")  # slurmctld contacts earlier nodes much later
            for node in NODES:
                self._launch(node, "slurmd", "-D", "-N", node)
            self._until(self._idle, "the nodes are not idle")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    @property
    def environment(self) -> dict[str, str]:
        """Return a client's environment, without variables of a Slurm job that these tests may run in."""
        others = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        path = f"{Path(sys.executable).parent}:{_PATH}"
        return others | {"PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, **environment: str) -> str:
        """Return the output of a client command such as `sinfo`. Raises SlurmFailure with its output if it fails."""
        ended = subprocess.run(
            command, env=self.environment | environment, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS
        )
        if ended.returncode:
            raise SlurmFailure(f"{' '.join(command)}: status {ended.returncode}\n{ended.stdout}{ended.stderr}")
        return ended.stdout

    def submit(self, script: Path, *arguments: str, **options: str | int | None) -> int:
        """Submit a script with arguments; return the job's number.

        options: options of sbatch, such as ntasks_per_node=1; None for one without a value. By default, output is
        appended to a file in the cluster's folder.
        """
        options = {"output": str(self.folder / "%j.out"), "open_mode": "append"} | options
        flags = [
            f"--{name.replace('_', '-')}" + ("" if value is None else f"={value}") for name, value in options.items()
        ]
        return int(self.run("sbatch", "--parsable", *flags, str(script), *arguments))

    def job(self, job: int) -> dict[str, str]:
        """Return the fields of `scontrol show job`: JobState, Reason, Restarts, NodeList, ExitCode, StdOut, ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", str(job))
        return dict(re.findall(r"(?:^| )([A-Z][\w/:]*)=(\S*)", shown))

    def output(self, job: int) -> str:
        with suppress(FileNotFoundError):
            return Path(self.job(job)["StdOut"]).read_text(errors="replace")
        return ""

    def errors(self, job: int) -> str:
        """Return the lines of the job's output that report starts and errors."""
        return "\n".join(re.findall(r"^(?:== |error: |slurmstepd: ).*$", self.output(job), re.MULTILINE))

    def wait(self, job: int, states: str | Collection[str], seconds: float = HANG_SECONDS) -> dict[str, str]:
        """Wait until the job is in one of these states; return the result of `job`.

        Raises SlurmFailure with the job's output at the time limit, or as soon as the job has ended in another state.
        """
        states = {states} if isinstance(states, str) else states

        def reached() -> bool:
            return self.job(job)["JobState"] in states

        self.wait_until(job, reached, f"is not {' or '.join(states)}", seconds)
        return self.job(job)

    def wait_output(self, job: int, text: str, seconds: float = HANG_SECONDS) -> None:
        """Wait until the job has printed the text. Raises SlurmFailure as `wait` does."""
        self.wait_until(job, lambda: text in self.output(job), f"has not printed {text!r}", seconds)

    def release(self, job: int) -> None:
        """Let a requeued job start in two seconds instead of two minutes.

        An earlier start would fail: a node refuses a job that ended there in the same second.
        """
        self._until(lambda: self.job(job)["JobState"] == "PENDING", f"job {job} is not pending")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2seconds")

    def requeue(self, job: int) -> None:
        self.run("scontrol", "requeue", str(job))

    def cancel(self, job: int) -> None:
        self.run("scancel", str(job))

    def set_node(self, name: str, state: str, reason: str = "test") -> None:
        """Set a node's state: down (ends its jobs), drain or resume."""
        self.run("scontrol", "update", f"NodeName={name}", f"State={state}", f"Reason={reason}")

    def tasks(self, job: int) -> dict[int, list[psutil.Process]]:
        """Return the processes of each rank of the job's running step: the task, then its descendants."""
        ranks = {}
        for process, environment in self._processes():
            # The batch script also has SLURM_PROCID, and srun also looks like a process of the step.
            if environment.get("SLURM_JOB_ID") == str(job) and "SLURM_STEP_ID" in environment:
                with suppress(psutil.Error):
                    if process.parent().name() == "slurmstepd":
                        ranks[int(environment["SLURM_PROCID"])] = [process, *process.children(recursive=True)]
        return ranks

    def clear(self) -> None:
        """End all jobs and return all nodes to service."""
        self.run("scancel", "--user=root")
        for node in NODES:
            with suppress(SlurmFailure):  # the node is in service
                self.set_node(node, "resume")

        def free() -> bool:
            self._kill_jobs()  # processes that ignore SIGTERM would live for KILL_WAIT
            return self._idle() and not self.run("squeue", "--noheader")

        self._until(free, "jobs do not end")

    def wait_until(self, job: int, condition: Callable[[], bool], failure: str, seconds: float = HANG_SECONDS) -> None:
        """Wait until the condition holds. Raises SlurmFailure as `wait` does. failure: the error message."""
        deadline = time.monotonic() + seconds
        while True:
            shown = self.job(job)  # read before the condition, so that the output of an ended job is complete
            if condition():
                return
            if shown["JobState"] in ENDED or time.monotonic() > deadline:
                told = ", ".join(f"{name} {shown[name]}" for name in ("JobState", "Reason", "Restarts", "ExitCode"))
                printed = f"{self.errors(job)}\n...\n{self.output(job)[-4000:]}"
                raise SlurmFailure(f"job {job} {failure}: {told}; its output:\n{printed}")
            time.sleep(0.3)  # each look starts a client of Slurm

    def _configure(self) -> None:
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").touch(mode=0o600)
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        ports = dict(zip(("controller", *NODES), free_ports(3), strict=True))
        host = socket.gethostname().split(".")[0]
        config = _CONFIG.format(host=host, folder=self.folder, kill_wait=KILL_WAIT, **ports)
        (self.folder / "slurm.conf").write_text(config)
        gpus = [self.folder / f"gpu{number}" for number in range(8)]
        for gpu in gpus:
            gpu.touch()
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={gpu}\n" for gpu in gpus))

    def _launch(self, name: str, program: str, *arguments: str) -> None:
        # The kernel ends the daemon if this process is killed.
        command = [shutil.which("setpriv"), "--pdeathsig", "KILL", shutil.which(program, path=_PATH), *arguments]
        with (self.folder / f"{name}.printed").open("wb") as printed:
            self.daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _answers(self) -> bool:
        with suppress(SlurmFailure):
            return " is UP" in self.run("scontrol", "ping")
        return False

    def _idle(self) -> bool:
        with suppress(SlurmFailure):  # the controller does not answer yet
            shown = self.run("sinfo", "--noheader", "--Node", "--partition=test", "--format=%N %T")
            return shown.split() == ["n1", "idle", "n2", "idle"]
        return False

    def _until(self, condition: Callable[[], bool], failure: str) -> None:
        """Wait until the condition holds. Raises SlurmFailure at the time limit, or as soon as a daemon has ended."""
        deadline = time.monotonic() + HANG_SECONDS
        while not condition():
            ended = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                printed = {name: (self.folder / f"{name}.printed").read_text(errors="replace") for name in self.daemons}
                raise SlurmFailure(
                    f"{failure}; daemons that have ended: {', '.join(ended) or 'none'}\n"
                    + "\n".join(f"--- {name}\n{text[-2000:]}" for name, text in printed.items())
                )
            time.sleep(0.1)

    def _processes(self) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
        """Yield all processes that use this cluster's configuration, with their environments."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURM_CONF") == str(self.folder / "slurm.conf"):
                    yield process, environment

    def _kill_jobs(self) -> None:
        for process, environment in self._processes():
            if "SLURM_JOB_ID" in environment:
                with suppress(psutil.Error):
                    process.kill()

    def _stop(self) -> None:
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        self.daemons.clear()
        for process in psutil.process_iter():  # slurmstepd overwrites its environment; its working folder is slurmd's
            with suppress(psutil.Error):
                if process.name() == "slurmstepd" and process.cwd() == str(self.folder):
                    process.kill()
        self._kill_jobs()
        shutil.rmtree(self.folder, ignore_errors=True)
