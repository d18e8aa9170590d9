"""How fast is a training step on one 80 GB GPU, compared with the published recipe, and is its attention correct?

    python benchmarks/gpu_step.py [--models 0.5b,2b,7b] [--pairs 256] [--rounds 3]

LLaVE's three sizes with random bf16 weights, created on the device; 7B with LoRA, the only way it fits one GPU. No data
and no network are needed. Without a GPU, or with --dry-run, the same code runs on the CPU with tiny shapes in about two
minutes. Its figures are then meaningless, and memory is that of the process.

The pairs are MMEB-like (benchmarks/mmeb_like.py): 61 % an image and its text, 25 % a text and its image, 14 % two
images. Images have several shapes (1,485 to 3,699 tokens); texts have 10 to 60 tokens in addition to the prompt. Both
sides train with DeepSpeed's ZeRO 1 and AdamW, with the frozen bf16 tower outside the engine:

    ours        pipeline/objectives/contrastive/step.py with the fastest available attention (model.attention=auto).
                First no chunk keeps its graph, then as many as fit: 1, 2, 4, ... are tried until memory runs out. All
                pairs are negatives of each other
    LLaVE       arXiv 2503.04812 as its code trains it: micro-batches of four pairs, grouped by whether queries have an
                image, right-padded to the longest item, queries and targets separately, a dummy tile for each text,
                activation checkpointing in every layer of the language model, accumulated gradients; SDPA, causal
                without a mask. A pair has three negatives per side

Each row is measured in a new process; if it runs out of memory, the table reports this. Seconds are medians over the
rounds, after a step of four pairs. Samples are pairs; tokens exclude padding. Memory is torch's peak allocation on the
device, including weights and AdamW's moments. It is an error if the two sides' embeddings of the same items disagree.

Model FLOPs utilisation counts what a step must compute (pipeline/models/flops.py), however a side does it: no padding,
no dummy tiles and no recomputation. The peak is the device's for dense bf16, by its name (pipeline/training/speed.py).

The second table is about attention. For items in one packed row it compares the embeddings, and the gradient of
sum(embeddings * random directions) with respect to the trained parameters. Each implementation in
pipeline/models/attention.py runs in bf16 and is compared with SDPA in fp32, the reference, and with SDPA in bf16, whose
own distance from fp32 is the expected error. It is an error if a kernel is more than three times as far from fp32 as
SDPA. In trials on the CPU, correct variants (one item at a time, other roundings, SDPA's other backend) reached at most
2.0 times. Wrong ones (attention to one token ahead, to all tokens or to another item's last token, the last key left
out, the scale 5 % off, heads mixed) reached at least 4.4 times in the embeddings.
"""

import argparse
import gc
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import astuple, dataclass, replace
from functools import partial
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlavaOnevisionConfig, Qwen2Config, Qwen2Model, SiglipVisionConfig
from transformers.initialization import no_init_weights

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.loss import llave_loss
from benchmarks.mmeb_like import MICRO_BATCH, draw, embed_padded, micro_batches, tiles_of, tokens_of
from pipeline.config import Recipe, load_ds_config, load_recipe
from pipeline.data.batch import Batch, Encoded
from pipeline.distributed import start_distributed
from pipeline.errors import PipelineError
from pipeline.jobs.program import command_line
from pipeline.models.attention import KINDS as ATTENTION_KINDS
from pipeline.models.attention import choose, implementation
from pipeline.models.chunks import CachedFeatures, Chunk, Packed, embed_chunks, pack, plan_chunks, run_chunk
from pipeline.models.llave.flops import step_flops
from pipeline.models.llave.model import FrozenTower, TowerlessLlave
from pipeline.models.lora import add_adapters
from pipeline.objectives.contrastive.step import Contrastive
from pipeline.training.budget import Budget
from pipeline.training.engine import adamw, freeze, parameter_groups
from pipeline.training.speed import peak_tflops


