"""A comparison as JSON and as a page."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from vllm_workflow.bench import plots, report
from vllm_workflow.bench.compare import Comparison
from vllm_workflow.bench.compare_jobs import NUM_CAPACITY_RUNS, NUM_PROFILE_RUNS, Setting
from vllm_workflow.bench.compare_policies import ALPHAS, PORTFOLIO
from vllm_workflow.bench.compare_rows import DEFINITIONS, NUM_RESAMPLES
from vllm_workflow.bench.compare_text import (
    level_error_summary,
    paper_rows,
    setting_title,
    summary_rows,
)
from vllm_workflow.bench.report import Section
from vllm_workflow.core.metrics import mean, percentile
from vllm_workflow.sim.capacity import REFERENCE_POLICIES
from vllm_workflow.sim.compiled import is_compiled
from vllm_workflow.sim.workloads import PREFIX

LEVELS = {
    1: "engines in closed form between events",
    2: "vLLM's own scheduler and KV-cache manager in virtual time",
    3: "vLLM servers with an emulated GPU, router and HTTP in real time",
}
_CAPACITY = (
    f"highest throughput of {' and '.join(REFERENCE_POLICIES)} at any rate of even arrivals, "
    f"{NUM_CAPACITY_RUNS} runs, level 1"
)
_PROFILES = (
    "the router is told each workflow's stages with their means, of a generator over "
    f"{NUM_PROFILE_RUNS} runs that are not compared on, of a file over all its runs; output "
    "lengths of single calls it learns as it goes"
)
_PACKAGES = ("vllm-workflow", "numpy", "vllm")


def document(comparison: Comparison, command: Sequence[str]) -> dict[str, Any]:
    """Return what goes into the JSON file; no number in it is infinite."""
    made = {
        "meta": meta(comparison, command),
        "rows": list(comparison.rows),
        "pairs": list(comparison.pairs),
    }
    if comparison.rows_below:
        made["rows_level_1"] = list(comparison.rows_below)
    found: dict[str, Any] = finite(made)
    return found


def meta(comparison: Comparison, command: Sequence[str]) -> dict[str, Any]:
    """Return the conditions."""
    options = comparison.options
    setup = options.setup
    said: dict[str, Any] = {
        "command": " ".join(command),
        "level": options.level,
        "level_is": LEVELS[options.level],
        "versions": versions(),
        "fleet": setup.fleet,
        "instances": _instances(comparison),
        "model_shape": setup.model_shape,
        "weight_bits": setup.weight_bits,
        "tp": setup.tp,
        "gpu_memory_utilization": setup.gpu_memory_utilization,
        "gpu_memory_utilization_note": "vLLM's default is 0.9, with which an L40S with a 70B model "
        "at 4 bits could not hold one CHESS prompt",
        "runs": setup.num_runs,
        "seeds": options.num_seeds,
        "burstiness": setup.burstiness,
        "disturbance": setup.disturbance.name,
        "slo_scales": None if options.slo_s is not None else list(options.slo_scales),
        "slo_s": options.slo_s,
        "traces": {name: _trace(comparison, name) for name in options.traces},
        "capacity_is": _CAPACITY if comparison.capacities else None,
        "policies": _policies(comparison),
        "profiles": _PROFILES,
        "searches": _searches(comparison),
        "bootstrap": f"{NUM_RESAMPLES} resamples of the seeds, percentile interval",
        "definitions": dict(DEFINITIONS),
    }
    if comparison.rows_below:
        said["level_error"] = level_error_summary(comparison)
    return said


def page(
    comparison: Comparison,
    command: Sequence[str],
    *,
    said: Mapping[str, Any] | None = None,
    more: Sequence[Section] = (),
) -> str:
    """Return the HTML report.

    Args:
        comparison: Of what.
        command: That made it.
        said: Conditions in the place of `meta`.
        more: Sections after the tables.
    """
    options = comparison.options
    palette = plots.Palette(entry.name for entry in comparison.entries)
    sections: list[Section] = []
    for trace in options.traces:
        sections += _trace_sections(comparison, trace, palette)
    if comparison.rows_below:
        sections.append(_level_section(comparison))
    sections.append(_pair_section(comparison))
    sections += more
    said = dict(meta(comparison, command) if said is None else said)
    for name in ("definitions", "level_error", "policies"):
        said.pop(name, None)
    sections.append(report.conditions_section(said))
    sections.append(report.conditions_section(DEFINITIONS, "What the columns mean"))
    rows = report.table_section("Every simulation", comparison.rows, report.COMPARISON_COLUMNS)
    return report.render(
        "Policies compared",
        [*sections, rows],
        lead=f"Level {options.level}: {LEVELS[options.level]}. {options.setup.fleet}, "
        f"{options.setup.model_shape}, {options.setup.num_runs} runs, {options.num_seeds} seeds.",
        cautions=_cautions(comparison),
    )


def versions() -> dict[str, str]:
    """Return what the figures were made with."""
    found = {"python": platform.python_version(), "cpus": str(os.cpu_count())}
    found["compiled"] = str(is_compiled()).lower()
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _instances(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "instance_id": each.instance.instance_id,
            "num_kv_tokens": each.instance.num_kv_tokens,
            "max_num_seqs": each.instance.max_num_seqs,
            "max_num_batched_tokens": each.latency.max_num_batched_tokens,
        }
        for each in comparison.options.setup.build_fleet()
    ]


def _trace(comparison: Comparison, name: str) -> dict[str, Any]:
    trace = comparison.traces[name]
    setting = next(s for s in comparison.settings if s.trace == name)
    samples = comparison.samples[comparison.entries[0].name, setting]
    references_s = [value for sample in samples for value in sample.references_s]
    said: dict[str, Any] = {
        "notes": list(trace.notes),
        "num_duplicate_runs": trace.num_duplicates,
        "lower_bound_s": {
            "mean": mean(references_s),
            **{f"p{percent}": percentile(references_s, percent) for percent in (50, 95, 99)},
        },
    }
    if (found := comparison.capacities.get(name)) is not None:
        said |= {"capacity_runs_per_s": found.rate, "capacity_policy": found.policy}
    return said


def _policies(comparison: Comparison) -> dict[str, str]:
    return {
        entry.name: entry.variants[0].policy.fingerprint
        if len(entry.variants) == 1
        else f"best of {len(entry.variants)}, see rows"
        for entry in comparison.entries
    }


def _searches(comparison: Comparison) -> dict[str, str]:
    said = {
        "hexgen-oracle+urgency": f"α of {list(ALPHAS)}, least P95 over the seeds of the setting",
        "clairvoyant": f"{', '.join(PORTFOLIO)}, each also with late binding, told true output "
        "lengths and true work left; most attainment, then least P95 over the seeds: an upper "
        "bound in practice, not a proven one",
    }
    names = {entry.name for entry in comparison.entries}
    found = {name: text for name, text in said.items() if name in names}
    if found and comparison.options.level > 1:
        found["chosen at"] = "level 1"
    return found


def _cautions(comparison: Comparison) -> list[str]:
    cautions = [
        f"{name}: {note}"
        for name, trace in comparison.traces.items()
        if not name.startswith(PREFIX)  # what a generator is, its name and the conditions tell
        for note in trace.notes
    ]
    for name, trace in comparison.traces.items():
        if trace.num_duplicates:
            cautions.append(
                f"{name}: {trace.num_duplicates} of {len(trace.runs)} runs repeat an earlier one."
            )
    num_failed = sum(row["failed"] for row in comparison.rows)
    if num_failed:
        cautions.append(f"{num_failed} runs never ended.")
    return cautions


def _trace_sections(comparison: Comparison, trace: str, palette: plots.Palette) -> list[Section]:
    sections = []
    settings = [s for s in comparison.settings if s.trace == trace]
    for scale in dict.fromkeys(s.slo_scale for s in settings):
        of_scale = [s for s in settings if s.slo_scale == scale]
        sections.append(_rate_section(comparison, of_scale, palette))
    for setting in settings:
        title = setting_title(setting)
        sections.append(
            report.table_section(
                title,
                summary_rows(comparison, setting),
                note="Least P95 first. Mean over seeds ± standard deviation.",
            )
        )
        if small := paper_rows(comparison, setting):
            sections.append(report.table_section("HexGen-Text2SQL by part", small))
        sections.append(_sample_section(comparison, setting, palette))
    return sections


def _rate_section(
    comparison: Comparison, settings: Sequence[Setting], palette: plots.Palette
) -> Section:
    rows = [row for setting in settings for row in comparison.rows_of(setting)]
    first = settings[0]
    slo = f"SLO {first.slo_s:g} s" if first.slo_s is not None else f"SLO {first.slo_scale:g} × LB1"
    return report.figure_section(
        f"{first.trace}: attainment by rate, {slo}",
        plots.attainment_by_rate(rows, palette=palette),
        note="Mean over seeds; the band reaches from the lowest to the highest of them.",
    )


def _sample_section(comparison: Comparison, setting: Setting, palette: plots.Palette) -> Section:
    latencies_s: dict[str, list[float]] = {}
    by_scale: dict[str, tuple[list[float], list[float]]] = {}
    for entry in comparison.entries:
        samples = comparison.samples[entry.name, setting]
        latencies_s[entry.name] = [v for s in samples for v in s.latencies_s]
        references_s = [v for s in samples for v in s.references_s]
        by_scale[entry.name] = latencies_s[entry.name], references_s
    return report.figure_section(
        f"Run latency: {setting_title(setting)}",
        plots.attainment_by_scale(
            by_scale, x_label="SLO, as a multiple of LB1 (log)", palette=palette
        ),
        plots.latency_cdf(latencies_s, slo_s=setting.slo_s, palette=palette),
        note="All seeds together. The policies were given one SLO; the first chart asks what share "
        "would have met another.",
    )


def _pair_section(comparison: Comparison) -> Section:
    shown = ("p95_s", "slo_scale_at_95", "throughput", "attainment")
    rows = [
        {
            "policy": pair["policy"],
            "against": pair["against"],
            "trace": pair["trace"],
            "runs/s": pair["rate"],
            "metric": pair["metric"],
            "ratio": pair["ratio"],
            "95 % interval": None
            if pair["ratio"] is None
            else f"{report.plain(pair['ci_low'])} – {report.plain(pair['ci_high'])}",
            "seeds": pair["seeds"],
        }
        for pair in comparison.pairs
        if pair["metric"] in shown
    ]
    return report.table_section(
        "Ratios, seed by seed", rows, note=f"{DEFINITIONS['pairs']}. All metrics are in the JSON."
    )


def _level_section(comparison: Comparison) -> Section:
    summary = level_error_summary(comparison)
    level = comparison.options.level
    rows = [
        {
            "policy": each["policy"],
            "trace": each["trace"],
            "runs/s": each["rate"],
            "P95 at level 1 (s)": each["p95_s_level_1"],
            f"P95 at level {level} (s)": each["p95_s"],
            "error": report.percent(each["error"]),
            "mean |error| of one seed": report.percent(each["mean_abs_error"]),
        }
        for each in summary["settings"]
    ]
    return report.table_section(
        f"Level 1 against level {level}",
        rows,
        note=f"{summary['what']}: |error| of the mean over seeds, median "
        f"{report.percent(summary['median_abs'])}, mean {report.percent(summary['mean_abs'])}, "
        f"worst {report.percent(summary['worst_abs'])}; goal {report.percent(summary['goal'])}.",
    )


def finite(value: Any) -> Any:
    """JSON has no infinity: what is infinite becomes null."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
