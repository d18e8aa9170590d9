"""The parts of benchmarks/gpu_all.sh: each prints a section in Markdown.

    python benchmarks/gpu_parts.py [--dry-run] [PART ...]

    attention   each kind of attention in bf16 beside SDPA in fp32, as in gpu_step.py
    0.5b, 2b    a training step beside the published recipe, as in gpu_step.py; its memory beside tools/plan_memory.py
    loss        the loss of 32,768 pairs, as in loss.py
    encode      embedding, without training
    demo        the demo's first steps in bf16 on the GPU beside fp32 on the CPU, and the second half of them again,
                from a checkpoint that was copied and written while steps went on

With --dry-run all parts but 2b run on the CPU with tiny shapes; their figures are meaningless. A part that fails says
so in its section, and the others follow; the exit status is then 3.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import loss
from benchmarks.gpu_step import (
    BACKBONES,
    SO400M,
    TINY,
    Differences,
    Measured,
    Setting,
    batch_of,
    fresh,
    judge,
    make,
    measure_attention,
    measure_steps,
)
from benchmarks.mmeb_like import tokens_of
from pipeline.config import load_ds_config, load_recipe
from pipeline.convert.demo import TrainingPairs
from pipeline.convert.sharding import convert
from pipeline.distributed import start_distributed
from pipeline.errors import PipelineError
from pipeline.models.attention import KERNELS, choose, implementation
from pipeline.models.chunks import chunk_tokens_for, embed_chunks, plan_chunks
from pipeline.models.llave.model import FrozenTower, TowerlessLlave
from pipeline.training import checkpoint
from pipeline.training.memory import Plan
from pipeline.training.preemption import Preemption
from pipeline.training.speed import peak_tflops
from pipeline.training.trainer import Trainer

LOSS_PAIRS, LOSS_WIDTH = 32_768, 1024
FAILED = 3  # the exit status if a section says that its part failed; benchmarks/gpu_all.sh then adds nothing
DEMO_DATASETS = ("Scene-CLS", "Scene-VQA", "Scene-T2I", "Scene-I2T", "Scene-Ground")

Rows = Iterable[Iterable[object]]


def section(title: str, columns: Iterable[str], rows: Rows) -> str:
    cells = [list(columns), *(list(map(str, row)) for row in rows)]
    cells.insert(1, ["---"] + ["---:"] * (len(cells[0]) - 1))
    return f"### {title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"


def setting(model: str, dry: bool) -> Setting:
    """Return a setting that takes about a minute on one H100, by its FLOPs."""
    return Setting(model, 4, 1, 512, True) if dry else Setting(model, 128, 2, BACKBONES[model].chunk_tokens, False)


def attention(dry: bool) -> str:
    used = setting("0.5b", dry)
    measured = fresh(measure_attention, used)
    if measured is None:
        raise PipelineError("out of memory")
    rows, found = [], dict[str, Differences]()
    for kind, result in measured.items():
        if isinstance(result, str):
            rows.append([kind, "does not run", result, ""])
            continue
        found[kind] = from_fp32 = result[0]
        rows.append([kind, *(f"{each:.1e}" for each in (from_fp32.embedding, from_fp32.gradient, from_fp32.norm))])
    try:
        judge(found)
        verdict = "none is far from fp32"
    except PipelineError as error:
        verdict = str(error)
    columns = ("bf16 beside SDPA in fp32", "embeddings", "gradient, largest element", "gradient, norm")
    return section(f"Attention of 0.5B: {verdict}", columns, rows)


def step(model: str, dry: bool) -> str:
    used = setting(model, dry)
    peak = None if dry else peak_tflops(torch.cuda.get_device_name())
    tokens = tokens_of(batch_of(used.config("sdpa"), used.pairs).items.values())
    measured = measure_steps(used)
    plain = next(row for name, (_, row) in measured.items() if name.startswith("ours"))
    rows = []
    for name, (negatives, row) in measured.items():
        if row is None:
            rows.append([name, negatives, *["out of memory"] * 5])
            continue
        kept = plain.most_cached if plain and "graphs of" in name else 0
        planned = f"{planned_bytes(used, kept) / 1e9:.1f}" if name.startswith("ours") else ""
        rows.append([name, negatives, *figures(used, row, tokens, peak), planned])
    columns = ("", "negatives", "seconds", "pairs/s", "tokens/s", "MFU", "peak, GB", "planned, GB")
    title = f"A step of {model}: {used.pairs} pairs, {tokens:,} tokens, chunks of {used.chunk_tokens:,}"
    return section(title, columns, rows)


def figures(used: Setting, row: Measured, tokens: int, peak: float | None) -> list[str]:
    """Return seconds, pairs/s, tokens/s, MFU and peak memory in GB."""
    utilisation = f"{row.flops / row.seconds / peak / 1e12:.1%}" if peak else "unknown peak"
    rates = [f"{row.seconds:.2f}", f"{used.pairs / row.seconds:.2f}", f"{tokens / row.seconds:,.0f}"]
    return [*rates, utilisation, f"{row.peak / 1e9:.1f}"]


def planned_bytes(used: Setting, kept_chunks: int) -> int:
    """Return what tools/plan_memory.py plans for one GPU, with as many cached graphs."""
    config = used.config("sdpa")
    text = {name: getattr(config.text_config, name) for name in ("hidden_size", "intermediate_size", "vocab_size")}
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    text |= {name: getattr(config.text_config, name) for name in names}
    architecture = {"vision": TINY if used.dry else SO400M, "text": text}
    architecture["image_grid_pinpoints"] = config.image_grid_pinpoints
    recipe = load_recipe(
        ROOT / f"pipeline/recipes/llave_{used.model}.yaml",
        [
            *("deepspeed=ds_configs/zero1.json", "data.lanes=1", "model.path=null", "model.image_grid_pinpoints=null"),
            *(f"batch.global_batch={used.pairs}", f"batch.chunk_tokens={used.chunk_tokens}"),
            *(f"batch.kept_chunks={kept_chunks}", f"model.architecture={json.dumps(architecture)}"),
        ],
    )
    plan = Plan.of(recipe, 1, videos=False)
    return plan.total(used.chunk_tokens, plan.states(1, load_ds_config(recipe, 1)["zero_optimization"]))


def loss_of_large_batch(dry: bool) -> str:
    pairs, width, rounds = (2048, 64, 1) if dry else (LOSS_PAIRS, LOSS_WIDTH, 3)
    device, method = (torch.device("cpu"), "fork") if dry else (torch.device("cuda"), "spawn")
    row = loss.compare("LLaVE", pairs, width, rounds, device, method)
    columns = ("B", "beside", "ours, s", "theirs", "ratio", "ours, MB", "theirs", "ratio", "differ by")
    return section(f"The loss, {width:,} dimensions, float32", columns, [row])


@dataclass(frozen=True)
class Embedded:
    """Seconds for all items, their number and tokens, and the peak of torch's allocations in bytes; 0 on a CPU."""

    seconds: float
    items: int
    tokens: int
    peak: int


