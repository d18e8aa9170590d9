"""Arrays as .npy files: the index's sidecars, the members of tars and the folders of embeddings.

The header of a .npy file is Python source, which numpy parses with `ast.literal_eval`. That fails at random when two
threads of a process parse at once (CPython's issue 106905), and samples are read by many threads. So headers are
parsed here, as JSON.
"""

import json
import re
from io import BytesIO
from pathlib import Path

import numpy as np

_START = b"\x93NUMPY\x01\x00"  # version 1.0, as numpy writes every header below 64 KiB
_AS_JSON = str.maketrans("()'", '[]"')
_LAST_COMMA = re.compile(r", ?(?=[]}])")


def array_bytes(array: np.ndarray) -> bytes:
    """Return the bytes of a .npy file; see `array_of`."""
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def array_of(data: bytes) -> np.ndarray:
    """Parse the bytes of a .npy file; ValueError if they are invalid. A wrong size in the header allocates nothing."""
    dtype, columns_first, shape, start = _header(data)
    try:
        values = np.frombuffer(data, dtype, offset=start) if len(data) > start else np.zeros(0, dtype)
        return values.reshape(shape, order="F" if columns_first else "C")
    except (ValueError, OverflowError) as error:
        raise ValueError(f"it holds no array ({error})") from None


def mapped(path: Path) -> np.ndarray:
    """Return a .npy file's array as a memory map. Raises ValueError or OSError if the file is invalid or incomplete."""
    with path.open("rb") as file:
        dtype, columns_first, shape, start = _header(file.read(2**16))
    try:
        return np.memmap(path, dtype, "r", start, shape, "F" if columns_first else "C")
    except OverflowError as error:
        raise ValueError(str(error)) from None


def npy_header(count: int, width: int, dtype: str = "<f4") -> bytes:
    """Return the header of a .npy file of `count` rows of `width` numbers.  dtype: numpy's name of their type."""
    header = BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": (count, width)}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def _header(data: bytes) -> tuple[np.dtype, bool, tuple[int, ...], int]:
    """Parse a header: its dtype, whether columns come first, the shape, and where the values begin."""
    begin = len(_START) + 2
    start = begin + int.from_bytes(data[begin - 2 : begin], "little")
    try:
        if not data.startswith(_START) or len(data) < start:
            raise ValueError("its header is not that of a .npy file")
        text = data[begin:start].decode("latin1").translate(_AS_JSON)
        header = json.loads(_LAST_COMMA.sub("", text).replace("False", "false").replace("True", "true"))
        return _dtype(header["descr"]), header["fortran_order"], tuple(map(int, header["shape"])), start
    except (TypeError, ValueError, LookupError, RecursionError) as error:
        raise ValueError(f"it holds no array ({error})") from None


def _dtype(described: str | list) -> np.dtype:
    """Return the dtype that a header describes. Objects, which are pickled, are refused with ValueError."""
    if isinstance(described, list):
        dtype = np.dtype([(name, _dtype(kind), *map(tuple, sizes)) for name, kind, *sizes in described])
    else:
        dtype = np.dtype(described)
    if dtype.hasobject:
        raise ValueError("its values are Python objects")
    return dtype
