"""An evaluation's numbers: JSON for programs, a table for people."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.errors import PipelineError
from pipeline.evaluation.metrics import candidate_similarities, precision_at_1
from pipeline.evaluation.tasks import META_TASKS, Collection


@dataclass(frozen=True)
class Example:
    """A query and its best candidates, by name: (name, similarity), best first. right: the name it should find."""

    query: str
    right: str
    best: list[tuple[str, float]]


@dataclass(frozen=True)
class Dataset:
    """One dataset's result. chance: the Precision@1 of guessing. ties: queries with an equal wrong candidate."""

    task: str
    in_distribution: bool
    queries: int
    precision_at_1: float
    chance: float
    ties: int
    example: Example


@dataclass(frozen=True)
class Report:
    """Results of all datasets of an evaluation of `model`."""

    model: str
    datasets: dict[str, Dataset]

    @classmethod
    def of(cls, model: str, collection: Collection, embeddings) -> "Report":
        """embeddings: (items of the collection, hidden), unit rows."""
        datasets = {}
        for task in collection.tasks:
            similarities = candidate_similarities(task, embeddings)
            precision, ties = precision_at_1(similarities)
            first = np.argsort(-similarities[0], kind="stable")[:3]
            names = [collection.names[row] for row in task.candidates[0]]
            example = Example(
                query=collection.names[task.queries[0]],
                right=names[0],
                best=[(names[place], round(float(similarities[0][place]), 4)) for place in first],
            )
            chance = float(np.mean([1 / len(candidates) for candidates in task.candidates]))
            datasets[task.name] = Dataset(
                task.meta_task, task.in_distribution, len(task.queries), precision, chance, ties, example
            )
        return cls(model, datasets)

    def averages(self, field: str = "precision_at_1") -> dict[str, float]:
        """Means over datasets, not queries, as MMEB's table has them; what has no dataset is left out."""
        groups = {task: [d for d in self.datasets.values() if d.task == task] for task in META_TASKS}
        groups["in distribution"] = [d for d in self.datasets.values() if d.in_distribution]
        groups["out of distribution"] = [d for d in self.datasets.values() if not d.in_distribution]
        groups["overall"] = list(self.datasets.values())
        return {name: float(np.mean([getattr(d, field) for d in group])) for name, group in groups.items() if group}

    @classmethod
    def merged(cls, reports: Sequence["Report"]) -> "Report":
        """One of all their datasets; PipelineError where they are of different models or share a dataset."""
        if len(models := {report.model for report in reports}) != 1:
            raise PipelineError(f"the reports are of different models: {', '.join(sorted(models))}")
        names = [name for report in reports for name in report.datasets]
        if twice := {name for name in names if names.count(name) > 1}:
            raise PipelineError(f"several reports have {', '.join(sorted(twice))}")
        datasets = {name: dataset for report in reports for name, dataset in report.datasets.items()}
        return cls(models.pop(), {name: datasets[name] for name in sorted(datasets)})

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(asdict(self) | {"averages": self.averages()}, indent=1) + "\n")
        unfinished.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Report":
        try:
            content = json.loads(path.read_text())
            datasets = {}
            for name, values in content["datasets"].items():
                example = values.pop("example")
                best = [tuple(candidate) for candidate in example.pop("best")]
                datasets[name] = Dataset(**values, example=Example(**example, best=best))
            return cls(content["model"], datasets)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PipelineError(f"{path} is not an evaluation's report: {error}") from None

    def print(self, before: "Report | None" = None) -> None:
        """Precision@1 in percent, by dataset and averaged, beside chance and, if given, an earlier report."""
        table = Table(title=f"Precision@1 (%) of {self.model}", title_justify="left", title_style="bold")
        table.add_column("", no_wrap=True)
        table.add_column("task", no_wrap=True)
        for column in (
            "queries",
            "chance",
            *(["before", "after"] if before else ["Precision@1"]),
            "× chance",
        ):
            table.add_column(column, justify="right")

        def add(name: str, task: str, queries: str, chance: float, now: float, then: float | None) -> None:
            earlier = [f"{100 * then:.1f}" if then is not None else "-"] if before else []
            table.add_row(
                name,
                task,
                queries,
                f"{100 * chance:.1f}",
                *earlier,
                f"{100 * now:.1f}",
                f"{now / chance:.1f}",
            )

        for name, d in self.datasets.items():
            then = before.datasets.get(name) if before else None
            add(
                name,
                d.task,
                str(d.queries),
                d.chance,
                d.precision_at_1,
                then.precision_at_1 if then else None,
            )
        table.add_section()
        chances, earlier = self.averages("chance"), before.averages() if before else {}
        for name, value in self.averages().items():
            add(f"mean: {name}", "", "", chances[name], value, earlier.get(name))
        # In a log file there is no width to fit.
        console = Console() if sys.stdout.isatty() else Console(width=120)
        console.print(table)
        if ties := sum(d.ties for d in self.datasets.values()):
            console.print(f"{ties} queries had a wrong candidate as similar as the right one; these count as right.")

    def print_example(self, name: str) -> None:
        """One query of a dataset with its best candidates."""
        example = self.datasets[name].example
        print(f"{name}, its first query: {example.query!r}; right is {example.right!r}. The best three:")
        for place, (candidate, similarity) in enumerate(example.best, 1):
            print(f"  {place}. {candidate}  ({similarity:.3f}){'  <- right' if candidate == example.right else ''}")
