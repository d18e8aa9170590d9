"""The results of one dataset, as stored in report.json."""

from dataclasses import dataclass, field

import numpy as np

from pipeline.data.mmeb import META_TASKS

BINS = np.linspace(-1, 1, 201)


@dataclass(frozen=True)
class Similarities:
    """Histograms over BINS: the queries' similarities to their right candidate, and to their hardest negative."""

    positive: list[int]
    hardest_negative: list[int]

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
    metrics: dict[str, float]
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
