"""What does an optimizer step cost, compared with the published recipe and the published gradient cache?

    python benchmarks/step_cost.py [--pairs 64] [--sizes 32 128 512 1024] [--rounds 3]

A scaled-down LLaVE-0.5B with random float32 weights on the CPU: all layers, an eighth of the width, and a ninth of the
tokens. The pairs are MMEB-like (benchmarks/mmeb_like.py): 61 % an image and its text, 25 % a text and its image, 14 %
two images. Before the division by nine, images have 1,485 to 3,699 tokens, and texts 10 to 60 in addition to the
prompt.

    ours        pipeline/objectives/contrastive/step.py on ZeRO 0, with the frozen tower outside the engine. Chunks with
                the tokens of four of the longest items, with none, half or all of their graphs kept from the first
                pass; and chunks of one longest item
    LLaVE       arXiv 2503.04812 as its code trains it: micro-batches of four pairs, grouped by whether queries have an
                image (--group_by_modality_length), right-padded to the longest item, queries and targets separately, a
                dummy tile for each text, activation checkpointing in every layer, accumulated gradients. The negatives
                are those of the micro-batch, three per side, instead of the batch's
    GradCache   arXiv 2101.06983, with the same four pairs at a time and the same padding; everything is embedded twice,
                including the tower's part; no activation checkpointing, as in ours

Both peers run transformers' own modules with the same weights. Unnecessary work is removed: causal SDPA needs no mask;
there is no LM head and no list of hidden states. LLaVE omits the tower's graph, and the last product of a layer in the
recomputation, which reentrant checkpointing would do; GradCache omits the dummy tiles.

FLOPs are counted by torch's FlopCounterMode over the whole step. Added are the CPU's kernels for attention and for a
linear layer with GELU, which it does not know. Causal attention counts as half of the square. Seconds are for one
thread, medians over the rounds, in which all sides take turns to be first. Every side clips the gradient and runs
AdamW; the learning rate is 0, so that all steps start with the same weights.

Memory is the peak of the step's live tensors, including gradients, but not weights, data and AdamW's moments, which
exist before. It is counted per tensor: resident memory also includes what the allocator has freed but not returned, up
to three times as much. In the second table, the global batch grows and the chunk size does not. That table lists the
tower's kept features separately: on a GPU, they are offloaded to CPU memory beyond batch.features_mb.

All sides must agree: embeddings to 1e-5, GradCache's loss and gradient norm with ours to 1e-4.
"""

import argparse
import math
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # even with a GPU: the counts are the same, and the CPU's kernels are added below

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm
from transformers import LlavaOnevisionModel
from transformers import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.loss import llave_loss
from benchmarks.mmeb_like import LONGEST_TEXT, MICRO_BATCH, PROMPT, draw, embed_padded, micro_batches, tiles_of
from pipeline.config import Recipe, load_ds_config, load_recipe
from pipeline.data.batch import Batch, Encoded
from pipeline.data.tiles import Tiling
from pipeline.distributed import start_distributed
from pipeline.errors import PipelineError
from pipeline.jobs.program import command_line
from pipeline.models.chunks import CachedFeatures, embed_chunks, plan_chunks
from pipeline.models.llave.checks import load_config, tiling
from pipeline.models.llave.config import LlaveArchitecture
from pipeline.models.llave.model import build, normalised, tower_features
from pipeline.objectives.contrastive.step import Contrastive
from pipeline.training.budget import Budget
from pipeline.training.engine import build_engine, freeze, load_frozen, parameter_groups

transformers_logging.disable_progress_bar()
CPU = torch.device("cpu")
TILE, PATCH = 72, 8  # 9 x 9 patches per tile; SigLIP-so400m has 27 x 27 from 384 pixels
TOKENS = 9  # the divisor of the number of tokens
ARCHITECTURE = LlaveArchitecture(
    vision={
        "hidden_size": 1152 // 8,
        "intermediate_size": 4304 // 8,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": TILE,
        "patch_size": PATCH,
    },
    text={
        "hidden_size": 896 // 8,
        "intermediate_size": 4864 // 8,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 320,
    },
    image_grid_pinpoints=[(TILE, TILE), (TILE, 2 * TILE), (2 * TILE, TILE), (2 * TILE, 2 * TILE)],
)
PAPER, CACHED = "LLaVE", "GradCache"
LARGEST_DIFFERENCE = 1e-5  # between two embeddings
TOLERANCE = 1e-4  # relative


def batch_of(pairs: int, path: str) -> Batch:
    config = load_config(path)
    words = np.setdiff1d(np.arange(256), [config.image_token_id, config.video_token_id])
    return draw(config, pairs, words, TOKENS)


