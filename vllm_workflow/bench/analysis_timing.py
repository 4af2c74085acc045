"""How long runs would take alone: on an instance that does nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.sim.types import TraceCall, TraceRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One call in the run's own time, which begins at 0."""

    call: TraceCall
    start_s: float
    end_s: float

    @property
    def service_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One run, every call made as soon as it can be."""

    calls: tuple[Timed, ...]
    critical: tuple[Timed, ...]
    """The chain that ends last: each call waits for the one before it. In order."""

    @property
    def duration_s(self) -> float:
        return self.critical[-1].end_s

    @property
    def work_s(self) -> float:
        """Service of all calls, as if one after the other."""
        return sum(timed.service_s for timed in self.calls)

    @property
    def critical_work_s(self) -> float:
        return sum(timed.service_s for timed in self.critical)

    @property
    def gap_s(self) -> float:
        """What of the duration is no call: tools and the agent's own work."""
        return self.duration_s - self.critical_work_s

    def num_running(self, time_s: float) -> int:
        """Calls under way at an instant."""
        return sum(timed.start_s <= time_s < timed.end_s for timed in self.calls)


def timeline(run: TraceRun, service_s: Mapping[str, float]) -> Timeline:
    """Lay out a run.

    Args:
        run: Every call after those that it follows.
        service_s: Seconds of each call, by its id.
    """
    placed: dict[str, Timed] = {}
    for call in run.calls:
        ready_s = max((placed[parent].end_s for parent in call.after), default=0.0)
        start_s = ready_s + call.gap_s
        placed[call.call_id] = Timed(
            call=call, start_s=start_s, end_s=start_s + service_s[call.call_id]
        )
    last = max(placed.values(), key=lambda timed: timed.end_s)
    chain = [last]
    while chain[-1].call.after:
        parents = [placed[parent] for parent in chain[-1].call.after]
        chain.append(max(parents, key=lambda timed: timed.end_s))
    return Timeline(calls=tuple(placed.values()), critical=tuple(reversed(chain)))


def longest_path(run: TraceRun, weight: Mapping[str, float]) -> float:
    """Return the greatest sum of weights along a chain of calls."""
    best: dict[str, float] = {}
    for call in run.calls:
        before = max((best[parent] for parent in call.after), default=0.0)
        best[call.call_id] = before + weight[call.call_id]
    return max(best.values())


def services_s(
    latency: LatencyModel, run: TraceRun, num_cached_tokens: Sequence[int]
) -> dict[str, float]:
    """Return seconds of each call, by its id, with nothing else in the batch.

    Args:
        latency: Of the instance.
        run: Its calls.
        num_cached_tokens: Of each call's prompt, in their order; a prompt that is cached as a
            whole still takes a step.
    """
    services = {}
    for call, num_cached in zip(run.calls, num_cached_tokens, strict=True):
        num_decoded = call.num_output_tokens - 1
        services[call.call_id] = latency.prefill_s(
            call.num_prompt_tokens - num_cached, num_cached_tokens=num_cached
        ) + latency.decode_s(
            num_decoded,
            batch_size=1,
            num_context_tokens=call.num_prompt_tokens + 0.5 * num_decoded,
        )
    return services
