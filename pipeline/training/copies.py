"""Copies of an engine's states in CPU memory, filled by another thread while training continues."""

import copy
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.errors import is_out_of_memory
from pipeline.jobs import limits
from pipeline.models.pinned import pinned, pinned_bytes

_SPARE = 2  # memory is used for copies if so many times of what they need is available

logger = logging.getLogger(__name__)


class Copies:
    """Copies states, in buffers that later copies use again: allocating them takes longer than copying.

    Buffers are known by their bytes, and whether they are pinned, for what is on a GPU.

    device: of the states; some may be in CPU memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._free: dict[tuple[int, bool], list[torch.UntypedStorage]] = defaultdict(list)
        self._used: dict[tuple[int, bool], list[torch.UntypedStorage]] = defaultdict(list)
        self._unfilled: list[tuple[torch.Tensor, torch.Tensor]] = []  # buffers and what they will contain, as bytes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._is_short = False

    def of(self, states: Any, volatile: Any = ()) -> Any:
        """Return a copy of dicts, lists, tensors and plain values, with the same bytes by torch.save but the device.

        The tensors' content follows in `fill`. Until then they must not change, except those that share memory with
        one in `volatile`, which are copied at once. Tensors that share a storage share its copy. All earlier copies are
        overwritten. Returns None if memory is short, and logs that once.
        """
        self._free, self._used = self._used, defaultdict(list)
        at_once = {tensor.untyped_storage()._cdata for tensor in _tensors(volatile)}
        storages: dict[int, torch.UntypedStorage] = {}
        if not self._fit(states):
            return None
        try:
            tensors = {id(tensor): self._copy(tensor, storages, at_once) for tensor in _tensors(states)}
        except Exception as error:  # other processes may have taken the memory meanwhile
            if not is_out_of_memory(error):
                raise
            self._warn(f"it could not be allocated ({error})")
            return None
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return copy.deepcopy(states, tensors)

    def fill(self) -> None:
        """Copy the tensors' content. For another thread; the copies do not hold Python's lock."""
        if self._stream:
            torch.cuda.set_device(self._stream.device)  # a new thread has the first device
        with torch.cuda.stream(self._stream):
            for buffer, source in self._unfilled:
                buffer.copy_(source, non_blocking=True)
        if self._stream:
            self._stream.synchronize()
        self._unfilled.clear()

    def free(self) -> None:
        """Free the buffers, also those of copies that are not filled."""
        self._free.clear()
        self._used.clear()
        self._unfilled.clear()

    def _fit(self, states: Any) -> bool:
        """Whether there is enough memory for a copy."""
        storages = {storage._cdata: storage for storage in (each.untyped_storage() for each in _tensors(states))}
        wanted = Counter(map(_buffer_for, storages.values()))
        needed = sum(_allocated(*key) * max(count - len(self._free[key]), 0) for key, count in wanted.items())
        if not needed:
            return True
        available = limits.available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if needed > available // _SPARE:
            self._warn(
                f"{_SPARE} times its {needed / 1e9:.1f} GB are not available of the CPU's memory to this process, but "
                f"{available / 1e9:.1f} GB"
            )
        return needed <= available // _SPARE

    def _warn(self, reason: str) -> None:
        if not self._is_short:
            logger.warning("training stops while a checkpoint is written, for want of memory for a copy: %s", reason)
            self._is_short = True

    def _copy(self, value: Any, storages: dict[int, torch.UntypedStorage], at_once: set[int]) -> Any:
        """Return a tensor as torch.load would rebuild it, or one of the parts that it is rebuilt from."""
        if isinstance(value, torch.Tensor):
            rebuild, parts = value.__reduce_ex__(2)[:2]
            return rebuild(*self._copy(parts, storages, at_once))
        if isinstance(value, torch.TypedStorage):
            source = value._untyped_storage
            if source._cdata not in storages:
                buffer = storages[source._cdata] = self._buffer(source)
                if source._cdata in at_once:
                    _bytes(buffer).copy_(_bytes(source), non_blocking=True)
                else:
                    self._unfilled.append((_bytes(buffer), _bytes(source)))
            return torch.TypedStorage(wrap_storage=storages[source._cdata], dtype=value.dtype, _internal=True)
        return tuple(self._copy(each, storages, at_once) for each in value) if isinstance(value, tuple) else value

    def _buffer(self, source: torch.UntypedStorage) -> torch.UntypedStorage:
        key = _buffer_for(source)
        buffer = self._free[key].pop() if self._free[key] else _allocate(*key).untyped_storage()
        self._used[key].append(buffer)
        return buffer


def _buffer_for(source: torch.UntypedStorage) -> tuple[int, bool]:
    return source.nbytes(), source.device.type != "cpu"


def _allocate(size: int, pins: bool) -> torch.Tensor:
    def allocate(pins: bool) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pins)

    return pinned(allocate) if pins else allocate(False)


def _allocated(size: int, pins: bool) -> int:
    """Return the bytes that torch allocates."""
    return pinned_bytes(size) if pins else size


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """Iterate over the tensors in nested dicts, lists and tuples."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for each in state.values() if isinstance(state, dict) else state:
            yield from _tensors(each)
