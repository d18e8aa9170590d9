"""Pinned CPU memory, from and to which a GPU copies while the host continues; pageable memory where it is refused.

Copies of pageable memory have the same results, but the host waits for them.
"""

import logging
from collections.abc import Callable
from functools import cache

from torch import Tensor

from pipeline.errors import is_out_of_memory

logger = logging.getLogger(__name__)


def pinned(allocate: Callable[[bool], Tensor]) -> Tensor:
    """Return allocate(True), which pins its memory; if that is refused, warn and return allocate(False).

    The same reason is logged once.
    """
    try:
        return allocate(True)
    except RuntimeError as error:
        if not is_out_of_memory(error) and "OS call failed" not in str(error):
            raise  # also an earlier error of the GPU may be raised here
        _warn(str(error).partition("\n")[0])
    return allocate(False)


def pinned_bytes(size: int) -> int:
    """Return the bytes that torch allocates for pinned memory: a power of two."""
    return 1 << (size - 1).bit_length() if size else 0


@cache
def _warn(reason: str) -> None:
    logger.warning(
        "CPU memory could not be pinned (%s), so copies to and from the GPU wait: raise the limit of locked memory "
        "(ulimit -l) or the job's memory, or lower what is in CPU memory (tools/plan_memory.py shows it)",
        reason,
    )
