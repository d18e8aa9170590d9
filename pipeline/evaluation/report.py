"""An evaluation's numbers: JSON for programs, tables and figures for people."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from pipeline.data.mmeb import META_TASKS, MMEB_TASKS
from pipeline.errors import PipelineError, printable
from pipeline.evaluation.leaderboard import leaderboard
from pipeline.evaluation.results import BINS, Result
from pipeline.storage import objects
from pipeline.storage.documents import parse_json

FORMAT = 1
REPORT_FILE = "report.json"
_MMEB_QUERIES = 1000  # of each dataset, as the VLM2Vec paper samples them (arXiv 2410.05160)
AVERAGES = (*META_TASKS, "in distribution", "out of distribution", "overall")
_ALIASES = {"ImageNet-1K": "ImageNet_1K"}  # an evaluation may call it as the training set does
# Name -> meta-task, and whether it is in distribution: each of MMEB's 36 once.
_MMEB = {name: task for name, task in MMEB_TASKS.items() if name not in _ALIASES.values()}


@dataclass(frozen=True)
class Row:
    """A line of a table of datasets that are not MMEB's.

    direction: see Retrieval.  queries, chance: None where a line has none: of a mean, of the other direction.
    metrics: without the direction in their names.  before: the same of an earlier report; empty without one.
    """

    name: str
    direction: str
    queries: int | None
    chance: float | None
    metrics: dict[str, float]
    before: dict[str, float]


@dataclass(frozen=True)
class Report:
    """Results of an evaluation of `model`, by dataset: MMEB's in the order of its table, then the others as given."""

    model: str
    results: dict[str, Result]

    def __post_init__(self) -> None:
        places = {name: place for place, name in enumerate(MMEB_TASKS)}
        places |= {alias: places[name] for name, alias in _ALIASES.items()}
        ordered = sorted(
            self.results.items(), key=lambda item: places.get(item[0], len(places)) if item[1].is_mmeb else len(places)
        )
        object.__setattr__(self, "results", dict(ordered))

    @property
    def score(self) -> float:
        """The mean of all datasets' scores, by which checkpoints are compared that were evaluated on the same sets."""
        return float(np.mean([result.score for result in self.results.values()]))

    @property
    def collapsed(self) -> list[str]:
        """The datasets for which the model's vectors are all one."""
        return [name for name, result in self.results.items() if result.collapsed]

    def mmeb(self) -> dict[str, Result | None]:
        """MMEB's 36 datasets in the order of its table, None for those that are missing; empty if all are."""
        ours = {name: result for name, result in self.results.items() if result.is_mmeb}
        found = {name: ours.get(name) or ours.get(_ALIASES.get(name, "")) for name in _MMEB}
        return found if any(found.values()) else {}

    def averages(self, of: Callable[[Result], float] = attrgetter("score")) -> dict[str, float]:
        """Means over datasets, not queries, as MMEB's table has them: by meta-task, by distribution, and overall.

        Where one of MMEB's own datasets is there, each is over MMEB's alone, and only given if it has all of them.
        """
        return {
            group: float(np.mean([of(result) for result in members.values()]))
            for group, members in self._groups().items()
            if None not in members.values()
        }

    def missing(self) -> dict[str, list[str]]:
        """The averages that are not given -> the datasets that they lack."""
        lacking = {
            group: [name for name, result in members.items() if result is None]
            for group, members in self._groups().items()
        }
        return {group: names for group, names in lacking.items() if names}

    def _groups(self) -> dict[str, dict[str, Result | None]]:
        """What each average is over."""
        datasets = [(name, *_MMEB[name], result) for name, result in self.mmeb().items()] or [
            (name, result.group, result.in_distribution, result)
            for name, result in self.results.items()
            if result.is_mmeb
        ]
        groups: dict[str, dict[str, Result | None]] = {group: {} for group in AVERAGES}
        for name, task, inside, result in datasets:
            for group in (task, "in distribution" if inside else "out of distribution", "overall"):
                groups[group][name] = result
        return {group: members for group, members in groups.items() if members}

    def others(self, before: "Report | None" = None) -> dict[str, list[Row]]:
        """Group -> a row for each dataset and direction, for results that are not MMEB's.

        Datasets in several languages are followed by the means over these.
        """
        groups: dict[str, list[Row]] = {}
        for result in self.results.values():
            if not result.is_mmeb:
                groups.setdefault(result.group, [])
        for group, rows in groups.items():
            families: dict[str, list[list[Row]]] = {}
            for name, result in self.results.items():
                if result.group == group:
                    families.setdefault(_family(name, result.language), []).append(_rows(name, result, before))
            for family, languages in families.items():
                rows += [row for language in languages for row in language]
                if len(languages) > 1:
                    name = f"mean: {family}, {len(languages)} languages"
                    rows += [_mean(name, among) for among in zip(*languages, strict=True)]
        return groups

    def save(self, path: Path) -> None:
        """Write it as JSON; the file is there whole or not at all."""
        head = {"format": FORMAT, "model": self.model, "averages": self.averages()}
        _write(path, json.dumps(head | {"results": {name: asdict(result) for name, result in self.results.items()}}))

    @classmethod
    def read(cls, path: Path) -> "Report":
        """What `save` wrote to a file, or `write` to a folder; PipelineError if that is not a report of this format."""
        file = path / REPORT_FILE if path.is_dir() else path
        try:
            remedy = "it is not an evaluation's report: evaluate again, or name another"
            content = parse_json(file.read_bytes(), str(file), remedy=remedy)
            version = content.get("format") if isinstance(content, dict) else None
            if version != FORMAT:
                raise PipelineError(
                    f"{file} has format {version!r}, this version reads format {FORMAT} of reports: evaluate again"
                )
            results = TypeAdapter(dict[str, Result]).validate_python(content["results"])
            for name, result in results.items():
                similarities = result.similarities
                counts = similarities.positive, similarities.hardest_negative
                if not result.metrics or {len(each) for each in counts} != {len(BINS) - 1}:
                    raise ValueError(f"{name} has no metrics, or not {len(BINS) - 1} bins of similarities")
            return cls(str(content["model"]), results)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise PipelineError(f"{file} is not an evaluation's report: {where}: {first['msg']}") from None
        except (OSError, ValueError, KeyError, RecursionError) as error:
            raise PipelineError(f"{file} is not an evaluation's report: {error!r}") from None

    def write(self, folder: Path, before: "Report | None" = None) -> None:
        """report.json, report.html, figures/*.png, and of MMEB's datasets leaderboard.json.

        before: an earlier report to set beside it.
        """
        # Jinja and matplotlib take a third of a second to import, and training, which imports this, draws no report.
        from pipeline.evaluation import figures, html

        self.save(folder / REPORT_FILE)
        if datasets := self.mmeb():
            _write(folder / "leaderboard.json", json.dumps(leaderboard(self.model, datasets), indent=4) + "\n")
        figures.write(self, folder / "figures", before)
        _write(folder / "report.html", html.page(self, before))

    def print(self, before: "Report | None" = None) -> None:
        """Tables of all datasets beside chance and, if given, an earlier report; what averages lack, and ties."""
        # In a log file there is no width to fit. A name may hold brackets, which are no markup.
        width = None if sys.stdout.isatty() else 120
        console = Console(width=width, markup=False, emoji=False, highlight=False)
        if any(result.is_mmeb for result in self.results.values()):
            console.print(self._precision_table(before))
        for group, rows in self.others(before).items():
            console.print(_table(printable(f"{group}, of {self.model}"), rows))
        for sentence in self.remarks():
            console.print(printable(sentence))

    def remarks(self) -> list[str]:
        """What a reader of the tables must know: the averages that are not there, and the ties."""
        said, lacking = [], []
        if self.collapsed:
            said.append(
                f"THE MODEL HAS COLLAPSED: it gives all queries or all candidates of {', '.join(self.collapsed)} one "
                "vector, and the figures say nothing else. Were its weights loaded? Did training diverge?"
            )
        for group, names in self.missing().items():
            listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            lacking.append(f"{group} lacks {listed} of its {len(self._groups()[group])}")
        if lacking:
            said.append(f"Means that lack a dataset are not given: {'; '.join(lacking)}.")
        short = [name for name, result in self.mmeb().items() if result and result.queries[""] < _MMEB_QUERIES]
        if short:
            listed = ", ".join(short[:4]) + (f" and {len(short) - 4} more" if len(short) > 4 else "")
            said.append(f"MMEB has {_MMEB_QUERIES:,} queries a dataset; fewer have {listed}.")
        if ties := sum(result.ties for result in self.results.values()):
            said.append(
                f"{ties} queries had a wrong candidate as similar as the right one, which counts as found only "
                "where the two are one item."
            )
        return said

    def _precision_table(self, before: "Report | None") -> Table:
        table = Table(title=printable(f"Precision@1 (%) of {self.model}"), title_justify="left", title_style="bold")
        table.add_column("", no_wrap=True)
        table.add_column("task", no_wrap=True)
        for column in ("queries", "chance", *(["before", "after"] if before else ["Precision@1"]), "× chance"):
            table.add_column(column, justify="right")

        def add(name: str, task: str, queries: str, chance: float, now: float, then: float | None) -> None:
            earlier = [f"{100 * then:.1f}" if then is not None else "-"] if before else []
            table.add_row(
                printable(name),
                task,
                queries,
                f"{100 * chance:.1f}",
                *earlier,
                f"{100 * now:.1f}",
                f"{now / chance:.1f}",
            )

        for name, result in self.results.items():
            if result.is_mmeb:
                then = before.results.get(name) if before else None
                queries = sum(result.queries.values())
                add(name, result.group, str(queries), result.chance, result.score, then and then.score)
        table.add_section()
        chances, earlier = self.averages(attrgetter("chance")), before.averages() if before else {}
        for group, value in self.averages().items():
            add(f"mean: {group}", "", "", chances[group], value, earlier.get(group))
        return table


