"""Copies of packed chunks to a GPU: one for each chunk, in a stream of its own, through pinned buffers that are reused.

So the thread that launches kernels neither packs nor waits for a copy. On a CPU nothing is copied.
"""

import math
from dataclasses import dataclass, replace
from itertools import cycle

import numpy as np
import torch

from pipeline.models.chunks import Packed
from pipeline.models.pinned import pinned

_ALIGNMENT = 256  # bytes, like the device's allocator
BUFFERS = 2  # one is filled while the other is copied


@dataclass(frozen=True)
class Layout:
    """Where arrays are in one block of `size` bytes.  places: name -> (first byte, bytes, dtype, shape)."""

    size: int
    places: dict[str, tuple[int, int, torch.dtype, tuple[int, ...]]]

    @classmethod
    def of(cls, arrays: dict[str, list[np.ndarray]]) -> "Layout":
        """arrays: name -> parts to be concatenated."""
        size, places = 0, {}
        for name, parts in arrays.items():
            shape = sum(map(len, parts)), *parts[0].shape[1:]
            length = math.prod(shape) * parts[0].itemsize
            places[name] = size, length, torch.from_numpy(parts[0]).dtype, shape
            size += -(-length // _ALIGNMENT) * _ALIGNMENT
        return cls(size, places)

    def views(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the arrays in a block, (size,) uint8 or longer, by name."""
        return {
            name: block[start : start + length].view(dtype).view(shape)
            for name, (start, length, dtype, shape) in self.places.items()
        }

    def fill(self, block: torch.Tensor, arrays: dict[str, list[np.ndarray]]) -> None:
        """Write the arrays into a block in CPU memory."""
        for name, view in self.views(block).items():
            np.concatenate(arrays[name], out=view.numpy())


@dataclass(frozen=True)
class Staged:
    """A chunk on its way to the device.  block: the device memory of its tensors.  copied: when it is filled."""

    packed: Packed
    block: torch.Tensor | None = None
    copied: torch.cuda.Event | None = None

    def received(self) -> Packed:
        """Return the chunk for use in the current stream, which waits for the copy; this thread does not."""
        if self.block is not None and self.copied is not None:
            stream = torch.cuda.current_stream(self.block.device)
            stream.wait_event(self.copied)
            self.block.record_stream(stream)  # only then may the copies' stream reuse the memory
        return self.packed


class _Buffer:
    """Pinned memory.  copied: when its last copy ends."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.copied: torch.cuda.Event | None = None

    def of(self, size: int) -> torch.Tensor:
        """Wait until the last copy has ended, and return (size,) uint8."""
        if self.copied:
            self.copied.synchronize()
        if len(self._memory) < size:
            self._memory = pinned(lambda pins: torch.empty(size, dtype=torch.uint8, pin_memory=pins))
        return self._memory[:size]


class Staging:
    """Sends packed chunks to a device. For use by one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, None
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a new thread has the first device
            self._stream = torch.cuda.Stream(device)
        self._buffers = cycle([_Buffer() for _ in range(BUFFERS)])

    def sent(self, packed: Packed, *, tiles: bool) -> Staged:
        """Begin to copy a chunk to the device, with its texts' vectors, and its tiles if they are needed."""
        vectors = packed.text_vectors
        made = {} if vectors is None else {"text_vectors": vectors}
        if self._stream is None:
            if tiles and packed.images:
                made["tiles"] = packed.tiles
            return Staged(replace(packed, made=made))
        rows = {"input_ids": packed.input_ids, "position_ids": packed.position_ids} | made
        arrays = {name: [tensor.numpy()] for name, tensor in rows.items()}
        if tiles and packed.images:
            arrays["tiles"] = [image.tiles for image in packed.images]
        layout, buffer = Layout.of(arrays), next(self._buffers)
        memory = buffer.of(layout.size)
        layout.fill(memory, arrays)
        with torch.cuda.stream(self._stream):
            block = memory.to(self._device, non_blocking=True)
            copied = buffer.copied = self._stream.record_event()
        made = layout.views(block)
        ids, positions = made.pop("input_ids"), made.pop("position_ids")
        return Staged(replace(packed, input_ids=ids, position_ids=positions, made=made), block, copied)
