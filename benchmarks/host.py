"""Does the training thread wait for the host's work: receiving a batch, cutting it into chunks, packing the chunks?

    python benchmarks/host.py [--pairs 64] [--steps 8] [--rounds 3] [--picture timeline.png]

A step of LLaVE on a simulated device, with real batches. The device is a clock: a kernel of s seconds ends s seconds
after the one before, or after its launch. Its queue takes 1,024 kernels, about CUDA's number: a launch waits for room.
Who waits sleeps, without Python's lock. No GPU is needed.

    batch      MMEB-like pairs (benchmarks/mmeb_like.py) with tiles of 384 pixels. As from a data worker, a batch
               arrives as pickled rows and items; its tiles are in shared memory and are not copied
    step       pipeline/models/chunks.py with 16,384 tokens a chunk. A first pass over all chunks, the loss, a second
               pass, the optimizer. After the loss and after the optimizer, the training thread waits for the device. A
               frozen tower reads the tiles in the first pass
    a chunk    takes the device --forward milliseconds in the first pass and three times as many in the second, if it is
               full. To launch it, the training thread calls a number of tiny operations of torch
    in line    the training thread receives, cuts and packs. Each chunk is copied once more, as into pinned memory
    ahead      pipeline/training/feed.py does, in a thread. On a GPU it writes directly to pinned memory and copies from
               there in a stream of its own; neither is simulated

Figures are means over the steps after the first two, in milliseconds per step, of the round with the shortest steps:
other programs on the machine only lengthen them. The two ways take turns.

    step, idle              of the device, from a step's first kernel to the next step's
    receive, cut, pack      CPU time of the training thread; "cut" includes planning. It holds Python's lock
    copy                    the same, for copies of tiles and ids, which release the lock
    feed                    CPU time of the feed's thread
    wait, longest           the training thread's waits for the feed: their sum, and the longest one
    launch                  the tiny operations' time: the feed's thread lengthens it if it holds the lock

On a machine with more programs than cores, waits and launches have those programs' time in them. CPU times do not: the
feed's thread holds the lock for at most the time of receive, cut and pack. A larger --forward slows the device down.
"""

import argparse
import os
import pickle
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.mmeb_like import draw
from pipeline.data.batch import Batch, Share
from pipeline.data.plan import Stop
from pipeline.jobs.program import command_line
from pipeline.models.chunks import Chunk, Packed, plan_chunks, run_chunk
from pipeline.training.feed import Feed

CPU = torch.device("cpu")
CHUNK_TOKENS = 16384
LOSS, OPTIMIZER = 0.010, 0.020  # seconds on the device
QUEUE = 1024  # kernels
UNTIMED = 2  # steps
# Milliseconds on the device for a chunk in the first pass, and operations to launch it. By a roofline, a full chunk of
# LLaVE-0.5B takes an H100 about 50 ms; a language model of 24 layers launches about 600 kernels.
SETTINGS = ((50.0, 600), (20.0, 600), (2.0, 600), (2.0, 3000))
WAYS = ("in line", "ahead")


@dataclass(frozen=True)
class Cut:
    chunk_tokens: int = CHUNK_TOKENS
    kept_chunks: int = 0


@dataclass
class Device:
    """busy: (begin, end) of its work, in seconds.  free: when the last one ends.  queue: (begin, end, kernels)."""

    free: float = 0.0
    busy: list[tuple[float, float]] = field(default_factory=list)
    queue: deque[tuple[float, float, int]] = field(default_factory=deque)

    def run(self, seconds: float, kernels: int = 1) -> None:
        begin = max(time.perf_counter(), self.free)
        self.free = begin + seconds
        self.busy.append((begin, self.free))
        self.queue.append((begin, self.free, kernels))
        while (excess := sum(count for *_, count in self.queue) - QUEUE) > 0:
            begin, end, count = self.queue.popleft()
            done = min(excess, count)
            until = begin + (end - begin) * done / count
            if done < count:
                self.queue.appendleft((until, end, count - done))
            time.sleep(max(until - time.perf_counter(), 0))

    def wait(self) -> None:
        time.sleep(max(self.free - time.perf_counter(), 0))


