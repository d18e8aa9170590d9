"""Trace optimizer steps on CUDA tensors without data, on a machine without a GPU.

    python tests/cuda_trace             compare all steps with budgets.yaml, the roofline's extrapolation to a whole
                                        model with a whole model, and the memory plan with the tensors alive;
                                        test_cuda_trace.py runs this
    python tests/cuda_trace --update    write budgets.yaml
    python tests/cuda_trace --roofline  print what steps of the whole models cost, and how long an H100 would take

Names of cases in budgets.yaml, or of models for the roofline, choose some of them.

The roofline takes 70 % of the H100's 989 TFLOP/s for matmuls, 85 % of its 3.35 TB/s for memory, and FlashAttention 2's
speed for attention. The optimizer, its collectives and the sharding of DeepSpeed are not traced.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

import guard

guard.load()
os.environ["DS_ACCELERATOR"] = "cpu"

import budgets
import large
import memory
import roofline
import steps
from transformers.utils import logging

ROOFLINE_PAIRS = 32
EXTRAPOLATION = "extrapolation to all layers"
PARTS = ("RMSNorm", "SwiGLU", "RoPE", "LoRA", "matmul", "attention", "tower", "loss", "gradients", "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--roofline", action="store_true")
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    steps.start_ranks()
    if arguments.roofline:
        return print_roofline(arguments.names or large.MODELS)
    if arguments.update:
        kept = budgets.read() if arguments.names else {}
        return budgets.write(kept | {name: budgets.measured(name) for name in arguments.names or budgets.CASES})
    sys.exit(compare(arguments.names or (*budgets.CASES, EXTRAPOLATION, *memory.CASES)))


def compare(names: Iterable[str]) -> bool:
    """Print what differs from the budgets. Return whether anything does."""
    known, failed = budgets.read(), False
    for name in names:
        try:
            if name == EXTRAPOLATION:
                problems = large.wrong_extrapolation()
            elif name in memory.CASES:
                problems = memory.wrong(name)
            else:
                problems = budgets.excess(budgets.measured(name), known[name])
        except Exception as error:
            traceback.print_exc()
            problems = [f"{type(error).__name__}: {error}"]
        failed |= bool(problems)
        print(f"== {name}: {'FAILED' if problems else 'ok'}", *problems, sep="\n    ", flush=True)
    return failed


def print_roofline(models: Iterable[str]) -> None:
    print(f"| model, {ROOFLINE_PAIRS} pairs | kernels | GB | waits | seconds | MFU | {' | '.join(PARTS)} |")
    print("|" + "---|" * (6 + len(PARTS)))
    for model in models:
        costs, step = large.whole(model, ROOFLINE_PAIRS)
        seconds = sum(costs.seconds.values())
        figures = [
            model,
            f"{sum(costs.kernels.values()):,}",
            f"{sum(costs.bytes.values()) / 1e9:,.0f}",
            str(sum(step.record.waits.values())),
            f"{seconds:.2f}",
            f"{step.flops / seconds / roofline.PEAK:.1%}",
            *(f"{costs.seconds[part] / seconds:.1%}" for part in PARTS),
        ]
        print(f"| {' | '.join(figures)} |", flush=True)


main()
