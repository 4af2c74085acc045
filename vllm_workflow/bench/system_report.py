"""A comparison at level 3 as text, JSON and a page: what is valid, what is not, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_workflow.bench import compare_report, report
from vllm_workflow.bench.compare_report import finite
from vllm_workflow.bench.compare_rows import Row
from vllm_workflow.bench.compare_text import aligned, tables
from vllm_workflow.bench.compare_text import level_error_summary as level_1_error
from vllm_workflow.bench.report import NONE, Section, percent, plain
from vllm_workflow.bench.system import max_model_lens
from vllm_workflow.bench.system_compare import SystemComparison, level_error_summary
from vllm_workflow.bench.system_fleet import STREAM_INTERVAL, emulated_instances
from vllm_workflow.bench.system_words import NUM_LETTERS
from vllm_workflow.bench.validity import MAX_CPU_SHARE, MAX_LATE_SEND_SHARE
from vllm_workflow.emulation.lateness import MAX_LATE_SHARE


def text(comparison: SystemComparison) -> str:
    """Return everything that is printed."""
    parts = [_conditions(comparison)]
    if comparison.shown.entries:
        parts.append(tables(comparison.shown).rstrip("\n"))
    else:
        parts.append("No system has a valid measurement in every setting.")
    if excluded := excluded_rows(comparison):
        title = f"{len(excluded)} of {len(comparison.runs)} measurements are not in the tables"
        parts.append(aligned(title, excluded))
    parts.append(_level_error(comparison))
    return "\n\n".join(parts) + "\n"


def document(comparison: SystemComparison, command: Sequence[str]) -> dict[str, Any]:
    """Return what goes into the JSON file; no number in it is infinite."""
    made: dict[str, Any] = {
        "meta": meta(comparison, command),
        "rows": list(comparison.rows),
        "pairs": list(comparison.shown.pairs),
        "rows_level_2": list(comparison.below.rows),
        "rows_level_1": list(comparison.below.rows_below),
        "measurements": [
            {
                "policy": run.system.name,
                "rate": run.setting.rate,
                "seed": run.seed,
                "latencies_s": None if run.sample is None else list(run.sample.latencies_s),
                **run.figures,
            }
            for run in comparison.runs
        ],
    }
    found: dict[str, Any] = finite(made)
    return found


def meta(comparison: SystemComparison, command: Sequence[str]) -> dict[str, Any]:
    """Return the conditions."""
    said = compare_report.meta(comparison.below, command)
    options = comparison.options
    instances = emulated_instances(comparison.shown.options.setup)
    versions = {str(run.figures.get("server_version", "unknown")) for run in comparison.runs}
    return said | {
        "level": 3,
        "level_is": compare_report.LEVELS[3],
        "policies": {each.name: each.fingerprint for each in comparison.systems},
        "peers": {e.name: e.peer.requirement for e in comparison.systems if e.peer is not None},
        "peers_are_before": "stock vLLM; they get X-Session-ID and X-Request-Id",
        "vllm_servers": sorted(versions),
        "machine": dict(comparison.machine),
        "time_scale": options.time_scale,
        "time_scale_is": "steps, arrivals, gaps, SLOs, and all durations in policies, in the "
        "router's latency models and in peers' settings are divided by it; results are in seconds "
        "of life",
        "max_model_len": max_model_lens(instances),
        "stream_interval": STREAM_INTERVAL,
        "prompts": f"text of {NUM_LETTERS} bytes per token; max_tokens is the longest answer of "
        "the trace for every call, and only the emulated GPU knows when an answer ends",
        "valid_if": f"CPUs add at most {MAX_LATE_SHARE:.0%} to the steps of every server, late "
        f"sends cost runs at most {MAX_LATE_SEND_SHARE:.0%}, the generator uses at most "
        f"{MAX_CPU_SHARE:.0%} of a core, prompts and answers have the lengths of the trace",
        "measurements": len(comparison.runs),
        "measurements_invalid": comparison.num_invalid,
        "lateness": _lateness(comparison),
        "level_error": level_error_summary(comparison),
        "level_error_1_against_2": level_1_error(comparison.below),
    }


def page(comparison: SystemComparison, command: Sequence[str]) -> str | None:
    """Return the HTML report; None where nothing valid could be shown."""
    if not comparison.shown.entries:
        return None
    more: list[Section] = []
    if excluded := excluded_rows(comparison):
        more.append(report.table_section("Not in the tables", excluded))
    more.append(
        report.table_section("Level 2 against level 3", _level_rows(comparison), note=_ERROR_NOTE)
    )
    return compare_report.page(comparison.shown, command, said=meta(comparison, command), more=more)


def excluded_rows(comparison: SystemComparison) -> list[Row]:
    """Return what was measured and is not shown, with the first reason."""
    shown = {entry.name for entry in comparison.shown.entries}
    rows = []
    for row in comparison.rows:
        if row["valid"] and row["policy"] in shown:
            continue
        reasons = [row["problem"]] if row["problem"] else row["reasons"]
        why = reasons[0] if reasons else "valid, but not in every setting"
        more = f" (+{len(reasons) - 1})" if len(reasons) > 1 else ""
        rows.append(
            {
                "policy": row["policy"],
                "runs/s": plain(row["rate"]),
                "seed": str(row["seed"]),
                "within SLO": _shown(row.get("attainment"), percent),
                "P95 s": _shown(row.get("p95_s"), plain),
                "why not": why + more,
            }
        )
    return rows


_ERROR_NOTE = (
    "Same runs and arrivals; valid seeds only. Level 2 has vLLM's scheduler in virtual time, level "
    "3 adds processes, HTTP and real clocks."
)


def _shown(value: float | None, show: Any) -> str:
    return NONE if value is None else str(show(value))


def _lateness(comparison: SystemComparison) -> list[Row]:
    """Per measurement: the server that was furthest behind, and the generator."""
    return [
        {
            "policy": run.system.name,
            "seed": run.seed,
            "worst_late_share": row.get("late_share"),
            "late_sends_share": run.figures.get("generator", {}).get("late_sends_share"),
            "generator_cpu_share": run.figures.get("generator", {}).get("cpu_share"),
        }
        for run, row in zip(comparison.runs, comparison.rows, strict=True)
    ]


def _conditions(comparison: SystemComparison) -> str:
    shares = [row["late_share"] for row in comparison.rows if row["late_share"] is not None]
    worst = f"{percent(min(shares))} to {percent(max(shares))}" if shares else NONE
    machine = comparison.machine
    return (
        f"Level 3 at {comparison.options.time_scale:g} times the speed of life on "
        f"{machine['cpus']}, load average {machine['load_average_before']} before and "
        f"{machine['load_average_after']} after; what CPUs added to steps, worst server of each "
        f"measurement: {worst} (limit {MAX_LATE_SHARE:.0%}); "
        f"{comparison.num_invalid} of {len(comparison.runs)} measurements invalid"
    )


def _level_rows(comparison: SystemComparison) -> list[dict[str, str]]:
    return [
        {
            "policy": each["policy"],
            "runs/s": plain(each["rate"]),
            "seeds": str(each["seeds"]),
            "P95 s, level 2": plain(each["p95_s_level_2"]),
            "level 3": plain(each["p95_s"]),
            "error": f"{100 * each['p95_s_error']:+.1f} %",
            "mean s, level 2": plain(each["mean_s_level_2"]),
            "level 3 ": plain(each["mean_s"]),
            "error ": f"{100 * each['mean_s_error']:+.1f} %",
            "within SLO, level 2": percent(each["attainment_level_2"]),
            "level 3  ": percent(each["attainment"]),
        }
        for each in level_error_summary(comparison)["settings"]
    ]


def _level_error(comparison: SystemComparison) -> str:
    summary = level_error_summary(comparison)
    rows = _level_rows(comparison)
    if not rows:
        return "Level 2 against level 3: nothing valid to compare"
    title = (
        f"Level 2 against level 3: |error| of P95 median {percent(summary['median_abs'])}, mean "
        f"{percent(summary['mean_abs'])}, worst {percent(summary['worst_abs'])}"
    )
    return aligned(title, rows)