def chunk_tokens(cutting: Tiling, items: int) -> int:
    """Return the number of tokens of that many of the longest items."""
    longest = cutting.tokens(2 * TILE, 2 * TILE, anyres=True)
    return items * (longest + round((PROMPT + LONGEST_TEXT) / TOKENS))


def recipe_of(batch: int) -> Recipe:
    return load_recipe(
        ROOT / "pipeline/recipes/demo.yaml",
        [
            "deepspeed=ds_configs/zero0.json",
            "model.train.vision_tower=false",
            "data.lanes=1",
            f"batch.global_batch={batch}",
        ],
    )


@dataclass(frozen=True)
class Result:
    loss: float
    gradient_norm: float


class Ours:
    """The engine and the frozen tower."""

    def __init__(self, path: str, pairs: int) -> None:
        start_distributed(timeout_minutes=1)
        recipe = recipe_of(pairs)
        self.tiling = tiling(load_config(path))
        self.tower = load_frozen(recipe, path, CPU)
        self.engine = build_engine(recipe, load_ds_config(recipe, 1), path)

    def features(self, recipe: Recipe) -> CachedFeatures:
        return CachedFeatures(self.tower, recipe.batch.features_mb << 20)

    def step(self, batch: Batch, tokens: int, kept_chunks: int) -> Result:
        recipe = recipe_of(len(batch.query))
        budget = Budget(tokens, kept_chunks, chunk_is_fixed=True, kept_is_fixed=True, auto=[], longest=tokens)
        objective, features = Contrastive(recipe, CPU), self.features(recipe)
        result = objective.step(self.engine, batch, budget, 0, lr=0.0, features=features)
        return Result(float(result.loss.loss.detach()), result.grad_norm)

    def embeddings(self, batch: Batch) -> Tensor:
        """Embed the batch, (items, hidden)."""
        items, tokens = list(batch.items.values()), chunk_tokens(self.tiling, MICRO_BATCH)
        features = self.features(recipe_of(len(batch.query)))
        return embed_chunks(self.engine, plan_chunks(items, tokens, CPU), len(items), features)


