"""An analysis as tables: the same ones for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm_workflow.bench.analysis import Analysis, Spread

MAX_ROWS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One section of the report."""

    title: str
    header: tuple[str, ...]
    """Units in brackets. The first column is text, the others are numbers."""
    rows: tuple[tuple[str, ...], ...]
    reading: str
    """How to read it."""


def report(analysis: Analysis) -> str:
    """Return the report as text."""
    parts = [*summary(analysis), ""]
    for table in tables(analysis):
        parts += [table.title, "-" * len(table.title), *_aligned(table), table.reading, ""]
    return "\n".join(parts)


def summary(analysis: Analysis) -> list[str]:
    """Return what the report is about and under which conditions, line by line."""
    rate = analysis.arrival_rate
    lines = [
        f"Trace: {analysis.source}",
        f"Runs: {analysis.num_runs}, of which {analysis.num_duplicates} repeat an earlier one",
        f"Arrivals: {'none' if rate is None else f'{rate:.3g} runs/s'}",
        f"Seconds: each run alone on {analysis.hardware}",
        "Prefixes: a cache without limits, in the trace's order",
    ]
    return [*lines, *(f"Note: {note}" for note in analysis.notes)]


def tables(analysis: Analysis) -> list[Table]:
    """Return all sections that have something to tell."""
    found = [
        _graph(analysis),
        _calls(analysis),
        _tokens(analysis),
        _paths(analysis),
        _parallelism(analysis),
        _sharing(analysis),
        _lengths(analysis),
        *_remaining(analysis),
        *_tail(analysis),
    ]
    return [_shortened(table) for table in found]


def _graph(analysis: Analysis) -> Table:
    return Table(
        title="Which stage follows which",
        header=("stage", "followed by", "share", "calls"),
        rows=tuple(
            (t.before, t.after, _share(t.share), f"{t.width:.2f}") for t in analysis.transitions
        ),
        reading="Share of the stage's calls that are followed so, and by how many such calls.",
    )


def _calls(analysis: Analysis) -> Table:
    return Table(
        title="Calls and gaps per stage",
        header=(
            "stage", "calls", "in runs", "per run", "P95", "max", "alone [s]", "P95 [s]",
            "gap [s]", "P95 [s]", "max [s]",
        ),
        rows=tuple(
            (
                s.stage, str(s.num_calls), _share(s.run_share), f"{s.calls_per_run.mean:.2f}",
                f"{s.calls_per_run.p95:.0f}", f"{s.calls_per_run.max:.0f}",
                f"{s.service_s.mean:.2f}", f"{s.service_s.p95:.2f}", f"{s.gap_s.mean:.2f}",
                f"{s.gap_s.p95:.2f}", f"{s.gap_s.max:.2f}",
            )
            for s in analysis.stages
        ),
        reading="Alone: one call with nothing beside it, prefixes cached; the gap is before it.",
    )  # fmt: skip


def _tokens(analysis: Analysis) -> Table:
    return Table(
        title="Tokens per call",
        header=(
            "stage", "prompt mean", "P50", "P95", "max", "of all", "output mean", "P50", "P95",
            "max", "of all",
        ),
        rows=tuple(
            (
                s.stage, *_tokens_of(s.prompt_tokens), _share(s.prompt_share),
                *_tokens_of(s.output_tokens), _share(s.output_share),
            )
            for s in analysis.stages
        ),
        reading="Of all: the stage's share of the trace's prompt and output tokens.",
    )  # fmt: skip


def _paths(analysis: Analysis) -> Table:
    paths = analysis.paths
    rows = [
        ("calls", analysis.calls_per_run),
        ("prompt tokens", paths.prompt_tokens),
        ("output tokens", paths.output_tokens),
        ("output tokens, longest chain", paths.critical_output_tokens),
        ("work [s]", paths.work_s),
        ("work on the critical path [s]", paths.critical_work_s),
        ("gaps on the critical path [s]", paths.gap_s),
        ("duration [s]", paths.duration_s),
        ("duration, nothing cached [s]", paths.cold_duration_s),
    ]
    return Table(
        title="One run: critical path against total work",
        header=("per run", "mean", "P50", "P95", "max"),
        rows=tuple(
            (name, *(f"{v:,.1f}" for v in (s.mean, s.p50, s.p95, s.max))) for name, s in rows
        ),
        reading=f"Calls side by side make runs {paths.speedup:.2f} times as fast as one by one.",
    )


