"""How fast do images train in LLM2CLIP's second stage, compared with open_clip's loader and step on the same shards?

    pip install --no-deps --target /tmp/peer open_clip_torch==3.3.0 torchvision==0.28.0 webdataset==0.2.86
    pip install --no-deps --target /tmp/peer timm ftfy wcwidth pandas python-dateutil six
    python benchmarks/vision_step.py --work /tmp/vision_step --peer /tmp/peer [--images 2048] [--rounds 3]

Draws JPEGs of 336x252 with captions, in img2dataset's layout, which both sides read directly. The towers have the same
shape and weights: ViT-Ti/32 at 224 pixels, 2 layers, float32. A step costs a few times as much as decoding.

    ours        pipeline/data/stream.py and the step of the contrastive objective, llm2clip, with the captions' vectors
                cached by pipeline.embed, ZeRO 1. Once with one chunk whose graph is kept, as in open_clip; and once
                with the gradient cache: chunks of an eighth of the batch, embedded twice
    open_clip   open_clip_train.data.get_wds_dataset with its training transform (RandomResizedCrop), and
                open_clip_train.train.train_one_epoch with ClipLoss and AdamW. Our adapter replaces its text tower, and
                a table of the vectors, which costs almost nothing, replaces its tokenizer; ours reads the vectors from
                tars

A CUDA build of torchvision cannot load its operators with a CPU build of torch, and its import fails without them. Two
of them, unused here, are therefore declared first. Before the timing, both sides' pixels of one batch must be equal
(with open_clip's evaluation transform), and loss and gradient norm must agree to 1e-4.

Measured are the loader alone, steps on a given batch, and both together. Each side runs in a new process with one
thread for the model and --workers decoding processes. Rates cover all steps after the first three, and CPU seconds are
those of the process and its workers in these steps; they are more reliable if other programs use the cores. All sides
run in every round and take turns to be first. Figures are medians, and ratios are ratios of medians.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from itertools import repeat
from multiprocessing import get_context, set_start_method
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.config import Recipe, load_ds_config, load_recipe
from pipeline.data.batch import Batch
from pipeline.data.source import Source
from pipeline.data.stream import batches
from pipeline.distributed import start_distributed
from pipeline.errors import PipelineError
from pipeline.jobs.program import command_line
from pipeline.models.registry import training
from pipeline.models.text_encoder import model as decoder
from pipeline.models.text_encoder.processor import Settings
from pipeline.models.vision import VisionEncoder
from pipeline.objectives.contrastive.step import Contrastive
from pipeline.objectives.objective import StepResult
from pipeline.training.budget import Budget
from pipeline.training.engine import build_engine

WIDTH, HEIGHT = 336, 252
DIMENSION, TEXT_WIDTH = 128, 512
SIDE, PATCH = 224, 32
VISION = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_act": "gelu",
}
SHARD_SAMPLES = 256
BATCH, WARM_UP = 256, 3
LR = 1e-5
TOLERANCE = 1e-4
OURS, CACHED, THEIRS = "ours", "ours, all embedded twice", "open_clip"
CUTS = {OURS: (1, 1), CACHED: (8, 0)}  # (chunks, kept graphs)
LOADER, STEP, BOTH = "loader alone", "step alone", "loader and step"
CPU = torch.device("cpu")


def picture(number: int, width: int, height: int) -> bytes:
    """Return a JPEG of coloured clouds with photograph-like grain."""
    rng = np.random.default_rng(number)
    clouds = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    grain = rng.normal(0, 6, (height, width, 1))
    buffer = BytesIO()
    Image.fromarray(np.clip(np.asarray(clouds) + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def make_dataset(folder: Path, images: int, width: int, height: int, text_encoder: Path) -> None:
    """Create tars in img2dataset's layout with our index, and the captions' vectors next to them."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(picture, range(images), repeat(width), repeat(height), chunksize=32)
        for number, data in enumerate(tqdm(drawn, total=images, desc="drawing", unit=" images")):
            if number % SHARD_SAMPLES == 0:
                writer = webdataset.TarWriter(str(folder / f"{number // SHARD_SAMPLES:05d}.tar"))
            writer.write({"__key__": f"{number:09d}", "jpg": data, "txt": f"cloud number {number}"})
            if number % SHARD_SAMPLES == SHARD_SAMPLES - 1 or number == images - 1:
                writer.close()
    run("tools/make_shards.py", "img2dataset", str(folder), str(folder), "--processes", "2")
    run("-m", "pipeline.embed", str(text_encoder), "--shards", str(folder))