class Training:
    """Steps on the device.

    host: (cause, begin, end, CPU time) of the training thread's work and waits.  feed: CPU time of the feed's thread
    before each batch.
    """

    def __init__(self, arrivals: Iterator[Batch], forward: float, launches: int) -> None:
        self.arrivals, self.forward, self.launches = arrivals, forward, launches
        self.device, self.scalar = Device(), torch.zeros(())
        self.host: list[tuple[str, float, float, float]] = []
        self.feed: list[float] = []
        self.begins: list[int] = []

    @contextmanager
    def during(self, cause: str) -> Iterator[None]:
        begin, used = time.perf_counter(), time.thread_time()
        yield
        self.host.append((cause, begin, time.perf_counter(), time.thread_time() - used))

    def in_line(self, steps: int) -> None:
        for _ in range(steps):
            with self.during("receive"):
                batch = next(self.arrivals)
            with self.during("cut"):
                chunks = plan_chunks(list(batch.items.values()), CHUNK_TOKENS, CPU, padded=False)
            self._step([replace(chunk, take=self._packing(chunk)) for chunk in chunks])

    def _packing(self, chunk: Chunk):
        """Return what packs a chunk in line; only its first pass uses the tiles."""
        passes = iter((True, False))

        def take() -> Packed:
            with self.during("pack"):
                packed = chunk.packed
            with self.during("copy"):
                made = {"tiles": packed.tiles.clone()} if next(passes) else {}
                ids, positions = packed.input_ids.clone(), packed.position_ids.clone()
                return replace(packed, input_ids=ids, position_ids=positions, made=made)

        return take

    def ahead(self, steps: int) -> None:
        stop, options = Stop(), {"padded": False, "passes": 2, "tiles_once": True}
        items = lambda batch, step: list(batch.items.values())  # noqa: E731
        with Feed(self._timed(), range(steps), stop, CPU, items, **options) as feed:
            feed.next_cut(Cut())
            for _ in range(steps):
                with self.during("wait"):
                    prepared = feed.next()
                feed.next_cut(Cut())
                with self.during("cut"):
                    ahead = prepared.ahead
                    chunks = plan_chunks(ahead.items, CHUNK_TOKENS, CPU, padded=False, ahead=ahead)
                self._step([replace(chunk, take=self._waiting(chunk)) for chunk in chunks])

    def _timed(self) -> Iterator[Batch]:
        for batch in self.arrivals:
            self.feed.append(time.thread_time())
            yield batch

    def _waiting(self, chunk: Chunk):
        def take() -> Packed:
            with self.during("wait"):
                return chunk.take()

        return take

    def _step(self, chunks: list[Chunk]) -> None:
        self.begins.append(len(self.device.busy))
        for factor, after in ((1, LOSS), (3, OPTIMIZER)):
            for chunk in chunks:
                run_chunk(lambda packed, *_, factor=factor: self._model(packed, factor), chunk)
            self.device.run(after)
            self.device.wait()

    def _model(self, packed: Packed, factor: int) -> torch.Tensor:
        with self.during("launch"):
            for _ in range(factor * self.launches):
                self.scalar.add_(1)
        self.device.run(self.forward * factor * len(packed.input_ids) / CHUNK_TOKENS, factor * self.launches)
        return self.scalar.expand(len(packed.lengths), 1)

    def figures(self) -> dict[str, float]:
        """Return milliseconds per step by name, and the longest wait."""
        first, last, steps = self.begins[UNTIMED], self.begins[-1], len(self.begins) - 1 - UNTIMED
        begin, end = self.device.busy[first][0], self.device.busy[last][0]
        sums = Counter({"step": end - begin})
        sums["idle"] = end - begin - sum(there - here for here, there in self.device.busy[first:last])
        longest = 0.0
        for cause, here, there, used in self.host:
            if begin <= here < end:
                sums[cause] += there - here if cause in ("wait", "launch") else used
                longest = max(longest, there - here) if cause == "wait" else longest
        if self.feed:
            sums["feed"] = self.feed[-1] - self.feed[-1 - steps]
        return {name: 1e3 * seconds / steps for name, seconds in sums.items()} | {"longest": 1e3 * longest}


