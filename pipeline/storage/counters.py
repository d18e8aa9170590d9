"""What this process has read from object stores, and how often it had to try again."""

import os
import threading


class Counter:
    """A thread-safe counter. A forked child starts at zero, with a new lock."""

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self.value, self._lock = 0, threading.Lock()

    def add(self, number: int) -> None:
        with self._lock:
            self.value += number


RECEIVED = Counter()  # bytes
RETRIES = Counter()
