"""`python -m pipeline.train` with a rank killed while it saves: `python killed_saving.py RANK MOMENT ARGUMENTS`.

MOMENT: `sums`, `latest` or `removal`, of the first checkpoint. The kill waits until training has taken another step.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from pipeline import train
from pipeline.config import load_recipe
from pipeline.training import checkpoint, manifest

MOMENTS = {"sums": (manifest, "sums"), "latest": (checkpoint, "point"), "removal": (checkpoint, "remove_old")}


def main() -> None:
    rank, moment = int(sys.argv.pop(1)), sys.argv.pop(1)
    metrics = Path(load_recipe(sys.argv[1], sys.argv[2:]).run, "metrics.jsonl")
    module, name = MOMENTS[moment]
    function = getattr(module, name)

    def killing(*arguments: object, **options: object) -> object:
        if threading.current_thread().name.startswith("checkpoint") and int(os.environ["RANK"]) == rank:
            before = metrics.read_bytes().count(b"\n")
            while metrics.read_bytes().count(b"\n") == before:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(module, name, killing)
    train.main()


if __name__ == "__main__":
    main()