def shown(metric: str, value: float) -> str:
    """A metric as people write it: ranks as they are, shares in percent."""
    return f"{value if is_rank(metric) else 100 * value:.1f}"


def changed(metric: str, now: float, before: float) -> str:
    """The signed difference, in the unit of `shown`."""
    return f"{(now - before) * (1 if is_rank(metric) else 100):+.1f}"


def is_rank(metric: str) -> bool:
    """Whether it is better when it is lower: of median and mean rank."""
    return metric.endswith(("MdR", "MnR"))


def by_direction(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """{"t2i R@1": 0.5, ...} -> {"t2i": {"R@1": 0.5, ...}, ...}, in the same order; "" has those without direction."""
    sorted_: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        direction, _, metric = name.rpartition(" ")
        sorted_.setdefault(direction, {})[metric] = value
    return sorted_


def _family(name: str, language: str) -> str:
    """A dataset's name without its language, which ends it where there are several: XM3600-de, XM3600/de."""
    return re.sub(rf"[\W_]*(?<![A-Za-z]){re.escape(language)}\W*$", "", name) or name if language else name


def _rows(name: str, result: Result, before: Report | None) -> list[Row]:
    then = before.results.get(name) if before else None
    earlier = by_direction(then.metrics) if then else {}
    return [
        Row(
            name,
            direction,
            result.queries.get(direction),
            None if place else result.chance,  # it is of the first metric, so of the first direction
            metrics,
            earlier.get(direction, {}),
        )
        for place, (direction, metrics) in enumerate(by_direction(result.metrics).items())
    ]


def _mean(name: str, rows: Sequence[Row]) -> Row:
    """Over languages; beside earlier figures only if all of them have some."""
    befores = [row.before for row in rows]
    chance = None if rows[0].chance is None else float(np.mean([row.chance for row in rows]))
    before = _means(befores) if all(befores) else {}
    return Row(name, rows[0].direction, None, chance, _means([row.metrics for row in rows]), before)


def _means(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([each[name] for each in metrics])) for name in metrics[0]}


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", overflow="fold")
    table.add_column("", no_wrap=True)
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    for column in ("queries", "chance", *metrics):
        table.add_column(column, justify="right")
    for row in rows:
        figures = [
            shown(metric, row.metrics[metric])
            + (f" ({changed(metric, row.metrics[metric], row.before[metric])})" if metric in row.before else "")
            if metric in row.metrics
            else ""
            for metric in metrics
        ]
        queries = "" if row.queries is None else str(row.queries)
        chance = "" if row.chance is None else f"{100 * row.chance:.1f}"
        table.add_row(printable(row.name), row.direction, queries, chance, *figures)
    return table


def _write(path: Path, text: str) -> None:
    objects.write(str(path), text.encode(errors="replace"))  # a file's name in it may not be text
