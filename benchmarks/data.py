"""How fast is the data pipeline, compared with plain webdataset and transformers' image processor?

    python benchmarks/data.py --work /tmp/data [--images 5000] [--rounds 3]

Draws JPEGs of 640x480 with captions, converts them to shards in --work and uploads these to a real S3 server. Then it
runs both sides alternately, with the same number of decoding workers:

    reading     an epoch's samples without decoding: samples/s of pipeline/data/stream.py and of
                webdataset.WebDataset(...).shuffle(1000).batched(...), from files and from S3 (webdataset through
                presigned URLs and curl)
    loading     the same, with every image decoded and cut into LLaVA-OneVision's 384-pixel tiles by
                pipeline/data/tiles.py, on both sides
    tiles       one core: JPEG -> tiles, compared with transformers' LlavaOnevisionImageProcessorPil
    bytes       bytes that an epoch reads from S3 at 1, 2 and 4 ranks with --workers each, relative to the
                dataset's bytes

Figures are medians over the rounds, and ratios are ratios of medians. Both sides run in every round and take turns to
be first. An epoch's rate is given including the start of the workers, and from the first batch on.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path

import boto3
import numpy as np
import torch
import webdataset
from botocore.config import Config
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import LlavaOnevisionImageProcessorPil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.config import Data
from pipeline.data.batch import Batch, Encoded
from pipeline.data.batch import Image as Tiles
from pipeline.data.index import Index
from pipeline.data.lengths import Lengths
from pipeline.data.sample import IMAGE_MARK, Item, Pair
from pipeline.data.shards import write_shards
from pipeline.data.source import Source
from pipeline.data.stream import batches
from pipeline.data.tiles import Tiling, decode_image
from pipeline.errors import PipelineError
from pipeline.jobs.program import command_line
from pipeline.storage import objects
from tools.s3_server import S3Server

BUCKET = "pipeline-data"
PINPOINTS = ((384, 384), (384, 768), (768, 384), (768, 768))
TILING = Tiling(size=384, patches=27, pinpoints=PINPOINTS)
GLOBAL_BATCH = 64
Decode = Callable[[bytes], np.ndarray]


def picture(number: int) -> bytes:
    """Return a JPEG of 640x480, about 90 kB: coloured clouds with photograph-like grain."""
    rng = np.random.default_rng(number)
    clouds = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
    grain = rng.normal(0, 6, (480, 640, 1))
    buffer = BytesIO()
    Image.fromarray(np.clip(np.asarray(clouds) + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def make_dataset(folder: Path, count: int) -> Index:
    with ProcessPoolExecutor() as pool:
        pictures = tqdm(pool.map(picture, range(count), chunksize=32), total=count, desc="drawing", unit=" images")
        pairs = (
            Pair(f"{i:06d}", "Clouds", "", Item(f"{IMAGE_MARK}\nWhich?", (data,)), Item(f"cloud number {i}"))
            for i, data in enumerate(pictures)
        )
        return write_shards(pairs, folder, dataset="Clouds", shard_bytes=16 << 20)


def our_tiles(data: bytes) -> np.ndarray:
    return TILING.cut(decode_image(data), anyres=True)


def encode(item: Item, decode: Decode | None) -> Encoded:
    ids = np.frombuffer(item.text.encode(), np.uint8).astype(np.int32)
    return Encoded(ids, tuple(Tiles(decode(image), 480, 640) for image in item.images) if decode else ())


def epoch(url: str, workers: int, decode: Decode | None, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    source = Source.open(Data(url=url, workers=workers))
    order = source.order(GLOBAL_BATCH, 0, Lengths(TILING, 8))
    steps = range(order.steps_per_epoch)
    return batches(source, order, partial(encode, decode=decode), steps, rank=rank, world=world, timeout=60)


def ours(url: str, workers: int, decode: Decode | None) -> Iterator[int]:
    """Yield the numbers of samples of an epoch's batches."""
    for batch in epoch(url, workers, decode):
        assert all(batch.valid)
        yield len(batch.origins)


