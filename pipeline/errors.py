"""The one exception for what a user can mend, and how every command line shows it."""

import functools
import os
import sys
import time
import traceback
from collections.abc import Callable


class PipelineError(Exception):
    """Something the person at the keyboard can put right; the message says what and how."""


def command_line(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a `main` so that a `PipelineError` ends the process with one clear line and status 2.

    Every rank of a job usually meets the same error. The first rank reports at once; the others wait
    a moment, so that the launcher ends them before they repeat it, and speak only if they failed alone.
    Of several ranks one that fails otherwise ends at once, too: what waits for it must not wait for its clean-up.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except PipelineError as error:
            rank = int(os.environ.get("RANK", 0))
            if rank:
                time.sleep(5)
            where = f" (rank {rank})" if rank else ""
            sys.stdout.flush()
            print(f"error{where}: {error}", file=sys.stderr, flush=True)
            # Not sys.exit: a process group or a loader thread must not keep a failed process alive.
            os._exit(2)
        except Exception:
            if int(os.environ.get("WORLD_SIZE", 1)) == 1:
                raise
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    return wrapped
