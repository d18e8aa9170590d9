"""Draw a report's figures: a bar for each dataset, the distributions of its similarities, and scores over bytes.

PNGs have a light and a dark theme, for slides and papers. SVGs are for the HTML page, with CSS variables as colours.
"""

import io
import math
import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from pipeline.evaluation.report import BINS, DatasetResult, Report


@dataclass(frozen=True)
class Theme:
    """Colours as #rrggbb.

    positive and negative come from Okabe and Ito's palette for colour-blind people: https://jfly.uni-koeln.de/color/
    """

    background: str
    ink: str
    faint: str
    rule: str
    positive: str
    negative: str
    before: str


THEMES = {
    "light": Theme("#ffffff", "#1a1c20", "#626972", "#dde1e6", "#0072b2", "#d55e00", "#a8aeb8"),
    "dark": Theme("#14161a", "#e6e8eb", "#99a1ac", "#30343b", "#56b4e9", "#e69f00", "#69717d"),
}

OUTSIDE = 0.55  # opacity of bars of out-of-distribution datasets
_SMALL, _TEXT = 7.5, 8.5  # points
_ROW = 0.25  # inches for a bar
_DRAWN_BINS = 2  # bins of BINS in a drawn bin


def write(report: Report, folder: Path, before: Report | None = None) -> None:
    """Write bars-THEME.png, similarities-THEME.png and, for a report with variants, sizes-THEME.png for each theme."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, theme in THEMES.items():
        _all_bars(report, before, theme).savefig(folder / f"bars-{name}.png", dpi=160)
        _all_similarities(report, theme).savefig(folder / f"similarities-{name}.png", dpi=160)
        if report.variants:
            _sizes_sheet(report, theme).savefig(folder / f"sizes-{name}.png", dpi=160)


def svg_bars(results: dict[str, DatasetResult], before: Report | None) -> str:
    """Return an SVG element with the bars of one group's datasets."""
    figure = Figure(figsize=(4, 0.4 + _ROW * len(results)), layout="constrained")
    bars(figure.add_subplot(), results, before, THEMES["light"])
    return _svg(figure, f"Bars of {', '.join(results)}")


def svg_similarities(name: str, result: DatasetResult, span: tuple[float, float]) -> str:
    """Return an SVG element with the similarity histograms of one dataset."""
    figure = Figure(figsize=(1.9, 1))
    similarities(figure.add_axes((0.06, 0.2, 0.83, 0.78)), result, span, THEMES["light"])
    return _svg(figure, f"Similarities of {name}")


def svg_sizes(report: Report) -> str:
    """Return an SVG element with the variants' scores over the bytes of a vector."""
    figure = Figure(figsize=(4, 2.4), layout="constrained")
    sizes(figure.add_subplot(), report, THEMES["light"])
    return _svg(figure, f"Sizes and types of {report.model}")


def grouped(report: Report) -> dict[str, dict[str, DatasetResult]]:
    """Return group -> its datasets, in the report's order."""
    groups: dict[str, dict[str, DatasetResult]] = {}
    for name, result in report.results.items():
        groups.setdefault(result.group, {})[name] = result
    return groups


def span_of(report: Report) -> tuple[float, float]:
    """Return the range of all similarities, so that all datasets are drawn to the same scale."""
    counts = sum(
        np.array(each.similarities.positive) + each.similarities.hardest_negative for each in report.results.values()
    )
    seen = np.flatnonzero(counts)
    return (float(BINS[max(seen[0] - 2, 0)]), float(BINS[min(seen[-1] + 3, len(BINS) - 1)])) if len(seen) else (-1, 1)


def bars(axes: Axes, results: dict[str, DatasetResult], before: Report | None, theme: Theme) -> None:
    """Draw the datasets' scores from top to bottom, with chance and the scores of an earlier report."""
    for place, (name, result) in enumerate(results.items()):
        then = before.results.get(name) if before else None
        top, height = (place - 0.13, 0.46) if then else (place, 0.6)
        opacity = OUTSIDE if result.in_distribution is False else 1
        score = 100 * result.score
        axes.barh(top, score, height, color=theme.background)  # hides the grid behind a transparent bar
        axes.barh(top, score, height, color=theme.positive, alpha=opacity)
        if then:
            axes.barh(place + 0.24, 100 * then.score, 0.2, color=theme.before)
        axes.vlines(100 * result.chance, place - 0.42, place + 0.42, color=theme.ink, linewidth=1.2)
        axes.text(score + 1.2, top, f"{score:.1f}", color=theme.ink, fontsize=_SMALL, va="center")
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_xlim(0, 106)  # room for the number beside a bar of 100
    axes.set_xticks(range(0, 101, 25))
    axes.set_yticks(range(len(results)), [_brief(name) for name in results])
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=theme.rule, linewidth=0.8)
    _dress(axes, theme)
    axes.tick_params(axis="y", labelcolor=theme.ink, labelsize=_TEXT)


def similarities(axes: Axes, result: DatasetResult, span: tuple[float, float], theme: Theme) -> None:
    """Draw histograms of the queries' similarities to the right candidate, and to the hardest negative."""
    pairs = (result.similarities.hardest_negative, theme.negative), (result.similarities.positive, theme.positive)
    edges = BINS[::_DRAWN_BINS]
    within = (edges >= span[0] - 0.02) & (edges <= span[1] + 0.02)  # the other bins are empty
    edges, within = edges[within], within[:-1] & within[1:]
    for counts, colour in pairs:
        shares = np.reshape(counts, (-1, _DRAWN_BINS)).sum(1)[within] / max(sum(counts), 1)
        axes.stairs(shares, edges, fill=True, color=colour, alpha=0.3)
        axes.stairs(shares, edges, color=colour, linewidth=1.1)
    axes.set_xlim(*span)
    axes.set_ylim(bottom=0)
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=5)
    _dress(axes, theme)


