"""What a step does on a GPU, as budgets.yaml keeps it."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import large
import small
import yaml
from tracer import Record

FILE = Path(__file__).with_name("budgets.yaml")
PAIRS = 8  # of a step in real shapes
_HEADER = """\
# What an optimizer step does on an H100, traced on tensors without data. `python tests/cuda_trace --update` writes it.
# Of each case: how often the host waits for the device, what copies without waiting, the collectives, and the attention
# kernels. In a real shape also what each layer costs, in a step of {pairs} pairs: kernels and MB of device memory.
"""


def measured() -> Iterator[tuple[str, dict[str, Any]]]:
    """Trace the cases, and return what each does by its name."""
    for name in small.CASES:
        yield name, _counted(small.trace(name))
    for model in large.MODELS:
        less, more = large.step(model, PAIRS), large.step(model, PAIRS, more_layers=1)
        assert less.record.waits == more.record.waits, f"{model}: {more.record.waits - less.record.waits} in a layer"
        costs = large.layer(less, more)
        of_parts = {part: [costs.kernels[part], round(costs.bytes[part] / 1e6, 1)] for part in sorted(costs.bytes)}
        yield f"LLaVE {model}", _counted(less.record) | {"layer": of_parts}


def _counted(record: Record) -> dict[str, Any]:
    assert not record.waits_in_layers, f"waits inside layers: {record.waits_in_layers}"
    kept = {
        "waits": record.waits,
        "copies": record.copies,
        "collectives": record.collectives,
        "attention": record.attention,
    }
    return {name: dict(sorted(counts.items())) for name, counts in kept.items()}


def write(cases: dict[str, dict[str, Any]]) -> None:
    FILE.write_text(_HEADER.format(pairs=PAIRS) + yaml.safe_dump(cases, sort_keys=False, width=200))


def read() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text())
    return cases


def excess(found: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    """Return how a case differs from its budget. A layer may cost less, everything else must be equal."""
    problems = []
    for name in budget.keys() - {"layer"}:
        more, fewer = Counter(found[name]) - Counter(budget[name]), Counter(budget[name]) - Counter(found[name])
        problems += [f"{name}: {count} more: {what}" for what, count in more.items()]
        problems += [f"{name}: {count} fewer: {what}" for what, count in fewer.items()]
    for part, costs in found.get("layer", {}).items():
        limits = budget["layer"].get(part, (0, 0))
        for what, cost, limit in zip(("kernels", "MB"), costs, limits, strict=True):
            if cost > limit:
                problems.append(f"a layer's {part}: {cost} {what}, {limit} at most")
    return problems