@dataclass(frozen=True)
class Backbone:
    """A language model's shape, and the chunk size in tokens that fits one GPU."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    mlp: int
    vocabulary: int
    chunk_tokens: int
    lora: bool = False


# The chunk sizes leave 9 GB or more of 72 GB by the memory plan, of 7B with all weights on eight GPUs with ZeRO-3, too.
BACKBONES = {
    "0.5b": Backbone(896, 24, 14, 2, 4864, 151_936, 16_384),
    "2b": Backbone(1536, 28, 12, 2, 8960, 151_936, 8192),
    "7b": Backbone(3584, 28, 28, 4, 18_944, 152_064, 8192, lora=True),
}
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 72,
    "patch_size": 8,
}
COMPARED = 8  # items embedded by both sides
PARITY_PAIRS = 2
STANDARD_DEVIATION = 0.02  # of the initial weights
TIMES_SDPA = 3  # limit for a bf16 kernel's distance from fp32
Result = TypeVar("Result")


@dataclass(frozen=True)
class Setting:
    """What all rows of a table have in common. dry: use tiny shapes."""

    model: str
    pairs: int
    rounds: int
    chunk_tokens: int
    dry: bool

    def config(self, attention: str) -> LlavaOnevisionConfig:
        """Return the model's config. attention: its name in transformers."""
        backbone, vision = BACKBONES[self.model], TINY if self.dry else SO400M
        text = Qwen2Config(
            hidden_size=8 * backbone.heads if self.dry else backbone.hidden,
            intermediate_size=16 * backbone.heads if self.dry else backbone.mlp,
            num_hidden_layers=2 if self.dry else backbone.layers,
            num_attention_heads=backbone.heads,
            num_key_value_heads=backbone.key_value_heads,
            vocab_size=320 if self.dry else backbone.vocabulary,
        )
        size = vision["image_size"]
        config = LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
            text_config=text,
            image_token_id=text.vocab_size - 1,
            video_token_id=text.vocab_size - 2,
            image_grid_pinpoints=[[size * rows, size * columns] for rows in (1, 2) for columns in (1, 2)],
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        config._attn_implementation = {"text_config": attention, "vision_config": "sdpa"}
        return config

    def recipe(self, pairs: int, kept_chunks: int) -> Recipe:
        options = [
            "deepspeed=ds_configs/zero1.json",
            "data.lanes=1",
            f"batch.global_batch={pairs}",
            f"batch.chunk_tokens={self.chunk_tokens}",
            f"batch.kept_chunks={kept_chunks}",
        ]
        options += ["model.train.lora={rank: 16, alpha: 32}"] if BACKBONES[self.model].lora else []
        return load_recipe(ROOT / f"pipeline/recipes/llave_{self.model}.yaml", options)


def batch_of(config: LlavaOnevisionConfig, pairs: int) -> Batch:
    return draw(config, pairs, np.arange(config.video_token_id))  # the last two tokens are placeholders


class PaddedLlave(TowerlessLlave):
    """The model on right-padded rows, with activation checkpointing in every layer of the language model."""

    def __init__(self, config: LlavaOnevisionConfig) -> None:
        super().__init__(config)
        self.language_model = Qwen2Model(config.text_config)  # it does not pool in its last layer
        self.language_model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, packed: Packed, features: Tensor, dummies: Tensor) -> Tensor:
        """Embed N items as (N, hidden) float32 unit rows. dummies: features of the texts' dummy tiles, not used."""
        embeds = self.language_model.embed_tokens(packed.input_ids)
        if packed.images:
            placeholders = (packed.input_ids == self.config.image_token_id).nonzero()[:, 0]
            embeds = embeds.index_copy(0, placeholders, self.image_tokens(packed, features))
        if len(dummies):
            embeds = torch.cat([embeds, self.multi_modal_projector(dummies).flatten(0, 1)[:0]])
        return embed_padded(self.language_model, embeds.split(packed.lengths))