def arriving(batch: Batch) -> Iterator[Batch]:
    """Yield the batch again and again, each time received as from a data worker."""
    *state, tiles = Share([], batch.items).__getstate__()
    sent = pickle.dumps((replace(batch, items={}), state))
    while True:
        received, state = pickle.loads(sent)
        share = Share.__new__(Share)
        share.__setstate__((*state, tiles))
        yield replace(received, items=share.items)


def llave() -> LlavaOnevisionConfig:
    side = 384
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(image_size=side, patch_size=14),
        text_config=Qwen2Config(vocab_size=1000),
        image_token_id=999,
        video_token_id=998,
        image_grid_pinpoints=[[side * rows, side * columns] for rows in (1, 2) for columns in (1, 2)],
    )


def draw_timelines(trainings: dict[str, Training], picture: Path) -> None:
    """Draw a step of each way: the device above, the training thread below."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    colours = {"receive": "C4", "cut": "C5", "pack": "C1", "copy": "C1", "wait": "C3", "launch": "C7"}
    figure, rows = pyplot.subplots(len(trainings), sharex=True, figsize=(12, 4), layout="constrained")
    for axes, (way, training) in zip(rows, trainings.items(), strict=True):
        first, last = training.begins[-2:]
        begin, end = training.device.busy[first - 1][1] - 0.03, training.device.busy[last][1]
        shown = [(here, there) for here, there in training.device.busy if begin <= here <= end]
        axes.broken_barh([(here - begin, there - here) for here, there in shown], (1, 0.8), color="C0", label="device")
        for cause, colour in colours.items():
            spans = [(h - begin, t - h) for name, h, t, _ in training.host if name == cause and begin <= h <= end]
            if spans:
                axes.broken_barh(spans, (0, 0.8), color=colour, label=cause)
        axes.set_yticks([0.4, 1.4], ["training thread", "device"])
        axes.set_title(way)
        axes.legend(loc="upper right", ncols=6, fontsize="small")
    rows[-1].set_xlabel("seconds")
    figure.savefig(picture, dpi=100)


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=64, metavar="N", help="a batch's pairs (64)")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="of each way and round; at least 4 (8)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(3)")
    parser.add_argument("--forward", type=float, metavar="MS", help="a full chunk's first pass on the device (several)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw a step of the first setting")
    arguments = parser.parse_args()
    batch = draw(llave(), arguments.pairs, np.arange(900))
    tiles = sum(image.tiles.nbytes for item in batch.items.values() for image in item.images)
    chunks = len(plan_chunks(list(batch.items.values()), CHUNK_TOKENS, CPU, padded=False))
    names = ("step", "idle", "receive", "cut", "pack", "copy", "feed", "wait", "longest", "launch")
    table = Table(
        "forward",
        "launches",
        "",
        *names,
        title=f"{arguments.pairs} pairs, {chunks} chunks, {tiles / 1e6:,.0f} MB of tiles; ms a step",
    )
    settings = SETTINGS if arguments.forward is None else ((arguments.forward, 600),)
    for number, (forward, launches) in enumerate(settings):
        best: dict[str, Training] = {}
        for _ in range(arguments.rounds):
            for way in WAYS:
                training = Training(arriving(batch), forward / 1e3, launches)
                (training.in_line if way == "in line" else training.ahead)(arguments.steps)
                if way not in best or training.figures()["step"] < best[way].figures()["step"]:
                    best[way] = training
        for way in WAYS:
            found = best[way].figures()
            cells = (f"{found.get(name, 0):,.1f}" if found.get(name) else "" for name in names)
            table.add_row(f"{forward:g} ms", f"{launches:,}", way, *cells)
        table.add_section()
        if arguments.picture and number == 0:
            draw_timelines(best, arguments.picture)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
