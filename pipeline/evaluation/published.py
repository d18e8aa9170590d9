"""Published results, which a report shows beside its own."""

import re
from dataclasses import dataclass, field

from pipeline.evaluation.report import AVERAGES


@dataclass(frozen=True)
class Published:
    """Results of one model, as shares from 0 to 1.

    averages: over MMEB's datasets, with the names of `Report.averages`.
    metrics: by dataset, with the names of `DatasetResult.metrics`. Names of datasets are in lower case, letters only.
    """

    model: str
    source: str
    averages: dict[str, float]
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    def metrics_of(self, dataset: str) -> dict[str, float]:
        """Return a dataset's metrics, ignoring case and punctuation of its name; empty if there are none."""
        return self.metrics.get(re.sub(r"[\W_]", "", dataset).lower(), {})


def _shares(names: tuple[str, ...], percents: str) -> dict[str, float]:
    return {name: round(float(percent) / 100, 4) for name, percent in zip(names, percents.split(), strict=True)}


_LLAVE = "arXiv 2503.04812"
_T2V = "t2v R@1", "t2v R@5", "t2v R@10"

PUBLISHED = (
    Published("LLaVE-0.5B", _LLAVE, _shares(AVERAGES, "57.4 50.3 59.8 82.9 64.7 52.0 59.1")),
    Published("LLaVE-2B", _LLAVE, _shares(AVERAGES, "62.1 60.2 65.2 84.9 69.4 59.8 65.2")),
    Published(
        "LLaVE-7B",
        _LLAVE,
        _shares(AVERAGES, "65.7 65.4 70.9 91.9 75.0 64.4 70.3"),
        {"msrvtt": _shares(_T2V, "46.8 71.1 80.0"), "msvd": _shares(_T2V, "52.9 80.1 87.0")},
    ),
)
