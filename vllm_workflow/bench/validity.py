"""Whether a result may be believed: did generator and emulated GPUs keep up?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_workflow.bench.records import RunRecord
from vllm_workflow.core.metrics import percentile
from vllm_workflow.emulation.lateness import Lateness

MAX_LATE_SEND_SHARE = 0.02
"""Of the time of runs: what runs may lose to calls that the generator sent too late."""
MAX_CPU_SHARE = 0.9
"""Of one core: above it, tokens wait for the generator to notice them."""
MAX_WRONG_LENGTH_SHARE = 0.01
"""Of the calls that were answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validity:
    """What speaks against a result, and the figures behind it."""

    reasons: tuple[str, ...]
    """Sentences; none if the result is valid."""
    generator: Mapping[str, Any]
    emulated_servers: Mapping[str, Mapping[str, Any]]
    """By URL."""

    @property
    def is_valid(self) -> bool:
        return not self.reasons


def judge(
    runs: Sequence[RunRecord],
    *,
    cpu_share: float,
    emulated: Mapping[str, Lateness],
) -> Validity:
    """Judge a load.

    Args:
        runs: What was seen.
        cpu_share: CPU seconds of the generator per second, of one core.
        emulated: What the emulated GPUs did during the load, by their server's URL.
    """
    late_ms = [1000 * call.late_s for run in runs for call in run.calls]
    late_share = _late_send_share(runs)
    answered = [call for run in runs for call in run.calls if not call.error]
    num_wrong = sum(not call.has_trace_lengths for call in answered)
    reasons = list(_faults_of_generator(late_share, cpu_share))
    if num_wrong > MAX_WRONG_LENGTH_SHARE * len(answered):
        reasons.append(
            f"{num_wrong} of {len(answered)} calls had another number of prompt or output tokens "
            "than the trace"
        )
    if runs and not answered:
        reasons.append("no call was answered")
    for url, lateness in emulated.items():
        if not lateness.is_valid:
            reasons.append(f"{url}: {lateness}")
    return Validity(
        reasons=tuple(reasons),
        generator={
            "cpu_share": cpu_share,
            "late_sends_share": late_share,
            "p50_late_send_ms": percentile(late_ms, 50),
            "p99_late_send_ms": percentile(late_ms, 99),
            "max_late_send_ms": max(late_ms, default=None),
            "calls_with_other_lengths": num_wrong,
        },
        emulated_servers={
            url: {**asdict(lateness), "late_share": lateness.late_share}
            for url, lateness in emulated.items()
        },
    )


def _faults_of_generator(late_share: float, cpu_share: float) -> Iterator[str]:
    if late_share > MAX_LATE_SEND_SHARE:
        yield (
            f"calls were sent too late: {late_share:.1%} of the time of runs, at most "
            f"{MAX_LATE_SEND_SHARE:.0%} is tolerated"
        )
    if cpu_share > MAX_CPU_SHARE:
        yield (
            f"the load generator used {cpu_share:.0%} of a core, at most {MAX_CPU_SHARE:.0%} is "
            "tolerated"
        )


def _late_send_share(runs: Sequence[RunRecord]) -> float:
    """Late seconds of all sends per second of all runs: more than any run can have lost by them."""
    late_s = sum(call.late_s for run in runs for call in run.calls)
    run_s = sum(run.end_s - run.arrival_s for run in runs)
    return late_s / run_s if run_s > 0 else 0.0
