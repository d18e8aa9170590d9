"""The report of an evaluation: results by dataset, their averages, and report.json."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from pipeline.data.mmeb import META_TASKS, MMEB_TASKS
from pipeline.errors import PipelineError, first_few
from pipeline.models.compact import Form
from pipeline.storage import objects
from pipeline.storage.documents import parse_json

BINS = np.linspace(-1, 1, 201)
Counts = Annotated[list[int], Field(min_length=200, max_length=200)]  # of each bin
REPORT_FILE = "report.json"
_MMEB_QUERIES = 1000  # per dataset, as sampled in the VLM2Vec paper (arXiv 2410.05160)
AVERAGES = (*META_TASKS, "in distribution", "out of distribution", "overall")
_ALIASES = {"ImageNet-1K": "ImageNet_1K"}  # an evaluation set may have the name of the training set
# MMEB's 36 datasets: name -> (meta-task, in distribution).
_MMEB = {name: task for name, task in MMEB_TASKS.items() if name not in _ALIASES.values()}


@dataclass(frozen=True)
class Similarities:
    """Histograms over BINS: the queries' similarities to their right candidate, and to their hardest negative."""

    positive: Counts
    hardest_negative: Counts

    @classmethod
    def of(cls, positive: np.ndarray, hardest_negative: np.ndarray) -> "Similarities":
        """Count similarities (Q,). -inf, for a query without a wrong candidate, is not counted."""
        counts = (
            np.histogram(np.clip(values[np.isfinite(values)], -1, 1), BINS)[0]
            for values in (positive, hardest_negative)
        )
        return cls(*(each.tolist() for each in counts))

    @property
    def overlap(self) -> float:
        """The common area of the two distributions, from 0 (disjoint) to 1 (equal)."""
        positive, negative = (
            np.array(counts) / max(sum(counts), 1) for counts in (self.positive, self.hardest_negative)
        )
        return float(np.minimum(positive, negative).sum())


@dataclass(frozen=True)
class Shown:
    """An item for display.  picture: a JPEG in base64, or empty."""

    name: str
    picture: str = ""


@dataclass(frozen=True)
class Case:
    """A query, its right candidate and the first-ranked one, with their similarities to the query."""

    query: Shown
    right: Shown
    first: Shown
    positive: float
    similarity: float
    rank: int
    direction: str = ""


@dataclass(frozen=True)
class DatasetResult:
    """The result of one dataset.

    group: one of MMEB's meta-tasks; or "text-image", "text-video", "zero-shot classification".
    in_distribution: None outside MMEB's meta-tasks.
    queries: their number by direction; the key is "" if there is only one direction.
    metrics: "P@1"; "t2i R@1", "t2i R@5", "t2i R@10", "t2i MdR", "t2i MnR", then the same for "i2t", or for "t2v" and
        "v2t"; "top-1", "top-5". Shares from 0 to 1, ranks from 1. The first metric is the dataset's score.
    chance: the first metric's value for random ranking.
    ties: the number of queries with a wrong candidate exactly as similar as the best right one. The wrong one ranks
        first, unless both are the same item.
    collapsed: whether all queries, or all candidates, have the same vector; the metrics are then meaningless.
    worst: the queries with the lowest positive minus hardest negative similarity, the worst first.
    """

    group: str
    in_distribution: bool | None
    language: str
    queries: dict[str, int]
    metrics: Annotated[dict[str, float], Field(min_length=1)]
    chance: float
    ties: int
    similarities: Similarities
    worst: list[Case] = field(default_factory=list)
    collapsed: bool = False

    @property
    def metric(self) -> str:
        """The name of the metric that is the score."""
        return next(iter(self.metrics))

    @property
    def score(self) -> float:
        return self.metrics[self.metric]

    @property
    def is_mmeb(self) -> bool:
        return self.group in META_TASKS


@dataclass(frozen=True)
class Variant:
    """The datasets' scores with vectors in another form, by name."""

    form: Form
    scores: dict[str, float]


@dataclass(frozen=True)
class _Stored:
    format: Literal[1]
    model: str
    averages: dict[str, float]
    results: dict[str, DatasetResult]
    protocols: tuple[Literal["mmeb", "video"], ...] = ()
    variants: tuple[Variant, ...] = ()


@dataclass(frozen=True)
class TableRow:
    """A row in the table of a group of datasets outside MMEB.

    direction: see Retrieval.  queries: None in a row of means.  chance: None for the second direction.
    metrics: named without the direction.  before: the metrics from an earlier report; empty without one.
    """

    name: str
    direction: str
    queries: int | None
    chance: float | None
    metrics: dict[str, float]
    before: dict[str, float]


