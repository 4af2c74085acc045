"""A comparison as text: a table per setting, and the table of HexGen-Text2SQL's ablations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from vllm_workflow.bench.compare import Comparison, column_mean, same_setting
from vllm_workflow.bench.compare_jobs import Setting
from vllm_workflow.bench.compare_rows import Row
from vllm_workflow.bench.report import NONE, percent, plain
from vllm_workflow.core.metrics import percentile

PAPER_TABLE: Mapping[tuple[str, str], str] = {
    (dispatch, ordering): f"{dispatch}+{ordering}"
    for dispatch in ("round-robin", "hexgen")
    for ordering in ("fcfs", "urgency")
}
"""(dispatch, ordering) -> policy: what the paper compares by part."""
DEFAULT_POLICY = "workflow"
_COLUMNS = (
    ("attainment", "within SLO"),
    ("goodput", "goodput"),
    ("throughput", "runs/s"),
    ("mean_s", "mean s"),
    ("p50_s", "P50 s"),
    ("p95_s", "P95 s"),
    ("p99_s", "P99 s"),
    ("slo_scale_at_95", "scale@95%"),
    ("slo_scale_at_99", "scale@99%"),
    ("failed", "failed"),
    ("decision_us", "decision µs"),
)


def tables(comparison: Comparison) -> str:
    """Return everything that is printed."""
    parts = []
    for setting in comparison.settings:
        parts.append(_table(comparison, setting))
        if small := paper_rows(comparison, setting):
            parts.append(aligned("HexGen-Text2SQL by part", small))
    if comparison.rows_below:
        parts.append(_level_error(comparison))
    return "\n\n".join(parts) + "\n"


def setting_title(setting: Setting) -> str:
    """Say what a table is about."""
    load = "" if setting.load is None else f" (load {setting.load:g})"
    slo = (
        f"SLO {setting.slo_s:g} s"
        if setting.slo_s is not None
        else f"SLO {setting.slo_scale:g}×LB1"
    )
    return f"{setting.trace}, {setting.rate:.4g} runs/s{load}, {slo}"


def summary_rows(comparison: Comparison, setting: Setting) -> list[dict[str, str]]:
    """Return a row per policy, the least P95 first: mean ± standard deviation over seeds."""
    rows = []
    by_policy = {e.name: comparison.rows_of(setting, e.name) for e in comparison.entries}
    for name in sorted(by_policy, key=lambda name: column_mean(by_policy[name], "p95_s")):
        found = by_policy[name]
        variant = found[0]["variant"]
        row = {"policy": f"{name} [{variant}]" if variant else name}
        for column, title in _COLUMNS:
            row[title] = spread([each[column] for each in found], column)
        rows.append(row)
    rows.append(_bound_row(comparison, setting))
    return rows


def spread(values: Sequence[float | None], column: str) -> str:
    """Return mean ± standard deviation over seeds; none if a seed has no value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return NONE
    if any(math.isinf(value) for value in known):
        return "∞"
    if column == "failed":
        return plain(round(sum(known)))
    mean = statistics.fmean(known)
    show = percent if column == "attainment" else plain
    if column == "decision_us" or len(known) == 1:
        return show(float(mean))
    deviation = statistics.stdev(known)
    return f"{show(float(mean))} ± {show(float(deviation))}"


def paper_rows(comparison: Comparison, setting: Setting) -> list[dict[str, str]]:
    """Return the paper's table, if its four policies are there: dispatch by ordering; the default
    policy beside them, if it is compared too.
    """
    names = {entry.name for entry in comparison.entries}
    if not names.issuperset(PAPER_TABLE.values()):
        return []
    rows = []
    beside = {(name, ""): name for name in (DEFAULT_POLICY,) if name in names}
    for (dispatch, ordering), name in {**PAPER_TABLE, **beside}.items():
        found = comparison.rows_of(setting, name)
        row = {"dispatch": dispatch, "ordering": ordering}
        for column, title in (
            ("p95_s", "P95 s"),
            ("throughput", "runs/s"),
            ("slo_scale_at_95", "scale@95%"),
        ):
            row[title] = spread([each[column] for each in found], column)
        rows.append(row)
    return rows


