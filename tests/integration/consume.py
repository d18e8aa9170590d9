"""Ranks that only read: each writes every step's samples to a ledger, as fast as the data arrive."""

import json
import os
import time
from pathlib import Path

import numpy as np
from launch import begin, fork_server, say_where
from limits import HANG_SECONDS, SECONDS_AFTER_A_FAILURE

from pipeline.config import Data, parse_options
from pipeline.data.batch import Batch, Encoded
from pipeline.data.lengths import Lengths
from pipeline.data.order import Order
from pipeline.data.sample import Item
from pipeline.data.source import Source
from pipeline.data.stream import batches
from pipeline.data.tiles import Tiling
from pipeline.jobs.program import command_line
from pipeline.storage import objects

GLOBAL_BATCH = 16
TILING = Tiling(size=24, patches=3, pinpoints=((24, 24), (24, 48), (48, 24), (48, 48)))


def encode(item: Item) -> Encoded:
    """Return the item's content hash instead of its tokens, for tests to compare."""
    return Encoded(np.frombuffer(item.content_hash.to_bytes(8, "little"), np.uint8).astype(np.int32))


def open_order(data: Data) -> tuple[Source, Order]:
    source = Source.open(data)
    return source, source.order(GLOBAL_BATCH, 7, Lengths(TILING, 8))


def rows(batch: Batch) -> list:
    """Return each sample's origin and content."""
    return [list(row) for row in zip(map(str, batch.origins), batch.query, batch.target, batch.valid, strict=True)]


def consume(steps: range, folder: Path, options: list[str]) -> None:
    """Write each step's rows to FOLDER/rankR.jsonl, then the number of bytes received. options: fields of Data."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    data = parse_options(Data, options)
    source, order = open_order(data)
    received = objects.bytes_received()  # bytes of the indexes
    with (folder / f"rank{rank}.jsonl").open("a", buffering=1) as ledger:
        read = batches(source, order, encode, steps, rank=rank, world=world, timeout=HANG_SECONDS)
        for step, batch in zip(steps, read, strict=True):
            received += batch.received
            ledger.write(json.dumps({"step": step, "rows": rows(batch)}) + "\n")
    (folder / f"received{rank}").write_text(str(received))


def run_rank(environment: dict[str, str], steps: range, folder: Path, options: list[str]) -> None:
    begin(environment, folder / "output")
    command_line(lambda: consume(steps, folder, options))()


class Job:
    """The ranks as processes of the fork server, which start without delay."""

    def __init__(self, world: int, steps: range, folder: Path, options: list[str]) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.ranks = []
        for rank in range(world):
            own = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world)}
            self.ranks.append(fork_server().Process(target=run_rank, args=(own, steps, folder, options)))
            self.ranks[-1].start()

    @property
    def runs(self) -> bool:
        return any(rank.is_alive() for rank in self.ranks)

    def ledger(self) -> list[list]:
        """Return the rows of each step that all ranks have written, concatenated over the ranks."""
        ranks = []
        for rank in range(len(self.ranks)):
            path = self.folder / f"rank{rank}.jsonl"
            text = path.read_text() if path.exists() else ""
            ranks.append([json.loads(line)["rows"] for line in text.splitlines(keepends=True) if line.endswith("\n")])
        return [[row for part in parts for row in part] for parts in zip(*ranks, strict=False)]

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
        self.wait()

    def wait(self) -> list[int | None]:
        """Return the ranks' exit statuses. Kill ranks still running at the time limit, or some time after a failure."""
        deadline = time.monotonic() + HANG_SECONDS
        while self.runs and time.monotonic() < deadline:
            if any(rank.exitcode for rank in self.ranks):
                deadline = min(deadline, time.monotonic() + SECONDS_AFTER_A_FAILURE)
            time.sleep(0.02)
        say_where([rank.pid for rank in self.ranks if rank.is_alive()])
        for rank in self.ranks:
            rank.kill()
            rank.join()
        return [rank.exitcode for rank in self.ranks]

    @property
    def output(self) -> str:
        path = self.folder / "output"
        return path.read_text() if path.exists() else ""
