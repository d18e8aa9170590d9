"""An evaluation's figures: what the report shows, and report.json keeps."""

from dataclasses import dataclass, field

import numpy as np

from pipeline.data.mmeb import META_TASKS

BINS = np.linspace(-1, 1, 201)


@dataclass(frozen=True)
class Similarities:
    """Counts in BINS of the queries' similarities to their right candidate and to their hardest wrong one."""

    positive: list[int]
    hardest_negative: list[int]

    @classmethod
    def of(cls, positive: np.ndarray, hardest_negative: np.ndarray) -> "Similarities":
        """positive, hardest_negative: (Q,); a query without a wrong candidate has -inf there, and is not counted."""
        counts = (
            np.histogram(np.clip(values[np.isfinite(values)], -1, 1), BINS)[0]
            for values in (positive, hardest_negative)
        )
        return cls(*(each.tolist() for each in counts))

    @property
    def overlap(self) -> float:
        """The area that the two distributions share, from 0 (apart) to 1 (the same)."""
        positive, negative = (
            np.array(counts) / max(sum(counts), 1) for counts in (self.positive, self.hardest_negative)
        )
        return float(np.minimum(positive, negative).sum())


@dataclass(frozen=True)
class Shown:
    """An item as a person sees it. picture: a JPEG, in base64, or empty."""

    name: str
    picture: str = ""


@dataclass(frozen=True)
class Case:
    """A query, what it should have found, and what ranked first, with their similarities to it."""

    query: Shown
    right: Shown
    first: Shown
    positive: float
    similarity: float
    rank: int
    direction: str = ""


@dataclass(frozen=True)
class Result:
    """One dataset's.

    group: one of MMEB's meta-tasks; or "text-image", "text-video", "zero-shot classification".
    in_distribution: of MMEB's datasets alone.
    queries: how many, by direction, "" where there is one.
    metrics: "P@1"; "t2i R@1", "t2i R@5", "t2i R@10", "t2i MdR", "t2i MnR", then of "i2t", or of "t2v" and "v2t";
        "top-1", "top-5". Shares from 0 to 1, ranks from 1 on. The first is the dataset's score.
    chance: of guessing, by the first metric.
    ties: queries for which a wrong candidate is as similar as the best right one; it ranks before it, if it is not the
        same item.
    collapsed: the model gives all its queries, or all its candidates, one vector: the figures say nothing else.
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
        """The name of its score."""
        return next(iter(self.metrics))

    @property
    def score(self) -> float:
        return self.metrics[self.metric]

    @property
    def is_mmeb(self) -> bool:
        return self.group in META_TASKS
