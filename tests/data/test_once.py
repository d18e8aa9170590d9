"""Results that threads share are computed once, also after an error and in a forked process."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.data.once import Once


def test_threads_that_ask_together_compute_once():
    calls, started = [], threading.Barrier(8)

    def slow(number: int) -> list[int]:
        calls.append(number)
        event.wait(0.05)
        return [number]

    event, once = threading.Event(), Once(slow)

    def ask(number: int) -> list[int]:
        started.wait()
        return once(number)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, [1, 2] * 4))
    assert sorted(calls) == [1, 2]
    assert all(each is found[0] for each in found[::2]) and found[:2] == [[1], [2]]
    assert once(1) is found[0] and len(calls) == 2


def test_an_error_is_raised_and_not_kept():
    results = iter([ValueError("made so"), 3])

    def failing() -> int:
        if isinstance(result := next(results), Exception):
            raise result
        return result

    once = Once(failing)
    with pytest.raises(ValueError, match="made so"):
        once()
    assert once() == once() == 3


def test_a_forked_process_does_not_wait_for_its_parents_threads():
    begun, end = threading.Event(), threading.Event()

    def compute(name: str) -> int:
        if name == "slow" and os.getpid() == parent:
            begun.set()
            end.wait()
        return os.getpid()

    parent, once = os.getpid(), Once(compute)
    assert once("known") == parent
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(once, "slow")
        begun.wait()
        child = os.fork()
        if not child:
            os._exit(0 if once("known") == parent and once("slow") == os.getpid() else 1)
        end.set()
        assert os.waitpid(child, 0)[1] == 0
        assert future.result() == parent
