"""Does torch.compile make the language model faster on packed chunks, which all have different lengths?

    python benchmarks/compile.py [--hidden 256] [--layers 4] [--pairs 16] [--passes 5]

A language model with the proportions of LLaVE-0.5B's, as pipeline/models/llave/model.py runs it, with random float32
weights, on the GPU if there is one. Chunks of MMEB-like pairs (benchmarks/mmeb_like.py) with a ninth of the tokens run
forward and backward; every pass has new pairs, as every step has. Attention is SDPA.

    eager               as in the pipeline
    MLPs and norms      each module compiled with dynamic=True: one graph for all numbers of tokens
    whole layers        each layer compiled with dynamic=True: graphs depend on the items' lengths through attention.
                        Beyond torch's limit of 8 graphs, layers run eagerly, and torch reports it

The first pass compiles with an empty cache. In later passes the variants alternate; reported are the median seconds,
and the median ratio to eager in the same pass. After each pass, all gradients must agree with eager's to 1e-5 of the
largest value.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm
from transformers import LlavaOnevisionConfig, Qwen2Config, Qwen2Model, SiglipVisionConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.mmeb_like import draw
from pipeline.errors import PipelineError
from pipeline.jobs.program import command_line
from pipeline.models.attention import Segments, implementation
from pipeline.models.chunks import Chunk, plan_chunks
from pipeline.models.lean import LeanMLP, LeanRMSNorm, keep_less
from pipeline.models.packed_attention import pool_in_last_layer

TILE, PATCH, FEWER_TOKENS = 72, 8, 9  # 9 x 9 patches per tile; SigLIP-so400m has 27 x 27
HEAD = 64
CHUNK_TOKENS = 864  # the tokens of two of the longest items
TOLERANCE = 1e-5
VARIANTS: dict[str, tuple[type[nn.Module], ...]] = {
    "eager": (),
    "MLPs and norms": (LeanMLP, LeanRMSNorm),
    "whole layers": (Qwen2DecoderLayer,),
}


def config_of(hidden: int, layers: int) -> LlavaOnevisionConfig:
    text = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=4864 * hidden // 896,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=2 - hidden // HEAD % 2,
        vocab_size=320,
        attn_implementation=implementation("sdpa"),
    )
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(image_size=TILE, patch_size=PATCH),
        text_config=text,
        image_token_id=text.vocab_size - 1,
        video_token_id=text.vocab_size - 2,
        image_grid_pinpoints=[[TILE * rows, TILE * columns] for rows in (1, 2) for columns in (1, 2)],
    )


def make(config: Qwen2Config, compiled: tuple[type[nn.Module], ...], device: torch.device) -> Qwen2Model:
    """Return a model whose weights depend only on the config. compiled: the types of modules to compile."""
    torch.manual_seed(0)
    model = Qwen2Model(config).to(device)
    keep_less(model)
    pool_in_last_layer(model)
    for module in model.modules():
        if isinstance(module, compiled):
            module.compile(dynamic=True)
    return model


def run(model: Qwen2Model, chunks: Sequence[Chunk], device: torch.device) -> float:
    """Run a forward and backward pass over all chunks, and keep the gradients; return the seconds."""
    model.zero_grad()
    directions = torch.linspace(-1, 1, model.config.hidden_size, device=device)
    _wait(device)
    began = time.perf_counter()
    for chunk in chunks:
        packed = chunk.packed.to(device)
        hidden = model(
            input_ids=packed.input_ids[None],
            position_ids=packed.position_ids[None],
            segments=Segments(packed.lengths, device),
            use_cache=False,
        ).last_hidden_state
        (hidden @ directions).sum().backward()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def difference(model: Qwen2Model, eager: Qwen2Model) -> float:
    """Return the largest difference of the gradients, relative to eager's largest gradient."""
    pairs = [(mine.grad, right.grad) for mine, right in zip(model.parameters(), eager.parameters(), strict=True)]
    return max(float((mine - right).abs().max()) for mine, right in pairs) / max(
        float(right.abs().max()) for _, right in pairs
    )


def compare(config: Qwen2Config, passes: Sequence[Sequence[Chunk]], device: torch.device) -> Table:
    models = {name: make(config, compiled, device) for name, compiled in VARIANTS.items()}
    seconds, off = {name: [] for name in models}, dict.fromkeys(models, 0.0)
    for chunks in tqdm(passes, leave=False):
        for name, model in models.items():
            seconds[name].append(run(model, chunks, device))
            off[name] = max(off[name], difference(model, models["eager"]))
    table = Table(
        *("compiled", "first pass, s", "later passes, s", "by eager's", "gradients differ by"),
        title=f"{config.num_hidden_layers} layers of {config.hidden_size}, about {len(passes[0])} chunks a pass",
    )
    for name, (first, *later) in seconds.items():
        if not off[name] <= TOLERANCE:
            raise PipelineError(f"{name}: compiled, gradients differ by {off[name]:.1e} of the largest")
        ratio = statistics.median(mine / eager for mine, eager in zip(later, seconds["eager"][1:], strict=True))
        table.add_row(name, f"{first:.1f}", f"{statistics.median(later):.2f}", f"{ratio:.2f}", f"{off[name]:.0e}")
    return table


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, metavar="N", help="width; LLaVE-0.5B's is 896 (256)")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="LLaVE-0.5B has 24 (4)")
    parser.add_argument("--pairs", type=int, default=16, metavar="B", help="of a pass (16)")
    parser.add_argument("--passes", type=int, default=5, choices=range(1, 100), metavar="N", help="after the first (5)")
    arguments = parser.parse_args()
    if arguments.hidden % HEAD:
        raise PipelineError(f"--hidden is {arguments.hidden}; heads are {HEAD} wide, of which it is no multiple")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # more would spin at every barrier if other programs use the cores
    config = config_of(arguments.hidden, arguments.layers)
    count = 1 + arguments.passes
    words = np.arange(config.video_token_id)
    items = list(draw(config, count * arguments.pairs, words, FEWER_TOKENS).items.values())
    passes = [plan_chunks(items[number::count], CHUNK_TOKENS, device) for number in range(count)]
    console = Console(width=120)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU, one thread"
    console.print(f"{name}; torch {torch.__version__}", highlight=False)
    with TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        console.print(compare(config.text_config, passes, device))


if __name__ == "__main__":
    main()