def run(*command: str) -> None:
    if subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode:
        raise PipelineError(f"{' '.join(command)} failed; what it printed says why")


def make_text_encoder(folder: Path, width: int) -> None:
    """Create a decoder of one layer in the format of exported text encoders."""
    text = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 4, "vocab_size": 300}
    with TemporaryDirectory() as made:
        decoder.build(text, (f"cloud number {number}" for number in range(1000)), seed=0, folder=Path(made))
        model = decoder.TextEncoder.load(made, torch.float32)
        decoder.save(model, dict(model.named_parameters()), made, folder, base=None, settings=Settings())


def vectors_of(recipe: Recipe) -> np.ndarray:
    """Return the vectors of all captions, (images, width) float32, ordered by the numbers in the captions."""
    source, found = Source.open(recipe.data), {}
    for shard, (_, info) in enumerate(source.shards):
        tar, embedded = source.tars(shard)
        records, places = tar.records(0, info.samples), embedded.records(0, info.samples)
        read = zip(tar.read(records), records, embedded.read(places), strict=True)
        for data, record, vectors in read:
            pair = source.parse(shard, record, data, vectors)
            found[number_of(pair.target.text)] = pair.vectors[0]
    return np.stack([found[number] for number in range(len(found))])


def number_of(text: str) -> int:
    return int(text.rpartition(" ")[2])


@dataclass(frozen=True)
class Setting:
    """The paths and sizes of a benchmark run. peer: the folder with open_clip."""

    work: Path
    peer: Path
    images: int
    steps: int
    workers: int

    @property
    def data(self) -> Path:
        return self.work / f"clouds-{self.images}"

    @property
    def vectors(self) -> Path:
        return self.work / f"vectors-{self.images}.npy"

    @property
    def recipe(self) -> Recipe:
        fields = {
            "run": self.work / "run",
            "steps": self.steps,
            "precision": "fp32",
            "model.path": self.work / "tower",
            "model.text_encoder": self.work / "text_encoder",
            "data.url": self.data,
            "data.datasets": "[]",
            "data.lanes": 1,
            "data.workers": self.workers,
            "batch.global_batch": BATCH,
            "optimizer.lr": LR,
        }
        chosen = [f"{name}={value}" for name, value in fields.items()]
        return load_recipe(ROOT / "pipeline/recipes/llm2clip_vision.yaml", chosen)


@dataclass(frozen=True)
class Measured:
    """Averages per sample over the steps after the first ones."""

    samples_per_second: float
    cpu_milliseconds: float


class Clock:
    """Record the times at which batches are requested."""

    def __init__(self) -> None:
        self._process, self._noted = psutil.Process(), []

    def note(self) -> None:
        times = [each.cpu_times() for each in (self._process, *self._process.children(recursive=True))]
        self._noted.append((time.perf_counter(), sum(each.user + each.system for each in times)))

    def over(self, batches: Iterable[Any], steps: int) -> Iterator[Any]:
        """Yield that many batches; the workers that create them live until the last is used."""
        given = iter(batches)
        for _ in range(steps):
            batch = next(given)
            self.note()
            yield batch
        self.note()

    @property
    def measured(self) -> Measured:
        (began, cpu_before), (ended, cpu_after) = self._noted[WARM_UP], self._noted[-1]
        samples = (len(self._noted) - 1 - WARM_UP) * BATCH
        return Measured(samples / (ended - began), (cpu_after - cpu_before) / samples * 1e3)