def make(kind: Callable[[LlavaOnevisionConfig], nn.Module], config: LlavaOnevisionConfig, device: torch.device) -> Any:
    """Create a bf16 model directly on the device; its weights depend only on the config."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights(), device:
            model = kind(config)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
            else:
                parameter.normal_(std=STANDARD_DEVIATION)
    return model


def make_trained(kind: type[TowerlessLlave], setting: Setting, attention: str, device: torch.device) -> TowerlessLlave:
    """Create the model without the tower; the parameters that the recipe trains require gradients."""
    model, recipe = make(kind, setting.config(attention), device), setting.recipe(setting.pairs, 0)
    freeze(model, recipe)
    if recipe.model.train.adapters:
        add_adapters(model.language_model, recipe.model.train.adapters, seed=0)
    return model


class Side:
    """An engine and the frozen tower."""

    def __init__(self, setting: Setting, kind: type[TowerlessLlave], attention: str, device: torch.device) -> None:
        self.setting, self.device = setting, device
        self.tower = make(FrozenTower, setting.config(attention), device).eval().requires_grad_(False)
        model, recipe = make_trained(kind, setting, attention, device), setting.recipe(setting.pairs, 0)
        self.cost = step_flops(model, self.tower.vision_tower)
        config = load_ds_config(recipe, 1)
        optimizer = adamw(parameter_groups(model, recipe), recipe.optimizer.lr, config["zero_optimization"])
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)


class Ours(Side):
    def __init__(self, setting: Setting, device: torch.device) -> None:
        attention = choose("auto", device.type, torch.bfloat16)
        super().__init__(setting, TowerlessLlave, implementation(attention), device)

    def embed(self, items: Sequence[Encoded]) -> Tensor:
        features = self._features(self.setting.recipe(self.setting.pairs, 0))
        return embed_chunks(self.engine, self.chunks(items), len(items), features)

    def chunks(self, items: Sequence[Encoded]) -> list[Chunk]:
        """Plan the chunks as a step does."""
        return plan_chunks(items, self.setting.chunk_tokens, self.device, padded=self.engine.module.pads)

    def step(self, batch: Batch, kept_chunks: int) -> None:
        recipe = self.setting.recipe(len(batch.query), kept_chunks)
        budget = Budget.of(recipe.batch, recipe.model.max_tokens)
        objective, features = Contrastive(recipe, self.device), self._features(recipe)
        objective.step(self.engine, batch, budget, 0, lr=recipe.optimizer.lr, features=features)

    def _features(self, recipe: Recipe) -> CachedFeatures:
        return CachedFeatures(self.tower, recipe.batch.features_mb << 20)

    def most_cached(self, batch: Batch, chunks: int) -> int:
        """Return how many graphs fit: a power of two, or all. The last trial may have run out of memory."""
        fitting = 0
        while fitting < chunks:
            tried = min(2 * fitting or 1, chunks)
            try:
                self.step(batch, tried)
            except torch.OutOfMemoryError:
                break
            fitting = tried
        return fitting


class Paper(Side):
    def __init__(self, setting: Setting, device: torch.device) -> None:
        super().__init__(setting, PaddedLlave, "sdpa", device)

    def embed(self, items: Sequence[Encoded]) -> Tensor:
        packed, size = pack(items), self.tower.config.vision_config.image_size
        counts = len(packed.tiles), sum(not item.images for item in items)
        tiles = torch.cat([packed.tiles.view(counts[0], 3, size, size), torch.zeros(counts[1], 3, size, size).byte()])
        features = self.tower.features(tiles).split(counts)
        return self.engine(packed.to(self.device), *features)

    def step(self, batch: Batch) -> None:
        parts = micro_batches(batch)
        for number, (queries, targets) in enumerate(parts, 1):
            loss = llave_loss(self.embed(queries), self.embed(targets)) / len(parts)
            self.engine.set_gradient_accumulation_boundary(number == len(parts))
            self.engine.backward(loss, scale_wrt_gas=False)
        self.engine.step()


@dataclass(frozen=True)
class Measured:
    """A row of the table. embeddings: (COMPARED, hidden), before the first step.

    chunks, most_cached: for ours without kept graphs, the number of chunks and the number of graphs that fit.
    """

    seconds: float
    peak: int
    flops: float
    embeddings: np.ndarray
    chunks: int = 0
    most_cached: int = 0


def measure_paper(setting: Setting) -> Measured | None:
    side = Paper(setting, start_distributed(timeout_minutes=5))
    return _measure(side, side.step, batch_of(side.engine.module.config, setting.pairs))


def measure_ours(setting: Setting, kept_chunks: int) -> Measured | None:
    side = Ours(setting, start_distributed(timeout_minutes=5))
    batch = batch_of(side.engine.module.config, setting.pairs)
    measured = _measure(side, partial(side.step, kept_chunks=kept_chunks), batch)
    if kept_chunks:
        return measured
    chunks = len(side.chunks(list(batch.items.values())))
    return replace(measured, chunks=chunks, most_cached=side.most_cached(batch, chunks))


def _measure(side: Paper | Ours, step: Callable[[Batch], None], batch: Batch) -> Measured:
    setting, device, seconds = side.setting, side.device, []
    items = list(batch.items.values())
    flops = side.cost(items, 0)
    with torch.no_grad():
        embeddings = side.embed(items[:COMPARED]).cpu().numpy()
    step(batch_of(side.engine.module.config, MICRO_BATCH))  # the first step allocates AdamW's moments
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(setting.rounds):
        _wait(device)
        began = time.perf_counter()
        step(batch)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return Measured(statistics.median(seconds), _peak(device), flops, embeddings)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@dataclass(frozen=True)
class Differences:
    """embedding: largest of any element. gradient: largest relative to the largest element. norm: relative, overall."""

    embedding: float
    gradient: float
    norm: float


@dataclass(frozen=True)
class Run:
    """Embeddings (items, hidden), and the gradients of the trained parameters."""

    embeddings: Tensor
    gradients: list[Tensor]

    def beside(self, right: "Run") -> Differences:
        pairs = list(zip(self.gradients, right.gradients, strict=True))
        squares = sum(float((mine.float() - other.float()).square().sum()) for mine, other in pairs)
        largest = max(float((mine.float() - other.float()).abs().max()) for mine, other in pairs)
        return Differences(
            float((self.embeddings - right.embeddings).abs().max()),
            largest / max(float(other.abs().max()) for _, other in pairs),
            math.sqrt(squares / sum(float(other.float().square().sum()) for _, other in pairs)),
        )


def measure_attention(setting: Setting) -> dict[str, tuple[Differences, Differences] | str]:
    """Compare each attention with SDPA in fp32 and in bf16; instead, give the reason if it does not run."""
    device = start_distributed(timeout_minutes=5)
    model = make_trained(TowerlessLlave, setting, "packed_sdpa", device)
    model.language_model.gradient_checkpointing_enable({"use_reentrant": False})  # otherwise 7B in fp32 does not fit
    # Random weights attend to all tokens alike, which hides errors of kernels. Use larger queries and keys.
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if name.endswith(".weight") and ("q_proj" in name or "k_proj" in name) and "lora" not in name:
                parameter.normal_(std=1.5 / math.sqrt(parameter.shape[1]))
    batch, vision = batch_of(model.config, PARITY_PAIRS), model.config.vision_config
    items = list(batch.items.values())
    (chunk,) = plan_chunks(items, len(items) * max(len(item.input_ids) for item in items), device)
    torch.manual_seed(1)
    shape = tiles_of(items), (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
    features = torch.randn(shape, device=device, dtype=torch.bfloat16)
    directions = torch.randn(len(items), model.config.text_config.hidden_size, device=device)

    def run(kind: str) -> Run:
        model.language_model.config._attn_implementation = implementation(kind)
        embeddings = run_chunk(model, chunk, lambda *_: features.to(model.dtype))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad((embeddings * directions).sum(), trained)
        return Run(embeddings.detach(), list(gradients))

    runs, why_not = {}, {}
    for kind in ATTENTION_KINDS:
        try:
            choose(kind, device.type, torch.bfloat16)
            runs[kind] = run(kind)
        except PipelineError as error:
            why_not[kind] = str(error).partition(": ")[2].partition(";")[0]
    model.float()  # convert the same values
    exact = run("sdpa")
    measured = {kind: (each.beside(exact), each.beside(runs["sdpa"])) for kind, each in runs.items()}
    return {kind: measured.get(kind) or why_not[kind] for kind in ATTENTION_KINDS}


def _survives(function: Callable[..., Result], *arguments: Any) -> Result | None:
    try:
        with redirect_stdout(StringIO()):  # DeepSpeed prints the available memory
            return function(*arguments)
    except torch.OutOfMemoryError:
        return None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def fresh(function: Callable[..., Result], *arguments: Any) -> Result | None:
    """Call the function in a new process and return its result, or None if the device's memory does not suffice.

    A dry run forks this process: another one would import everything again. arguments: the first is the setting.
    """
    if arguments[0].dry:
        gc.freeze()  # DeepSpeed runs the garbage collector for every engine; skip what is imported
    with ProcessPoolExecutor(1, mp_context=get_context("fork" if arguments[0].dry else "spawn")) as pool:
        return pool.submit(_survives, function, *arguments).result()


def check(paper: Measured, ours: Measured) -> str:
    """Raise PipelineError if the sides disagree; otherwise describe how well they agree."""
    mine, other = ours.embeddings, paper.embeddings
    off = float(np.linalg.norm(mine - other, axis=1).max())
    apart = np.linalg.norm(mine[:, None] - mine, axis=2)
    nearest = float(apart[~np.eye(len(mine), dtype=bool)].min())
    if not off < nearest / 2:
        raise PipelineError(f"an item's embeddings are {off:.1e} apart, two items' {nearest:.1e} at least")
    return f"An item's embeddings by the two sides are {off:.0e} apart at most, two items' {nearest:.0e} at least"


def measure_steps(setting: Setting) -> dict[str, tuple[int, Measured | None]]:
    """Return by name of a row a pair's negatives on each side, and what was measured; None: memory ran out."""
    plain = fresh(measure_ours, setting, 0)
    rows = {
        "LLaVE": (MICRO_BATCH - 1, fresh(measure_paper, setting)),
        "ours, no graph kept": (setting.pairs - 1, plain),
    }
    if plain and plain.most_cached:
        name = f"ours, {plain.most_cached} graphs of {plain.chunks} kept"
        rows[name] = (setting.pairs - 1, fresh(measure_ours, setting, plain.most_cached))
    return rows


