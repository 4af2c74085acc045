"""Charts of results as SVG text. No global state of matplotlib is used or left changed.

A name (a policy, a system) has one colour, dash and marker in all charts of a report: make one
`Palette` of all names and give it to each. A chart without data says "none".
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter

from vllm_workflow.core.metrics import slo_attainment

# Okabe and Ito's colours, which people with any colour vision can tell apart, without the yellow
# that white paper swallows.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SIZE_INCHES = (9.0, 4.2)
_NUM_IN_LEGEND_COLUMN = 8
_NUM_SCALES = 200
_MAX_LINEAR_RATIO = 4.0
"""Of the greatest to the least scale; beyond it their axis is logarithmic."""
_RC: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "vllm-workflow",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e9ee",
    "axes.axisbelow": True,
    "axes.edgecolor": "#8a94a3",
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Look:
    """How one name is drawn."""

    colour: str
    dashes: str
    marker: str


class Palette:
    """Gives each name a look of its own, in the order of the names.

    Seven names differ by colour, further ones by dashes and marker too.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(dict.fromkeys(names))

    def __getitem__(self, name: str) -> Look:
        index = self.names.index(name)
        turn, colour = divmod(index, len(_COLOURS))
        return Look(
            _COLOURS[colour],
            _DASHES[turn % len(_DASHES)],
            _MARKERS[(index + turn) % len(_MARKERS)],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a chart; points without a `y` are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    """Lower edge of the band, one per point."""
    high: Sequence[float | None] | None = None


def series_of(
    rows: Iterable[Mapping[str, Any]], *, x: str, y: str, by: str = "policy"
) -> list[Series]:
    """Return a line per value of `by`: means over rows with equal `x`, as over seeds.

    The band reaches from the lowest to the highest of them.

    Args:
        rows: Each with `x`, `y` and `by`; a `y` of None is no sample.
        x: Name of the column along the axis.
        y: Name of the column of the values.
        by: Name of the column that tells lines apart.
    """
    samples: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        at = samples.setdefault(str(row[by]), {}).setdefault(float(row[x]), [])
        if row[y] is not None and math.isfinite(row[y]):
            at.append(float(row[y]))
    lines = []
    for name, points in samples.items():
        xs = sorted(points)
        found = [points[value] for value in xs]
        lines.append(
            Series(
                name=name,
                x=xs,
                y=[sum(values) / len(values) if values else None for values in found],
                low=[min(values, default=None) for values in found],
                high=[max(values, default=None) for values in found],
            )
        )
    return lines


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    palette: Palette | None = None,
    share: bool = False,
    goal: float | None = None,
    log_x: bool = False,
) -> str:
    """Draw lines with a marker per point, and bands where they have a width.

    Args:
        series: The lines.
        x_label: With the unit.
        y_label: With the unit.
        palette: Of the report; by default one of these names.
        share: `y` is a share from 0 to 1, drawn as a percentage.
        goal: Drawn across, thin.
        log_x: A logarithmic axis.
    """
    looks = palette or Palette(line.name for line in series)
    figure, axes = _figure(x_label, y_label)
    for line in series:
        points = [(x, y) for x, y in zip(line.x, line.y) if y is not None]
        look = looks[line.name]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=look.colour,
            linestyle=look.dashes,
            marker=look.marker,
            markersize=5,
            label=line.name if points else f"{line.name} (none)",
        )
        _band(axes, line, look)
    if log_x:
        axes.set_xscale("log")
    if goal is not None:
        axes.axhline(goal, color="#8a94a3", linewidth=0.8, linestyle=(0, (4, 4)))
    _finish(axes, share=share, is_empty=not any(y is not None for s in series for y in s.y))
    return _svg(figure)


def attainment_by_rate(
    rows: Iterable[Mapping[str, Any]],
    *,
    x: str = "rate",
    by: str = "policy",
    x_label: str = "arrivals (runs/s)",
    palette: Palette | None = None,
    goal: float | None = 0.95,
) -> str:
    """Draw SLO attainment against the arrival rate, a line per policy.

    Args:
        rows: With `attainment`, and the columns that `x` and `by` name; one per seed or more.
        x: `rate`, or `load`.
        by: See `series_of`.
        x_label: Of that column.
        palette: See `line_chart`.
        goal: See `line_chart`.
    """
    return line_chart(
        series_of(rows, x=x, y="attainment", by=by),
        x_label=x_label,
        y_label="runs within their SLO",
        palette=palette,
        share=True,
        goal=goal,
    )


