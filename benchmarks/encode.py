"""How fast does an evaluation embed its items, compared with the loop of the published evaluation code?

    python benchmarks/encode.py [--pairs 4] [--rounds 3]

Scaled-down LLaVE-0.5B and LLaVE-7B with random float32 weights, on one CPU thread. The vision tower takes half of the
work for an image's tokens in the first, a sixteenth in the second; both sides give it the same tiles. A tile has 14 x
14 patches instead of 27 x 27; to keep the proportions, texts also have 0.27 of their tokens. Items are MMEB-like
(DATASETS below): distinct pairs of JPEGs and texts, with the same number of pairs for each of MMEB's datasets. Before
scaling, texts have 10 to 500 tokens in addition to the prompt, and images have 2, 3 or 5 tiles.

    ours        embed_collection with a ModelEncoder, as in pipeline.evaluate: threads prepare the next group while the
                model embeds one. A group is sorted by length and packed in chunks with slightly more tokens than the
                longest item, as with 4,096 in LLaVE
    published   the loop of VLM2Vec's eval.py, on which LLaVE's is based: a dataset's queries in order, then its
                targets, in batches of 16, prepared by transformers' image processor in the same process, right-padded
                to the longest with an attention mask, through transformers' LlavaOnevisionModel

Unnecessary work is removed from the published loop: the LM head, the list of hidden states, the cache, and repeated
items of several datasets, which our side embeds once.

Both sides start with JPEGs and texts. They alternate by dataset and take turns to be first; a round covers all
datasets, and a ratio is the median over the rounds. CPU seconds include all threads of the process; unlike clock
seconds, other programs hardly affect them. The embeddings of both sides must agree to 1e-4.

"bound" is the ratio of CPU seconds that ours could reach: matrix products of the shapes that it computes, with the same
weights, are timed alone after the rounds ("products"), and with the calls of torch's attention ("and attention").
Everything else would take no time.
"""

import argparse
import io
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, LlavaOnevisionImageProcessorPil, LlavaOnevisionModel
from transformers import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


from pipeline.config import EvaluationRun
from pipeline.data.sample import IMAGE_MARK, Item
from pipeline.data.tiles import Tiling
from pipeline.errors import PipelineError
from pipeline.evaluation.encode import embed_collection
from pipeline.evaluation.encoders import ModelEncoder
from pipeline.evaluation.store import MemoryStore
from pipeline.evaluation.tasks import Collection, Ranking, item_key
from pipeline.jobs.program import command_line
from pipeline.models.llave.config import LlaveArchitecture
from pipeline.models.llave.model import build
from pipeline.models.llave.processor import prompt
from pipeline.models.registry import saved

transformers_logging.disable_progress_bar()
CPU = torch.device("cpu")
TILE, PATCH = 112, 8  # 14 x 14 patches per tile; SigLIP-so400m has 27 x 27 from 384 pixels
TOKENS = (TILE / PATCH / 27) ** 2


