"""Run all checks in the order of their dependencies, show the table, and record a refusal."""

import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import transformers

from pipeline.config import Recipe
from pipeline.errors import printable
from pipeline.jobs import status
from pipeline.jobs.preflight.check import HANG_SECONDS, Check, timed_out
from pipeline.jobs.preflight.job import Job, earlier_starts, memory, model, other_jobs, processes, resuming
from pipeline.jobs.preflight.machine import attention, device, gpus
from pipeline.jobs.preflight.nodes import Nodes, Place, all_reduce, meet
from pipeline.jobs.preflight.report import over_nodes, show
from pipeline.jobs.preflight.storage import data, disk_space, evaluation, machine, run_directory

_RESULTS_SECONDS = 2 * HANG_SECONDS  # that a node may be later than the first
_ACKNOWLEDGE_SECONDS = 5
_CPU_PROCESSES = 2


def preflight(recipe: Recipe, place: Place, installed: Check, *, world: int | None, slurm: bool, began: float) -> int:
    """Check, and print the table on the first node. Returns the exit status: 2 if something would stop the run, else 0.

    installed: the check of the packages.  world: processes of the run; None: one on each GPU, or two on the CPU.
    began: from time.monotonic.
    """
    transformers.utils.logging.disable_progress_bar()
    timed_out.clear()
    run = Path(recipe.run)
    nodes, checks = Nodes(place), [installed]
    if begins := slurm and place.node == 0:
        checks.append(other_jobs(run))
        if begins := checks[-1].state != "red":
            status.begin(run)
            checks.append(earlier_starts(run))
    checks.append(meet(nodes))
    together = bool(nodes.names)
    if not together:  # then each node checks itself and prints its own errors
        nodes = Nodes(Place(name=place.name))
    hardware: list[dict] = []
    checks += [gpus(hardware, nodes, slurm), attention(recipe, device(), slurm)]
    if together:
        checks.append(all_reduce(nodes, device()))
    checks.append(run_directory(run, nodes))

    sizes = [total for node in hardware for _, total, _ in node["gpus"]]
    count = len(sizes) if together else len(sizes) * place.nodes
    job = Job(recipe, world or count or max(_CPU_PROCESSES, place.nodes), count, guessed=not world and not count)
    checks += [data(job, nodes), model(job)]
    checks.append(machine(job, place.nodes))
    if place.node == 0:
        checks += [processes(job), memory(job, min(sizes, default=0)), disk_space(job), evaluation(recipe)]
        checks.append(resuming(job))

    results = [(place.name, checks)]
    if together and place.nodes > 1:
        nodes.put("results", [asdict(check) for check in checks])
        if place.node:
            nodes.get("results", place.node, _RESULTS_SECONDS)  # returns when the store has them
            nodes.put("done", True)
            return 0
        results += _of_others(nodes)
    merged = over_nodes(results)
    if place.node == 0:
        show(merged, f"{recipe.run}, on {place.nodes} node{'s' * (place.nodes > 1)}", time.monotonic() - began)
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
