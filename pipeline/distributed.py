"""The process group: how ranks find each other, gather rows, and part."""

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
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.cpp_extension import get_default_build_root

from pipeline.errors import PipelineError

Result = TypeVar("Result")

_RENDEZVOUS_MINUTES = (3, 10)  # at least: the first rank may have to wait for a lock (lock.SILENCE_SECONDS)
_SAID_SECONDS = 30  # of waiting without a word
_GOES_ON_SECONDS = 5
_FIRST_RANK_HOURS = 12
_KERNELS = ("cpu_adam",)  # that DeepSpeed compiles at their first use
_LONGEST_BUILD = 600  # seconds
# Of torch's variables for its allocator the first that is set counts.
_ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}


def start_distributed(timeout_minutes: float) -> torch.device:
    """Join the process group that the launcher's environment describes; alone, make one of one process.

    Returns this process's device. A collective that waits longer than the time limit ends the process; so does a rank
    that does not come within that time, three minutes at least and ten at most.
    """
    import deepspeed  # here: gathering rows needs neither of them
    import transformers
    from deepspeed.accelerator import get_accelerator

    transformers.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed still calls collectives by the names they had before torch 2.13, several a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if alone := "RANK" not in os.environ:
        _check_alone()
        for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)  # of whatever other ranks they are
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    rank, world = _place()
    here = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0" if world == 1 else "29500"}
    for name, value in here.items():
        os.environ.setdefault(name, value)
    remove_stale_lock()
    # What is freed of one size serves another. It must be set before the first allocation on a GPU.
    if not _ALLOCATOR.intersection(os.environ):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    accelerator = get_accelerator()
    backend, device, options = "gloo", torch.device("cpu"), {}
    if accelerator.device_name() != "cpu":
        if alone and (count := accelerator.device_count()) > 1:
            print(f"one process on one of {count} GPUs: torchrun --nproc-per-node {count} would take all", flush=True)
        # Slurm may show each task its own GPU alone. DeepSpeed, too, reads LOCAL_RANK.
        os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % accelerator.device_count())
        backend, device = accelerator.communication_backend_name(), int(os.environ["LOCAL_RANK"])
        accelerator.set_device(device)
        device = torch.device(accelerator.device_name(device))
        options = {"device_id": device}
        torch.backends.cudnn.allow_tf32 = False  # float32 convolutions, of patches, are to be as exact as products are
    least, most = _RENDEZVOUS_MINUTES
    store = _meet(min(max(timeout_minutes, least), most))
    limit = timedelta(minutes=timeout_minutes)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit, **options)
    # Tensor parallelism alone would use it: it takes a minute to compile, 66 MB of /dev/shm a rank, and never stops
    # waiting for a rank that was killed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, timeout=limit, verbose=False, auto_mpi_discovery=False)
    return device


def _check_alone() -> None:
    """Raise PipelineError where this was to be one of several processes, and say where it looks like that."""
    if (tasks := os.environ.get("SLURM_NTASKS", "1")) != "1":
        raise PipelineError(
            f"the job has {tasks} tasks, and this is none of them: start it by srun (`srun python -m ...`; without "
            "--pty), or unset SLURM_NTASKS if it is to be one process"
        )
    if (tasks := os.environ.get("SLURM_STEP_NUM_TASKS", "1")) != "1":
        print(f"one process: the step of {tasks} tasks in the environment is not this one's", flush=True)


def _place() -> tuple[int, int]:
    """(rank, processes), as the environment has it. PipelineError where it is no launcher's."""
    for name, least in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1), ("MASTER_PORT", 0)):
        text = os.environ.get(name, str(least))
        if not text.isdecimal() or int(text) < least:
            raise PipelineError(f"{name}={text} in the environment is of no launcher: unset it")
    rank, world = os.environ["RANK"], os.environ.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise PipelineError(
            f"RANK={rank} and WORLD_SIZE={world} in the environment are of no launcher: unset both, or start by "
            "torchrun or srun"
        )
    return int(rank), int(world)