def architecture(tower: tuple[int, int, int, int], text: tuple[int, int, int, int, int]) -> LlaveArchitecture:
    """Return a config from (width, MLP, layers, heads) and (width, MLP, layers, heads, key-value heads)."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return LlaveArchitecture(
        vision=dict(zip(names, tower, strict=True)) | {"image_size": TILE, "patch_size": PATCH},
        text=dict(zip((*names, "num_key_value_heads"), text, strict=True)) | {"vocab_size": 1024},
        image_grid_pinpoints=[(TILE, TILE), (TILE, 2 * TILE), (2 * TILE, TILE), (2 * TILE, 2 * TILE)],
    )


# SigLIP-so400m and Qwen2-0.5B with all layers and about an eighth of the width; SigLIP-so400m and Qwen2-7B at a 16th.
# Heads keep their width, and there are fewer of them, so that attention has about its original share of the work.
MODELS = {
    "0.5B": architecture((144, 538, 26, 2), (128, 608, 24, 2, 1)),
    "7B": architecture((72, 269, 26, 1), (256, 1184, 28, 2, 1)),
}
BATCH = 16
CHUNK = int(4096 * TOKENS)
TOLERANCE = 1e-4

# (height, width)
PHOTOS = (480, 640), (640, 480), (427, 640), (375, 500), (500, 375), (500, 500), (768, 1024)
PAGES = (2200, 1700), (600, 850), (2000, 800)
CROPS = (80, 120), (200, 150), (224, 224), (300, 380), (90, 320)


@dataclass(frozen=True)
class Side:
    """Queries or targets: the sizes of their images, and the range of words in their texts."""

    pictures: tuple[tuple[int, int], ...]
    words: tuple[int, int]


# MMEB's types of queries and targets, and how many of its 36 datasets have them.
DATASETS = {
    "classification": (10, Side(PHOTOS, (10, 20)), Side((), (10, 15))),
    "visual questions": (6, Side(PHOTOS, (15, 40)), Side((), (10, 15))),
    "document questions": (4, Side(PAGES, (15, 40)), Side((), (10, 15))),
    "caption to picture": (4, Side((), (15, 60)), Side(PHOTOS, (10, 12))),
    "picture to caption": (4, Side(PHOTOS, (10, 20)), Side((), (10, 60))),
    "news, entities": (4, Side(PHOTOS, (20, 60)), Side((), (30, 500))),
    "grounding": (4, Side(PHOTOS, (15, 40)), Side(CROPS, (10, 12))),
}
VOCABULARY = [
    "red",
    "blue",
    "green",
    "small",
    "large",
    "star",
    "ring",
    "heart",
    "cross",
    "left",
    "right",
    "above",
    "below",
    "between",
    "near",
    "two",
    "three",
]


def draw(pairs: int) -> dict[str, "Sides"]:
    """Return queries and targets by type of dataset: `pairs` per dataset that it represents."""
    rng = np.random.default_rng(0)

    def item(side: Side) -> Item:
        low, high = np.log(side.words)
        count = max(round(np.exp(rng.uniform(low, high)) * TOKENS), 4)
        text = " ".join(rng.choice(VOCABULARY, count))
        if not side.pictures:
            return Item(text)
        height, width = (round(n * TILE / 384) for n in side.pictures[rng.integers(len(side.pictures))])
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)  # as smooth as photographs
        Image.fromarray(coarse).resize((width, height)).save(buffer := io.BytesIO(), "JPEG", quality=90)
        return Item(f"{IMAGE_MARK}\n{text}", (buffer.getvalue(),))

    return {
        name: tuple([item(side) for _ in range(share * pairs)] for side in sides)
        for name, (share, *sides) in DATASETS.items()
    }


Sides = tuple[list[Item], list[Item]]  # queries and targets of a dataset


class Ours:
    """embed_collection, with a ModelEncoder."""

    def __init__(self, path: str, datasets: dict[str, Sides]) -> None:
        self.encoder = ModelEncoder.load(path, saved("llave"), EvaluationRun(chunk_tokens=CHUNK), CPU)
        self.collections = {name: _collection(name, *sides) for name, sides in datasets.items()}

    def embed(self, dataset: str) -> torch.Tensor:
        """Embed the queries, then the targets, (items, D)."""
        collection = self.collections[dataset]
        store = MemoryStore(len(collection.items), self.encoder.dimension)
        embed_collection(self.encoder, collection, store)
        return torch.from_numpy(store.vectors)

    def tokens(self) -> int:
        """Return the number of embedded tokens. There is no padding, except inside attention."""
        items = (item for collection in self.collections.values() for item in collection.items)
        return sum(len(self.encoder.prepare(item()).input_ids) for item in items)


def _collection(name: str, *sides: list[Item]) -> Collection:
    collection = Collection()
    queries, targets = (
        np.array([collection.row(item_key(f"{side} {n}"), "", partial(_same, item)) for n, item in enumerate(items)])
        for side, items in enumerate(sides)
    )
    collection.tasks.append(Ranking(name, "vqa", True, queries, [targets]))
    return collection


def _same(item: Item) -> Item:
    return item


class Published:
    """The published loop."""

    def __init__(self, path: str, datasets: dict[str, Sides], tiling: Tiling) -> None:
        self.datasets, self.tiling = datasets, tiling
        self.model = LlavaOnevisionModel.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right")
        self.images = LlavaOnevisionImageProcessorPil.from_pretrained(path)

    def _batches(self, dataset: str) -> Iterator[dict[str, torch.Tensor]]:
        for side in self.datasets[dataset]:
            for start in range(0, len(side), BATCH):
                yield self._batch(side[start : start + BATCH])

    def _batch(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """Return the model's inputs, as transformers' own processor does, which needs torchvision."""
        pictures = [Image.open(io.BytesIO(image)).convert("RGB") for item in items for image in item.images]
        counts = iter([self.tiling.tokens(picture.height, picture.width, anyres=True) for picture in pictures])
        texts = [
            prompt(item.text.replace(IMAGE_MARK, IMAGE_MARK * next(counts)) if item.images else item.text)
            for item in items
        ]
        inputs = dict(self.tokenizer(texts, padding=True, return_tensors="pt"))
        return inputs | (dict(self.images(pictures, return_tensors="pt")) if pictures else {})

    @torch.no_grad()
    def embed(self, dataset: str) -> torch.Tensor:
        """Embed the queries, then the targets, (items, D)."""
        rows = []
        for inputs in self._batches(dataset):
            hidden = self.model(**inputs, use_cache=False).last_hidden_state
            last = inputs["attention_mask"].sum(1) - 1
            rows.append(F.normalize(hidden[torch.arange(len(hidden)), last], dim=-1))
        return torch.cat(rows)

    def tokens(self) -> int:
        """Return the number of embedded tokens, including padding."""
        return sum(inputs["input_ids"].numel() for dataset in self.datasets for inputs in self._batches(dataset))


class Recorder(TorchDispatchMode):
    """Records calls of torch's matrix products and of its attention on a CPU, to repeat them without all else.

    Weights are kept, activations are replaced by random numbers of the same shape.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.attention: list[tuple[tuple[torch.Tensor, ...], dict]] = []
        self._activations: dict[tuple[int, ...], torch.Tensor] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm"):
            rows, weight = args[-2:]
            self.products.append((self._like(rows), weight))
        elif name == "_linear_pointwise":
            rows, weight = args[:2]
            self.products.append((self._like(rows.flatten(0, -2)), weight.T))
        elif name == "_scaled_dot_product_flash_attention_for_cpu":
            inputs = tuple(self._like(x.transpose(1, 2)).transpose(1, 2) for x in args[:3])
            options = {"is_causal": args[4] if len(args) > 4 else False, "enable_gqa": True}
            self.attention.append((inputs, options | {"attn_mask": (kwargs or {}).get("attn_mask")}))
        return function(*args, **(kwargs or {}))

    def _like(self, x: torch.Tensor) -> torch.Tensor:
        shape = tuple(x.shape)
        return self._activations.setdefault(shape, torch.rand(shape))

    def seconds(self) -> tuple[float, float]:
        """Return the CPU seconds of the products, and of products and attention."""
        began = time.thread_time()
        for rows, weight in self.products:
            torch.mm(rows, weight)
        middle = time.thread_time()
        for inputs, options in self.attention:
            F.scaled_dot_product_attention(*inputs, **options)
        return middle - began, time.thread_time() - began