def measure_encoding(used: Setting) -> Embedded:
    device = start_distributed(timeout_minutes=5)
    config = used.config(implementation(choose("auto", device.type, torch.bfloat16)))
    tower, model = (make(kind, config, device).eval() for kind in (FrozenTower, TowerlessLlave))
    items = list(batch_of(config, used.pairs).items.values())
    chunks = plan_chunks(items, chunk_tokens_for(model.pads), device, padded=model.pads)
    seconds = []
    for _ in range(1 + used.rounds):  # the first one warms up
        began = time.perf_counter()
        vectors = embed_chunks(model, chunks, len(items), tower.features_of).cpu()  # waits for the device
        seconds.append(time.perf_counter() - began)
    if not torch.allclose(vectors.norm(dim=1), torch.ones(len(items)), atol=1e-4):
        raise PipelineError("embeddings are no unit vectors")
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return Embedded(statistics.median(seconds[1:]), len(items), tokens_of(items), peak)


def encode(dry: bool) -> str:
    rows = []
    for model in ("0.5b",) if dry else ("0.5b", "2b"):
        if (each := fresh(measure_encoding, setting(model, dry))) is None:
            rows.append([model, *["out of memory"] * 3])
            continue
        rates = (f"{each.items / each.seconds:,.1f}", f"{each.tokens / each.seconds:,.0f}")
        rows.append([model, *rates, f"{each.peak / 1e9:.1f}"])
    return section("Embedding in bf16", ("", "items/s", "tokens/s", "peak, GB"), rows)


