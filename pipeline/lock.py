"""One process at a time writes to a folder, or to an S3 prefix: a lock that dies with its process.

FOLDER/.lock/HOST.PID.TOKEN is there while a process may write, and is written anew every few seconds. Locks of the
kernel are not relied on: there are mounts without any, mounts that keep them to one node without a word (Lustre's
localflock, NFS's local_lock), and servers that keep those of a node that is dead. So whoever finds another's file asks

    on the same machine   whether that very process lives
    on another            whether the file still changes, for two minutes; clocks may differ
    in Slurm              whether it is of an earlier start of the same job, which is over

and removes it if its process is dead. A process that finds its own file removed, as after it stood still for minutes,
ends at once: another may be writing.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.data import objects
from pipeline.data.objects import ObjectError
from pipeline.documents import FIXED, DocumentError, parse_json
from pipeline.errors import PipelineError, printable

FOLDER = ".lock"
BEAT_SECONDS = 20
SILENCE_SECONDS = 120  # more than a network file system may show an old state, and a beat
_DEAD_SECONDS = 24 * 3600  # by the clock, which is not that wrong


@dataclass(frozen=True)
class _Holder:
    """Who wrote a lock's file. born: when the process began.  job: Slurm's, and which of its starts."""

    __pydantic_config__ = FIXED

    host: str
    pid: int
    machine: str
    born: str
    job: tuple[str, int] | None
    time: float


@contextmanager
def held(folders: Iterable[str]) -> Iterator[None]:
    """Let no other process in that asks for one of these folders, as long as this one lives and is in here.

    Each process writes its own file before it looks for others: of two that begin at once both may be refused, but
    never are both let in. Raises PipelineError that says who is there, and ObjectError where nothing can be written.
    """
    own = [objects.join(folder, FOLDER, _name()) for folder in folders]
    ended = threading.Event()
    with ExitStack() as stack:
        for url in own:
            stack.callback(_remove, url)
            _write(url)
        # Also while it waits for a sign of others: who comes meanwhile must not take this one for dead.
        beating = threading.Thread(target=_beat, args=(own, ended), daemon=True)
        beating.start()
        stack.callback(beating.join)
        stack.callback(ended.set)
        for url in own:
            if other := _living(url.rpartition("/")[0], own=url):
                raise PipelineError(other)
        yield


def in_use(folder: str) -> str:
    """Who writes to a folder, and what to do; empty if nobody does. Judged by the clock, without waiting."""
    return _living(objects.join(folder, FOLDER))


def _living(locks: str, own: str = "") -> str:
    """own: of a process that is to write there, and waits to be sure; "" of one that only asks."""
    for url in objects.list_under(locks):
        if url == own or url.endswith(".partial"):
            continue
        try:
            data = objects.read(url)
        except ObjectError:
            continue  # it is gone meanwhile
        try:
            holder = parse_json(data, url, _Holder, remedy="it is a lock")
            place = printable(
                f"process {holder.pid} on {holder.host}" + (f", job {holder.job[0]}" if holder.job else "")
            )
        except DocumentError:
            holder, place = None, f"the process that wrote {url}"
        if _lives(holder, place, url, wait=bool(own)):
            return f"{locks.removesuffix(f'/{FOLDER}')} is in use by {place}: wait for it, or end it"
        if own:
            objects.delete(url)
    return ""


def _lives(holder: _Holder | None, place: str, url: str, wait: bool) -> bool:
    silent = SILENCE_SECONDS
    if holder:
        if holder.machine == _machine():
            return holder.born == _born(holder.pid)
        ours = _job()
        if holder.job and ours and holder.job[0] == ours[0] and holder.job[1] < ours[1]:
            return False  # a start of this job that is over, as Slurm knows
        silent = time.time() - holder.time
    if not wait or silent > _DEAD_SECONDS:
        return silent < SILENCE_SECONDS
    before = _stamp(url)
    print(f"{url} is there: does {place} live? Waiting for a sign, {SILENCE_SECONDS} s at most", file=sys.stderr)
    deadline = time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1, SILENCE_SECONDS / 4))
        if (now := _stamp(url)) != before:
            return now is not None
    return False


def _stamp(url: str) -> str | None:
    return objects.stamps(url.rpartition("/")[0]).get(url)


def _beat(own: list[str], ended: threading.Event) -> None:
    missing = 0
    while not ended.wait(1 if missing else BEAT_SECONDS):
        with suppress(ObjectError, OSError):  # the store may be back at the next beat
            missing = 0 if all(map(objects.exists, own)) else missing + 1
            if missing == 2:  # a file system may err once
                print(
                    f"error: {own[0]} is gone: another process may write there; this one ends. If none does, start the "
                    "same command again",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(2)
            for url in own if not missing else ():
                _write(url)


def _write(url: str) -> None:
    pid = os.getpid()
    holder = _Holder(socket.gethostname(), pid, _machine(), _born(pid), _job(), time.time())
    data = json.dumps(asdict(holder)).encode()
    try:
        objects.write(url, data)
    except ObjectError:
        objects.write(url, data)  # whoever left a moment ago removed the empty folder


def _remove(url: str) -> None:
    with suppress(ObjectError):
        objects.delete(url)
    if "://" not in url:
        with suppress(OSError):  # others wait there
            Path(url).parent.rmdir()


def _name() -> str:
    # Containers of one machine may have its name, and processes of the same number.
    return f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"


def _machine() -> str:
    """Where processes are known by the same numbers: this start of this machine, in this container."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def _born(pid: int) -> str:
    """When a process of this machine began, which no other of its number did; empty if it is dead."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return ""
    except ProcessLookupError:
        return ""
    try:  # no Linux
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    return "lives"


def _job() -> tuple[str, int] | None:
    """(cluster and job, start); None outside of Slurm."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    job = f"{os.environ['SLURM_JOB_ID']} {os.environ.get('SLURM_CLUSTER_NAME', '')}".rstrip()
    return job, int(os.environ.get("SLURM_RESTART_COUNT", 0))