def compare_steps(setting: Setting, peak: float | None, console: Console) -> None:
    rows = measure_steps(setting)
    (_, paper), (_, plain), *_ = rows.values()
    items = list(batch_of(setting.config("sdpa"), setting.pairs).items.values())
    table = Table(
        *("", "negatives", "seconds", "samples/s", "tokens/s", "ratio", "MFU", "peak, GB", "ratio"),
        title=f"a step of {setting.model}{' with LoRA' if BACKBONES[setting.model].lora else ''}, "
        f"chunks of {setting.chunk_tokens:,} tokens, median of {setting.rounds} rounds",
    )
    for name, (negatives, row) in rows.items():
        if row is None:
            table.add_row(name, str(negatives), "out of memory")
            continue
        table.add_row(
            *(name, str(negatives), f"{row.seconds:.2f}", f"{setting.pairs / row.seconds:.2f}"),
            f"{tokens_of(items) / row.seconds:,.0f}",
            f"{paper.seconds / row.seconds:.2f}" if paper else "",
            f"{row.flops / row.seconds / (peak * 1e12):.1%}" if peak else "",
            f"{row.peak / 1e9:.1f}",
            f"{row.peak / paper.peak:.2f}" if paper else "",
        )
    done = next((f", {row.flops / 1e12:,.3g} model TFLOP" for _, row in rows.values() if row), "")
    console.print(
        f"{setting.pairs} pairs: {tokens_of(items):,} tokens, {tiles_of(items):,} tiles{done}", highlight=False
    )
    console.print(table)
    if paper and plain:
        console.print(check(paper, plain), highlight=False)