def _parallelism(analysis: Analysis) -> Table:
    parallel = analysis.parallelism
    many = 1.0 - parallel.idle_share - parallel.single_share
    return Table(
        title="Calls side by side",
        header=("of the runs' duration", "value"),
        rows=(
            ("no call under way (gaps)", _share(parallel.idle_share)),
            ("one call", _share(parallel.single_share)),
            ("several calls", _share(max(0.0, many))),
            ("most calls at a time, mean over runs", f"{parallel.peak.mean:.1f}"),
            ("most calls at a time, any run", f"{parallel.peak.max:.0f}"),
        ),
        reading="Every call starts as soon as what it follows has ended and its gap is over.",
    )


def _sharing(analysis: Analysis) -> Table:
    rows = [(s.stage, *_known(s.within_share, s.across_share)) for s in analysis.stages]
    return Table(
        title="Prompt tokens that a prefix cache can hold",
        header=("stage", "same run", "other runs", "new"),
        rows=(*rows, ("all", *_known(analysis.within_share, analysis.across_share))),
        reading="Upper bound: a cache without limits, filled as soon as a call is made.",
    )


def _lengths(analysis: Analysis) -> Table:
    known = analysis.explained
    return Table(
        title="Output tokens known in advance",
        header=("from", "variance explained"),
        rows=(
            ("the prompt's length", _optional(known.by_prompt_length)),
            ("the stage", _optional(known.by_stage)),
            ("the stage and the prompt's length", _optional(known.by_stage_and_prompt_length)),
        ),
        reading="R² on the trace itself, so an upper bound for such predictors.",
    )


def _remaining(analysis: Analysis) -> Iterator[Table]:
    if not analysis.remaining:
        return
    yield Table(
        title="Remaining duration of a run, told at the end of a call",
        header=("after", "calls", "mean [s]", "error [s]", "R²", "error, k-th [s]", "R², k-th"),
        rows=tuple(
            (
                r.stage, str(r.num_calls), f"{r.mean_s:.2f}", f"{r.error_by_stage_s:.2f}",
                _optional(r.r2_by_stage), f"{r.error_by_round_s:.2f}", _optional(r.r2_by_round),
            )
            for r in analysis.remaining
        ),
        reading="Told by the mean over runs with other content; k-th: over calls that were the "
        "k-th of their stage too. Error: mean absolute.",
    )  # fmt: skip


def _tail(analysis: Analysis) -> Iterator[Table]:
    tail = analysis.tail
    if tail is None:
        return
    rows = [
        (
            c.stage, f"{c.num_calls_slow:.2f}", f"{c.num_calls_rest:.2f}",
            _signed(c.more_calls_s), _signed(c.longer_calls_s), _signed(c.total_s),
        )
        for c in tail.causes
    ]  # fmt: skip
    rows.append(("(gaps)", "", "", "", "", _signed(tail.gap_s)))
    difference = tail.mean_slow_s - tail.mean_rest_s
    rows.append(("all", "", "", "", "", _signed(difference)))
    yield Table(
        title="What makes the slowest 5 % slow",
        header=("stage", "slow runs", "others", "more calls [s]", "longer [s]", "total [s]"),
        rows=tuple(rows),
        reading=f"The slowest {tail.num_slow} of {analysis.num_runs} runs take "
        f"{tail.threshold_s:.1f} s or more, {tail.mean_slow_s:.1f} s on average, the others "
        f"{tail.mean_rest_s:.1f} s. Counts are calls per run on the critical path; seconds sum "
        "to the difference.",
    )


def _tokens_of(spread: Spread) -> tuple[str, ...]:
    return tuple(f"{v:,.0f}" for v in (spread.mean, spread.p50, spread.p95, spread.max))


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _known(within: float, across: float) -> tuple[str, str, str]:
    return _share(within), _share(across), _share(max(0.0, 1.0 - within - across))


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # + 0.0: no negative zero


def _optional(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _shortened(table: Table) -> Table:
    if len(table.rows) <= MAX_ROWS:
        return table
    return Table(
        title=table.title,
        header=table.header,
        rows=table.rows[:MAX_ROWS],
        reading=f"{table.reading} The first {MAX_ROWS} of {len(table.rows)} rows; --json has all.",
    )


def _aligned(table: Table) -> list[str]:
    rows = [table.header, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]
    return ["  ".join(_cells(row, widths)).rstrip() for row in rows]


def _cells(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if i == 0 else cell.rjust(width)