class Ours:
    """The engine, and batches as in training."""

    def __init__(self, setting: Setting) -> None:
        self.recipe = setting.recipe
        kind, path = training("llm2clip"), self.recipe.model.path
        self.processor = kind.processor(self.recipe, path)
        self.source = Source.open(self.recipe.data)
        self.order = self.source.order(BATCH, self.recipe.seed, kind.lengths(self.recipe))
        start_distributed(timeout_minutes=5)
        self.engine = build_engine(self.recipe, load_ds_config(self.recipe, 1), path)
        self.objective = Contrastive(self.recipe, CPU)

    def batches(self) -> Iterator[Batch]:
        steps = range(self.recipe.steps)
        return batches(self.source, self.order, self.processor.encode, steps, rank=0, world=1, timeout=300)

    def train(self, given: Iterable[Batch], chunks: int, kept: int) -> None:
        for batch in given:
            self.step(batch, chunks, kept)

    def step(self, batch: Batch, chunks: int, kept: int) -> StepResult:
        """chunks: number of chunks of the batch. kept: number of chunks whose graph is kept."""
        assert all(batch.valid)
        tokens = BATCH * (self.processor.tokens + 1) // chunks
        budget = Budget(tokens, kept, chunk_is_fixed=True, kept_is_fixed=True, auto=[], longest=tokens)
        return self.objective.step(self.engine, batch, budget, 0, lr=LR)


class Adapter(nn.Module):
    """A text tower for open_clip: our adapter, with the attributes that `train_one_epoch` may use."""

    context_length, vocab_size = 1, 1

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, vectors: Tensor) -> Tensor:
        return self.adapter(vectors)


class Theirs:
    """open_clip's model, loader, loss and optimizer, as its main.py creates them, with our weights and text side."""

    def __init__(self, setting: Setting) -> None:
        set_start_method("fork", force=True)  # its loader's workers get functions that cannot be pickled
        import_peer(setting.peer)
        from open_clip import ClipLoss, CustomTextCLIP, image_transform
        from open_clip_train import data, train

        self._data, self._train_one_epoch, self._setting = data, train.train_one_epoch, setting
        self.transforms = {training: image_transform(SIDE, is_train=training) for training in (True, False)}
        self.vectors = torch.from_numpy(np.load(setting.vectors, mmap_mode="c"))
        recipe = setting.recipe
        ours = training("llm2clip").load(recipe, recipe.model.path, "sdpa")
        shape = {
            "layers": VISION["num_hidden_layers"],
            "width": VISION["hidden_size"],
            "head_width": VISION["hidden_size"] // VISION["num_attention_heads"],
            "mlp_ratio": VISION["intermediate_size"] / VISION["hidden_size"],
            "patch_size": PATCH,
            "image_size": SIDE,
        }
        text = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}  # this tower is replaced
        self.model = CustomTextCLIP(DIMENSION, shape, text, output_dict=True)
        self.model.text = Adapter(ours.adapter)
        self.model.visual.load_state_dict(renamed(ours.vision.tower.state_dict()))
        self.loss = ClipLoss()
        # Parameter groups as in open_clip_train/main.py.
        named = dict(self.model.named_parameters())
        spared = {name for name, p in named.items() if p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name}
        groups = [
            {"params": [named[name] for name in spared], "weight_decay": 0.0},
            {"params": [named[name] for name in named.keys() - spared], "weight_decay": recipe.optimizer.weight_decay},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=recipe.optimizer.betas, eps=recipe.optimizer.eps)
        self.options = Namespace(
            train_data=f"{setting.data}/{{00000..{math.ceil(setting.images / SHARD_SAMPLES) - 1:05d}}}.tar",
            train_num_samples=setting.steps * BATCH,
            train_data_upsampling_factors=None,
            dataset_resampled=False,
            batch_size=BATCH,
            workers=setting.workers,
            world_size=1,
            rank=0,
            local_rank=0,
            log_local=False,
            seed=0,
            device="cpu",
            precision="fp32",
            distill=False,
            accum_freq=1,
            skip_scheduler=True,
            horovod=False,
            grad_clip_norm=recipe.optimizer.max_grad_norm,
            log_every_n_steps=100,
            wandb=False,
        )

    def tokens(self, text: str) -> Tensor:
        """Return the text's vector, (1, width)."""
        return self.vectors[number_of(text)][None]

    def batches(self) -> Iterator[list[Tensor]]:
        info = self._data.get_wds_dataset(self.options, self.transforms[True], is_train=True, tokenizer=self.tokens)
        return iter(info.dataloader)

    def train(self, given: Iterable[list[Tensor]]) -> None:
        data = Namespace(dataloader=_Given(given, self._setting.steps), set_epoch=lambda epoch: None)
        self._train_one_epoch(self.model, {"train": data}, self.loss, 0, self.optimizer, None, None, None, self.options)