@dataclass(frozen=True)
class Report:
    """Results of `model` by dataset: MMEB datasets in the order of MMEB's table, then the others in the given order.

    protocols: the evaluations of LLaVE's paper that read items like this one; only they are comparable.
    variants: the full vectors, then the other forms that were scored; empty if none was.
    """

    model: str
    results: dict[str, DatasetResult]
    protocols: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()

    def __post_init__(self) -> None:
        places = {name: place for place, name in enumerate(MMEB_TASKS)}
        places |= {alias: places[name] for name, alias in _ALIASES.items()}
        ordered = sorted(
            self.results.items(), key=lambda item: places.get(item[0], len(places)) if item[1].is_mmeb else len(places)
        )
        object.__setattr__(self, "results", dict(ordered))

    @property
    def score(self) -> float:
        """The mean of all datasets' scores, to compare checkpoints that were evaluated on the same sets."""
        return float(np.mean([result.score for result in self.results.values()]))

    @property
    def collapsed(self) -> list[str]:
        """The datasets where all queries, or all candidates, have the same vector."""
        return [name for name, result in self.results.items() if result.collapsed]

    def mmeb(self) -> dict[str, DatasetResult | None]:
        """Return MMEB's 36 datasets in the order of its table, None for missing ones; empty if all are missing."""
        ours = {name: result for name, result in self.results.items() if result.is_mmeb}
        found = {name: ours.get(name) or ours.get(_ALIASES.get(name, "")) for name in _MMEB}
        return found if any(found.values()) else {}

    def averages(self, of: Callable[[DatasetResult], float] = attrgetter("score")) -> dict[str, float]:
        """Return means over datasets, not queries, as in MMEB's table: by meta-task, by distribution, and overall.

        If the report has any of MMEB's 36 datasets, means are over those only, and omitted if one is missing.
        """
        return {
            group: float(np.mean([of(result) for result in members.values() if result]))
            for group, members in self._groups().items()
            if None not in members.values()
        }

    def means(self) -> dict[str, float]:
        """Return mean scores: the averages by meta-task and overall, of each other group, and of all datasets.

        The last is left out where another one is the same.
        """
        groups: dict[str, list[float]] = {}
        for result in self.results.values():
            groups.setdefault("MMEB" if result.is_mmeb else result.group, []).append(result.score)
        means = {group: mean for group, mean in self.averages().items() if group in (*META_TASKS, "overall")}
        means |= {group: float(np.mean(scores)) for group, scores in groups.items() if group != "MMEB"}
        if len(groups) > 1 or ("overall" not in means and "MMEB" in groups):
            means["all datasets"] = self.score
        return means

    def at(self, variant: Variant) -> "Report":
        """Return a report of a variant, in which each dataset has only its score."""
        results = {
            name: replace(result, metrics={result.metric: variant.scores[name]})
            for name, result in self.results.items()
        }
        return Report(self.model, results)

    @cached_property
    def means_by_form(self) -> dict[Form, dict[str, float]]:
        """The `means` of each variant, the full vectors first."""
        return {variant.form: self.at(variant).means() for variant in self.variants}

    def missing(self) -> dict[str, list[str]]:
        """Return omitted average -> the datasets that are missing for it."""
        omitted = {
            group: [name for name, result in members.items() if result is None]
            for group, members in self._groups().items()
        }
        return {group: names for group, names in omitted.items() if names}

    def _groups(self) -> dict[str, dict[str, DatasetResult | None]]:
        """Return the datasets of each average; None for a missing one."""
        datasets: list[tuple[str, str, bool | None, DatasetResult | None]] = [
            (name, *_MMEB[name], result) for name, result in self.mmeb().items()
        ]
        if not datasets:
            own = {name: result for name, result in self.results.items() if result.is_mmeb}
            datasets = [(name, result.group, result.in_distribution, result) for name, result in own.items()]
        groups: dict[str, dict[str, DatasetResult | None]] = {group: {} for group in AVERAGES}
        for name, task, inside, result in datasets:
            for group in (task, "in distribution" if inside else "out of distribution", "overall"):
                groups[group][name] = result
        return {group: members for group, members in groups.items() if members}

    def others(self, before: "Report | None" = None) -> dict[str, list[TableRow]]:
        """Return group -> a row for each dataset and direction, for results outside MMEB.

        If a dataset has several languages, rows with their means follow.
        """
        groups: dict[str, list[TableRow]] = {}
        for result in self.results.values():
            if not result.is_mmeb:
                groups.setdefault(result.group, [])
        for group, rows in groups.items():
            families: dict[str, list[list[TableRow]]] = {}
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
        """Write report.json, atomically."""
        results = {name: asdict(result) for name, result in self.results.items()}
        head = {"format": 1, "model": self.model, "averages": self.averages(), "protocols": list(self.protocols)}
        if self.variants:
            head["variants"] = [
                asdict(variant) | {"bytes": variant.form.bytes, "means": means}
                for variant, means in zip(self.variants, self.means_by_form.values(), strict=True)
            ]
        write_text(path, json.dumps(head | {"results": results}))

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Read a file from `save`, or report.json in a folder. Raises PipelineError if it has another form."""
        file = path / REPORT_FILE if path.is_dir() else path
        remedy = "it is not an evaluation's report: evaluate again, or name another file"
        try:
            data = file.read_bytes()
        except OSError as error:
            raise PipelineError(f"{file} cannot be read ({error.strerror}): {remedy}") from None
        content: _Stored = parse_json(data, str(file), _Stored, remedy=remedy)
        for variant in content.variants:
            if variant.scores.keys() != content.results.keys():
                raise PipelineError(f"{file} lacks datasets with vectors of {variant.form}: {remedy}")
        return cls(content.model, content.results, content.protocols, content.variants)

    def remarks(self) -> list[str]:
        """Return notes on the tables: collapse, omitted averages, small datasets, ties."""
        remarks, omitted = [], []
        if self.collapsed:
            remarks.append(
                f"THE MODEL HAS COLLAPSED: in {', '.join(self.collapsed)} all queries or all candidates have the same "
                "vector, so the scores are meaningless. Were its weights loaded? Did training diverge?"
            )
        for group, names in self.missing().items():
            omitted.append(f"{group} lacks {first_few(names)} of its {len(self._groups()[group])}")
        if omitted:
            remarks.append(f"Means with a missing dataset are omitted: {'; '.join(omitted)}.")
        short = [name for name, result in self.mmeb().items() if result and result.queries[""] < _MMEB_QUERIES]
        if short:
            remarks.append(f"MMEB has {_MMEB_QUERIES:,} queries in each dataset; these have fewer: {first_few(short)}.")
        if ties := sum(result.ties for result in self.results.values()):
            remarks.append(
                f"{ties} queries had a wrong candidate as similar as the right one: they count as wrong, unless both "
                "candidates are the same item."
            )
        return remarks


def shown(metric: str, value: float) -> str:
    """Return a metric as text: ranks as they are, shares in percent."""
    return f"{value if is_rank(metric) else 100 * value:.1f}"


def changed(metric: str, now: float, before: float) -> str:
    """Return the signed difference as text, in the unit of `shown`."""
    return f"{(now - before) * (1 if is_rank(metric) else 100):+.1f}"


def is_rank(metric: str) -> bool:
    """Return whether the metric is a median or mean rank, for which lower is better."""
    return metric.endswith(("MdR", "MnR"))


def by_direction(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Convert {"t2i R@1": 0.5, ...} to {"t2i": {"R@1": 0.5, ...}, ...}, in the same order; "" for no direction."""
    grouped: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        direction, _, metric = name.rpartition(" ")
        grouped.setdefault(direction, {})[metric] = value
    return grouped