def compare_attention(setting: Setting, console: Console) -> None:
    measured = fresh(measure_attention, setting)
    table = Table(
        *("bf16", "beside", "embeddings", "gradient, largest element", "gradient, norm"),
        title=f"attention of {setting.model}: largest differences; of the gradient, relative ones",
    )
    for kind, row in (measured or dict.fromkeys(ATTENTION_KINDS, "out of memory")).items():
        if isinstance(row, str):
            table.add_row(kind, row, "", "", "")
            continue
        for name, each in zip(("SDPA, fp32", "SDPA, bf16"), row, strict=True):
            if (kind, name) != ("sdpa", "SDPA, bf16"):
                table.add_row(kind, name, f"{each.embedding:.1e}", f"{each.gradient:.1e}", f"{each.norm:.1e}")
    console.print(table)
    if measured:
        judge({kind: row[0] for kind, row in measured.items() if not isinstance(row, str)})


def judge(from_fp32: dict[str, Differences]) -> None:
    """Raise PipelineError for attention that is much further from SDPA in fp32 than SDPA in bf16 is."""
    expected = astuple(from_fp32["sdpa"])
    for kind, differences in from_fp32.items():
        if not all(mine <= TIMES_SDPA * sdpa for mine, sdpa in zip(astuple(differences), expected, strict=True)):
            raise PipelineError(
                f"model.attention={kind} is further from fp32 than {TIMES_SDPA} times SDPA in bf16: force another"
            )


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(BACKBONES), metavar="NAMES", help="which (0.5b,2b,7b)")
    parser.add_argument("--pairs", type=int, metavar="B", help="of the global batch (256; 8 in a dry run)")
    parser.add_argument(
        "--rounds", type=int, choices=range(1, 100), metavar="N", help="steps that are timed (3; 1 in a dry run)"
    )
    parser.add_argument(
        "--chunk-tokens",
        type=int,
        metavar="T",
        help="of ours ("
        + ", ".join(f"{name}: {each.chunk_tokens}" for name, each in BACKBONES.items())
        + "; 1024 in a dry run)",
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    arguments = parser.parse_args()
    names = arguments.models.split(",")
    if unknown := [name for name in names if name not in BACKBONES]:
        raise PipelineError(f"--models has {', '.join(unknown)}; there are {', '.join(BACKBONES)}")
    dry = arguments.dry_run or not torch.cuda.is_available()
    pairs, rounds = arguments.pairs or (8 if dry else 256), arguments.rounds or (1 if dry else 3)
    if pairs < MICRO_BATCH:
        raise PipelineError(f"--pairs is {pairs}; a micro-batch has {MICRO_BATCH}")
    if dry:
        # For the new processes.
        os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    console = Console(width=120)
    device = "the CPU, tiny shapes" if dry else torch.cuda.get_device_name()
    peak = None if dry else peak_tflops(device)
    console.print(f"{device}; torch {torch.__version__}", highlight=False)
    for name in names:
        tokens = arguments.chunk_tokens or (1024 if dry else BACKBONES[name].chunk_tokens)
        setting = Setting(name, pairs, rounds, tokens, dry)
        with console.status(name):
            compare_steps(setting, peak, console)
            compare_attention(setting, console)


if __name__ == "__main__":
    main()