class Padded:
    """transformers' model on right-padded rows.

    checkpointing: of the activations of every layer of the language model. dummies: whether texts have a dummy tile.
    """

    def __init__(self, path: str, *, checkpointing: bool, dummies: bool) -> None:
        self.model = LlavaOnevisionModel.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").train()
        if checkpointing:
            self.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        self.dummies = dummies
        recipe = recipe_of(MICRO_BATCH)
        freeze(self.model, recipe)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, recipe), lr=0.0)
        self.largest_norm = recipe.optimizer.max_grad_norm

    def embed(self, items: Sequence[Encoded]) -> Tensor:
        """Embed the items, (items, hidden)."""
        rows = [self.model.language_model.embed_tokens(torch.from_numpy(item.input_ids)) for item in items]
        for row, projected in self._projected(items).items():
            tokens, config = projected.flatten(0, 1)[:0], self.model.config
            if items[row].images:
                (image,) = items[row].images
                tokens = self.model.pack_image_features(
                    [projected],
                    [(image.height, image.width)],
                    image_newline=self.model.image_newline,
                    vision_aspect_ratio=config.vision_aspect_ratio,
                )[0][0]
            placeholders = torch.from_numpy(np.flatnonzero(items[row].input_ids == config.image_token_id))
            rows[row] = rows[row].index_copy(0, placeholders, tokens)
        return embed_padded(self.model.language_model, rows)

    def _projected(self, items: Sequence[Encoded]) -> dict[int, Tensor]:
        """Return the projector's outputs by item, (tiles, patches², hidden)."""
        dummy = np.zeros((1, 3, TILE, TILE), np.uint8)
        tiles = {row: item.images[0].tiles for row, item in enumerate(items) if item.images}
        if self.dummies:
            tiles = {row: tiles.get(row, dummy) for row in range(len(items))}
        if not tiles:
            return {}
        with torch.no_grad():
            pixels = normalised(torch.from_numpy(np.concatenate(list(tiles.values()))), CPU, torch.float32)
            features = tower_features(self.model.vision_tower, pixels)
        counts = [len(each) for each in tiles.values()]
        return dict(zip(tiles, self.model.multi_modal_projector(features).split(counts), strict=True))

    def paper_step(self, batch: Batch) -> Result:
        parts, loss = micro_batches(batch), 0.0
        for query, target in parts:
            part = llave_loss(self.embed(query), self.embed(target)) / len(parts)
            part.backward()
            loss += float(part.detach())
        return Result(loss, self._optimize())

    def cached_step(self, batch: Batch) -> Result:
        parts = micro_batches(batch)
        with torch.no_grad():
            embedded = [torch.cat([self.embed(part[side]) for part in parts]) for side in range(2)]
        for each in embedded:
            each.requires_grad_()
        loss = llave_loss(*embedded)
        loss.backward()
        for side in range(2):
            gradients = embedded[side].grad.split([len(part[side]) for part in parts])
            for part, gradient in zip(parts, gradients, strict=True):
                (self.embed(part[side]) * gradient).sum().backward()
        return Result(float(loss.detach()), self._optimize())

    def _optimize(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.largest_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


@dataclass(frozen=True)
class Side:
    """One variant of a step. keeps_features: whether the tower's features are kept until the end of the step."""

    name: str
    negatives: int
    keeps_features: bool
    step: Callable[[Batch], Result]


def sides_of(ours: Ours, paper: Padded, cached: Padded, batch: Batch) -> list[Side]:
    pairs, one, four = len(batch.query), chunk_tokens(ours.tiling, 1), chunk_tokens(ours.tiling, MICRO_BATCH)
    chunks = len(plan_chunks(list(batch.items.values()), four, CPU))

    def own(name: str, tokens: int, kept_chunks: int) -> Side:
        return Side(name, pairs - 1, True, partial(ours.step, tokens=tokens, kept_chunks=kept_chunks))

    return [
        Side(PAPER, MICRO_BATCH - 1, False, paper.paper_step),
        Side(CACHED, pairs - 1, False, cached.cached_step),
        own(f"ours, chunks of {one} tokens", one, 0),
        own(f"ours, chunks of {four}", four, 0),
        own("- half of the graphs kept", four, -(-chunks // 2)),
        own("- all graphs kept", four, chunks),
    ]


def flops(step: Callable[[], Result]) -> tuple[int, Result]:
    # Called with shapes in the order of the kernels' arguments.
    def forward(query: tuple, key: tuple, value: tuple, dropout: float = 0.0, causal: bool = False, **_: object) -> int:
        return sdpa_flop_count(query, key, value) // (2 if causal else 1)

    def backward(grad, query, key, value, out, sums, dropout: float, causal: bool, **_: object) -> int:
        # Recompute the similarities, and two products for each of the forward pass.
        return sdpa_flop_count(query, key, value) * 5 // (4 if causal else 2)

    def linear(x: tuple, weight: tuple, *_: object, **__: object) -> int:
        return 2 * math.prod(x) * weight[0]

    kernels = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        torch.ops.mkldnn._linear_pointwise: linear,  # of a frozen tower
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        result = step()
    return counter.get_total_flops(), result


class LiveBytes(TorchDispatchMode):
    """Count the bytes of live tensors that operations allocate; `peak` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        given = {_storage(leaf)._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for storage in (_storage(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            key = storage._cdata
            if key not in given and key not in self._sizes:  # neither a view nor in place
                self._sizes[key] = storage.nbytes()
                self._live += storage.nbytes()
                self.peak = max(self.peak, self._live)
                weakref.finalize(storage, self._freed, key)
        return result

    def _freed(self, key: int) -> None:
        self._live -= self._sizes.pop(key)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def peak_of(step: Callable[[], Result]) -> int:
    with LiveBytes() as live:
        step()
    return live.peak


def feature_bytes(batch: Batch) -> int:
    return tiles_of(batch.items.values()) * (TILE // PATCH) ** 2 * ARCHITECTURE.vision["hidden_size"] * 4


def check(batch: Batch, ours: Ours, peers: Sequence[Padded], results: dict[str, Result]) -> str:
    """Raise PipelineError if the sides disagree; otherwise describe how well they agree."""
    items = list(batch.items.values())
    mine = ours.embeddings(batch)
    parts = [items[start : start + MICRO_BATCH] for start in range(0, len(items), MICRO_BATCH)]
    with torch.no_grad():
        others = [torch.cat([peer.embed(part) for part in parts]) for peer in peers]
    off = max(float((other - mine).abs().max()) for other in others)
    nearest = float((mine[:, None] - mine).abs().amax(2).fill_diagonal_(2).min())
    if not off <= LARGEST_DIFFERENCE < nearest:
        raise PipelineError(f"an item's embeddings differ by {off:.1e}, two items' of ours by {nearest:.1e} at least")
    expected, worst = results[CACHED], 0.0
    for name in results.keys() - {PAPER, CACHED}:
        for field in ("loss", "gradient_norm"):
            worst = max(worst, abs(getattr(results[name], field) / getattr(expected, field) - 1))
    if not worst <= TOLERANCE:
        raise PipelineError(f"loss or gradient norm differ by {worst:.1e}: {results}")
    return (
        f"An item's embeddings differ by {off:.0e} at most, two items' by {nearest:.0e} at least; ours and GradCache's "
        f"loss ({expected.loss:.2f}) and gradient norm by {worst:.0e}"
    )


def describe(batch: Batch) -> str:
    lengths = [[[len(item.input_ids) for item in side] for side in part] for part in micro_batches(batch)]
    real = sum(sum(side) for part in lengths for side in part)
    padded = sum(max(side) * len(side) for part in lengths for side in part)
    texts, tiles = sum(not item.images for item in batch.items.values()), tiles_of(batch.items.values())
    return (
        f"{len(batch.query)} pairs: {real:,} tokens, {padded:,} with the peers' padding; {tiles} tiles, LLaVE's "
        f"dummies {texts} more"
    )


def compare(ours: Ours, path: str, pairs: int, rounds: int) -> tuple[list[str], Table]:
    batch = batch_of(pairs, path)
    paper, cached = Padded(path, checkpointing=True, dummies=True), Padded(path, checkpointing=False, dummies=False)
    sides = sides_of(ours, paper, cached, batch)
    for side in sides:
        side.step(batch_of(2, path))  # the first step allocates the optimizer's state
    counted, results, peaks, seconds = {}, {}, {}, {side.name: [] for side in sides}
    for side in tqdm(sides, desc="FLOPs, bytes", leave=False):
        counted[side.name], results[side.name] = flops(partial(side.step, batch))
        peaks[side.name] = peak_of(partial(side.step, batch))
    lines = [describe(batch), check(batch, ours, (paper, cached), results)]
    for number in tqdm(range(rounds), desc="seconds", leave=False):
        first = number % len(sides)
        for side in sides[first:] + sides[:first]:
            began = time.perf_counter()
            side.step(batch)
            seconds[side.name].append(time.perf_counter() - began)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    table = Table(
        *("", "negatives", "TFLOP", "ratio", "seconds", "ratio", "peak, MB", "ratio", "kept features"),
        title=f"a step of {pairs} pairs; seconds: one thread, median of {rounds} rounds",
    )
    for side in sides:
        cells = []
        for measured, unit, form in ((counted, 1e12, ".3f"), (medians, 1, ".1f"), (peaks, 1e6, ",.0f")):
            mine = measured[side.name]
            cells += [f"{mine / unit:{form}}", f"{mine / measured[PAPER]:.2f}"]
        kept = f"{feature_bytes(batch) / 1e6:,.0f}" if side.keeps_features else ""
        table.add_row(side.name, str(side.negatives), *cells, kept)
    return lines, table


def grow(ours: Ours, path: str, sizes: Sequence[int]) -> Table:
    tokens, first = chunk_tokens(ours.tiling, MICRO_BATCH), None
    table = Table(
        *("pairs", "peak, MB", "kept features", "the rest", "ratio to the first"),
        title=f"ours, chunks of {tokens} tokens, no graph kept",
    )
    for pairs in tqdm(sizes, desc="global batch", leave=False):
        batch = batch_of(pairs, path)
        peak, kept = peak_of(partial(ours.step, batch, tokens=tokens, kept_chunks=0)), feature_bytes(batch)
        first = first or peak - kept
        cells = [f"{each / 1e6:,.0f}" for each in (peak, kept, peak - kept)]
        table.add_row(f"{pairs:,}", *cells, f"{(peak - kept) / first:.3f}")
    return table


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=64, metavar="B", help="of the compared global batch (64)")
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[32, 128, 512, 1024], metavar="B", help="pairs (32 128 512 1024)"
    )
    parser.add_argument("--rounds", type=int, default=3, choices=range(1, 100), metavar="N", help="of the seconds (3)")
    arguments = parser.parse_args()
    if min([arguments.pairs, *arguments.sizes]) < MICRO_BATCH:
        raise PipelineError(f"--pairs and --sizes are {MICRO_BATCH} at least")
    torch.set_num_threads(1)  # more would spin at every barrier if other programs use the cores
    console = Console(width=120)
    with TemporaryDirectory() as folder:
        path = str(Path(folder, "model"))
        build(ARCHITECTURE, ["a small red star"], seed=0, folder=Path(path))
        ours = Ours(path, arguments.pairs)
        lines, table = compare(ours, path, arguments.pairs, arguments.rounds)
        for line in lines:
            console.print(line, highlight=False)
        console.print(table)
        if arguments.sizes:
            console.print(grow(ours, path, arguments.sizes))


if __name__ == "__main__":
    main()
