"""The demo's results as plain text, the systems side by side."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

MAX_CHANGE = 1.3
"""Of the speed of one instance, idle but for the probe, between two systems."""


def speeds(instances: Mapping[str, Mapping[str, float]]) -> str:
    """Say how fast each instance is and how much they differ."""
    parts = [
        f"{name} {1000 * speed['token_alone_s']:.1f} ms per token alone, "
        f"{speed['tokens_per_s']:.0f} tokens/s full"
        for name, speed in instances.items()
    ]
    rates = [speed["tokens_per_s"] for speed in instances.values()]
    return f"measured: {'; '.join(parts)}; full speeds differ {max(rates) / min(rates):.1f}x"


def caution(results: Sequence[Mapping[str, Any]]) -> str | None:
    """Return a warning if the machine itself was faster for one system than for another."""
    changes = {
        name: max(rates) / min(rates)
        for name in results[0]["instances"]
        for rates in [[result["instances"][name]["tokens_per_s"] for result in results]]
    }
    name, change = max(changes.items(), key=lambda item: item[1])
    if change < MAX_CHANGE:
        return None
    return (
        f"CAUTION: before the load, instance {name} was {change:.1f}x as fast in one system as in "
        "the other, with the same model on the same CPUs. Something else was using them; compare "
        "again on a quiet machine."
    )


def comparison(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table: a row per number, a column per system."""
    rows = [("", *(result["title"] for result in results))]
    columns = [_numbers(result["runs"]) for result in results]
    names = dict.fromkeys(name for column in columns for name in column)
    rows.extend((name, *(column.get(name, "none") for column in columns)) for name in names)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _numbers(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return name to text of every number of one system."""
    numbers = {
        "answered": _share([run["sql"] is not None for run in runs]),
        "correct": _share([bool(run["correct"]) for run in runs if run["correct"] is not None]),
        "deadline met": _share([bool(run["deadline_met"]) for run in runs]),
    }
    tenants = sorted({run["tenant"] for run in runs})
    for tenant in tenants:
        own = [run for run in runs if run["tenant"] == tenant]
        slo = f"{own[0]['slo_s']:g} s"
        numbers[f"  {tenant} ({slo})"] = _share([bool(run["deadline_met"]) for run in own])
    for share in (0.5, 0.95):
        for tenant in ("", *tenants):
            own = [run for run in runs if not tenant or run["tenant"] == tenant]
            latencies = sorted(run["latency_s"] for run in own if run["sql"] is not None)
            percentile = f"P{share * 100:.0f}"
            name = f"  {percentile} {tenant}" if tenant else f"run latency {percentile}"
            numbers[name] = _percentile(latencies, share)
    return numbers | _calls(runs)


def _calls(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return calls by instance and by stage."""
    calls = [call for run in runs for call in run["timeline"]]
    instances = sorted({call["instance"] or "none" for call in calls})
    on = Counter((call["stage"], call["instance"] or "none") for call in calls)
    numbers = {f"calls ({' / '.join(instances)})": _split(on, None, instances)}
    for stage in dict.fromkeys(call["stage"] for call in calls):
        numbers[f"  {stage}"] = _split(on, stage, instances)
    numbers[f"ms per output token ({' / '.join(instances)})"] = " / ".join(
        _ms_per_token([call for call in calls if call["instance"] == name]) for name in instances
    )
    return numbers


def _ms_per_token(calls: Sequence[Mapping[str, Any]]) -> str:
    """Return what a token took under load, waiting in the engine included."""
    counted = [call for call in calls if call["num_output_tokens"]]
    if not counted:
        return "none"
    seconds = sum(c["end_s"] - c["start_s"] - (c["queue_ms"] or 0.0) / 1000 for c in counted)
    return f"{1000 * seconds / sum(c['num_output_tokens'] for c in counted):.1f}"


def _split(on: Counter[tuple[str, str]], stage: str | None, instances: Sequence[str]) -> str:
    return " / ".join(
        str(sum(n for (s, i), n in on.items() if i == name and stage in {None, s}))
        for name in instances
    )


def _share(held: Sequence[bool]) -> str:
    return f"{sum(held)} of {len(held)} ({sum(held) / len(held):.0%})" if held else "none"


def _percentile(ordered: Sequence[float], share: float) -> str:
    if not ordered:
        return "none"
    return f"{ordered[max(0, math.ceil(share * len(ordered)) - 1)]:.2f} s"
