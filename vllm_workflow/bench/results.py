"""The result of a load: the keys of `vllm bench serve`, with runs for its requests.

Where a key of `vllm bench serve` speaks of requests (`completed`, `request_throughput`,
`mean_e2el_ms`), a request is a run here. A run has no time to first token, per output token or
between tokens of its own: `ttft`, `tpot` and `itl` are those of its calls, one sample per call
or gap, as there; the same and the calls' own `e2el` are there once more under `calls_…`.
Percentiles are of what was answered; attainment and goodput are of all that arrived.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vllm_workflow.bench.records import CallRecord, RunRecord
from vllm_workflow.core import metrics
from vllm_workflow.core.errors import ConfigError

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
TABLE_PERCENTILES = (50.0, 95.0, 99.0)
"""Of the tables per stage and per instance."""


def summarize(
    runs: Sequence[RunRecord],
    *,
    percentile_metrics: Sequence[str] = METRICS,
    percentiles: Sequence[float] = TABLE_PERCENTILES,
    goodput_ms: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the figures of a load.

    Args:
        runs: Everything that arrived.
        percentile_metrics: Of `METRICS`, those that percentiles are wanted of.
        percentiles: From 0 to 100.
        goodput_ms: What a run must keep to count as good: `e2el` end to end, `ttft` and `tpot`
            with every call. By default its SLO.
    """
    calls = [call for run in runs for call in run.calls]
    answered = [call for call in calls if not call.error]
    duration_s = _duration_s(runs)
    num_in = sum(call.num_prompt_tokens or 0 for call in answered)
    num_out = sum(call.num_output_tokens or 0 for call in answered)
    latencies_s = [run.latency_s for run in runs]
    figures: dict[str, Any] = {
        "duration": duration_s,
        "completed": sum(run.finished for run in runs),
        "failed": sum(not run.finished for run in runs),
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "total_cached_tokens": _known_sum(call.num_cached_tokens for call in answered),
        "request_throughput": metrics.throughput(latencies_s, duration_s),
        "request_goodput": _goodput(runs, goodput_ms, duration_s),
        "output_throughput": _per_second(num_out, duration_s),
        "total_token_throughput": _per_second(num_in + num_out, duration_s),
        "max_output_tokens_per_s": _max_output_tokens_per_s(answered),
        "max_concurrent_requests": _max_concurrent((run.arrival_s, run.end_s) for run in runs),
    }
    figures |= _latencies(runs, answered, percentile_metrics, percentiles)
    figures |= _slo(runs)
    figures |= {
        "calls_completed": len(answered),
        "calls_failed": len(calls) - len(answered),
        "calls_throughput": _per_second(len(answered), duration_s),
        "per_stage": table(calls, "stage", lambda call: call.stage),
        "per_instance": table(calls, "instance", lambda call: call.instance or "unknown"),
        "errors": dict(Counter(call.error for call in calls if call.error).most_common(10)),
    }
    return figures


def table(
    calls: Iterable[CallRecord], name: str, group: Callable[[CallRecord], str]
) -> list[dict[str, Any]]:
    """Return one row of figures per group of calls, in the order of the groups' first calls.

    Args:
        calls: All of them, failed ones too.
        name: Heading of the group's column.
        group: Gives the group of a call.
    """
    groups: dict[str, list[CallRecord]] = {}
    for call in sorted(calls, key=lambda call: call.sent_s):
        groups.setdefault(group(call), []).append(call)
    return [{name: value, **_row(members)} for value, members in groups.items()]


def _row(calls: Sequence[CallRecord]) -> dict[str, Any]:
    answered = [call for call in calls if not call.error]
    e2els_ms = [1000 * call.e2el_s for call in answered]
    row: dict[str, Any] = {
        "calls": len(calls),
        "failed": len(calls) - len(answered),
        "input_tokens": _known_sum(call.num_prompt_tokens for call in answered),
        "cached_tokens": _known_sum(call.num_cached_tokens for call in answered),
        "output_tokens": _known_sum(call.num_output_tokens for call in answered),
        "median_ttft_ms": metrics.percentile(_ms(call.ttft_s for call in answered), 50),
        "median_tpot_ms": metrics.percentile(_ms(call.tpot_s for call in answered), 50),
        "mean_e2el_ms": metrics.mean(e2els_ms),
    }
    return row | {
        f"p{percent:g}_e2el_ms": metrics.percentile(e2els_ms, percent)
        for percent in TABLE_PERCENTILES
    }


