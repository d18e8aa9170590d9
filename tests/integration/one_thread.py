"""`python -m pipeline.train`, which fails if the feed's thread calls torch.distributed."""

import sys
import threading
from types import FrameType

from torch.distributed import distributed_c10d

from pipeline import train
from pipeline.training import feed


def main() -> None:
    called, files = set(), set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if threading.current_thread().name != "feed":
            return
        files.add(frame.f_code.co_filename)
        if event == "call" and frame.f_code.co_filename == distributed_c10d.__file__:
            called.add(frame.f_code.co_name)
        elif event == "c_call" and "distributed" in str(getattr(argument, "__module__", "")):
            called.add(str(argument))

    end = train.end_distributed

    def check(status: int) -> None:
        assert feed.__file__ in files, "the thread was not watched"
        if called:
            sys.exit(f"the feed's thread called {called}")
        end(status)

    threading.setprofile(note)  # of threads that start from now on
    train.end_distributed = check
    train.main()


if __name__ == "__main__":
    main()