@dataclass(frozen=True)
class Demo:
    """A short run of the demo's recipe, in an empty folder."""

    dry: bool
    precision: str
    folder: Path
    data: Path
    steps: int

    def options(self) -> list[str]:
        small = ["batch.global_batch=8", "data.lanes=2", "batch.chunk_tokens=500"] if self.dry else []
        fields = ["data.workers=0", "evaluation=null", "deepspeed=ds_configs/zero1.json"]
        fields += [f"checkpoint.every={self.steps // 2}"]
        fields += [f"run={self.folder}", f"data.url={self.data}", f"steps={self.steps}", f"precision={self.precision}"]
        fields += [f"data.datasets=[{', '.join(DEMO_DATASETS[: 1 if self.dry else None])}]", "data.block_samples=8"]
        return fields + small


def losses(demo: Demo) -> list[float]:
    """Train, from the newest checkpoint if there is one, and return the loss of each step."""
    trainer = Trainer(load_recipe("demo.yaml", demo.options()), Preemption())
    trainer.check(resumes=True)
    trainer.build()
    trainer.train()
    return [json.loads(line)["loss"] for line in (demo.folder / "metrics.jsonl").read_text().splitlines()]


def demo(dry: bool) -> str:
    datasets, samples, steps = DEMO_DATASETS[: 1 if dry else None], 16 if dry else 256, 2 if dry else 40
    with TemporaryDirectory() as name:
        folder = Path(name)
        pairs = {str(folder / "data" / each): TrainingPairs(each, 0, samples) for each in datasets}
        convert(pairs, options={}, shard_bytes=1_000_000)
        found = {}
        for place, precision in (("GPU", "bf16"), ("CPU", "fp32")):
            with on_cpu() if place == "CPU" else nullcontext():
                run = Demo(dry, precision, folder / precision, folder / "data", steps)
                found[precision] = fresh(losses, run)
                if place == "GPU":
                    back_to_half(run)
                    found["resumed"] = fresh(losses, run)
    if None in found.values():
        raise PipelineError("out of memory")
    columns = ("step", "bf16, GPU", "fp32, CPU", "difference", "resumed, GPU", "difference")
    rows = []
    for number in (each for each in (1, 2, 10, 20, 21, 30, 40) if each <= steps):
        gpu, cpu, resumed = (found[name][number - 1] for name in ("bf16", "fp32", "resumed"))
        row = [number, f"{gpu:.3f}", f"{cpu:.3f}", f"{gpu - cpu:+.3f}"]
        rows.append(row + ([f"{resumed:.3f}", f"{resumed - gpu:+.1e}"] if number > steps // 2 else ["", ""]))
    return section("The demo's loss", columns, rows)


def back_to_half(demo: Demo) -> None:
    """Make a run that ended look as if it had been killed just after its first checkpoint."""
    *later, first = checkpoint.candidates(demo.folder / "checkpoints")
    checkpoint.point(first)
    for each in later:
        shutil.rmtree(each)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Let new processes use the CPU."""
    before = dict(os.environ)
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


PARTS: dict[str, Callable[[bool], str]] = {
    "attention": attention,
    "0.5b": lambda dry: step("0.5b", dry),
    "2b": lambda dry: step("2b", dry),
    "loss": loss_of_large_batch,
    "encode": encode,
    "demo": demo,
}


def heading(dry: bool) -> str:
    device = "the CPU with tiny shapes: these figures are meaningless" if dry else torch.cuda.get_device_name()
    missing = [f"{kind}: {reason}" for kind, kernel in KERNELS.items() if (reason := kernel.missing())]
    lacks = f"; without {', '.join(missing)}" if missing else ""
    return f"## On {device}\n\ntorch {torch.__version__}, CUDA {torch.version.cuda}{lacks}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"heading, {', '.join(PARTS)} (all)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    arguments = parser.parse_args()
    parts, failed = PARTS | {"heading": heading}, False
    if unknown := [name for name in arguments.parts if name not in parts]:
        parser.error(f"there is no part {', '.join(unknown)}")
    if arguments.dry_run:
        os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    elif not torch.cuda.is_available():
        parser.error("there is no GPU: --dry-run runs everything on the CPU with tiny shapes")
    # On the CPU 2B is the same code as 0.5B.
    for name in arguments.parts or ["heading", *(part for part in PARTS if part != "2b" or not arguments.dry_run)]:
        try:
            print(parts[name](arguments.dry_run), flush=True)
        except Exception as error:
            failed = True
            traceback.print_exc()
            said = (str(error).splitlines() or [""])[0]
            print(f"### {name}: failed\n\n{type(error).__name__}: {said}\n", flush=True)
    sys.exit(FAILED if failed else 0)


if __name__ == "__main__":
    main()
