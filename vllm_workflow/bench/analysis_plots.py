"""An analysis as plots, each an SVG that needs nothing else."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vllm_workflow.bench.analysis import END, NUM_POINTS, START, Analysis, StageSummary

MAX_STAGES = 20
"""Stages shown, those with most work; more labels would run into each other."""
_BLUE, _ORANGE, _GREY, _GREEN = "#3465a4", "#d97706", "#b8bcc2", "#2f8f5b"
_WIDTH = 8.4
"""Inches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One figure of the page."""

    title: str
    svg: str


def plots(analysis: Analysis) -> list[Plot]:
    """Return all figures that have something to show."""
    busiest = sorted(analysis.stages, key=lambda s: -s.num_calls * s.service_s.mean)[:MAX_STAGES]
    stages = [stage for stage in analysis.stages if stage in busiest]
    drawn: list[tuple[str, Callable[[Analysis, Sequence[StageSummary]], Figure] | None]] = [
        ("Which stage follows which", _graph),
        ("Tokens per call", _tokens),
        ("Duration of a run alone", _durations),
        ("Calls side by side over a run", _parallelism),
        ("Prompt tokens that a prefix cache can hold", _sharing),
        ("Remaining duration and how well it can be told", _remaining),
        ("What makes the slowest 5 % slow", _tail if analysis.tail else None),
    ]
    return [Plot(title=title, svg=_svg(draw(analysis, stages))) for title, draw in drawn if draw]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # A stage's name in a script that the font lacks shows as boxes; the tables have it.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _figure(height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots(1, columns, sharey=columns > 1)
    for each in np.atleast_1d(axes):
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _label(stage: str) -> str:
    """A stage's name as text: no formulas, no line as long as the plot."""
    short = stage if len(stage) <= 28 else f"{stage[:27]}…"
    return short.replace("$", r"\$") or "(none)"


def _rows(stages: Sequence[StageSummary]) -> float:
    return 1.2 + 0.34 * len(stages)


def _stage_axis(axes: Any, stages: Sequence[str]) -> None:
    axes.set_yticks(range(len(stages)), [_label(stage) for stage in stages])
    axes.set_ylim(len(stages) - 0.4, -0.6)