def sizes(axes: Axes, report: Report, theme: Theme) -> None:
    """Draw the last of the report's means over the bytes of a vector: a line for each type, a point for each size."""
    lines: dict[str, list[tuple[int, float, int]]] = {}
    for form, means in report.means_by_form.items():
        name = list(means)[-1]
        lines.setdefault(form.kind, []).append((form.bytes, 100 * means[name], form.dimensions))
    note = partial(axes.annotate, textcoords="offset points", ha="center", fontsize=_SMALL)
    for (kind, points), colour in zip(lines.items(), (theme.positive, theme.negative, theme.faint), strict=False):
        size, score, _ = zip(*points, strict=True)
        axes.plot(size, score, color=colour, marker="o", markersize=4, linewidth=1.3)
        note(kind, (size[0], score[0]), (0, 7), color=colour)
        for x, y, dimensions in points:
            note(str(dimensions), (x, y), (0, -12), color=theme.faint)
    axes.set_xscale("log", base=2)
    stored = [variant.form.bytes for variant in report.variants]
    low, high = math.floor(math.log2(min(stored))), math.ceil(math.log2(max(stored)))
    ticks = [2**power for power in range(low, high + 1, 1 + (high - low) // 8)]
    axes.set_xticks(ticks, [f"{each:,}" for each in ticks])
    axes.minorticks_off()
    axes.margins(0.1, 0.3)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=theme.rule, linewidth=0.8)
    axes.set_title(f"{name}, %, by bytes of a vector", loc="left", color=theme.ink, fontsize=_TEXT)
    _dress(axes, theme)


def _sizes_sheet(report: Report, theme: Theme) -> Figure:
    figure = _sheet(6, 3.2, theme)
    sizes(figure.add_subplot(), report, theme)
    return figure


def _all_bars(report: Report, before: Report | None, theme: Theme) -> Figure:
    groups = grouped(report)
    rows = [len(results) for results in groups.values()]
    figure = _sheet(7, _ROW * sum(rows) + 0.55 * len(rows) + 0.7, theme)
    every = figure.subplots(len(groups), height_ratios=rows, squeeze=False)[:, 0]
    for axes, (group, results) in zip(every, groups.items(), strict=True):
        bars(axes, results, before, theme)
        metrics = ", ".join(dict.fromkeys(result.metric for result in results.values()))
        axes.set_title(f"{group}: {metrics}, %", loc="left", color=theme.ink, fontsize=_TEXT + 1, weight="bold")
    handles: list[Patch | Line2D] = [Patch(color=theme.positive, label=_brief(report.model, 40))]
    if any(result.in_distribution is False for result in report.results.values()):
        handles.append(Patch(color=theme.positive, alpha=OUTSIDE, label="out of distribution"))
    if before:
        handles.append(Patch(color=theme.before, label=_brief(before.model, 40)))
    handles.append(Line2D([], [], color=theme.ink, marker="|", markersize=9, linestyle="", label="chance"))
    _legend(figure, handles, theme)
    return figure


def _all_similarities(report: Report, theme: Theme) -> Figure:
    count = len(report.results)
    columns = min(count, 6 if count > 12 else 4 if count > 4 else 3)
    lines = -(-count // columns)
    figure = _sheet(2.1 * columns + 0.3, 1.4 * lines + 0.6, theme)
    every = list(figure.subplots(lines, columns, squeeze=False).flat)
    span = span_of(report)
    for axes, (name, result) in zip(every, report.results.items(), strict=False):
        similarities(axes, result, span, theme)
        axes.set_title(f"{_brief(name)}: {overlap(result)}", loc="left", color=theme.ink, fontsize=_TEXT - 0.5)
    for axes in every[count:]:
        axes.remove()
    colours = {"positive": theme.positive, "hardest negative": theme.negative}
    _legend(figure, [Patch(color=colour, alpha=0.6, label=label) for label, colour in colours.items()], theme)
    return figure


def _sheet(width: float, height: float, theme: Theme) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    return Figure(figsize=(width, height), layout=layout, facecolor=theme.background)


def overlap(result: DatasetResult) -> str:
    """Return `Similarities.overlap` in percent, as text."""
    if not sum(result.similarities.hardest_negative):
        return "no negatives"
    return f"overlap {100 * result.similarities.overlap:.0f}%"


def _dress(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor("none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.rule)
    axes.tick_params(colors=theme.faint, labelsize=_SMALL, length=0, pad=3)


def _legend(figure: Figure, handles: list, theme: Theme) -> None:
    look = {"frameon": False, "fontsize": _TEXT, "labelcolor": theme.ink, "handlelength": 1.2}
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), **look)


def _brief(name: str, characters: int = 24) -> str:
    """Return the name as a label: shortened, as valid UTF-8, and with $ escaped, because it would begin a formula."""
    name = name if len(name) <= characters else f"{name[: characters - 1]}…"
    return name.encode(errors="replace").decode().replace("$", r"\$")


def _svg(figure: Figure, label: str) -> str:
    """Return the figure as an SVG element that fills the available width and uses the page's colours."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(?<=<svg)[^>]*?( viewBox="[^"]*")[^>]*', r' aria-hidden="true"\1', text, count=1)
    text = re.sub(r' id="[a-z0-9]+_\d+"', "", text)  # the same in every figure
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)  # they repeat the labels
    for name, colour in asdict(THEMES["light"]).items():
        text = text.replace(colour, f"var(--{name})")
    return text
