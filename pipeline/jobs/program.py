"""What every program of this project does before and after its `main`: environment, logging, Ctrl-C, errors."""

import functools
import gc
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable

from pipeline import home, interrupt
from pipeline.errors import PipelineError, disk_message, is_of_late_peer, is_of_lost_peer, of_failed_worker, printable
from pipeline.jobs import launch

_OTHER_RANKS_SECONDS = 5


def command_line(main: Callable[[], None]) -> Callable[[], None]:
    """Set up the process, call `main`, and report how it failed: one line and status 2 for an error, 130 for Ctrl-C.

    Rank 0 reports at once. Other ranks usually met the same error, or only lost the connection to rank 0: they wait a
    moment, in which the launcher ends them. A failed rank exits without clean-up, which could wait for other ranks.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        rank = 0
        if not gc.isenabled():  # pipeline/__init__.py disabled it for the imports
            gc.freeze()  # imported objects stay: later collections, also those of forked workers, skip them
            gc.enable()
        try:
            launch.init_from_environment()
            rank, _ = launch.rank_in_environment()
            configure_logging(rank)
            sys.argv[1:] = map(_with_home, sys.argv[1:])
            with interrupt.handled():
                main()
                return
        except KeyboardInterrupt:
            interrupt.end()
        except Exception as error:
            if interrupt.interrupted():
                interrupt.end()
            alone = os.environ.get("WORLD_SIZE", "1") == "1"
            lost = not (alone or isinstance(error, PipelineError)) and is_of_lost_peer(error)
            message = _message(error, alone)
            if not message and alone:
                raise
            if not message:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        if rank or lost:
            time.sleep(_OTHER_RANKS_SECONDS)
        sys.stdout.flush()
        where = f" (rank {rank})" if rank else ""
        print(f"error{where}: {printable(message, keep=chr(10))}", file=sys.stderr, flush=True)
        os._exit(2)

    return wrapped


def _message(error: Exception, alone: bool) -> str:
    """What to print; empty for an error that needs its traceback.  alone: no other rank exists."""
    if isinstance(error, PipelineError):
        return str(error)
    if message := disk_message(error) or of_failed_worker(error):
        return message
    if not alone and is_of_lost_peer(error):
        return "the connection to another rank is lost; that rank's message says why"
    if not alone and is_of_late_peer(error):
        return "another rank did not answer in time (timeout_minutes): does its process or its node hang?"
    return ""


def configure_logging(rank: int) -> None:
    """Write what the package logs to stderr, with time, level and rank."""
    logger = logging.getLogger("pipeline")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Handler) for handler in logger.handlers):
        logger.addHandler(_Handler())
    for handler in logger.handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s rank {rank}: %(message)s"))


class _Handler(logging.Handler):
    """To stderr as it is now (tests replace it), above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # preflight starts without any dependency

        tqdm.write(printable(self.format(record), keep="\n"), file=sys.stderr)
        sys.stderr.flush()


def _with_home(argument: str) -> str:
    """Expand `~/x`, also in `--out=~/x` and `run=~/x`, which not every shell does: no folder must be named `~`."""
    if not re.match(r"([\w.-]+=)?~[^/]*/", argument):
        return argument
    try:
        return home.expanded(argument)
    except ValueError as error:
        raise PipelineError(str(error)) from None
