"""`python -m pipeline.train` with a full disk from the Nth checkpoint on: `python full_disk.py N ARGUMENTS`.

A file-size limit simulates the full disk: the operating system refuses writes beyond it.
"""

import resource
import sys

import deepspeed

from pipeline import train

_LARGEST = 100_000  # bytes; logs are smaller, optimizer states are larger


def main() -> None:
    nth = int(sys.argv.pop(1))
    save, saves = deepspeed.DeepSpeedEngine.save_checkpoint, 0

    def save_checkpoint(engine: deepspeed.DeepSpeedEngine, *arguments: object, **options: object) -> object:
        nonlocal saves
        saves += 1
        if saves == nth:
            resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST, resource.RLIM_INFINITY))
        return save(engine, *arguments, **options)

    deepspeed.DeepSpeedEngine.save_checkpoint = save_checkpoint
    train.main()


if __name__ == "__main__":
    main()
