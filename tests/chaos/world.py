"""The runs that trials disturb: small runs with a real S3 server, and their undisturbed results."""

import json
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from fault_proxy import FLIP, RESET, TRUNCATE, UNAVAILABLE, Fault, FaultProxy, refuse, stall
from launch import Ended, fork, wait
from PIL import Image
from safetensors import safe_open

from pipeline.convert.demo import TrainingPairs
from pipeline.convert.sharding import convert
from pipeline.models.llave.config import LlaveArchitecture
from pipeline.models.llave.model import build
from pipeline.storage import objects
from tools.s3_server import S3Server

BUCKET = "chaos"
DATASETS = ("Scene-I2T", "Scene-CLS")
HANG = 400  # seconds after which a program counts as hanging; slow machines need far less
AFTER_FAILURE = 10  # seconds from a rank's failure until the others are killed, as by a launcher
STEPS, EVERY = 8, 2
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 24, "patch_size": 8}
TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 320}


class Violation(Exception):
    """A result that must never occur."""


@dataclass
class World:
    """The server with its data, the model, and the undisturbed results.

    folder: on the disk; each trial has its own folder in it.
    proxy: in front of the server; programs use its endpoint.
    """

    folder: Path
    server: S3Server
    proxy: FaultProxy
    injected: Counter[str] = field(default_factory=Counter)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def shards(self) -> Path:
        """Return a local copy of one of the server's datasets."""
        return self.folder / "shards"

    @property
    def undisturbed(self) -> Path:
        return self.folder / "undisturbed"

    def train(self, run: Path, *overrides: str) -> list[str]:
        return [
            *("-m", "pipeline.train", "pipeline/recipes/demo.yaml", f"run={run}", f"model.path={self.model}"),
            f"data.url=s3://{BUCKET}/train",
            f"data.datasets=[{', '.join(DATASETS)}]",
            *("data.lanes=4", "data.block_samples=8", "data.window_blocks=2", "data.timeout_s=5"),
            *("batch.global_batch=24", "batch.chunk_tokens=2000", f"steps={STEPS}", f"checkpoint.every={EVERY}"),
            *(f"evaluation.urls=[s3://{BUCKET}/train/Scene-I2T]", "evaluation.every=4"),
            *("ledger=true", "timeout_minutes=1", *overrides),
        ]

    def evaluate(self, out: Path) -> list[str]:
        return [
            "-m",
            "pipeline.evaluate",
            str(self.model),
            f"s3://{BUCKET}/train/Scene-I2T",
            f"out={out}",
            "timeout_s=5",
        ]

    def embed(self, out: Path) -> list[str]:
        shards = ["--shards", f"s3://{BUCKET}/train/Scene-I2T", "--stored", "bf16"]
        return ["-m", "pipeline.embed", str(self.model), *shards, "--out", str(out)]

    def convert(self, dest: str) -> list[str]:
        source = [str(self.folder / "pairs.jsonl"), dest, "--dataset", "pairs", "--shards", "6"]
        return ["tools/make_shards.py", "jsonl", *source, "--processes", "2"]

    @contextmanager
    def broken_storage(self, chance: random.Random, rate: float, only: Fault | None = None) -> Iterator[None]:
        """Give this fraction of requests a fault: a random transient one, or `only` this one."""
        passing = [RESET, TRUNCATE, FLIP, UNAVAILABLE, stall(1), stall(8), refuse(403, "AccessDenied")]
        faults = [only] if only else passing
        lock = threading.Lock()  # the proxy calls it from many threads

        def plan(number: int, method: str, path: str) -> Fault | None:
            with lock:
                if chance.random() >= rate:
                    return None
                fault = chance.choice(faults)
                self.injected[f"{fault.kind}{fault.status or ''}"] += 1
                return fault

        self.proxy.faults = plan
        try:
            yield
        finally:
            self.proxy.faults = lambda number, method, path: None


