"""Read .safetensors files in blocks, and write one block by block, so that no tensor need be in memory.

Format: eight bytes with the header's length, a JSON header with each tensor's dtype, shape and place, and the tensors'
bytes (github.com/huggingface/safetensors).
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from pipeline.errors import PipelineError
from pipeline.models.files import refuse_not_finite

# The dtypes by their names in a header: those of weights, and of integers and marks in buffers.
WEIGHTS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = WEIGHTS | {"I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}

BLOCK = 2**16  # elements; in float64 half a MB, which stays in a processor's cache: twice as fast as 2**20


@dataclass(frozen=True)
class Place:
    """A tensor in a .safetensors file.  kind: the dtype's name in the header.  begin: its first byte in the file."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    begin: int

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * _DTYPES[self.kind].itemsize

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the elements in flat blocks of BLOCK. Raises PipelineError for NaN or infinity.  name: for errors."""
        dtype = _DTYPES[self.kind]
        with self.file.open("rb") as opened:
            opened.seek(self.begin)
            for first in range(0, self.count, BLOCK):
                data = bytearray(min(BLOCK, self.count - first) * dtype.itemsize)
                if opened.readinto(data) < len(data):
                    raise PipelineError(f"{self.file} became shorter while it was read: start again")
                block = torch.frombuffer(data, dtype=dtype)
                refuse_not_finite(self.file, name, block)
                yield block


def places_in(file: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """Return the tensors of a file by name, in the order of their bytes, and its metadata.

    The file must have passed `survey`, which refuses a damaged header and other dtypes.
    """
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    metadata = header.pop("__metadata__", {})
    found = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    places = {
        name: Place(file, each["dtype"], tuple(each["shape"]), 8 + size + each["data_offsets"][0])
        for name, each in found
    }
    return places, metadata


def write_tensors(
    file: Path, kinds: dict[str, tuple[str, tuple[int, ...]]], blocks: Iterable[torch.Tensor], metadata: dict[str, str]
) -> None:
    """Write a .safetensors file.

    kinds: dtype's name in a header and shape of each tensor by name.  blocks: the tensors' elements, one tensor after
    another in the order of `kinds`, in flat blocks of the dtype.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (kind, shape) in kinds.items():
        begin, end = end, end + prod(shape) * _DTYPES[kind].itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for block in blocks:
            opened.write(block.contiguous().view(torch.uint8).numpy().tobytes())


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 values to a dtype once, to nearest, ties to even.

    torch rounds float64 to float32 on the way to a half precision. Rounded twice, a value that lies just beside the
    middle of two numbers may end at the wrong one. So the first rounding is to odd here: towards zero, with the last
    bit set if anything was cut (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    between = values.to(torch.float32)
    bits = between.view(torch.int32)
    cut = between.double() != values
    bits -= (between.double().abs() > values.abs()).int()
    bits |= cut.int()
    return between.to(dtype)