def _family(name: str, language: str) -> str:
    """Return a dataset's name without the language at its end: XM3600-de, XM3600/de -> XM3600."""
    return re.sub(rf"[\W_]*(?<![A-Za-z]){re.escape(language)}\W*$", "", name) or name if language else name


def _rows(name: str, result: DatasetResult, before: Report | None) -> list[TableRow]:
    then = before.results.get(name) if before else None
    earlier = by_direction(then.metrics) if then else {}
    return [
        TableRow(
            name,
            direction,
            result.queries.get(direction),
            None if place else result.chance,  # chance belongs to the first metric, so to the first direction
            metrics,
            earlier.get(direction, {}),
        )
        for place, (direction, metrics) in enumerate(by_direction(result.metrics).items())
    ]


def _mean(name: str, rows: Sequence[TableRow]) -> TableRow:
    """Return the mean over languages, with earlier metrics only if all languages have them."""
    befores = [row.before for row in rows]
    chance = None if rows[0].chance is None else float(np.mean([row.chance for row in rows]))
    before = _means(befores) if all(befores) else {}
    return TableRow(name, rows[0].direction, None, chance, _means([row.metrics for row in rows]), before)


def _means(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([each[name] for each in metrics])) for name in metrics[0]}


def write_text(path: Path, text: str) -> None:
    """Write the text atomically. Characters that are not UTF-8, as in some file names, are replaced."""
    objects.write(str(path), text.encode(errors="replace"))
