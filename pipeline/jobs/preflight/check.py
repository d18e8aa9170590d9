"""One check of what a run needs: its result, and what to do about it."""

import os
import queue
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Literal, ParamSpec

from pipeline.errors import PipelineError

Parameters = ParamSpec("Parameters")

HANG_SECONDS = 120  # only what hangs takes longer, whatever the load of the nodes and file systems
_AFTER_TIMEOUT_SECONDS = 5
timed_out = threading.Event()  # a check that stops the run timed out: later checks get less time


@dataclass(frozen=True)
class Check:
    """A row of the table.

    state: red would stop the run; yellow does not.  do: what to do, unless `found` says it.
    """

    name: str
    state: Literal["skipped", "green", "yellow", "red"]
    found: str
    do: str = ""

    @property
    def error(self) -> str:
        return f"preflight: {self.name}: {self.found}" + (f" - {self.do}" if self.do else "")


green = partial(Check, "", "green")
yellow = partial(Check, "", "yellow")
red = partial(Check, "", "red")
skipped = partial(Check, "", "skipped")


def check(
    name: str, if_late: str, seconds: float = HANG_SECONDS, late: Callable[[str, str], Check] = red
) -> Callable[[Callable[Parameters, Check]], Callable[Parameters, Check]]:
    """Make a function a check of this name: an exception is red, and so is a result later than `seconds`.

    if_late: what to do after a timeout.  late: red, or yellow if a timeout does not stop the run.
    """

    def decorate(function: Callable[Parameters, Check]) -> Callable[Parameters, Check]:
        @wraps(function)
        def limited(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Check:
            results: queue.SimpleQueue[Check] = queue.SimpleQueue()

            def work() -> None:
                try:
                    results.put(function(*args, **kwargs))
                except PipelineError as error:
                    results.put(red(str(error)))
                except Exception as error:
                    first = (str(error).strip().splitlines() or [""])[0]
                    results.put(red(f"{type(error).__name__}: {first}"))

            # A thread that hangs in a driver or on a dead file server ends with the process.
            threading.Thread(target=work, daemon=True).start()
            limit = min(seconds, _AFTER_TIMEOUT_SECONDS) if timed_out.is_set() else seconds
            try:
                result = results.get(timeout=limit)
            except queue.Empty:
                result = late(f"no answer within {limit:g} s", if_late)
                if result.state == "red":
                    timed_out.set()
            return replace(result, name=name, found=_without_secrets(result.found))

        return limited

    return decorate


def _without_secrets(text: str) -> str:
    """Exceptions of libraries may contain values of the environment."""
    for name, value in os.environ.items():
        if len(value) > 3 and re.search("SECRET|TOKEN|PASSWORD|ACCESS_KEY|API_KEY", name):
            text = text.replace(value, "***")
    return text
