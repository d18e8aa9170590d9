"""Write a report's files: report.html, which needs neither network nor scripts, and the files beside it."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.evaluation import figures
from pipeline.evaluation.published import PUBLISHED, Published
from pipeline.evaluation.report import (
    AVERAGES,
    REPORT_FILE,
    DatasetResult,
    Report,
    TableRow,
    by_direction,
    changed,
    is_rank,
    shown,
    write_text,
)

_TEMPLATE = "report.html.jinja"


def change(metric: str, now: float, before: float) -> tuple[str, str]:
    """Return a signed difference as text, and "better" or "worse", or "" if it rounds to zero."""
    text = changed(metric, now, before)
    if float(text) == 0:
        return "0.0", ""
    better = (float(text) > 0) != is_rank(metric)
    return text.replace("-", "−"), "better" if better else "worse"


def write_report(report: Report, folder: Path, before: Report | None = None) -> None:
    """Write report.json, report.html, figures/*.png and, for MMEB datasets, leaderboard.json.

    before: an earlier report to compare with.
    """
    report.save(folder / REPORT_FILE)
    if datasets := report.mmeb():
        write_text(folder / "leaderboard.json", json.dumps(_leaderboard(report.model, datasets), indent=4) + "\n")
    figures.write(report, folder / "figures", before)
    write_text(folder / "report.html", page(report, before))


def _leaderboard(model: str, datasets: Mapping[str, DatasetResult | None]) -> dict[str, Any]:
    """Return the file to submit to https://huggingface.co/spaces/TIGER-Lab/MMEB-Leaderboard, image datasets only.

    datasets: MMEB's 36 datasets by name; None for one that was not evaluated, written as in the authors' program.
    Metadata that an evaluation does not know is None: fill it in before submitting.

    The layout follows experiments/report_score_v2.py in https://github.com/TIGER-AI-Lab/VLM2Vec, and the leaderboard's
    file in docs/mmebv2_reproduction/ there, where model_size is in billions of parameters.
    """
    unknown = ("model_backbone", "model_size", "embedding_dimension", "max_length_tokens", "model_release_date", "url")
    metadata = {
        "model_name": model,
        **dict.fromkeys(unknown),
        "data_source": "Self-Reported",
        "report_generated_date": datetime.now().isoformat(),
    }
    image: dict[str, Any] = dict.fromkeys(datasets, "FILE_N/A")
    for name, result in datasets.items():
        if result:
            queries = sum(result.queries.values())
            image[name] = {"hit@1": result.score, "num_pred": queries, "num_data": queries}
    return {"metadata": metadata, "metrics": {"image": image, "video": {}, "visdoc": {}}}


def page(report: Report, before: Report | None = None) -> str:
    """Return the HTML of a report, compared with an earlier one if given. Text from data or models is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"shown": shown, "change": change, "overlap": figures.overlap}
    averages, groups, span = report.averages(), figures.grouped(report), figures.span_of(report)
    return environment.get_template(_TEMPLATE).render(
        report=report,
        before=before,
        themes={name: asdict(theme) for name, theme in figures.THEMES.items()},
        outside=figures.OUTSIDE,
        average_names=[name for name in AVERAGES if name in averages or name in report.missing()],
        averages=averages,
        earlier=before.averages() if before else {},
        chances=report.averages(attrgetter("chance")),
        papers=PUBLISHED if report.mmeb() and "mmeb" in report.protocols else (),
        groups=groups,
        others={
            group: [(row, papers_of(row, report)) for row in rows] for group, rows in report.others(before).items()
        },
        bars={group: figures.svg_bars(results, before) for group, results in groups.items()},
        variants=list(report.means_by_form.items()),
        sizes=figures.svg_sizes(report) if report.variants else "",
        similarities={name: figures.svg_similarities(name, result, span) for name, result in report.results.items()},
    )


def papers_of(row: TableRow, report: Report) -> list[tuple[Published, dict[str, float]]]:
    """Return the published metrics for a row's dataset and direction, if the report's evaluation is comparable."""
    if "video" not in report.protocols:
        return []
    found = [(paper, by_direction(paper.metrics_of(row.name)).get(row.direction, {})) for paper in PUBLISHED]
    return [(paper, metrics) for paper, metrics in found if metrics]
