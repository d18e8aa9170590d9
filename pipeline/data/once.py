"""A cache for what threads read: each value is computed once, and kept."""

import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Once(Generic[T]):
    """Calls a function once for each list of arguments, and keeps the results without limit.

    Threads that ask for a result while another one computes it wait for it. An error is raised in all of them, and not
    kept. A forked process has the results of its parent, and computes itself what the parent had not finished.
    """

    def __init__(self, function: Callable[..., T]) -> None:
        self._function = function
        self._known: dict[tuple[Hashable, ...], T] = {}
        self._computing: dict[tuple[Hashable, ...], Future[T]] = {}
        os.register_at_fork(after_in_child=self._computing.clear)  # their threads do not exist in the child

    def put(self, result: T, *arguments: Any) -> None:
        """Keep a result that is known already."""
        self._known[arguments] = result

    def __call__(self, *arguments: Any) -> T:
        if arguments in self._known:
            return self._known[arguments]
        mine = Future[T]()
        computing = self._computing.setdefault(arguments, mine)  # atomic
        if computing is not mine:
            return computing.result()
        try:
            if arguments not in self._known:  # another thread may have finished it since the first look
                self._known[arguments] = self._function(*arguments)
            mine.set_result(self._known[arguments])
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            del self._computing[arguments]
        return self._known[arguments]
