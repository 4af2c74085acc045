"""The page about one load of a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_workflow.bench import plots, report
from vllm_workflow.bench.lanes import (
    MAX_LANES,
    instance_legend,
    instance_names,
    lane_of,
    swim_lanes,
)
from vllm_workflow.bench.records import RunRecord
from vllm_workflow.bench.report import Column, Section, percent, plain

_CALL_COLUMNS = (
    Column("stage", "stage", plain),
    Column("instance", "instance", plain),
    Column("calls", "calls", plain),
    Column("failed", "failed", plain),
    Column("input_tokens", "input tokens", plain),
    Column("cached_tokens", "of them cached", plain),
    Column("output_tokens", "output tokens", plain),
    Column("median_ttft_ms", "median TTFT (ms)", plain),
    Column("median_tpot_ms", "median TPOT (ms)", plain),
    Column("mean_e2el_ms", "mean E2EL (ms)", plain),
    Column("p50_e2el_ms", "P50 (ms)", plain),
    Column("p95_e2el_ms", "P95 (ms)", plain),
    Column("p99_e2el_ms", "P99 (ms)", plain),
)


def serve_report(document: Mapping[str, Any], runs: Sequence[RunRecord]) -> str:
    """Return the page.

    Args:
        document: As `serve.document` made it.
        runs: What it was made of.
    """
    name = document["label"] or document["model_id"]
    cautions = [f"Invalid: {reason}." for reason in document["invalid_reasons"]]
    return report.render(
        "Runs against a server",
        [
            _summary(document),
            _scale_section(name, runs, document["meta"].get("slo_reference")),
            _latency_section(name, runs),
            report.table_section("Calls per stage", document["per_stage"], _CALL_COLUMNS),
            report.table_section("Calls per instance", document["per_instance"], _CALL_COLUMNS),
            _generator_section(document),
            *_lane_sections(runs),
            report.conditions_section(_conditions(document)),
        ],
        lead=f"{document['num_prompts']} runs of {document['meta'].get('trace', 'a trace')}, "
        f"{document['completed']} finished, {document['failed']} failed.",
        cautions=cautions,
    )


def _summary(document: Mapping[str, Any]) -> Section:
    row = {
        "arrived": document["num_prompts"],
        "finished": document["completed"],
        "failed": document["failed"],
        "attainment": document["slo_attainment"],
        "goodput": document["request_goodput"],
        "throughput": document["request_throughput"],
        **{
            f"{statistic}_s": _seconds(document.get(f"{statistic}_e2el_ms"))
            for statistic in ("mean", "p50", "p95", "p99")
            if f"{statistic}_e2el_ms" in document
        },
        "slo_scale_at_95": document["slo_scale_at_95"],
        "slo_scale_at_99": document["slo_scale_at_99"],
    }
    return report.table_section(
        "Runs",
        [row],
        report.COMPARISON_COLUMNS,
        note="Shares are of all runs that arrived; seconds are of those that finished.",
    )


def _scale_section(name: str, runs: Sequence[RunRecord], reference: str | None) -> Section:
    known = [(run.latency_s, run.reference_s) for run in runs if run.reference_s is not None]
    latencies_s = [latency for latency, _ in known]
    references_s = [reference_s for _, reference_s in known]
    chart = plots.attainment_by_scale(
        {name: (latencies_s, references_s)},
        x_label=f"SLO, as a multiple of {reference or 'a reference'}",
    )
    return report.figure_section("Attainment against SLO scale", chart)


def _latency_section(name: str, runs: Sequence[RunRecord]) -> Section:
    slos = {run.slo_s for run in runs}
    chart = plots.latency_cdf(
        {name: [run.latency_s for run in runs]}, slo_s=slos.pop() if len(slos) == 1 else None
    )
    return report.figure_section("Run latency", chart)


def _lane_sections(runs: Sequence[RunRecord]) -> list[Section]:
    lanes = [lane_of(run) for run in sorted(runs, key=lambda run: run.arrival_s)]
    palette = plots.Palette(instance_names(lanes))
    note = (
        "A lane is a run, a bar a call, its colour the instance, its letter the stage's first; "
        "calls side by side stack. The tick is the run's SLO; red: missed. Point at something for "
        "figures."
    )
    if len(lanes) > MAX_LANES:
        note += f" The first {MAX_LANES} of {len(lanes)} runs."
    legend = instance_legend(palette)
    return [
        report.figure_section(
            "Runs, from their arrival", legend, swim_lanes(lanes, palette=palette), note=note
        ),
        report.figure_section(
            "Runs, by the clock", legend, swim_lanes(lanes, by_clock=True, palette=palette)
        ),
    ]


def _generator_section(document: Mapping[str, Any]) -> Section:
    generator = document["generator"]
    rows: list[dict[str, Any]] = [
        {
            "what": "CPU of the load generator",
            "value": f"{percent(generator['cpu_share'])} of a core",
        },
        *(
            {"what": f"{name} of sends after their time", "value": f"{plain(generator[key])} ms"}
            for name, key in (("P50", "p50_late_send_ms"), ("P99", "p99_late_send_ms"))
        ),
        {
            "what": "late sends, of the time of runs",
            "value": percent(generator["late_sends_share"]),
        },
        {
            "what": "calls with other lengths than the trace",
            "value": plain(generator["calls_with_other_lengths"]),
        },
        *(
            {"what": f"late steps of the emulated GPU at {url}", "value": percent(s["late_share"])}
            for url, s in document["emulated_servers"].items()
        ),
        {"what": "valid", "value": plain(document["valid"])},
    ]
    return report.table_section("Did the measurement keep up?", rows)


def _conditions(document: Mapping[str, Any]) -> dict[str, Any]:
    names = ("date", "backend", "model_id", "request_rate", "burstiness", "max_concurrency")
    return {**{name: document[name] for name in names}, **document["meta"]}


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
