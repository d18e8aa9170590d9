"""The results of all nodes as one table, a row for each check."""

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.errors import first_few, printable
from pipeline.jobs.preflight.check import Check

_STATES = {"skipped": ("skip", "dim"), "green": ("ok", "green"), "yellow": ("warn", "yellow"), "red": ("FAIL", "red")}
_SEVERITY = list(_STATES)
_LISTED = 3  # findings of one check that differ between nodes


def over_nodes(results: Sequence[tuple[str, Sequence[Check]]]) -> list[Check]:
    """(node's name, its checks) -> each check once, in the first node's order: the worst result of the nodes.

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
        text = "; ".join(listed[:_LISTED]) + (f"; and {len(listed) - _LISTED} more" if len(listed) > _LISTED else "")
    rates = sorted((check.rate, node) for node, check in found if check.rate is not None)
    if rates and worst.state == "green":
        (slow, slowest), (fast, fastest) = rates[0], rates[-1]
        text += (
            f", {slow:,.0f} ({slowest}) to {fast:,.0f} MB/s ({fastest})" if len(rates) > 1 else f", {fast:,.0f} MB/s"
        )
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
