"""What a step does on a GPU, as budgets.yaml keeps it."""

from collections import Counter
from pathlib import Path
from typing import Any

import large
import small
import yaml
from tracer import Record

_LARGE = "LLaVE "
CASES = (*small.CASES, *(f"{_LARGE}{model}" for model in large.LLAVE), *large.QWEN)
FILE = Path(__file__).with_name("budgets.yaml")
PAIRS = 4  # of a step in real shapes
_HEADER = """\
# What an optimizer step does on an H100, traced on tensors without data. `python tests/cuda_trace --update` writes it.
# Of each case: how often and where the host waits for the device, the collectives, and the attention kernels. In a real
# shape also what one layer costs in a step of {pairs} pairs, by part: kernels, and MB that they read and write.
"""


def measured(name: str) -> dict[str, Any]:
    """Trace a case, one of CASES, and return what it does."""
    if name in small.CASES:
        return _counted(small.trace(name))
    model = name.removeprefix(_LARGE)
    less, more = large.step(model, PAIRS), large.step(model, PAIRS, more_layers=1)
    assert less.record.waits == more.record.waits, f"waits in a layer: {more.record.waits - less.record.waits}"
    costs = large.layer(less, more)
    of_parts = {
        part: f"{costs.kernels[part]} kernels, {costs.bytes[part] / 1e6:.1f} MB" for part in sorted(costs.bytes)
    }
    return _counted(less.record) | {"layer": of_parts}


def _counted(record: Record) -> dict[str, Any]:
    assert not record.waits_in_layers, f"waits inside layers: {record.waits_in_layers}"
    kept = {"waits": record.waits, "collectives": record.collectives, "attention": record.attention}
    return {name: dict(sorted(counts.items())) for name, counts in kept.items()}


def write(cases: dict[str, dict[str, Any]]) -> None:
    cases = {name: cases[name] for name in CASES if name in cases}
    FILE.write_text(_HEADER.format(pairs=PAIRS) + yaml.safe_dump(cases, sort_keys=False, width=200))


def read() -> dict[str, dict[str, Any]]:
    return (yaml.safe_load(FILE.read_text()) or {}) if FILE.exists() else {}


def excess(found: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    """Return how a case differs from its budget. A layer may cost less, everything else must be equal."""
    problems = []
    for name in budget.keys() - {"layer"}:
        more, fewer = Counter(found[name]) - Counter(budget[name]), Counter(budget[name]) - Counter(found[name])
        problems += [f"{name}: {count} more: {what}" for what, count in more.items()]
        problems += [f"{name}: {count} fewer: {what}" for what, count in fewer.items()]
    for part, costs in found.get("layer", {}).items():
        limits = budget["layer"].get(part, "0 kernels, 0 MB")
        if any(cost > limit for cost, limit in zip(_numbers(costs), _numbers(limits), strict=True)):
            problems.append(f"a layer's {part}: {costs}, at most {limits}")
    return problems


def _numbers(costs: str) -> list[float]:
    return [float(each.split()[0]) for each in costs.split(", ")]
