"""Run all checks in the order of their dependencies, show them in one table, and record a refusal."""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.config import Recipe
from pipeline.device import configure_device
from pipeline.errors import first_few, printable
from pipeline.jobs import status
from pipeline.jobs.preflight import job as checks
from pipeline.jobs.preflight.attention import attention
from pipeline.jobs.preflight.check import HANG_SECONDS, Check, timed_out
from pipeline.jobs.preflight.job import Job
from pipeline.jobs.preflight.nodes import Nodes, all_reduce, device, gpus, meet

_RESULTS_SECONDS = 2 * HANG_SECONDS  # that a node may be later than the first
_ACKNOWLEDGE_SECONDS = 5
_CPU_PROCESSES = 2
_STATES = {"skipped": ("skip", "dim"), "green": ("ok", "green"), "yellow": ("warn", "yellow"), "red": ("FAIL", "red")}
_SEVERITY = list(_STATES)
_LISTED = 3  # findings of one check that differ between nodes


def preflight(recipe: Recipe, nodes: Nodes, installed: Check, *, world: int | None, slurm: bool, began: float) -> int:
    """Check, and print the table on the first node. Returns the exit status: 2 if something would stop the run, else 0.

    installed: the check of the packages.  world: processes of the run; None: one on each GPU, or two on the CPU.
    began: from time.monotonic.
    """
    transformers.utils.logging.disable_progress_bar()
    timed_out.clear()
    run, found, place = Path(recipe.run), [installed], device()
    configure_device(place)
    if begins := slurm and nodes.node == 0:
        found.append(checks.other_jobs(run))
        if begins := found[-1].state != "red":
            status.begin(run)
            found.append(checks.earlier_starts(run))
    found.append(meet(nodes))
    node, count, together = nodes.node, nodes.count, bool(nodes.names)
    if not together:  # then each node checks itself and prints its own errors
        nodes = Nodes(name=nodes.name)
    hardware: list[list] = []
    found += [gpus(hardware, nodes, slurm), attention(recipe, place, slurm)]
    if together:
        found.append(all_reduce(nodes, place))
    found.append(checks.run_directory(run, nodes))

    sizes = [total for on_node in hardware for _, total, _ in on_node]
    gpu_count = len(sizes) if together else len(sizes) * count
    job = Job(recipe, world or gpu_count or max(_CPU_PROCESSES, count), gpu_count, guessed=not world and not gpu_count)
    found += [checks.data(job, node, count), checks.model(job), checks.machine(job, count)]
    if node == 0:
        found += [checks.processes(job), checks.memory(job, min(sizes, default=0)), checks.disk_space(job)]
        found += [checks.evaluation(recipe), checks.resuming(job)]

    results = [(nodes.name, found)]
    if together and count > 1:
        nodes.put("results", [asdict(check) for check in found])
        if node:
            nodes.get("results", node, _RESULTS_SECONDS)  # returns when the store has them
            nodes.put("done", True)
            return 0
        results += _of_others(nodes)
    merged = over_nodes(results)
    if node == 0:
        show(merged, f"{recipe.run}, on {count} node{'s' * (count > 1)}", time.monotonic() - began)
    sys.stdout.flush()
    reds = [check for check in merged if check.state == "red"]
    for check in reds:
        print(printable(f"error: {check.error}", keep="\n"), file=sys.stderr)
    if reds and begins:  # training, which would record it, does not start
        status.note(run, "refused", reason="; ".join(check.error for check in reds))
    return 2 if reds else 0


def _of_others(nodes: Nodes) -> list[tuple[str, list[Check]]]:
    results, deadline = [], time.monotonic() + _RESULTS_SECONDS
    for number, name in enumerate(nodes.names[1:], 1):
        try:
            received = nodes.get("results", number, deadline - time.monotonic())
            results.append((name, [Check(**check) for check in received]))
        except RuntimeError:
            results.append((name, [Check("results", "red", "this node sent none", "see its log")]))
        else:
            with suppress(RuntimeError):
                nodes.get("done", number, _ACKNOWLEDGE_SECONDS)  # the store ends with this process
    return results


def over_nodes(results: Sequence[tuple[str, Sequence[Check]]]) -> list[Check]:
    """Merge the nodes' checks: return the worst result of each, in the first node's order.

    If not all nodes have the same finding, their names stand before it.
    """
    names = dict.fromkeys(check.name for _, checks in results for check in checks)
    return [
        _worst([(node, check) for node, checks in results for check in checks if check.name == name]) for name in names
    ]


def _worst(found: list[tuple[str, Check]]) -> Check:
    worst = max((check for _, check in found), key=lambda check: _SEVERITY.index(check.state))
    findings: dict[str, list[str]] = {}
    for node, check in found:
        if check.state == worst.state:
            findings.setdefault(check.found, []).append(node)
    text = worst.found
    if len(findings) > 1 or len(findings[text]) < len(found):
        listed = [f"{first_few(nodes, _LISTED)}: {each}" for each, nodes in findings.items()]
        text = first_few(listed, _LISTED)
    return replace(worst, found=text)


def show(checks: Sequence[Check], title: str, seconds: float) -> None:
    """Print the table; in colour only on a terminal."""
    table = Table("check", "", "found", "what to do", title=Text(printable(title)), title_justify="left")
    for check in checks:
        word, colour = _STATES[check.state]
        texts = (Text(printable(text, keep="\n")) for text in (check.found, check.do))  # Text: brackets are no markup
        table.add_row(check.name, Text(word, colour), *texts)
    counts = {word: sum(check.state == state for check in checks) for state, (word, _) in _STATES.items()}
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    console.print(
        f"{counts['ok']} ok, {counts['warn']} warn, {counts['FAIL']} FAIL, {counts['skip']} skip; {seconds:.1f} s",
        highlight=False,
    )
