"""The encoder of small_mining.py, for programs; each rank kills itself when it has written two shards."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_mining import Texts

from pipeline.embedding.mining import MinedDataset

_keep, _kept = MinedDataset.keep, []


def _killed(self, *arguments):
    _keep(self, *arguments)
    _kept.append(arguments)
    if len(_kept) == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def encoder(path, options):
    MinedDataset.keep = _killed
    return Texts()