def bounds(ours: Ours) -> np.ndarray:
    """Return the CPU seconds of `Recorder.seconds` for each dataset, (datasets, 2)."""
    found = []
    for dataset in DATASETS:
        with Recorder() as recorder:
            ours.embed(dataset)
        with torch.no_grad():
            found.append(recorder.seconds())
    return np.array(found)


def measure(ours: Ours, published: Published, number: int) -> tuple[np.ndarray, float]:
    """Return clock and CPU seconds of a round, (2 sides, datasets, 2); and the embeddings' largest difference."""
    seconds, off = np.zeros((2, len(DATASETS), 2)), 0.0
    for place, dataset in enumerate(DATASETS):
        found = {}
        for side in (0, 1) if number % 2 else (1, 0):
            began = np.array([time.perf_counter(), time.process_time()])
            found[side] = (ours, published)[side].embed(dataset)
            seconds[side, place] = np.array([time.perf_counter(), time.process_time()]) - began
        off = max(off, float((found[0] - found[1]).abs().max()))
    if not off <= TOLERANCE:
        raise PipelineError(f"embeddings of the two sides differ by {off:.1e}")
    return seconds, off


def table(name: str, seconds: np.ndarray, alone: np.ndarray, pairs: int) -> Table:
    """seconds: (rounds, 2 sides, datasets, 2).  alone: (datasets, 2), see `bounds`."""
    heads = "pairs/s, ours", "published", "ratio", "ratio, CPU seconds", "bound: products", "and attention"
    table = Table("", *heads, title=f"{name}, {pairs} pairs")

    def add(name: str, pairs: int, seconds: np.ndarray, alone: np.ndarray) -> None:
        """seconds: (rounds, 2 sides, 2).  alone: (2,)."""
        rates = pairs / np.median(seconds[:, :, 0], axis=0)
        ratios = *np.median(seconds[:, 1] / seconds[:, 0], axis=0), *np.median(seconds[:, 1, 1]) / alone
        table.add_row(name, *(f"{rate:.1f}" for rate in rates), *(f"{ratio:.2f}" for ratio in ratios))

    for place, (dataset, (share, *_)) in enumerate(DATASETS.items()):
        add(dataset, pairs * share // 36, seconds[:, :, place], alone[place])
    table.add_section()
    add("all", pairs, seconds.sum(axis=2), alone.sum(axis=0))
    return table


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4, choices=range(1, 1001), metavar="N", help="times 36 (4)")
    parser.add_argument("--rounds", type=int, default=3, choices=range(1, 100), metavar="N", help="(3)")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), help="(0.5B 7B)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more would spin at every barrier if other programs use the cores
    datasets, pairs = draw(arguments.pairs), 36 * arguments.pairs
    for name in arguments.models:
        with TemporaryDirectory() as folder:
            path = str(Path(folder, "model"))
            build(MODELS[name], [" ".join(VOCABULARY)] * 10, seed=0, folder=Path(path))
            ours = Ours(path, datasets)
            published = Published(path, datasets, ours.encoder.processor.tiling)
            ours.encoder.model()
        print(f"{pairs} pairs: {ours.tokens():,} tokens, {published.tokens():,} in the padded batches")
        rounds = []
        for number in range(arguments.rounds):
            seconds, off = measure(ours, published, number)
            rounds.append(seconds)
            print(f"round {number + 1}: embeddings differ by {off:.0e} at most", flush=True)
        Console(width=120).print(table(name, np.array(rounds), bounds(ours), pairs))


if __name__ == "__main__":
    main()