def _graph(analysis: Analysis, stages: Sequence[StageSummary]) -> Figure:
    names = [stage.stage for stage in stages]
    rows, columns = [START, *names], [*names, END]
    matrix = np.zeros((len(rows), len(columns)))
    for t in analysis.transitions:
        if t.before in rows and t.after in columns:
            matrix[rows.index(t.before), columns.index(t.after)] = t.share
    figure, axes = _figure(1.9 + 0.42 * len(rows))
    axes.imshow(matrix, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    size = 9 if len(columns) <= 12 else 6
    for (i, j), share in np.ndenumerate(matrix):
        if share > 0.0:
            colour = "white" if share > 0.5 else "black"
            text = f"{100 * share:.0f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)
    axes.set_xticks(range(len(columns)), [_label(c) for c in columns], rotation=40, ha="right")
    _stage_axis(axes, rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("followed by [% of the stage's calls]")
    axes.set_ylabel("stage")
    return figure


def _tokens(analysis: Analysis, stages: Sequence[StageSummary]) -> Figure:
    figure, panels = _figure(_rows(stages), columns=2)
    for axes, name, spreads in (
        (panels[0], "prompt", [stage.prompt_tokens for stage in stages]),
        (panels[1], "output", [stage.output_tokens for stage in stages]),
    ):
        for i, spread in enumerate(spreads):
            axes.hlines(i, spread.p50, spread.p95, color=_BLUE, linewidth=5, alpha=0.45)
            axes.plot(spread.mean, i, "o", color=_BLUE)
            axes.plot(spread.max, i, "|", color=_ORANGE, markersize=12, markeredgewidth=2)
        axes.set_xscale("log")
        axes.set_xlabel(f"{name} tokens per call")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_title("bar: P50 to P95, dot: mean, tick: max", fontsize=9, loc="left")
    _stage_axis(panels[0], [stage.stage for stage in stages])
    return figure


def _durations(analysis: Analysis, stages: Sequence[StageSummary]) -> Figure:
    figure, axes = _figure(3.2)
    share = 100 * np.arange(1, analysis.num_runs + 1) / analysis.num_runs
    paths = analysis.paths
    axes.step(paths.durations_s, share, where="post", color=_BLUE, label="critical path with gaps")
    axes.step(paths.works_s, share, where="post", color=_ORANGE, label="all calls one by one")
    axes.set_xlabel("seconds")
    axes.set_ylabel("runs that take at most so long [%]")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 101)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _parallelism(analysis: Analysis, stages: Sequence[StageSummary]) -> Figure:
    figure, axes = _figure(2.8)
    x = 100 * (np.arange(NUM_POINTS) + 0.5) / NUM_POINTS
    axes.step(x, analysis.parallelism.p95, where="mid", color=_GREY, label="P95 over runs")
    axes.step(x, analysis.parallelism.mean, where="mid", color=_BLUE, label="mean over runs")
    axes.set_xlabel("part of the run's duration [%]")
    axes.set_ylabel("calls under way")
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _sharing(analysis: Analysis, stages: Sequence[StageSummary]) -> Figure:
    figure, axes = _figure(_rows(stages))
    totals = np.array(
        [s.num_calls * s.prompt_tokens.mean / analysis.num_runs / 1000 for s in stages]
    )
    left = np.zeros(len(stages))
    for label, colour, shares in (
        ("new", _ORANGE, [1 - s.within_share - s.across_share for s in stages]),
        ("known from other runs", _BLUE, [s.across_share for s in stages]),
        ("known from the same run", _GREEN, [s.within_share for s in stages]),
    ):
        part = totals * np.array(shares)
        axes.barh(range(len(stages)), part, left=left, color=colour, label=label, height=0.7)
        left += part
    _stage_axis(axes, [stage.stage for stage in stages])
    axes.set_xlabel("thousand prompt tokens per run")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _remaining(analysis: Analysis, stages: Sequence[StageSummary]) -> Figure:
    names = {stage.stage for stage in stages}
    rows = [r for r in analysis.remaining if r.stage in names]
    figure, axes = _figure(1.3 + 0.5 * max(1, len(rows)))
    y = np.arange(len(rows))
    for offset, label, colour, values in (
        (-0.27, "mean remaining", _GREY, [r.mean_s for r in rows]),
        (0.0, "error, told by stage", _ORANGE, [r.error_by_stage_s for r in rows]),
        (0.27, "error, told by stage and round", _BLUE, [r.error_by_round_s for r in rows]),
    ):
        axes.barh(y + offset, values, height=0.25, color=colour, label=label)
    _stage_axis(axes, [r.stage for r in rows])
    axes.set_xlabel("seconds (error: mean absolute)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _tail(analysis: Analysis, stages: Sequence[StageSummary]) -> Figure:
    tail = analysis.tail
    if tail is None:
        raise ValueError("a trace without a tail has no such plot")
    causes = tail.causes[:MAX_STAGES]
    figure, axes = _figure(1.6 + 0.42 * (len(causes) + 1))
    y = np.arange(len(causes))
    more, longer = [c.more_calls_s for c in causes], [c.longer_calls_s for c in causes]
    axes.barh(y - 0.19, more, height=0.36, color=_BLUE, label="more calls")
    axes.barh(y + 0.19, longer, height=0.36, color=_ORANGE, label="longer calls")
    axes.barh(len(causes), tail.gap_s, height=0.36, color=_GREY, label="gaps")
    _stage_axis(axes, [*(c.stage for c in causes), "(gaps)"])
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel("seconds more on the critical path than in other runs")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
