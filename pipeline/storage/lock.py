"""A lock for a folder or an S3 prefix: one process at a time writes there, and the lock ends with its process.

FOLDER/.lock/HOST.PID.TOKEN exists while a process may write, and its process rewrites it every few seconds. Kernel
locks are not reliable: some mounts have none, some keep them on one node (Lustre's localflock, NFS's local_lock), and
some servers keep those of a dead node. So a process that finds another's lock file checks

    on the same machine   whether exactly that process is alive
    on another machine    whether the file still changes, for two minutes; clocks may differ
    in Slurm              whether it belongs to an earlier start of the same job, which has ended

and removes the file if its process is dead. A process that finds its own file removed, as after a stop of minutes,
ends at once: another process may be writing.
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

from pipeline.errors import PipelineError, printable
from pipeline.storage import objects
from pipeline.storage.documents import FIXED, DocumentError, parse_json
from pipeline.storage.objects import ObjectError

FOLDER = ".lock"
BEAT_SECONDS = 20
SILENCE_SECONDS = 120  # longer than a heartbeat and the time a network file system may show an old state
_DEAD_SECONDS = 24 * 3600  # clocks do not differ by this much
_ATTEMPTS = 10  # to write a lock file
ADVICE = ": wait for it, or end it"  # how the message of a lock in use ends


class InUse(PipelineError):
    """Another process, which the message names, holds the lock."""


@dataclass(frozen=True)
class _Holder:
    """The process that wrote a lock file. born: its start time.  job: its Slurm job, and the number of the start."""

    __pydantic_config__ = FIXED

    host: str
    pid: int
    machine: str
    born: str
    job: tuple[str, int] | None
    time: float


@contextmanager
def held(folders: Iterable[str]) -> Iterator[None]:
    """Hold the locks of these folders while the block runs; any other process that asks for one of them is refused.

    Each process writes its own file before it looks for others. Two that start at once may both be refused, but never
    are both admitted. Raises InUse that names the other process, and ObjectError if a file cannot be written.
    """
    own = [objects.join(folder, FOLDER, _name()) for folder in folders]
    ended = threading.Event()
    with ExitStack() as stack:
        for url in own:
            stack.callback(_remove, url)
            _write(url)
        # The heartbeat starts before the check for others, which may last: a third process must see this one alive.
        heartbeat = threading.Thread(target=_beat, args=(own, ended), daemon=True)
        heartbeat.start()
        stack.callback(heartbeat.join)
        stack.callback(ended.set)
        _refuse_others(own)
        yield


def in_use(folder: str) -> str:
    """Say which process writes to a folder, and what to do; "" if none does. It trusts the clock and does not wait."""
    locks = objects.join(folder, FOLDER)
    for _, holder, process in _found(locks):
        alive = _is_alive(holder)
        if alive or (alive is None and holder and time.time() - holder.time < SILENCE_SECONDS):
            return _in_use(locks, process)
    return ""


def _refuse_others(own: list[str]) -> None:
    """Raise InUse if a process with another lock file is alive; remove the files of dead processes.

    Waits for all uncertain processes at once.
    """
    uncertain: dict[str, str] = {}
    for locks in dict.fromkeys(url.rpartition("/")[0] for url in own):
        for url, holder, process in _found(locks):
            if url in own:
                continue
            alive = _is_alive(holder)
            if alive:
                raise InUse(_in_use(locks, process))
            if alive is None:
                uncertain[url] = process
            else:
                objects.delete(url)
    before = {url: _stamp(url) for url in uncertain}
    for url, process in list(uncertain.items())[:1]:
        more = f" (and {len(uncertain) - 1} more)" if len(uncertain) > 1 else ""
        print(
            f"{printable(url)}{more} exists: is {process} alive? Waiting for a heartbeat, at most {SILENCE_SECONDS} s",
            file=sys.stderr,
        )
    deadline = time.monotonic() + SILENCE_SECONDS
    while uncertain and time.monotonic() < deadline:
        time.sleep(min(1, SILENCE_SECONDS / 4))
        for url, process in list(uncertain.items()):
            now = _stamp(url)
            if now is None:
                del uncertain[url]
            elif now != before[url]:
                raise InUse(_in_use(url.rpartition("/")[0], process))
    for url in uncertain:
        objects.delete(url)


def _in_use(locks: str, process: str) -> str:
    return f"{locks.removesuffix(f'/{FOLDER}')} is in use by {process}{ADVICE}"


def _found(locks: str) -> Iterator[tuple[str, _Holder | None, str]]:
    """The files of a lock: URL, content if it can be read, and a name for the process that wrote it."""
    for url in objects.list_under(locks):
        if url.endswith(".partial"):
            continue
        holder = None
        try:
            holder = parse_json(objects.read(url), url, _Holder, remedy="it is a lock")
        except ObjectError:
            if _stamp(url) is None:
                continue  # it was removed meanwhile
        except DocumentError:
            pass
        if holder is None:
            yield url, None, f"the process that wrote {printable(url)}"
        else:
            job = f", job {holder.job[0]}" if holder.job else ""
            yield url, holder, printable(f"process {holder.pid} on {holder.host}{job}")


def _is_alive(holder: _Holder | None) -> bool | None:
    """Whether the process is alive; None if only waiting for a heartbeat can tell."""
    if holder is None:
        return None
    if holder.machine == _machine():
        return holder.born == _born(holder.pid)
    ours = _job()
    if holder.job and ours and holder.job[0] == ours[0] and holder.job[1] < ours[1]:
        return False  # Slurm has ended that start of this job
    return False if time.time() - holder.time > _DEAD_SECONDS else None


def _stamp(url: str) -> str | None:
    return objects.stamps(url.rpartition("/")[0]).get(url)


def _beat(own: list[str], ended: threading.Event) -> None:
    missing = 0
    while not ended.wait(1 if missing else BEAT_SECONDS):
        with suppress(ObjectError, OSError):  # the storage may be back at the next heartbeat
            missing = 0 if all(map(objects.exists, own)) else missing + 1
            if missing == 2:  # a file system may be wrong once
                print(
                    f"error: {own[0]} is gone: another process may write there, so this one ends. If no other process "
                    "does, start the same command again",
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
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return objects.write(url, data)
        except ObjectError:
            if "://" in url or attempt == _ATTEMPTS:
                raise
        time.sleep(0.01 * attempt)  # another process removed the empty folder just now, and more may do so


def _remove(url: str) -> None:
    with suppress(ObjectError):
        objects.delete(url)
    if "://" not in url:
        with suppress(OSError):  # not empty: another process waits for the lock
            Path(url).parent.rmdir()


def _name() -> str:
    # The token: containers of one machine may share its name and have processes of the same number.
    return f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"


def _machine() -> str:
    """Identify this boot of this machine and this container: the scope of process numbers."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def _born(pid: int) -> str:
    """The start time of a process of this machine, which tells it from others of its number; empty if it is dead."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state in "ZX" else fields[18]


def _job() -> tuple[str, int] | None:
    """(job and cluster, number of the start) in Slurm; None outside of it."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    job = f"{os.environ['SLURM_JOB_ID']} {os.environ.get('SLURM_CLUSTER_NAME', '')}".rstrip()
    start = os.environ.get("SLURM_RESTART_COUNT", "")
    return job, int(start) if start.isdecimal() else 0
