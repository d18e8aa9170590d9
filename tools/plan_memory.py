"""Estimate the memory that a recipe needs on each GPU under ZeRO 0, 1, 2 and 3.

    python tools/plan_memory.py pipeline/recipes/demo.yaml --gpus 2
    python tools/plan_memory.py RECIPE --gpus 8 --memory 80 batch.chunk_tokens=16384

Reads only the model's configuration, no weights; and, if the recipe uses mined negatives or a teacher's vectors, the
indexes of the data. If they cannot be read, a note below the tables says what is assumed. Sizes are in GB of 10^9
bytes, the unit of GPU vendors. The column of the recipe's own ZeRO stage uses its DeepSpeed config; the other columns
use ds_configs/. ZeRO 0 needs fp32.

A chunk has batch.chunk_tokens tokens, or model.max_tokens if that is more. The estimate assumes chunks full of
photographs (4:3), or full of videos (--videos), which have more tiles or pixels. Phases of a step in brackets do not
overlap, so only the largest counts. The last lines show the largest batch.chunk_tokens that fits (none: one item of
model.max_tokens does not fit), and how many chunks of one such item can keep their graph (batch.kept_chunks). If the
DeepSpeed config offloads, the CPU memory follows. Every rank pins CPU memory for two chunks on their way to the GPU,
and for a frozen tower's features beyond batch.features_mb; torch rounds each up to a power of two. Every rank also
copies its part of a checkpoint to CPU memory, so that training continues while it is written; rank 0's part is the
largest.

The estimate leaves out CUDA, NCCL and fragmentation, which need a few GB, and negatives and further positives in the
samples themselves. With `auto`, training fills at most 90 % of the memory: use --memory 72 for a GPU of 80 GB.
"""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing runs here, so DeepSpeed needs no GPU

from pipeline.config import Recipe, load_ds_config, load_recipe
from pipeline.data.source import Source
from pipeline.errors import PipelineError
from pipeline.jobs.program import command_line
from pipeline.training.memory import MOST_CHUNKS, MOST_TOKENS, Plan, States

GB = 1e9
STAGES = (0, 1, 2, 3)
STORE_SECONDS = 5  # without a byte, after which the data count as unreadable


def zero_sections(recipe: Recipe, gpus: int) -> dict[int, dict]:
    """Return stage -> "zero_optimization" of its DeepSpeed config. The pipeline does not support stage 0 in bf16."""
    own = load_ds_config(recipe, gpus)["zero_optimization"]
    sections = {own["stage"]: own}
    for stage in STAGES:
        if stage not in sections and (stage or recipe.precision == "fp32"):
            other = recipe.model_copy(update={"deepspeed": f"ds_configs/zero{stage}.json"})
            sections[stage] = load_ds_config(other, gpus)["zero_optimization"]
    return dict(sorted(sections.items()))


def data_of(recipe: Recipe) -> tuple[Source | None, str]:
    """Return the data if they matter to the estimate, or None and, if they cannot be read, why."""
    data = recipe.data
    if not data.negatives and not data.teacher:
        return None, ""
    try:
        return Source.open(data.model_copy(update={"timeout_s": min(data.timeout_s, STORE_SECONDS)})), ""
    except PipelineError as error:
        return None, f"the data cannot be read: {error}"


def parameter_table(plan: Plan) -> Table:
    table = Table("", "millions", "trained", title="parameters")
    for group in plan.groups:
        how = "yes" if group.trained else "no" if group.in_engine else "no; replicated on every GPU"
        table.add_row(group.name, f"{group.parameters / 1e6:,.2f}", how)
    return table


def memory_table(plan: Plan, sections: dict[int, dict], memory: float) -> Table:
    chunk_tokens = plan.budget.chunk_tokens
    columns = {stage: plan.states(stage, zero) for stage, zero in sections.items()}
    title = f"GB on each of {plan.gpus} GPUs, {plan.recipe.precision}, chunks of {chunk_tokens:,} tokens"
    table = Table("", *(f"ZeRO {stage}" for stage in columns), title=title)
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, sizes: list[int]) -> None:
        table.add_row(name, *map(gigabytes, sizes))

    states = list(columns.values())
    row("parameters", [each.parameters for each in states])
    row("gradients", [each.gradients for each in states])
    row("optimizer: moments, master weights", [each.optimizer for each in states])
    row("buckets of gradients in transit", [each.buckets for each in states])
    row("gathered parameters (maximum)", [each.gathered for each in states])
    for name, size in plan.kept().items():
        row(name, [size] * len(states))
    phases = [plan.phases(chunk_tokens, each) for each in states]
    for name in phases[0]:
        table.add_row(f"({name})", *(f"({gigabytes(each[name])})" for each in phases))
    table.add_section()
    totals = [plan.total(chunk_tokens, each) for each in states]
    row("total", totals)
    table.add_row(f"left of {memory / GB:g}", *(coloured(gigabytes(memory - each), each <= memory) for each in totals))
    table.add_row("fits", *(coloured("yes" if each <= memory else "no", each <= memory) for each in totals))
    table.add_row("largest batch.chunk_tokens", *(largest(plan, each, memory) for each in states))
    longest = f"chunks of {plan.recipe.model.max_tokens:,} tokens that can keep their graph"
    table.add_row(longest, *(most_cached(plan, each, memory) for each in states))
    if any(each.host for each in states):
        row("CPU memory for each GPU", [each.host for each in states])
    row("CPU memory for chunks and features, pinned", [plan.pinned(chunk_tokens)] * len(states))
    row("CPU memory for a copy of rank 0's checkpoint", [each.copied for each in states])
    return table


def gigabytes(size: float) -> str:
    return f"{size / GB:,.3f}"


def coloured(text: str, good: bool) -> str:
    return f"[{'green' if good else 'red'}]{text}"


def largest(plan: Plan, states: States, memory: float) -> str:
    tokens = plan.largest_chunk(memory, states)
    text = f"{tokens:,}" + (" or more" if tokens + 64 > MOST_TOKENS else "") if tokens else "none"
    return coloured(text, bool(tokens))


def most_cached(plan: Plan, states: States, memory: float) -> str:
    count = plan.most_cached(memory, states)
    return f"{count:,}" + (" or more" if count == MOST_CHUNKS else "")


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file, or the name of one of the project's own, as demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a recipe's field by its dotted name")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the run, on all nodes together")
    parser.add_argument("--memory", type=float, default=80, metavar="GB", help="memory of one GPU (80)")
    parser.add_argument("--videos", action="store_true", help="fill the chunks with videos")
    arguments = parser.parse_intermixed_args()
    if arguments.gpus < 1 or not 0 < arguments.memory < float("inf"):  # nan fails this, too
        raise PipelineError("--gpus and --memory must be positive numbers")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    sections = zero_sections(recipe, arguments.gpus)
    source, unread = data_of(recipe)
    plan = Plan.of(recipe, arguments.gpus, arguments.videos, source)
    console = Console(width=120)
    console.print(parameter_table(plan), memory_table(plan, sections, arguments.memory * GB))
    for remark in filter(None, (*plan.stored.remarks, unread)):
        console.print(f"note: {remark}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
