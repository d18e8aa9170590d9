"""The process group: ranks join it, gather rows, wait for work on the first one, and leave it together."""

import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.cpp_extension import get_default_build_root

from pipeline.device import configure_device
from pipeline.errors import PipelineError
from pipeline.jobs import launch

T = TypeVar("T")

logger = logging.getLogger(__name__)

_RENDEZVOUS_MINUTES = (3, 10)  # least and most; the first rank may have to wait for a lock (lock.SILENCE_SECONDS)
_QUIET_SECONDS = 30  # before a wait is logged
_POLL_SECONDS = 5
_FIRST_RANK_HOURS = 12
_KERNELS = ("cpu_adam",)  # that DeepSpeed compiles when they are first used
_BUILD_SECONDS = 600  # that a build takes at most


def start_distributed(timeout_minutes: float) -> torch.device:
    """Join the process group that the launcher's environment describes; without a launcher, create one for one process.

    Returns this process's device. If a collective waits longer than `timeout_minutes`, the process ends. Raises
    PipelineError if a rank does not join within that time, or within three minutes if it is less, ten if it is more.
    """
    import deepspeed  # here: gathering rows needs neither of them
    import transformers
    from deepspeed.accelerator import get_accelerator

    transformers.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch 2.13 deprecates, several times a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if alone := "RANK" not in os.environ:
        _check_alone()
        for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)  # another process's
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    rank, world = launch.rank_in_environment()
    defaults = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0" if world == 1 else "29500"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    remove_stale_lock()
    accelerator = get_accelerator()
    configure_device(accelerator.device_name())
    backend, device, device_id = "gloo", torch.device("cpu"), None
    if accelerator.device_name() != "cpu":
        count = accelerator.device_count()
        if alone and count > 1:
            logger.warning("one process uses one of %d GPUs: torchrun --nproc-per-node %d uses all", count, count)
        # Slurm may show each task only its own GPU. DeepSpeed, too, reads LOCAL_RANK.
        number = int(os.environ["LOCAL_RANK"]) % count
        os.environ["LOCAL_RANK"] = str(number)
        accelerator.set_device(number)
        backend, device = accelerator.communication_backend_name(), torch.device(accelerator.device_name(number))
        device_id = device
    least, most = _RENDEZVOUS_MINUTES
    store = _rendezvous(rank, world, min(max(timeout_minutes, least), most))
    limit = timedelta(minutes=timeout_minutes)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit, device_id=device_id)
    # DeepSpeed makes groups without naming a limit, which then would be torch's.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = limit
    # Only tensor parallelism would use it. It compiles for a minute, uses 66 MB of /dev/shm a rank, and waits for ever
    # for a rank that was killed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, timeout=limit, verbose=False, auto_mpi_discovery=False)
    return device


def _check_alone() -> None:
    """Raise PipelineError if this process looks like one of several that were started without srun."""
    if (tasks := os.environ.get("SLURM_NTASKS", "1")) != "1":
        raise PipelineError(
            f"the job has {tasks} tasks, and this process is none of them: start it with srun (`srun python -m ...`, "
            "without --pty), or unset SLURM_NTASKS to run one process"
        )
    if (tasks := os.environ.get("SLURM_STEP_NUM_TASKS", "1")) != "1":
        logger.warning("running as one process: it does not belong to the step of %s tasks in its environment", tasks)


@contextmanager
def _log_long_wait(subject: str) -> Iterator[None]:
    """Log what this process waits for, if that takes long."""
    timer = threading.Timer(_QUIET_SECONDS, logger.warning, ("waiting for %s", subject))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _rendezvous(rank: int, world: int, minutes: float) -> dist.Store:
    """The store that all ranks share, once all have joined it; PipelineError names the missing ranks."""
    address, port, limit = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(minutes=minutes)
    where = f"{address}:{port}"
    # Under torchrun its agent has the store, also for ranks that it starts again.
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    with _log_long_wait(f"all {world} ranks to join {where}, {minutes:g} minutes at most"):
        try:
            server = dist.TCPStore(address, port, world, is_master, limit, wait_for_workers=False)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" in str(error):
                why = f"port {port} is in use on {socket.gethostname()}: set MASTER_PORT to a free one"
            else:
                why = (
                    f"rank 0 did not listen at {where} within {minutes:g} minutes: see its log, or set MASTER_ADDR to "
                    f"an address of its node that {socket.gethostname()} can reach"
                )
            raise PipelineError(why) from error
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), server)
        joined = dist.PrefixStore("here", store)
        joined.set(str(rank), socket.gethostname())
        try:
            joined.wait([str(other) for other in range(world)], limit)
        except dist.DistStoreError as error:
            missing = [str(other) for other in range(world) if not joined.check([str(other)])]
            nodes = sorted({joined.get(str(other)).decode() for other in range(world) if str(other) not in missing})
            raise PipelineError(
                f"of {world} ranks {', '.join(missing)} did not join {where} within {minutes:g} minutes; those that "
                f"joined are on {', '.join(nodes)}. Do the other nodes run, and can they reach that address?"
            ) from error
    return dist.PrefixStore("group", store)


