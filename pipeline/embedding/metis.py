"""Partition a graph by METIS: a script for a process of its own, which `partition.py` starts.

METIS does not release the interpreter's lock, for minutes or hours. In a process of its own it lets the waiting one
exchange messages with other ranks. The graph comes by standard input as numpy arrays: the ends of each node's edges
(N + 1,), the nodes that they lead to, and their weights. Each node's part goes to standard output, int64 (N,).
"""

import ctypes
import signal
import sys
from io import BytesIO

import numpy as np
import pymetis

_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when the thread that started it ends
_IMBALANCE = 100  # METIS cuts fewer edges if it may split unevenly: here by 100 in 1000


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    given = BytesIO(sys.stdin.buffer.read())
    ends, others, weights = (np.load(given, allow_pickle=False) for _ in range(3))
    options = pymetis.Options(seed=0, ufactor=_IMBALANCE)
    adjacency = pymetis.CSRAdjacency(ends, others)
    _, parts = pymetis.part_graph(int(sys.argv[1]), adjacency, eweights=weights, recursive=True, options=options)
    result = BytesIO()
    np.save(result, np.asarray(parts, np.int64), allow_pickle=False)
    sys.stdout.buffer.write(result.getvalue())


if __name__ == "__main__":
    main()