@dataclass(frozen=True)
class _Given:
    """The part of a loader's interface that `train_one_epoch` uses."""

    batches: Iterable[list[Tensor]]
    num_batches: int

    @property
    def num_samples(self) -> int:
        return self.num_batches * BATCH

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter(self.batches)


def import_peer(folder: Path) -> None:
    """Import open_clip with the webdataset version that it requires, and torchvision."""
    sys.path.insert(0, str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "webdataset"]:
        del sys.modules[name]  # our modules keep the version that they imported
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        import open_clip_train.train  # noqa: F401
    except ImportError as error:
        raise PipelineError(
            f"--peer {folder} lacks what open_clip needs ({error}); install it as --help says"
        ) from None


def renamed(tower: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of transformers' CLIP vision tower for open_clip."""
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post",
        "encoder.layers": "transformer.resblocks",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn": "attn",
    }
    theirs = {}
    for name, tensor in tower.items():
        name = name.removeprefix("vision_model.")
        for old, new in names.items():
            name = name.replace(old, new)
        theirs[name] = tensor
    for layer in range(VISION["num_hidden_layers"]):
        attention = f"transformer.resblocks.{layer}.attn"
        for kind in ("weight", "bias"):
            parts = [theirs.pop(f"{attention}.{part}_proj.{kind}") for part in "qkv"]
            theirs[f"{attention}.in_proj_{kind}"] = torch.cat(parts)
    theirs["proj"] = theirs.pop("visual_projection.weight").T
    return theirs


@cache
def made(name: str, setting: Setting) -> Ours | Theirs:
    torch.set_num_threads(1)
    return Theirs(setting) if name == THEIRS else Ours(setting)


def measure(name: str, what: str, setting: Setting) -> Measured:
    side, clock = made(THEIRS if name == THEIRS else OURS, setting), Clock()
    given = side.batches()
    if what == STEP:
        batch = next(given)
        given.close()
        given = repeat(batch)
    timed = clock.over(given, setting.steps)
    if what == LOADER:
        for _ in timed:
            pass
    else:
        side.train(timed, *CUTS.get(name, ()))
    return clock.measured


def compare(setting: Setting) -> str:
    """Raise PipelineError if loss or gradient norm of one batch differ; otherwise describe the difference."""
    ours, theirs = Ours(setting), made(THEIRS, setting)
    batch, pixels = next(ours.batches()), ours.processor.pixels
    mean, std = (torch.tensor(values)[:, None, None] for values in (pixels.mean, pixels.std))
    images, vectors = [], []
    for query, target, origin in zip(batch.query, batch.target, batch.origins, strict=True):
        data = dict(webdataset_sample(origin.shard, origin.sample))
        images.append(theirs.transforms[False](Image.open(BytesIO(data["jpg"]))))
        vectors.append(theirs.tokens(data["txt"].decode())[0])
        tiles = torch.from_numpy(batch.items[query].images[0].tiles)
        assert torch.equal((tiles[0] / 255 - mean) / std, images[-1])
        assert torch.equal(torch.from_numpy(batch.items[target].vector), vectors[-1])
    output = theirs.model(torch.stack(images), torch.stack(vectors))
    loss = theirs.loss(**output)
    loss.backward()
    named = theirs.model.named_parameters()
    norm = torch.nn.utils.get_total_norm([p.grad for name, p in named if name != "logit_scale"])
    mine = ours.step(batch, chunks=8, kept=4)
    off = max(_relative(mine.loss.loss.item(), loss.item()), _relative(mine.grad_norm, norm.item()))
    if not off <= TOLERANCE:
        raise PipelineError(f"loss or gradient norm differ by {off:.1e}: {mine.loss.loss}, {mine.grad_norm}")
    return f"of one batch the loss ({loss.item():.4f}) and the gradient norm ({norm.item():.3f}) differ by {off:.0e}"


