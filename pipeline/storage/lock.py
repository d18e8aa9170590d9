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

from pipeline.errors import PipelineError, printable
from pipeline.jobs import launch
from pipeline.storage import objects
from pipeline.storage.documents import FIXED, DocumentError, parse_json
from pipeline.storage.objects import ObjectError

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
        _refuse_others(own)
        yield


def in_use(folder: str) -> str:
    """Who writes to a folder, and what to do; empty if nobody does. Judged by the clock, without waiting."""
    locks = objects.join(folder, FOLDER)
    for _, holder, place in _found(locks):
        lives = _lives(holder)
        if lives or (lives is None and holder and time.time() - holder.time < SILENCE_SECONDS):
            return _in_use(locks, place)
    return ""


def _refuse_others(own: list[str]) -> None:
    """Raise PipelineError where another process lives than the one that wrote these files; remove those of dead ones.

    All that may be dead are waited for at once.
    """
    doubted: dict[str, str] = {}
    for locks in dict.fromkeys(url.rpartition("/")[0] for url in own):
        for url, holder, place in _found(locks):
            if url in own:
                continue
            lives = _lives(holder)
            if lives:
                raise PipelineError(_in_use(locks, place))
            if lives is None:
                doubted[url] = place
            else:
                objects.delete(url)
    before = {url: _stamp(url) for url in doubted}
    for url, place in list(doubted.items())[:1]:
        more = f" (and {len(doubted) - 1} more)" if len(doubted) > 1 else ""
        print(
            f"{printable(url)}{more} is there: does {place} live? Waiting for a sign, {SILENCE_SECONDS} s at most",
            file=sys.stderr,
        )
    deadline = time.monotonic() + SILENCE_SECONDS
    while doubted and time.monotonic() < deadline:
        time.sleep(min(1, SILENCE_SECONDS / 4))
        for url, place in list(doubted.items()):
            now = _stamp(url)
            if now is None:
                del doubted[url]
            elif now != before[url]:
                raise PipelineError(_in_use(url.rpartition("/")[0], place))
    for url in doubted:
        objects.delete(url)


def _in_use(locks: str, place: str) -> str:
    return f"{locks.removesuffix(f'/{FOLDER}')} is in use by {place}: wait for it, or end it"


def _found(locks: str) -> Iterator[tuple[str, _Holder | None, str]]:
    """The files of a lock: where each is, what it says if that can be read, and what to call who wrote it."""
    for url in objects.list_under(locks):
        if url.endswith(".partial"):
            continue
        holder = None
        try:
            holder = parse_json(objects.read(url), url, _Holder, remedy="it is a lock")
        except ObjectError:
            if _stamp(url) is None:
                continue  # it is gone meanwhile
        except DocumentError:
            pass
        if holder is None:
            yield url, None, f"the process that wrote {printable(url)}"
        else:
            job = f", job {holder.job[0]}" if holder.job else ""
            yield url, holder, printable(f"process {holder.pid} on {holder.host}{job}")


def _lives(holder: _Holder | None) -> bool | None:
    """None: who knows? It must be waited for a sign."""
    if holder is None:
        return None
    if holder.machine == _machine():
        return holder.born == _born(holder.pid)
    ours = _job()
    if holder.job and ours and holder.job[0] == ours[0] and holder.job[1] < ours[1]:
        return False  # a start of this job that is over, as Slurm knows
    return False if time.time() - holder.time > _DEAD_SECONDS else None


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
    return job, launch.restarts()
