"""Print a report as tables, in a terminal or a log file."""

import sys
from collections.abc import Sequence
from operator import attrgetter

from rich.console import Console
from rich.table import Table

from pipeline.errors import printable
from pipeline.evaluation.report import Report, TableRow, changed, shown


def print_report(report: Report, before: Report | None = None) -> None:
    """Print tables of all datasets, with chance and optionally an earlier report; of sizes and types; the remarks."""
    # A log file has no width. Names may contain brackets, which are not markup.
    width = None if sys.stdout.isatty() else 120
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    if any(result.is_mmeb for result in report.results.values()):
        console.print(_precision_table(report, before))
    for group, rows in report.others(before).items():
        console.print(_table(f"{group}, of {report.model}", rows))
    if report.variants:
        console.print(_variants_table(report))
    for sentence in report.remarks():
        console.print(printable(sentence))


def _precision_table(report: Report, before: Report | None) -> Table:
    """Return a table of the results of MMEB's meta-tasks, and of the averages."""
    columns = ["queries", "chance", *(["before", "after"] if before else ["Precision@1"]), "× chance"]
    table = _titled(f"Precision@1 (%) of {report.model}", "task", columns)
    mmeb = {name: result for name, result in report.results.items() if result.is_mmeb}
    means, chances = report.averages(), report.averages(attrgetter("chance"))
    earlier = {name: result.score for name, result in before.results.items()} if before else {}
    earlier |= {f"mean: {group}": value for group, value in before.averages().items()} if before else {}
    rows: dict[str, tuple[str, int | str, float, float]] = {
        name: (each.group, sum(each.queries.values()), each.chance, each.score) for name, each in mmeb.items()
    }
    rows |= {f"mean: {group}": ("", "", chances[group], value) for group, value in means.items()}
    for number, (name, (task, queries, chance, score)) in enumerate(rows.items(), 1):
        then = [shown("P@1", earlier[name]) if name in earlier else "-"] if before else []
        figures = [shown("P@1", chance), *then, shown("P@1", score), f"{score / chance:.1f}"]
        table.add_row(printable(name), task, str(queries), *figures, end_section=number == len(mmeb))
    return table


def _table(title: str, rows: Sequence[TableRow]) -> Table:
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    table = _titled(title, "", ["queries", "chance", *metrics])
    for row in rows:
        figures = [
            _compared(metric, row.metrics[metric], row.before.get(metric)) if metric in row.metrics else ""
            for metric in metrics
        ]
        queries = "" if row.queries is None else str(row.queries)
        chance = "" if row.chance is None else f"{100 * row.chance:.1f}"
        table.add_row(printable(row.name), row.direction, queries, chance, *figures)
    return table


def _variants_table(report: Report) -> Table:
    """Return a table of the means by size and type, with the differences to the full vectors."""
    whole, *others = [report.at(variant).means() for variant in report.variants]
    table = _titled(f"means (%) by size and type of the vectors of {report.model}", "type", ["bytes", *whole])
    for variant, means in zip(report.variants, [whole, *others], strict=True):
        figures = [_compared("", means[name], None if means is whole else whole[name]) for name in whole]
        table.add_row(str(variant.form.dimensions), variant.form.kind, str(variant.form.bytes), *figures)
    return table


def _compared(metric: str, value: float, before: float | None) -> str:
    return shown(metric, value) + ("" if before is None else f" ({changed(metric, value, before)})")


def _titled(title: str, second: str, columns: Sequence[str]) -> Table:
    """Return an empty table with columns for a name, a text and numbers."""
    table = Table(title=printable(title), title_justify="left", title_style="bold")
    table.add_column("", overflow="fold")
    table.add_column(second, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table
