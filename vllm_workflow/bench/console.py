"""A result as text, laid out as `vllm bench serve` lays out its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH = 50
_TITLES = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
}


def result_table(document: Mapping[str, Any]) -> str:
    """Return the result that `serve.document` made, for people."""
    rows: Sequence[tuple[str, Any]] = [
        ("Successful runs:", document["completed"]),
        ("Failed runs:", document["failed"]),
        ("Maximum run concurrency:", document["max_concurrency"] or "no limit"),
        ("Run rate configured (runs/s):", document["request_rate"]),
        ("Benchmark duration (s):", document["duration"]),
        ("Successful calls:", document["calls_completed"]),
        ("Failed calls:", document["calls_failed"]),
        ("Total input tokens:", document["total_input_tokens"]),
        ("Total cached input tokens:", document["total_cached_tokens"]),
        ("Total generated tokens:", document["total_output_tokens"]),
        ("Run throughput (runs/s):", document["request_throughput"]),
        ("Run goodput (runs/s):", document["request_goodput"]),
        ("Call throughput (calls/s):", document["calls_throughput"]),
        ("Output token throughput (tok/s):", document["output_throughput"]),
        ("Peak output token throughput (tok/s):", document["max_output_tokens_per_s"]),
        ("Peak concurrent runs:", document["max_concurrent_requests"]),
        ("Total token throughput (tok/s):", document["total_token_throughput"]),
    ]
    lines = [f"{' Workflow Serving Benchmark Result ':=^{_WIDTH}}", *_lines(rows)]
    lines += _block("Run Latency (end to end)", "E2EL", "e2el", document)
    lines += [f"{'Runs within their SLO':-^{_WIDTH}}", *_lines(_slo_rows(document))]
    for name, (title, short) in _TITLES.items():
        lines += _block(f"{title}, calls", short, name, document)
    lines += _block("End-to-end Latency, calls", "E2EL", "calls_e2el", document)
    for name in ("stage", "instance"):
        lines += [f"{f'Calls per {name}':-^{_WIDTH}}", *_columns(document[f"per_{name}"])]
    lines += [f"{'Load generator':-^{_WIDTH}}", *_lines(_generator_rows(document))]
    lines += [f"{'error':<12}{count:>6} x {text}" for text, count in document["errors"].items()]
    lines += ["=" * _WIDTH]
    return "\n".join([*lines, *(f"INVALID: {reason}" for reason in document["invalid_reasons"])])


def figure(value: Any) -> str:
    """Return a value as it is printed: no sample is `none`, never 0."""
    if value is None:
        return "none"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


def _slo_rows(document: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("Runs with an SLO:", document["runs_with_slo"]),
        ("Runs within it:", document["runs_met"] if document["runs_with_slo"] else None),
        ("SLO attainment (%):", _percent(document["slo_attainment"])),
        ("SLO scale needed for 95 %:", document["slo_scale_at_95"]),
        ("SLO scale needed for 99 %:", document["slo_scale_at_99"]),
    ]


def _generator_rows(document: Mapping[str, Any]) -> list[tuple[str, Any]]:
    generator = document["generator"]
    rows = [
        ("CPU (% of one core):", _percent(generator["cpu_share"])),
        ("P99 late send (ms):", generator["p99_late_send_ms"]),
        ("Late sends (% of the time of runs):", _percent(generator["late_sends_share"])),
        ("Calls with other lengths than the trace:", generator["calls_with_other_lengths"]),
    ]
    for url, server in document["emulated_servers"].items():
        rows.append((f"Late steps at {url} (%):", _percent(server["late_share"])))
    return [*rows, ("Valid:", "yes" if document["valid"] else "NO")]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _block(title: str, short: str, key: str, document: Mapping[str, Any]) -> list[str]:
    prefix, _, name = key.rpartition("_")
    pattern = re.compile(rf"{f'{prefix}_' if prefix else ''}(?P<statistic>[a-z0-9.]+)_{name}_ms")
    found = [
        (match["statistic"], value)
        for k, value in document.items()
        if (match := pattern.fullmatch(k))
    ]
    rows = [(f"{s.capitalize()} {short} (ms):", value) for s, value in found if s != "std"]
    return [f"{title:-^{_WIDTH}}", *_lines(rows)]


def _lines(rows: Sequence[tuple[str, Any]]) -> list[str]:
    return [f"{name:<40} {figure(value)}" for name, value in rows]


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return ["none"]
    cells = [list(rows[0]), *([figure(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths))
        )
        for line in cells
    ]