def webdataset_sample(shard: str, number: int) -> dict[str, bytes]:
    samples = webdataset.WebDataset(shard, shardshuffle=False)
    return next(sample for place, sample in enumerate(samples) if place == number)


def _relative(mine: float, other: float) -> float:
    return abs(mine - other) / abs(other)


def measure_all(setting: Setting, pools: dict[str, ProcessPoolExecutor], rounds: int) -> Table:
    table = Table(
        *("", "samples/s", "ratio", "CPU ms/sample", "ratio"),
        title=f"batch {BATCH}, {setting.workers} workers, {setting.steps} steps, median of {rounds} rounds",
    )
    plans = {LOADER: (OURS, THEIRS), STEP: (OURS, CACHED, THEIRS), BOTH: (OURS, CACHED, THEIRS)}
    for what, names in plans.items():
        measured: dict[str, list[Measured]] = {name: [] for name in names}
        for number in tqdm(range(rounds), desc=what):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                measured[name].append(pools[name].submit(measure, name, what, setting).result())
        rates, costs = (
            {name: statistics.median(getattr(each, field) for each in measured[name]) for name in names}
            for field in ("samples_per_second", "cpu_milliseconds")
        )
        for name in names:
            ratios = (f"{values[name] / values[THEIRS]:.2f}" for values in (rates, costs))
            table.add_row(f"{what}: {name}", f"{rates[name]:.1f}", next(ratios), f"{costs[name]:.2f}", next(ratios))
        table.add_section()
    return table


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the dataset; made if it is not there")
    parser.add_argument("--peer", type=Path, required=True, metavar="FOLDER", help="where open_clip was installed")
    parser.add_argument("--images", type=int, default=2304, metavar="N", help="JPEGs in the dataset (2304)")
    parser.add_argument("--steps", type=int, default=9, metavar="N", help="of each measurement (9)")
    parser.add_argument("--rounds", type=int, default=3, choices=range(1, 100), metavar="N", help="(3)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="decoding processes, on both sides (1)")
    arguments = parser.parse_args()
    setting = Setting(
        arguments.work.resolve(), arguments.peer.resolve(), arguments.images, arguments.steps, arguments.workers
    )
    if not WARM_UP < setting.steps <= setting.images // BATCH:
        raise PipelineError(f"--steps is more than {WARM_UP}, and --images {BATCH} for each of them")
    if not (setting.work / "tower").is_dir():
        make_text_encoder(setting.work / "text_encoder", TEXT_WIDTH)
        VisionEncoder.build(VISION, DIMENSION, seed=0).save(setting.work / "tower")
    if not setting.vectors.exists():
        make_dataset(setting.data, setting.images, WIDTH, HEIGHT, setting.work / "text_encoder")
        np.save(setting.vectors, vectors_of(setting.recipe))
    console, spawn = Console(width=120), get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as ours, ProcessPoolExecutor(1, spawn) as theirs:
        console.print(theirs.submit(compare, setting).result(), highlight=False)
        console.print(measure_all(setting, {OURS: ours, CACHED: ours, THEIRS: theirs}, arguments.rounds))


if __name__ == "__main__":
    main()