def _bound_row(comparison: Comparison, setting: Setting) -> dict[str, str]:
    """What nothing can beat: each run on its critical path, alone."""
    samples = comparison.samples[comparison.entries[0].name, setting]
    row = dict.fromkeys(title for _, title in _COLUMNS)
    columns: dict[str, list[float | None]] = {
        "P50 s": [percentile(s.references_s, 50.0) for s in samples],
        "P95 s": [percentile(s.references_s, 95.0) for s in samples],
        "P99 s": [percentile(s.references_s, 99.0) for s in samples],
        "mean s": [statistics.fmean(s.references_s) for s in samples],
        "scale@95%": [1.0],
        "scale@99%": [1.0],
    }
    shown = {title: spread(columns[title], "") if title in columns else "" for title in row}
    return {"policy": "lower bound (LB1)", **shown}


def _table(comparison: Comparison, setting: Setting) -> str:
    options = comparison.options
    title = (
        f"{setting_title(setting)}, level {options.level}, {options.setup.fleet}, "
        f"{options.setup.num_runs} runs, {options.num_seeds} seeds (± standard deviation)"
    )
    return aligned(title, summary_rows(comparison, setting))


def aligned(title: str, rows: Sequence[Mapping[str, str]]) -> str:
    """Return a table below its title; numbers to the right."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([title, *text])


def level_errors(comparison: Comparison) -> list[Row]:
    """Return level 1 against the level of the rows: P95 per policy and setting.

    `error` is that of the mean over seeds, `mean_abs_error` the mean over seeds of the absolute
    error of one; shares.
    """
    found = []
    for setting in comparison.settings:
        for entry in comparison.entries:
            pairs = [
                (below["p95_s"], row["p95_s"])
                for below, row in zip(comparison.rows_below, comparison.rows, strict=True)
                if row["policy"] == entry.name and same_setting(row, setting)
            ]
            if any(not math.isfinite(value) for each in pairs for value in each):
                continue
            one, other = (statistics.fmean(column) for column in zip(*pairs))
            found.append(
                {
                    "policy": entry.name,
                    "trace": setting.trace,
                    "rate": setting.rate,
                    "load": setting.load,
                    "slo_scale": setting.slo_scale,
                    "p95_s_level_1": one,
                    "p95_s": other,
                    "error": one / other - 1.0,
                    "mean_abs_error": statistics.fmean(abs(a / b - 1.0) for a, b in pairs),
                }
            )
    return found


def level_error_summary(comparison: Comparison) -> Row:
    """Return `level_errors` in a few numbers."""
    errors = level_errors(comparison)
    absolute = [abs(each["error"]) for each in errors]
    return {
        "what": f"P95 run latency at level 1 against level {comparison.options.level}, same runs "
        "and arrivals",
        "goal": 0.03,
        "median_abs": statistics.median(absolute) if absolute else None,
        "mean_abs": statistics.fmean(absolute) if absolute else None,
        "worst_abs": max(absolute, default=None),
        "mean_signed": statistics.fmean(e["error"] for e in errors) if errors else None,
        "settings": errors,
    }


def _level_error(comparison: Comparison) -> str:
    rows = [
        {
            "policy": each["policy"],
            "trace": each["trace"],
            "runs/s": plain(each["rate"]),
            "P95 s, level 1": plain(each["p95_s_level_1"]),
            f"P95 s, level {comparison.options.level}": plain(each["p95_s"]),
            "error": f"{100 * each['error']:+.1f} %",
            "mean |error| of a seed": percent(each["mean_abs_error"]),
        }
        for each in level_errors(comparison)
    ]
    summary = level_error_summary(comparison)
    title = (
        f"Level 1 against level {comparison.options.level}: |error| of P95 "
        f"median {percent(summary['median_abs'])}, mean {percent(summary['mean_abs'])}, "
        f"worst {percent(summary['worst_abs'])}"
    )
    return aligned(title, rows) if rows else title
