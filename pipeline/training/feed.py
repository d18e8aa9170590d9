"""The host's work for a step, in a thread ahead of the training thread.

The thread receives the next batch from the data workers, cuts it into chunks and packs them, in the order in which the
step runs them, a few chunks ahead: near the end of a step it is at the first chunks of the next. It calls no
collective, because those of two threads could meet in different orders on different ranks.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from pipeline.data.batch import Batch, Encoded
from pipeline.data.plan import Stop
from pipeline.errors import PipelineError
from pipeline.models.chunks import Ahead, Packed, cut, pack
from pipeline.models.staging import Staged, Staging
from pipeline.objectives.objective import Cut

# Chunks that are ready, besides one in use and one in preparation. A LLaVE chunk of 16,384 tokens is 10 MB.
_AHEAD = 2
_STOP_SECONDS = 1  # interval of a waiting thread's checks whether to stop
_CHUNK_SECONDS = 600  # that packing a chunk and copying it may take; batches have limits of their own
_LEAVE_SECONDS = 5  # that the training thread waits for the thread's end


@dataclass(frozen=True)
class Prepared:
    """A step's batch, and its items cut into chunks.  order: numbers of the chunks, as all passes run them."""

    batch: Batch
    ahead: Ahead
    order: Sequence[int]


class Feed:
    """Prepares the steps' batches. A context manager: at its end the thread stops.

    For each step, call `next_cut` when it is known how the step cuts its batch, and then `next`. The training thread
    waits only for what the other thread can prepare without it; to ask for anything else is a RuntimeError.

    batches: one for each of `steps`; the thread iterates over them, and `stop` must end the wait for one.
    items: (batch, step) -> the items that the step embeds.  padded: see `plan_chunks`.
    passes: see `Objective`.  tiles_once: only the first pass over a chunk uses its tiles.
    waited: seconds that the training thread has waited here.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        steps: range,
        stop: Stop,
        device: torch.device,
        items: Callable[[Batch, int], Sequence[Encoded]],
        *,
        padded: bool,
        passes: int,
        tiles_once: bool,
    ) -> None:
        self._batches, self._steps, self._stop, self._device, self._items = batches, steps, stop, device, items
        self._padded, self._passes, self._tiles_once = padded, passes, tiles_once
        # Queues in C: those with a size are in Python, and each use would hold its lock for long.
        self._ready: queue.SimpleQueue[Prepared | Staged | BaseException] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()  # an item for each that `_ready` may take
        for _ in range(_AHEAD):
            self._room.put(None)
        self._cuts: queue.SimpleQueue[Cut | None] = queue.SimpleQueue()
        self._cuts_given = 0  # more than there were steps
        self._order: deque[int] = deque()  # the chunks of this step that were not yet taken
        self.waited = 0.0
        # A daemon: it never keeps the process alive.
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for awaited in (self._cuts, self._room):
            awaited.put(None)
        self._thread.join(_LEAVE_SECONDS)

    def next_cut(self, cut: Cut) -> None:
        """Say how the next step is cut for which this was not yet said. `cut` must not change before its end."""
        self._cuts_given += 1
        self._cuts.put(cut)

    def next(self) -> Prepared:
        """Return the next step's batch. Raises what the thread raised."""
        if self._order:
            raise RuntimeError(
                f"a step ended, and {len(self._order)} packed chunks are left of it: does it run as many passes as its "
                f"objective declares, {self._passes}?"
            )
        if not self._cuts_given:
            raise RuntimeError("a step begins before it was said how its batch is cut")
        self._cuts_given -= 1
        prepared = self._get(None)
        assert isinstance(prepared, Prepared)
        self._order.extend(prepared.order)
        return prepared

    def _take(self, number: int) -> Packed:
        if not self._order:
            raise RuntimeError(
                f"chunk {number} is run, but all passes were packed that the objective declares: {self._passes}"
            )
        if number != self._order[0]:
            raise RuntimeError(f"chunk {number} is not the one that was packed next, which is {self._order[0]}")
        staged = self._get(_CHUNK_SECONDS)
        assert isinstance(staged, Staged)
        self._order.popleft()
        return staged.received()

    def _get(self, limit: float | None) -> Prepared | Staged:
        """limit: seconds after which waiting is an error."""
        began, given = time.perf_counter(), None
        while given is None:
            alive = self._thread.is_alive()
            try:
                given = self._ready.get(timeout=_STOP_SECONDS)
            except queue.Empty:  # a signal that came to the other thread is handled now
                if not alive:
                    raise RuntimeError("more steps or chunks are used than were prepared") from None
                if limit is not None and time.perf_counter() - began > limit:
                    raise PipelineError(f"a chunk was not packed within {limit:g} s: does this machine swap?") from None
        self._room.put(None)
        self.waited += time.perf_counter() - began
        if isinstance(given, BaseException):
            raise given
        return given

    def _run(self) -> None:
        try:
            staging = Staging(self._device)
            for step in self._steps:
                batch = next(self._batches)
                items, how = self._items(batch, step), self._cuts.get()
                if how is None:
                    return
                cuts = cut(items, how.chunk_tokens, padded=self._padded)
                again = range(how.kept_chunks, len(cuts))
                order = [*range(len(cuts)), *(number for _ in range(1, self._passes) for number in again)]
                self._put(Prepared(batch, Ahead(items, cuts, self._take), order))
                packed: list[Packed] = []  # without tiles, and therefore small
                for place, number in enumerate(order):
                    if place < len(cuts):
                        packed.append(pack([items[row] for row in cuts[number]]))
                    tiles = place < len(cuts) or not self._tiles_once
                    self._put(staging.sent(packed[number], tiles=tiles))
        except _Stopped:
            pass
        except BaseException as error:
            with suppress(_Stopped):
                self._put(error)

    def _put(self, given: Prepared | Staged | BaseException) -> None:
        while not self._stop.is_set():
            with suppress(queue.Empty):
                self._room.get(timeout=_STOP_SECONDS)
                self._ready.put(given)
                return
        raise _Stopped


class _Stopped(Exception):
    pass
