"""A check of what a run needs: what was found, and what to do about it."""

import functools
import os
import queue
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, ParamSpec

from pipeline.errors import PipelineError

Parameters = ParamSpec("Parameters")

_HURRY_SECONDS = 5
some_is_late = threading.Event()  # and stops the run: then the others are not waited for long


@dataclass(frozen=True)
class Check:
    """A line of the table.

    state: red would stop the run; yellow lets it start.  do: what to do, where `found` does not say it.
    rate: MB/s that were measured, which differ from node to node.
    """

    name: str
    state: Literal["skipped", "green", "yellow", "red"]
    found: str
    do: str = ""
    rate: float | None = None

    @property
    def error(self) -> str:
        return f"preflight: {self.name}: {self.found}" + (f" - {self.do}" if self.do else "")


def green(found: str, rate: float | None = None) -> Check:
    return Check("", "green", found, rate=rate)


def yellow(found: str, do: str) -> Check:
    return Check("", "yellow", found, do)


def red(found: str, do: str = "") -> Check:
    return Check("", "red", found, do)


def skipped(why: str) -> Check:
    return Check("", "skipped", why)


def check(
    name: str, seconds: float, if_late: str, late: Callable[[str, str], Check] = red
) -> Callable[[Callable[Parameters, Check]], Callable[Parameters, Check]]:
    """Make a function the check of this name: what it raises is red, and it is not waited for longer than `seconds`.

    if_late: what to do then.  late: red, or yellow where it stops nothing.
    """

    def decorate(function: Callable[Parameters, Check]) -> Callable[Parameters, Check]:
        @functools.wraps(function)
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

            # A thread that hangs, in a driver or on a dead file server, ends with the process.
            threading.Thread(target=work, daemon=True).start()
            patience = min(seconds, _HURRY_SECONDS) if some_is_late.is_set() else seconds
            try:
                result = results.get(timeout=patience)
            except queue.Empty:
                result = late(f"no answer within {patience:g} s", if_late)
                if result.state == "red":
                    some_is_late.set()
            return replace(result, name=name, found=_without_secrets(result.found))

        return limited

    return decorate


def _without_secrets(text: str) -> str:
    """Other people's exceptions may repeat what the environment holds."""
    for name, value in os.environ.items():
        if len(value) > 3 and re.search("SECRET|TOKEN|PASSWORD|ACCESS_KEY|API_KEY", name):
            text = text.replace(value, "***")
    return text
