"""`python -m pipeline.train`, which fails if any thread but the training thread calls torch.distributed."""

import sys
import threading
from types import FrameType

from torch.distributed import distributed_c10d

from pipeline import train
from pipeline.training import feed


def main() -> None:
    called, files = set(), set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        files.add(frame.f_code.co_filename)
        if event == "call" and frame.f_code.co_filename == distributed_c10d.__file__:
            called.add(f"{threading.current_thread().name}: {frame.f_code.co_name}")
        elif event == "c_call" and "distributed" in (getattr(argument, "__module__", None) or ""):
            called.add(f"{threading.current_thread().name}: {argument}")

    end = train.end_distributed

    def check(status: int) -> None:
        assert feed.__file__ in files, "the feed's thread was not watched"
        if called:
            sys.exit(f"other threads called {called}")
        end(status)

    threading.setprofile(note)  # of threads that start from now on
    train.end_distributed = check
    train.main()


if __name__ == "__main__":
    main()