def attainment_by_scale(
    samples: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str = "SLO, as a multiple of the run's reference",
    palette: Palette | None = None,
    goal: float | None = 0.95,
) -> str:
    """Draw which share of runs would have met `scale · reference`, for every scale.

    Args:
        samples: Name to latencies (`inf` if a run did not end) and references, in seconds, one
            each per run.
        x_label: What the reference is.
        palette: See `line_chart`.
        goal: See `line_chart`.
    """
    looks = palette or Palette(samples)
    figure, axes = _figure(x_label, "runs within their SLO")
    scales = {name: [t / r for t, r in zip(*pair)] for name, pair in samples.items()}
    finite = sorted(s for values in scales.values() for s in values if math.isfinite(s))
    for name, (latencies_s, references_s) in samples.items():
        label = name if latencies_s else f"{name} (none)"
        xs = _logarithmic(finite)
        ys = [
            slo_attainment(latencies_s, [x * r for r in references_s]) if latencies_s else None
            for x in xs
        ]
        _step(axes, xs, [math.nan if y is None else y for y in ys], looks[name], label)
    if finite and finite[-1] > _MAX_LINEAR_RATIO * finite[0]:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    if goal is not None:
        axes.axhline(goal, color="#8a94a3", linewidth=0.8, linestyle=(0, (4, 4)))
    _finish(axes, share=True, is_empty=not finite)
    return _svg(figure)


def latency_cdf(
    samples: Mapping[str, Sequence[float]],
    *,
    slo_s: float | None = None,
    x_label: str = "run latency (s)",
    palette: Palette | None = None,
) -> str:
    """Draw which share of all runs had ended after so many seconds.

    Args:
        samples: Name to latencies in seconds; `inf` for a run that did not end, so that its line
            stays below 100 %.
        slo_s: If it is the same for all runs: drawn as a mark.
        x_label: With the unit.
        palette: See `line_chart`.
    """
    looks = palette or Palette(samples)
    figure, axes = _figure(x_label, "runs that have ended")
    longest = max((v for s in samples.values() for v in s if math.isfinite(v)), default=None)
    for name, values in samples.items():
        ended = sorted(v for v in values if math.isfinite(v))
        if longest is None or not values:
            _step(axes, [], [], looks[name], f"{name} (none)")
            continue
        xs = [0.0, *ended, 1.04 * longest]
        ys = [0.0, *((n + 1) / len(values) for n in range(len(ended))), len(ended) / len(values)]
        _step(axes, xs, ys, looks[name], name)
    if slo_s is not None and longest is not None:
        axes.axvline(slo_s, color="#b3261e", linewidth=1.0)
        axes.annotate(
            f"SLO {slo_s:g} s",
            (slo_s, 0.02),
            xytext=(4, 0),
            textcoords="offset points",
            color="#b3261e",
        )
    axes.set_xlim(left=0.0)
    _finish(axes, share=True, is_empty=longest is None)
    return _svg(figure)


def _figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    return figure, axes


def _band(axes: Axes, line: Series, look: Look) -> None:
    if line.low is None or line.high is None:
        return
    edges = [
        (x, low, high)
        for x, low, high in zip(line.x, line.low, line.high)
        if low is not None and high is not None
    ]
    if any(high > low for _, low, high in edges):
        axes.fill_between(
            [x for x, _, _ in edges],
            [low for _, low, _ in edges],
            [high for _, _, high in edges],
            color=look.colour,
            alpha=0.15,
            linewidth=0,
        )


def _step(axes: Axes, xs: Sequence[float], ys: Sequence[float], look: Look, label: str) -> None:
    axes.plot(
        xs,
        ys,
        drawstyle="steps-post",
        color=look.colour,
        linestyle=look.dashes,
        linewidth=1.6,
        label=label,
    )


def _logarithmic(finite: Sequence[float]) -> list[float]:
    """Return scales from the least to the greatest of a sorted sample, in even ratios."""
    if not finite:
        return []
    low, high = finite[0] / 1.05, finite[-1] * 1.05
    return [low * (high / low) ** (i / (_NUM_SCALES - 1)) for i in range(_NUM_SCALES)]


def _finish(axes: Axes, *, share: bool, is_empty: bool) -> None:
    if share:
        axes.set_ylim(-0.02, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if is_empty:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center")
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        # Beside the lines, never on them.
        axes.legend(
            handles,
            labels,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            ncols=math.ceil(len(labels) / (2 * _NUM_IN_LEGEND_COLUMN)),
            frameon=False,
            handlelength=2.6,
        )


def _svg(figure: Figure) -> str:
    """Return the figure as an `<svg>` element for the inside of a page, the same every time."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_RC):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].strip()