def theirs(urls: list[str], workers: int, decode: Decode | None) -> Iterator[int]:
    def read(sample: dict) -> tuple[bytes, torch.Tensor | bytes]:
        image = sample["query.0.jpg"]
        return sample["json"], torch.from_numpy(decode(image)) if decode else image

    dataset = webdataset.WebDataset(urls, shardshuffle=100, workersplitter=webdataset.split_by_worker)
    dataset = dataset.shuffle(1000).map(read).batched(GLOBAL_BATCH // workers, collation_fn=list)
    for batch in webdataset.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield len(batch)


def rates(samples: Callable[[], Iterator[int]]) -> tuple[float, float]:
    """Return samples per second over a whole epoch, and after its first batch."""
    began = time.perf_counter()
    batches = samples()
    first = next(batches)
    ready = time.perf_counter()
    rest = sum(batches)
    ended = time.perf_counter()
    return (first + rest) / (ended - began), rest / (ended - ready)


def presigned(url: str, index: Index) -> list[str]:
    """Return presigned URLs of the shards, valid for an hour."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    config = Config(s3={"addressing_style": "path"}, signature_version="s3v4")
    sign = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], config=config).generate_presigned_url
    keys = [{"Bucket": bucket, "Key": f"{prefix}/{shard.file}"} for shard in index.shards]
    return [sign("get_object", Params=key, ExpiresIn=3600) for key in keys]


def measure_readers(places: dict[str, str], index: Index, rounds: int, workers: int) -> Table:
    table = Table(
        *("", "ours, samples/s", "webdataset", "ratio", "after the first batch: ours", "webdataset", "ratio"),
        title=f"median of {rounds} rounds, {workers} workers",
    )
    for kind, decode in (("loading from {}", our_tiles), ("reading from {}", None)):
        for name, url in places.items():
            shards = presigned(url, index) if "://" in url else [f"{url}/{shard.file}" for shard in index.shards]
            sides = [partial(ours, url, workers, decode), partial(theirs, shards, workers, decode)]
            measured = []
            for number in tqdm(range(rounds), desc=kind.format(name)):
                turn = {side: rates(sides[side]) for side in ((0, 1) if number % 2 == 0 else (1, 0))}
                measured.append((*turn[0], *turn[1]))
            whole, after, their_whole, their_after = map(statistics.median, zip(*measured, strict=True))
            table.add_row(kind.format(name), *_beside(whole, their_whole), *_beside(after, their_after))
    return table


def _beside(mine: float, other: float) -> tuple[str, str, str]:
    return f"{mine:.0f}", f"{other:.0f}", f"{mine / other:.2f}"


def measure_tiles(rounds: int) -> Table:
    torch.set_num_threads(1)
    images = [picture(number) for number in range(20)]
    processor = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=[list(size) for size in PINPOINTS])

    def milliseconds(run: Callable[[bytes], object]) -> float:
        began = time.perf_counter()
        for image in images:
            run(image)
        return (time.perf_counter() - began) / len(images) * 1e3

    pairs = [(milliseconds(our_tiles), milliseconds(lambda data: processor(decode_image(data)))) for _ in range(rounds)]
    mine, other = map(statistics.median, zip(*pairs, strict=True))
    table = Table("", "ours, ms", "transformers", "ratio", title=f"median of {rounds} rounds, one core")
    table.add_row("640x480 JPEG -> 5 tiles", f"{mine:.1f}", f"{other:.1f}", f"{other / mine:.1f}")
    return table


def measure_bytes(url: str, index: Index, workers: int) -> Table:
    table = Table("ranks", "bytes read / dataset's", title="an epoch from S3")
    size = index.total_bytes + sum(shard.sidecar_bytes for shard in index.shards)
    for world in (1, 2, 4):
        received = sum(batch.received for rank in range(world) for batch in epoch(url, workers, None, rank, world))
        table.add_row(str(world), f"{received / size:.4f}")
    return table


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the dataset; made if it is not there")
    parser.add_argument("--images", type=int, default=5000, metavar="N", help="JPEGs in the dataset (5000)")
    parser.add_argument(
        "--rounds", type=int, default=3, choices=range(1, 100), metavar="N", help="of each measurement (3)"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="decoding processes, on both sides (2)")
    arguments = parser.parse_args()
    folder = arguments.work / f"clouds-{arguments.images}"
    index = Index.load(str(folder)) if (folder / "index.json").exists() else make_dataset(folder, arguments.images)
    if index.samples != arguments.images:
        raise PipelineError(f"{folder} holds {index.samples} images: delete it or choose another --work")
    with S3Server(BUCKET, folder=arguments.work) as server:
        os.environ |= server.environment()
        url = f"s3://{BUCKET}/clouds"
        for path in sorted(folder.iterdir()):
            objects.write(objects.join(url, path.name), path)
        tables = [
            measure_tiles(arguments.rounds),
            measure_bytes(url, index, arguments.workers),
            measure_readers({"files": str(folder), "S3": url}, index, arguments.rounds, arguments.workers),
        ]
    console = Console(width=120)
    console.print(f"{index.samples} images, {index.total_bytes / 1e6:.0f} MB, {len(index.shards)} shards")
    for table in tables:
        console.print(table)


if __name__ == "__main__":
    main()
