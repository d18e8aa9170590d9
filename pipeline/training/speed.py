"""How fast a step was, over all ranks: one line of speed.jsonl."""

import re
import time
from collections.abc import Mapping

import torch
from deepspeed.accelerator import get_accelerator

from pipeline.data.batch import Batch
from pipeline.distributed import all_gather_constant
from pipeline.models.flops import StepFlops
from pipeline.objectives.objective import StepResult

# Words of a device's name -> its peak for dense bf16, in TFLOP/s, by NVIDIA's data sheets (without sparsity). The first
# row whose words are all in the name counts.
PEAKS = {
    ("GH200",): 989.4,
    ("GB200",): 2500.0,
    ("B200",): 2250.0,
    ("H200", "NVL"): 835.5,
    ("H200",): 989.4,
    ("H100", "NVL"): 835.5,
    ("H100", "PCIe"): 756.5,
    ("H100",): 989.4,
    ("H800",): 989.4,
    ("H20",): 148.0,
    ("A100",): 312.0,
    ("A800",): 312.0,
    ("A40",): 149.7,
    ("A30",): 165.0,
    ("A10",): 125.0,
    ("L40S",): 362.0,
    ("L40",): 181.0,
    ("L4",): 121.0,
}

# Phases in which a rank waits for no other, unless parameters are partitioned (ZeRO 3).
_OWN = ("data", "first_pass", "pass")


def peak_tflops(name: str) -> float | None:
    """Return a device's peak for dense bf16 by its name, as torch.cuda.get_device_name gives it; None if unknown.

    A MIG instance is a part of a device, whose share of the peak its name does not give.
    """
    words = set(re.split(r"[\s-]+", name))
    return next((peak for wanted, peak in PEAKS.items() if words.issuperset(wanted) and "MIG" not in words), None)


class Speed:
    """Measures the steps of a run.

    global_batch: pairs of a step.  flops: counts those of this rank's items; None if the model's are unknown.
    precision: "bf16", whose peak the utilisation refers to, or "fp32", which has none.
    """

    def __init__(self, global_batch: int, flops: StepFlops | None, precision: str) -> None:
        self._global_batch, self._flops, self._peak = global_batch, flops, None
        if precision == "bf16" and get_accelerator().device_name() == "cuda":
            self._peak = peak_tflops(torch.cuda.get_device_name())

    def of_step(
        self,
        result: StepResult,
        batch: Batch,
        began: float,
        waited: float,
        memory: int,
        phases: Mapping[str, float],
        counts: Mapping[str, float],
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Return a step's values for speed.jsonl, and the sums of `counts` over ranks. Collective.

        began: time.perf_counter() at the step's begin.  waited: seconds in which this rank waited for data.
        memory: its peak in bytes.  phases: its seconds by phase, from `take_seconds`.  All ranks have the same phases
        and counts.
        """
        flops = self._flops(list(batch.items.values()), result.logits) if self._flops else 0.0
        ours = [result.tokens, result.padded, batch.received, batch.retries, waited, memory, flops]
        ours += [sum(phases.get(name, 0.0) for name in _OWN), *phases.values(), *counts.values()]
        device = get_accelerator().current_device_name()
        ranks = all_gather_constant(torch.tensor([ours], device=device)).double().cpu()
        seconds = time.perf_counter() - began
        tokens, padded, received, retries, waits, memories, each_flops, own, *rest = ranks.T
        by_phase, summed = rest[: len(phases)], rest[len(phases) :]
        speed = {
            "seconds": seconds,
            "waiting_for_data": float(waits.max()),
            "samples_per_second": self._global_batch / seconds,
            "tokens_per_second": float(tokens.sum()) / seconds,
            "padding": 1 - float(tokens.sum() / padded.sum()),
            "heaviest_rank": float(tokens.max() / tokens.mean()),
            "slowest_rank": int(own.argmax()),
            "slowest_rank_seconds": float(own.max() - own.mean()),
            "read_mb_per_second": float(received.sum()) / 1e6 / seconds,
            "read_retries": int(retries.sum()),
            "peak_memory_gb": float(memories.max()) / 1e9,
        }
        if self._flops:
            speed["tflops_per_device"] = float(each_flops.mean()) / 1e12 / seconds
            if self._peak:
                speed["mfu"] = speed["tflops_per_device"] / self._peak
        speed |= {f"seconds/{name}": float(each.mean()) for name, each in zip(phases, by_phase, strict=True)}
        return speed, {name: float(each.sum()) for name, each in zip(counts, summed, strict=True)}
