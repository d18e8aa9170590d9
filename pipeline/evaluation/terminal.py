"""Print a report as tables, in a terminal or a log file."""

import sys
from collections.abc import Sequence
from operator import attrgetter

from rich.console import Console
from rich.table import Table

from pipeline.errors import printable
from pipeline.evaluation.report import Report, TableRow, changed, shown

_FORM = "size\ntype\nbytes of a vector"  # the heading of the forms


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
        for table in _variants_tables(report, console.width):
            console.print(table)
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


def _variants_tables(report: Report, width: int) -> list[Table]:
    """Return tables of the means by size and type, with the differences to the full vectors.

    A row is a mean, a column a form. Columns that do not fit in `width` characters continue in another table.
    """
    whole = next(iter(report.means_by_form.values()))
    columns = {
        f"{form.dimensions}\n{form.kind}\n{form.bytes:,}": [
            _compared("", means[name], None if means is whole else whole[name]) for name in whole
        ]
        for form, means in report.means_by_form.items()
    }
    names = max(map(len, (*_FORM.split("\n"), *whole))) + 4  # with the borders
    each = max(len(line) for head, figures in columns.items() for line in (*head.split("\n"), *figures)) + 3
    fitting = max(1, (width - names) // each)
    tables = []
    for start in range(0, len(columns), fitting):
        continued = ", continued" if start else ""
        title = f"means (%) by size and type of the vectors of {report.model}{continued}"
        table = Table(title=printable(title), title_justify="left", title_style="bold")
        table.add_column(_FORM, overflow="fold")
        here = dict(list(columns.items())[start : start + fitting])
        for head in here:
            table.add_column(head, justify="right", no_wrap=True)
        for name, *figures in zip(whole, *here.values(), strict=True):
            table.add_row(name, *figures)
        tables.append(table)
    return tables


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
