"""The report of a run: one HTML file with its curves, made from ``metrics.jsonl``.

The file is self-contained: plots are inline SVG, and it needs neither network nor scripts. It follows the reader's
light or dark setting.
"""

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any, Literal

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mbridge_train.run.files import replace_text
from mbridge_train.run.metrics import read_metrics
from mbridge_train.run.progress import format_figure

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


def write_report(
    metrics: Path,
    out: Path,
    *,
    title: str,
    charts: Sequence[Chart],
    section: str = "",
    config: str | None = None,
) -> None:
    """Write the report; an existing file is replaced atomically.

    Args:
        metrics: ``metrics.jsonl`` of the run.
        out: the HTML file.
        title: heading of the page.
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
    missing = [chart.title for chart in charts if not curves[chart]]
    parts = [
        f'<p class="note">Steps: {records[0]["step"]} to {records[-1]["step"]}.</p>' if records else "",
        _warning(records),
        '<div class="charts">',
        *(_figure(number, chart, curves[chart]) for number, chart in enumerate(drawn)),
        "</div>",
        '<p class="note">Thin curves show each step, thick ones a moving average.</p>'
        if len(records) >= SMOOTHING_STEPS
        else "",
        f'<p class="note">Not recorded: {html.escape(", ".join(missing))}.</p>' if missing else "",
        _summary(drawn, curves),
        section,
        f"<details><summary>Configuration</summary><pre>{html.escape(config)}</pre></details>" if config else "",
    ]
    page = _PAGE.substitute(title=html.escape(title), body="\n".join(part for part in parts if part))
    replace_text(out, page)


def _curves(chart: Chart, records: list[dict[str, Any]]) -> list[_Curve]:
    recorded = sorted({name for line in records for name, value in line.items() if isinstance(value, int | float)})
    curves = []
    for name in dict.fromkeys(n for pattern in chart.metrics for n in recorded if fnmatchcase(n, pattern)):
        points = [(line["step"], float(line[name])) for line in records if line.get(name) is not None]
        curves.append(_Curve(name, [step for step, _ in points], [value for _, value in points]))
    return curves


def _figure(number: int, chart: Chart, curves: list[_Curve]) -> str:
    unit = f' <span class="unit">{html.escape(chart.unit)}</span>' if chart.unit else ""
    caption = f"<figcaption>{html.escape(chart.title)}{unit}</figcaption>"
    return f"<figure>{caption}{_draw(number, chart, curves)}</figure>"


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


def _warning(records: list[dict[str, Any]]) -> str:
    affected = [record for record in records if "nonfinite" in record]
    if not affected:
        return ""
    names = ", ".join(f"{name} = {value}" for name, value in affected[0]["nonfinite"].items())
    return (
        f'<p class="warning">Values are not finite in {len(affected)} step{"s" * (len(affected) > 1)}, '
        f"the first at step {affected[0]['step']}: {html.escape(names)}.</p>"
    )


def _summary(charts: Sequence[Chart], curves: Mapping[Chart, list[_Curve]]) -> str:
    rows = []
    for chart in charts:
        for curve in curves[chart]:
            best = ""
            if chart.best is not None:
                value = (max if chart.best == "max" else min)(curve.values)
                step = curve.steps[curve.values.index(value)]
                best = f'{format_figure(value)} <span class="unit">at step {step}</span>'
            first, last = (format_figure(curve.values[index]) for index in (0, -1))
            rows.append(
                f"<tr><td>{html.escape(chart.title)}</td><td><code>{html.escape(curve.metric)}</code></td>"
                f"<td>{first}</td><td>{last}</td><td>{best}</td></tr>"
            )
    if not rows:
        return '<p class="note">No metrics yet.</p>'
    head = "<tr><th>Chart</th><th>Metric</th><th>First</th><th>Last</th><th>Best</th></tr>"
    return f'<h2>Summary</h2><div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --ink: #1c2330; --soft: #667085; --page: #f6f7f9; --card: #ffffff; --line: #e1e5ea; --warn: #fff3d6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7ee; --soft: #97a1b1; --page: #12151b; --card: #1b2029; --line: #2c333f; --warn: #43371a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 32px 24px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 12px; }
h2 { font-size: 18px; margin: 36px 0 10px; }
.unit, .note { color: var(--soft); }
.unit { font-weight: normal; font-size: 13px; }
.warning { background: var(--warn); border-radius: 8px; padding: 10px 14px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; }
figure { margin: 0; padding: 14px 16px 8px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
figcaption { font-weight: 600; margin-bottom: 6px; }
figure svg { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; background: var(--card); border: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
th:nth-child(n + 3), td:nth-child(n + 3) { text-align: right; }
code, pre { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
details { margin-top: 32px; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px;
  overflow-x: auto; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")