def on_first_rank(work: Callable[[], T], subject: str = "the first rank's part") -> T:
    """Run `work` on the first rank; return its result on all ranks. What `work` raises, the first rank raises.

    Collective; without a process group it runs here.
    The other ranks get a message every few seconds: in one collective they could not wait longer than its time limit.
    subject: names the work in a log message if it takes long, and in the PipelineError after twelve hours.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return work()
    if dist.get_rank():
        message: list[Any] = [False, None]
        while not message[0]:
            dist.broadcast_object_list(message)
        return message[1]
    pool, began = ThreadPoolExecutor(1), time.monotonic()
    try:
        future = pool.submit(work)
        with _log_long_wait(f"{subject}, {_FIRST_RANK_HOURS} hours at most"):
            while True:
                futures.wait([future], timeout=_POLL_SECONDS)
                done = future.done()
                message = [done, future.result() if done else None]
                if not done and time.monotonic() - began > 3600 * _FIRST_RANK_HOURS:
                    raise PipelineError(
                        f"{subject} took over {_FIRST_RANK_HOURS} hours: does a file system or server hang?"
                    )
                dist.broadcast_object_list(message)
                if done:
                    return message[1]
    finally:
        pool.shutdown(wait=False)


def on_every_rank(work: Callable[[], None], done: Callable[[], int], show: Callable[[int], object]) -> None:
    """Run `work` on every rank, and return when it has ended on all. What `work` raises, its rank raises.

    Ranks may take very different times: meanwhile they exchange a message every few seconds, because in one collective
    they could not wait longer than its time limit. Collective; without a process group it runs here.
    done: how much of its work this rank has done.  show: called with the sum over all ranks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        work()
        show(done())
        return
    pool = ThreadPoolExecutor(1)
    try:
        future, ended = pool.submit(work), False
        while not ended:
            futures.wait([future], timeout=_POLL_SECONDS)
            states: list[Any] = [None] * dist.get_world_size()
            if own := future.done():  # asked once: what it raises must not be missed
                future.result()
            dist.all_gather_object(states, (own, done()))
            show(sum(count for _, count in states))
            ended = all(each for each, _ in states)
    finally:
        pool.shutdown(wait=False)


def end_distributed(status: int = 0) -> NoReturn:
    """Exit with this status after all ranks have called this.

    It exits without Python's clean-up, during which gloo's threads sometimes abort the process.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def remove_stale_lock() -> None:
    """Wait for a process that builds DeepSpeed's kernels; delete the lock of a build that was killed.

    PyTorch would wait for that lock for ever. This runs before ranks join the process group, and they build after that.
    """
    for lock in _locks():
        with suppress(OSError), _log_long_wait(f"the process that builds a kernel and has {lock}, 10 minutes at most"):
            while time.time() - lock.stat().st_mtime < _BUILD_SECONDS:
                time.sleep(1)
            try:
                lock.unlink()
            except PermissionError as error:
                raise PipelineError(f"{error}: delete it, or set TORCH_EXTENSIONS_DIR to another folder") from error
            logger.warning("deleted %s, which a killed build left", lock)


def _locks() -> list[Path]:
    """PyTorch's lock files during builds. PyTorch's own function would create the folders."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return [lock for kernel in _KERNELS for lock in root.glob(f"**/{kernel}/lock")]


# torch 2.13 renamed both and warns at the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def rank_and_world(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """(rank, world size) in the group; (0, 1) where no process group was initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    return 0, 1


def gathered(value: T) -> list[T]:
    """Return every rank's value, in rank order; [value] without a process group. Collective."""
    values = [value] * rank_and_world()[1]
    if dist.is_available() and dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def all_gather_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """x (n, ...) of every rank, in rank order: (W*n, ...). Without a process group or others: x itself.

    The gradient is the sum over ranks: each rank's x takes part in every rank's result. So either no
    rank's x requires grad, or every rank's does and every rank runs the backward pass; n must be the same.
    """
    return x if rank_and_world(group)[1] == 1 else _AllGatherRows.apply(x, group)


@torch.no_grad()
def all_gather_constant(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Gather tensors without gradients, such as hashes (int64) and masks (bool): (n, ...) -> (W*n, ...)."""
    _, world = rank_and_world(group)
    if world == 1:
        return x.detach()
    gathered = x.new_empty(world * x.shape[0], *x.shape[1:])
    _all_gather(gathered, x.contiguous(), group=group)
    return gathered


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return all_gather_constant(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rank, world = rank_and_world(ctx.group)
        own = grad.shape[0] // world
        if grad.is_cuda:
            result = grad.new_empty(own, *grad.shape[1:])
            _reduce_scatter(result, grad.contiguous(), group=ctx.group)
        else:  # older versions of gloo have no reduce-scatter
            result = grad.clone(memory_format=torch.contiguous_format)  # autograd may still use `grad` elsewhere
            dist.all_reduce(result, group=ctx.group)
            result = result[rank * own : (rank + 1) * own].clone()  # frees the other ranks' rows
        return result, None
