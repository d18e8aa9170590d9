"""`python -m pipeline.train` for which the disk is full from the Nth checkpoint on: `python full_disk.py N ARGUMENTS`.

No file grows past a limit, which the operating system refuses as it refuses a full disk.
"""

import resource
import sys

import deepspeed

from pipeline import train

_LARGEST = 100_000  # bytes; a log has fewer, an optimizer's state more


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