@contextmanager
def _said_if_long(what: str) -> Iterator[None]:
    """Say what this process waits for, if it has to."""
    timer = threading.Timer(_SAID_SECONDS, print, (f"waiting for {what}",), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _meet(minutes: float) -> dist.Store:
    """The store that all ranks share, once all have come to it; else PipelineError, which names the missing."""
    with _said_if_long(
        f"all {os.environ['WORLD_SIZE']} ranks to come to {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, "
        f"{minutes:g} minutes at most"
    ):
        return _met(minutes)


def _met(minutes: float) -> dist.Store:
    (rank, world), limit = _place(), timedelta(minutes=minutes)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    where = f"{address}:{port}"
    # Under torchrun its agent holds the store, also for ranks that it starts again.
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(address, port, world, holds, limit, wait_for_workers=False)
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            why = f"port {port} is taken on {socket.gethostname()}; set MASTER_PORT to a free one"
        else:
            why = (
                f"no rank 0 at {where} within {minutes:g} minutes: its log says why, or set MASTER_ADDR to an address "
                f"of its node that {socket.gethostname()} reaches"
            )
        raise PipelineError(why) from error
    here = dist.PrefixStore("here", store)
    here.set(str(rank), socket.gethostname())
    try:
        here.wait([str(other) for other in range(world)], limit)
    except dist.DistStoreError as error:
        missing = [str(other) for other in range(world) if not here.check([str(other)])]
        came = sorted({here.get(str(other)).decode() for other in range(world) if str(other) not in missing})
        raise PipelineError(
            f"of {world} ranks {', '.join(missing)} did not come to {where} within {minutes:g} minutes; those that did "
            f"are on {', '.join(came)}. Are the others' nodes up, and do they reach that address?"
        ) from error
    return dist.PrefixStore("group", store)


def on_first_rank(work: Callable[[], Result], what: str = "its part", hours: float = _FIRST_RANK_HOURS) -> Result:
    """What `work` returns on the first rank, to all ranks; what it raises, the first one raises.

    The others hear every few seconds that it goes on: in one collective they would wait no longer than its time limit.
    what: is said of a first rank that takes long; PipelineError if it takes longer than so many hours.
    """
    leads, said, pool, began = dist.get_rank() == 0, [False, None], ThreadPoolExecutor(1), time.monotonic()
    try:
        future = pool.submit(work) if leads else None
        with _said_if_long(f"{what}, {hours:g} hours at most") if leads else nullcontext():
            while not said[0]:
                if leads:
                    futures.wait([future], timeout=_GOES_ON_SECONDS)
                    said = [True, future.result()] if future.done() else [False, None]
                    if not future.done() and time.monotonic() - began > 3600 * hours:
                        raise PipelineError(f"{what} took over {hours:g} hours: does a file system or server hang?")
                dist.broadcast_object_list(said)
    finally:
        pool.shutdown(wait=False)
    return said[1]


def end_distributed(status: int = 0) -> NoReturn:
    """End this process with this exit status, when all ranks have come here.

    At once: gloo's threads now and then abort a Python that takes its time to end, after all was done.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def remove_stale_lock() -> None:
    """Wait for whoever builds DeepSpeed's kernels; take away the lock of a build that was killed.

    PyTorch would wait for that for ever. It is before ranks meet, and they build after that.
    """
    for lock in _locks():
        with suppress(OSError), _said_if_long(f"whoever builds a kernel and holds {lock}, 10 minutes at most"):
            while time.time() - lock.stat().st_mtime < _LONGEST_BUILD:
                time.sleep(1)
            try:
                lock.unlink()
            except PermissionError as error:
                raise PipelineError(f"{error}: delete it, or set TORCH_EXTENSIONS_DIR to another folder") from error
            print(f"{lock} is left from a build that was killed: it was deleted", flush=True)


def _locks() -> list[Path]:
    """Where PyTorch has them while it builds; its own function would make the folders, in a home that may not be."""
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return [Path(root, kernel, "lock") for kernel in _KERNELS]
    versions = {"rocm": torch.version.hip, "cu": torch.version.cuda}
    built = next((name + version.replace(".", "") for name, version in versions.items() if version), "cpu")
    folder = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}_{built}"
    return [Path(get_default_build_root(), folder, kernel, "lock") for kernel in _KERNELS]


# torch 2.13 renamed both and warns at the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def rank_and_world(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """(rank, world size) in the group; (0, 1) where no process group was initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    return 0, 1


def all_gather_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """x (n, ...) of every rank, in rank order: (W*n, ...). Without a process group or others: x itself.

    The gradient is the sum over ranks: each rank's x takes part in every rank's result. So either no
    rank's x requires grad, or every rank's does and every rank runs the backward pass; n must be the same.
    """
    return x if rank_and_world(group)[1] == 1 else _AllGatherRows.apply(x, group)


@torch.no_grad()
def all_gather_constant(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The same for what has no gradient, such as hashes (int64) and masks (bool): (n, ...) -> (W*n, ...)."""
    _, world = rank_and_world(group)
    if world == 1:
        return x.detach()
    gathered = x.new_empty(world * x.shape[0], *x.shape[1:])
    _all_gather(gathered, x.contiguous(), group=group)
    return gathered


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return all_gather_constant(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        rank, world = rank_and_world(ctx.group)
        own = grad.shape[0] // world
        if grad.is_cuda:
            result = grad.new_empty(own, *grad.shape[1:])
            _reduce_scatter(result, grad.contiguous(), group=ctx.group)
        else:  # gloo has learnt to reduce-scatter only lately
            result = grad.clone(memory_format=torch.contiguous_format)  # autograd may still use `grad` elsewhere
            dist.all_reduce(result, group=ctx.group)
            result = result[rank * own : (rank + 1) * own].clone()  # frees the other ranks' rows
        return result, None