def _latencies(
    runs: Sequence[RunRecord],
    answered: Sequence[CallRecord],
    percentile_metrics: Sequence[str],
    percentiles: Sequence[float],
) -> dict[str, Any]:
    of_calls = {
        "ttft": _ms(call.ttft_s for call in answered),
        "tpot": _ms(call.tpot_s for call in answered),
        "itl": _ms(itl for call in answered for itl in call.itls_s),
        "e2el": _ms(call.e2el_s for call in answered),
    }
    latencies_ms = _ms(run.latency_s for run in runs if run.finished)
    figures: dict[str, Any] = {}
    for name, values in of_calls.items():
        wanted = percentiles if name in percentile_metrics else ()
        statistics = _statistics(name, values, wanted)
        of_runs = _statistics(name, latencies_ms, wanted) if name == "e2el" else statistics
        figures |= of_runs
        figures |= {f"calls_{key}": value for key, value in statistics.items()}
    return figures


def _statistics(
    name: str, values_ms: Sequence[float], percentiles: Sequence[float]
) -> dict[str, float | None]:
    values_ms = sorted(values_ms)  # once, and again in no time for each percentile
    return {
        f"mean_{name}_ms": metrics.mean(values_ms),
        f"median_{name}_ms": metrics.percentile(values_ms, 50),
        f"std_{name}_ms": float(np.std(values_ms)) if values_ms else None,
    } | {f"p{p:g}_{name}_ms": metrics.percentile(values_ms, p) for p in percentiles}


def _slo(runs: Sequence[RunRecord]) -> dict[str, Any]:
    latencies_s = [run.latency_s for run in runs]
    slos_s = [run.slo_s for run in runs]
    references_s = [r for run in runs if (r := run.reference_s) is not None]
    has_scales = len(references_s) == len(runs)
    return {
        "runs_with_slo": sum(slo is not None for slo in slos_s),
        "runs_met": metrics.num_met(latencies_s, slos_s),
        "slo_attainment": metrics.slo_attainment(latencies_s, slos_s),
        **{
            f"slo_scale_at_{percent}": metrics.slo_scale_at(
                percent / 100, latencies_s, references_s
            )
            if has_scales
            else None
            for percent in (95, 99)
        },
    }


def _goodput(
    runs: Sequence[RunRecord], goodput_ms: Mapping[str, float] | None, duration_s: float
) -> float | None:
    if goodput_ms:
        return _per_second(sum(_is_good(run, goodput_ms) for run in runs), duration_s)
    if all(run.slo_s is None for run in runs):
        return None
    return metrics.goodput([r.latency_s for r in runs], [r.slo_s for r in runs], duration_s)


def _is_good(run: RunRecord, goodput_ms: Mapping[str, float]) -> bool:
    most = {name: value / 1000 for name, value in goodput_ms.items()}
    return (
        run.latency_s <= most.get("e2el", math.inf)
        and all(
            (call.ttft_s or 0.0) <= most.get("ttft", math.inf)
            and (call.tpot_s or 0.0) <= most.get("tpot", math.inf)
            for call in run.calls
        )
        and run.finished
    )


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """Read `KEY:MS` pairs.

    Raises:
        ConfigError: An unknown key, or not a number of milliseconds above 0.
    """
    found = {}
    for pair in pairs:
        key, _, text = pair.partition(":")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if key not in GOODPUT_METRICS or not 0 < value < math.inf:
            raise ConfigError(
                f"--goodput: expected KEY:MILLISECONDS with one of {list(GOODPUT_METRICS)}, "
                f"got {pair!r}"
            )
        found[key] = value
    return found


def to_json_value(value: Any) -> Any:
    """Return a value without what JSON has no number for: `inf` becomes text, `nan` null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {key: to_json_value(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(v) for v in value]
    return value


def _duration_s(runs: Sequence[RunRecord]) -> float:
    """From the first arrival to the last end."""
    if not runs:
        return 0.0
    return max(run.end_s for run in runs) - min(run.arrival_s for run in runs)


def _per_second(number: float, duration_s: float) -> float | None:
    return number / duration_s if duration_s > 0 else None


def _known_sum(numbers: Iterable[int | None]) -> int | None:
    """Return the sum of the numbers that are known; None if none is."""
    known = [n for n in numbers if n is not None]
    return sum(known) if known else None


def _ms(durations_s: Iterable[float | None]) -> list[float]:
    return [1000 * seconds for seconds in durations_s if seconds is not None]


def _max_output_tokens_per_s(calls: Sequence[CallRecord]) -> float | None:
    """Tokens of the busiest second; a call's tokens are spread over its events evenly."""
    tokens: Counter[int] = Counter()
    for call in calls:
        share = (call.num_output_tokens or 0) / max(1, len(call.token_times_s))
        for time in call.token_times_s:
            tokens[int(time)] += share  # type: ignore[assignment]
    return max(tokens.values(), default=None)


def _max_concurrent(spans: Iterable[tuple[float, float]]) -> int:
    # At one instant, what ends is gone before what begins.
    steps = sorted((t, step) for start, end in spans for t, step in ((start, 1), (end, -1)))
    most = now = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    return most
