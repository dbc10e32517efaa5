"""The report of a run: one HTML file with its curves, made from ``metrics.jsonl``.

The file is self-contained: plots are inline SVG, and it needs neither network nor scripts. It follows the reader's
light or dark setting.
"""

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import matplotlib
from cycler import cycler
from jinja2 import Environment, PackageLoader
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mbridge_train.run.metrics import read_metrics
from mbridge_train.run.run_directory import replace_text

SMOOTHING_STEPS = 20
"""Smallest number of points of a curve that is drawn with a moving average."""

_COLORS = ["#2f7ed8", "#e4853a", "#3aa76d", "#c8529b", "#8a6fd1", "#c9a227", "#3fb0c9", "#d9534f"]
# Matplotlib needs a color, which is then replaced by the text color of the page.
_INK = "#010203"


@dataclass(kw_only=True, slots=True, frozen=True)
class Chart:
    """One plot of the report."""

    title: str
    metrics: tuple[str, ...]
    """Names in ``metrics.jsonl``, possibly with ``*`` and ``?``: one curve for each recorded metric."""
    unit: str = ""
    best: Literal["max", "min"] | None = None
    """The value that the summary shows as the best; None: no value."""
    smooth: bool = True
    """Draw long curves with a moving average; False for values that are not measured, such as a learning rate."""
    stacked: bool = False
    """Draw the metrics as parts of a whole."""


@dataclass(slots=True)
class _Curve:
    metric: str
    steps: list[int]
    values: list[float]

    def best(self, kind: Literal["max", "min"]) -> tuple[int, float]:
        """Return the first step with the largest or smallest value, and the value."""
        value = max(self.values) if kind == "max" else min(self.values)
        return self.steps[self.values.index(value)], value


def write_report(
    metrics: Path, out: Path, *, title: str, charts: Sequence[Chart], section: str = "", config: str | None = None
) -> None:
    """Write the report on ``metrics.jsonl`` to `out`; an existing file is replaced atomically.

    Args:
        charts: charts in the order of display. Charts without recorded metrics are listed by title.
        section: HTML to show below the curves; its texts must be escaped.
        config: the configuration of the run, shown verbatim.

    Raises:
        TrainError: a line of `metrics`, named with file and number, is not valid, or `out` cannot be written.
        FileNotFoundError: `metrics` does not exist.
    """
    records = read_metrics(metrics)
    curves = {chart: _curves(chart, records) for chart in charts}
    drawn = [chart for chart in charts if curves[chart]]
    templates = Environment(loader=PackageLoader("mbridge_train.run", "."), autoescape=True, trim_blocks=True)
    templates.filters["figure"] = format_figure
    page = templates.get_template("report.html.jinja").render(
        title=title,
        records=records,
        drawn=[(chart, curves[chart], _draw(number, chart, curves[chart])) for number, chart in enumerate(drawn)],
        missing=[chart.title for chart in charts if not curves[chart]],
        smoothing_steps=SMOOTHING_STEPS,
        section=section,
        config=config,
    )
    replace_text(out, page + "\n")


def _curves(chart: Chart, records: list[dict[str, Any]]) -> list[_Curve]:
    recorded = sorted({name for line in records for name, value in line.items() if isinstance(value, int | float)})
    curves = []
    for name in dict.fromkeys(n for pattern in chart.metrics for n in recorded if fnmatchcase(n, pattern)):
        points = [(line["step"], float(line[name])) for line in records if line.get(name) is not None]
        curves.append(_Curve(name, [step for step, _ in points], [value for _, value in points]))
    return curves


def _draw(number: int, chart: Chart, curves: list[_Curve]) -> str:
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"chart{number}",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.prop_cycle": cycler(color=_COLORS),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        if chart.stacked and len({tuple(curve.steps) for curve in curves}) == 1:
            _stack(axes, curves)
        else:
            for curve in curves:
                _line(axes, curve, chart.smooth)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.margins(x=0.02)
        if len(curves) > 1:
            columns = min(len(curves), 3)
            figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=8, handlelength=1.2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Identifiers must be unique within the page, not only within the plot.
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>chart{number}-", svg)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', rf'\1role="img" aria-label="{html.escape(chart.title)}"', svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)\s+height="[^"]*"', r"\1", svg, count=1)
    return svg.replace(_INK, "currentColor")


def _line(axes: Axes, curve: _Curve, smooth: bool) -> None:
    few = len(curve.values) < SMOOTHING_STEPS
    if few or not smooth:
        axes.plot(curve.steps, curve.values, label=curve.metric, marker="o" if few else "", markersize=3, linewidth=1.6)
        return
    (raw,) = axes.plot(curve.steps, curve.values, alpha=0.3, linewidth=1)
    average = _moving_average(curve.values, max(3, len(curve.values) // SMOOTHING_STEPS))
    axes.plot(curve.steps, average, label=curve.metric, color=raw.get_color(), linewidth=1.7)


def _stack(axes: Axes, curves: list[_Curve]) -> None:
    steps = curves[0].steps
    bottom = [0.0] * len(steps)
    if len(steps) > SMOOTHING_STEPS:
        axes.stackplot(steps, *(curve.values for curve in curves), labels=[curve.metric for curve in curves])
        return
    width = 0.85 * min((after - before for before, after in pairwise(steps)), default=1)
    for curve in curves:
        axes.bar(steps, curve.values, width, bottom=bottom, label=curve.metric)
        bottom = [low + value for low, value in zip(bottom, curve.values, strict=True)]


def _moving_average(values: list[float], window: int) -> list[float]:
    """Return the centered moving average, over fewer values at the ends."""
    half = window // 2
    slices = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [math.fsum(part) / len(part) for part in slices]


def format_figure(value: float) -> str:
    """Format `value` with at most four significant digits, whole numbers in full."""
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e9):
        return str(int(value))
    return f"{value:.4g}"