@contextmanager
def a_world(folder: Path) -> Iterator[World]:
    """Create everything, including the undisturbed results."""
    with ExitStack() as stack:
        server = stack.enter_context(S3Server(BUCKET, folder=folder))
        os.environ |= server.environment()
        world = World(folder, server, stack.enter_context(FaultProxy(server.endpoint)))
        for number, name in enumerate(DATASETS):
            convert({f"s3://{BUCKET}/train/{name}": TrainingPairs(name, number, 90)}, options={}, shard_bytes=100_000)
        objects_below = objects.list_under(f"s3://{BUCKET}/train/{DATASETS[0]}")
        world.shards.mkdir()
        for url in objects_below:
            (world.shards / url.rpartition("/")[2]).write_bytes(objects.read(url))
        _write_pairs(folder)
        pinpoints = [(24 * rows, 24 * columns) for rows in (1, 2) for columns in (1, 2)]
        shape = LlaveArchitecture(vision=VISION, text=TEXT, image_grid_pinpoints=pinpoints)
        build(shape, ["a small red star at the top left", "a large blue ring"], seed=1, folder=world.model)
        os.environ["AWS_ENDPOINT_URL"] = world.proxy.endpoint
        done = world.undisturbed
        for arguments, ranks in (
            (world.train(done / "run"), 2),
            (world.evaluate(done / "evaluation"), 2),
            (world.embed(done / "vectors"), 2),
            (world.convert(str(done / "pairs")), 1),
        ):
            succeed(arguments, ranks)
        yield world


def _write_pairs(folder: Path) -> None:
    lines = []
    for number in range(60):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        query = {"text": "<image>\nWhat is it?", "images": [f"{number}.png"]}
        lines.append(json.dumps({"query": query, "target": {"text": f"noise {number}"}}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")


def launched(arguments: list[str], world: int) -> Ended:
    return wait(fork(arguments, world), HANG, AFTER_FAILURE)


def judged(ended: Ended) -> Ended:
    """Return a program's result. Raise Violation unless it succeeded or failed with one clear line."""
    failed = [status for status in ended.status if status]
    if None in ended.status and not failed:
        raise Violation(f"it hangs\n{ended.output[-3000:]}")
    if "Traceback (most recent call last)" in ended.output:
        raise Violation(f"a traceback\n{ended.output[-3000:]}")
    if any(status > 0 for status in failed) and not any(
        word in ended.output for word in ("error", "interrupted", "stopped", "damaged", "usage:")
    ):
        raise Violation(f"it ended with {ended.status} and no word\n{ended.output[-3000:]}")
    return ended


def succeed(arguments: list[str], world: int) -> Ended:
    """Run a program; raise Violation if it fails."""
    ended = judged(launched(arguments, world))
    if any(ended.status):
        raise Violation(f"it ended with {ended.status}: {' '.join(arguments)}\n{ended.output[-3000:]}")
    return ended


def same_run(run: Path, expected: Path, *, whole: bool = True) -> None:
    """Raise Violation unless a run ended with the undisturbed run's results.

    whole: False if damage may have removed lines of the logs; the remaining lines must be equal.
    """
    for name in ("metrics.jsonl", "ledger/rank0.jsonl", "ledger/rank1.jsonl"):
        ours, theirs = (folder / name for folder in (run, expected))
        ours, theirs = ours.read_bytes().splitlines(), theirs.read_bytes().splitlines()
        if (ours != theirs) if whole else (not set(ours) <= set(theirs) or ours[-1] != theirs[-1]):
            differing = next((pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]), (b"", b""))
            raise Violation(
                f"{name} differs from the undisturbed run's: {len(ours)} lines for {len(theirs)}; first "
                f"{differing[0][:300]!r} for {differing[1][:300]!r}"
            )
    if weights(run / "export") != weights(expected / "export"):
        raise Violation("the exported weights differ from the undisturbed run's")


def weights(folder: Path) -> dict[str, bytes]:
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def same_files(url: str, expected: str) -> None:
    """Raise Violation unless two folders or prefixes contain the same files, byte for byte."""
    ours, theirs = ({each.removeprefix(place): each for each in objects.list_under(place)} for place in (url, expected))
    if ours.keys() != theirs.keys():
        raise Violation(f"{url} holds {sorted(ours)}, the undisturbed one {sorted(theirs)}")
    for name, place in ours.items():
        if objects.read(place) != objects.read(theirs[name]):
            raise Violation(f"{place} differs from the undisturbed one")
