"""A systematic look at a trace: what its runs do, what can be shared, predicted, sped up."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from vllm_workflow.bench.analysis_prediction import Explained, Remaining, explained, remaining
from vllm_workflow.bench.analysis_sharing import Sharing, sharing
from vllm_workflow.bench.analysis_tail import Tail, tail
from vllm_workflow.bench.analysis_timing import Timeline, longest_path, services_s, timeline
from vllm_workflow.core.metrics import mean, percentile
from vllm_workflow.profiles.profile import LatencyProfile
from vllm_workflow.sim.types import Trace, TraceCall, TraceRun

START, END = "(start)", "(end)"
NUM_POINTS = 100
"""Instants of a run's duration at which calls under way are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A distribution."""

    mean: float
    p50: float
    p95: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarise at least one value; percentiles interpolate linearly."""
        sample = list(values)
        # Only of an empty sample there would be None.
        average, p50, p95 = (
            cast(float, value)
            for value in (mean(sample), percentile(sample, 50.0), percentile(sample, 95.0))
        )
        return cls(mean=average, p50=p50, p95=p95, max=max(sample))


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """One edge of the stage graph."""

    before: str
    after: str
    share: float
    """Calls of `before` that a call of `after` follows, of all; of runs for `(start)`."""
    width: float
    """Calls of `after` that follow one such call, mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSummary:
    """All calls of one stage."""

    stage: str
    num_calls: int
    run_share: float
    """Runs that have the stage at all."""
    calls_per_run: Spread
    """Over all runs, those without it too."""
    prompt_tokens: Spread
    output_tokens: Spread
    service_s: Spread
    """Seconds of one call alone, prefixes cached."""
    gap_s: Spread
    prompt_share: float
    """Of the trace's prompt tokens."""
    output_share: float
    within_share: float
    """Of the stage's own prompt tokens: an earlier call of the run began with them."""
    across_share: float
    """Of the stage's own prompt tokens: only earlier runs did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """Critical path against total work, per run."""

    prompt_tokens: Spread
    output_tokens: Spread
    critical_output_tokens: Spread
    """Longest chain of calls, counted in output tokens."""
    work_s: Spread
    """All calls one after the other, prefixes cached."""
    critical_work_s: Spread
    gap_s: Spread
    """On the critical path."""
    duration_s: Spread
    """Critical path with gaps: no scheduler can be faster on this hardware."""
    cold_duration_s: Spread
    """The same if no prompt were cached."""
    durations_s: tuple[float, ...]
    """Of every run, ascending."""
    works_s: tuple[float, ...]
    """Of every run, ascending."""
    speedup: float
    """Work over critical work, of all runs together: what side-by-side calls can gain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """Calls under way over the course of a run, each run's duration stretched to 1."""

    mean: tuple[float, ...]
    """Shape (NUM_POINTS,), over runs."""
    p95: tuple[float, ...]
    peak: Spread
    """Per run."""
    idle_share: float
    """Of the runs' durations with no call under way: gaps."""
    single_share: float
    """With exactly one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """Everything that the report shows."""

    source: str
    notes: tuple[str, ...]
    hardware: str
    num_runs: int
    num_duplicates: int
    arrival_rate: float | None
    """Runs per second between the first and the last arrival; None without arrivals."""
    calls_per_run: Spread
    transitions: tuple[Transition, ...]
    stages: tuple[StageSummary, ...]
    paths: Paths
    parallelism: Parallelism
    within_share: float
    """Of all prompt tokens, see `StageSummary`."""
    across_share: float
    explained: Explained
    remaining: tuple[Remaining, ...]
    tail: Tail | None


def analyze(trace: Trace, profile: LatencyProfile) -> Analysis:
    """Analyse a trace on the hardware of a profile.

    Args:
        trace: With at least one run.
        profile: Of one instance; it serves each run alone.
    """
    shared = sharing(trace.runs)
    warm = [
        timeline(run, services_s(profile.latency, run, [each.num_cached_tokens for each in shares]))
        for run, shares in zip(trace.runs, shared, strict=True)
    ]
    cold = [
        timeline(run, services_s(profile.latency, run, [0] * len(run.calls))) for run in trace.runs
    ]
    calls = [call for run in trace.runs for call in run.calls]
    flat = [each for shares in shared for each in shares]
    num_prompt_tokens = sum(call.num_prompt_tokens for call in calls)
    return Analysis(
        source=trace.source,
        notes=trace.notes,
        hardware=_hardware(profile),
        num_runs=len(trace.runs),
        num_duplicates=trace.num_duplicates,
        arrival_rate=_arrival_rate(trace.runs),
        calls_per_run=Spread.of(len(run.calls) for run in trace.runs),
        transitions=tuple(_transitions(trace.runs)),
        stages=tuple(_stages(trace.runs, flat, warm)),
        paths=_paths(trace.runs, warm, cold),
        parallelism=_parallelism(warm),
        within_share=sum(each.num_within_tokens for each in flat) / num_prompt_tokens,
        across_share=sum(each.num_across_tokens for each in flat) / num_prompt_tokens,
        explained=explained(calls),
        remaining=tuple(remaining(trace.runs, warm, _in_order(trace.runs))),
        tail=tail(warm),
    )


def _hardware(profile: LatencyProfile) -> str:
    return (
        f"{profile.model_shape} ({profile.weight_bits} bit) on {profile.tp} x {profile.gpu}; "
        f"{profile.source}"
    )


def _arrival_rate(runs: Sequence[TraceRun]) -> float | None:
    first, last = runs[0].arrival_s, runs[-1].arrival_s
    if first is None or last is None or last <= first:
        return None
    return (len(runs) - 1) / (last - first)


def _transitions(runs: Sequence[TraceRun]) -> list[Transition]:
    """The edges by where they start, in the order of the stages, frequent ones first."""
    totals: Counter[str] = Counter({START: len(runs)})
    followed: Counter[tuple[str, str]] = Counter()
    widths: Counter[tuple[str, str]] = Counter()
    for run in runs:
        after: dict[str, Counter[str]] = {call.call_id: Counter() for call in run.calls}
        first: Counter[str] = Counter()
        for call in run.calls:
            totals[call.stage] += 1
            for parent in call.after:
                after[parent][call.stage] += 1
            if not call.after:
                first[call.stage] += 1
        for before, children in [
            (START, first),
            *((call.stage, after[call.call_id] or Counter({END: 1})) for call in run.calls),
        ]:
            for stage, width in children.items():
                followed[before, stage] += 1
                widths[before, stage] += width
    return [
        Transition(
            before=before,
            after=stage,
            share=count / totals[before],
            width=widths[before, stage] / count,
        )
        for start in (START, *_in_order(runs))
        for (before, stage), count in followed.most_common()
        if before == start
    ]


def _in_order(runs: Sequence[TraceRun]) -> list[str]:
    """Return the stages by where in a run they begin, on average."""
    begins: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        first = {call.stage: i for i, call in reversed(list(enumerate(run.calls)))}
        for stage, i in first.items():
            begins[stage].append(i / len(run.calls))
    return sorted(begins, key=lambda stage: sum(begins[stage]) / len(begins[stage]))


def _stages(
    runs: Sequence[TraceRun], shared: Sequence[Sharing], lines: Sequence[Timeline]
) -> list[StageSummary]:
    rows: dict[str, list[tuple[TraceCall, Sharing, float]]] = defaultdict(list)
    timed = [each for line in lines for each in line.calls]
    for each, share in zip(timed, shared, strict=True):
        rows[each.call.stage].append((each.call, share, each.service_s))
    per_run = [Counter(call.stage for call in run.calls) for run in runs]
    counts = {stage: [each[stage] for each in per_run] for stage in rows}
    all_prompt = sum(each.call.num_prompt_tokens for each in timed)
    all_output = sum(each.call.num_output_tokens for each in timed)
    found = []
    for stage in _in_order(runs):
        members = rows[stage]
        prompts = [call.num_prompt_tokens for call, _, _ in members]
        outputs = [call.num_output_tokens for call, _, _ in members]
        found.append(
            StageSummary(
                stage=stage,
                num_calls=len(members),
                run_share=sum(n > 0 for n in counts[stage]) / len(runs),
                calls_per_run=Spread.of(counts[stage]),
                prompt_tokens=Spread.of(prompts),
                output_tokens=Spread.of(outputs),
                service_s=Spread.of(service_s for _, _, service_s in members),
                gap_s=Spread.of(call.gap_s for call, _, _ in members),
                prompt_share=sum(prompts) / all_prompt,
                output_share=sum(outputs) / all_output,
                within_share=sum(s.num_within_tokens for _, s, _ in members) / sum(prompts),
                across_share=sum(s.num_across_tokens for _, s, _ in members) / sum(prompts),
            )
        )
    return found


def _paths(runs: Sequence[TraceRun], warm: Sequence[Timeline], cold: Sequence[Timeline]) -> Paths:
    outputs = [{call.call_id: float(call.num_output_tokens) for call in r.calls} for r in runs]
    return Paths(
        prompt_tokens=Spread.of(sum(c.num_prompt_tokens for c in run.calls) for run in runs),
        output_tokens=Spread.of(sum(each.values()) for each in outputs),
        critical_output_tokens=Spread.of(
            longest_path(run, each) for run, each in zip(runs, outputs, strict=True)
        ),
        work_s=Spread.of(line.work_s for line in warm),
        critical_work_s=Spread.of(line.critical_work_s for line in warm),
        gap_s=Spread.of(line.gap_s for line in warm),
        duration_s=Spread.of(line.duration_s for line in warm),
        cold_duration_s=Spread.of(line.duration_s for line in cold),
        durations_s=tuple(sorted(line.duration_s for line in warm)),
        works_s=tuple(sorted(line.work_s for line in warm)),
        speedup=sum(line.work_s for line in warm) / sum(line.critical_work_s for line in warm),
    )


def _parallelism(lines: Sequence[Timeline]) -> Parallelism:
    points = (np.arange(NUM_POINTS) + 0.5) / NUM_POINTS
    counts = np.array([[line.num_running(p * line.duration_s) for p in points] for line in lines])
    seconds: dict[int, float] = defaultdict(float)
    peaks = []
    for line in lines:
        peak = 0
        for level, duration_s in _levels(line):
            seconds[level] += duration_s
            peak = max(peak, level)
        peaks.append(peak)
    total = sum(line.duration_s for line in lines)
    return Parallelism(
        mean=tuple(counts.mean(axis=0).tolist()),
        p95=tuple(np.percentile(counts, 95, axis=0).tolist()),
        peak=Spread.of(peaks),
        idle_share=seconds[0] / total,
        single_share=seconds[1] / total,
    )


def _levels(line: Timeline) -> list[tuple[int, float]]:
    """Return the calls under way between each two events of a run, and for how long."""
    changes = sorted(
        [(timed.start_s, 1) for timed in line.calls] + [(timed.end_s, -1) for timed in line.calls]
    )
    found = []
    level, since = 0, 0.0
    for time_s, change in changes:
        if time_s > since:
            found.append((level, time_s - since))
            since = time_s
        level += change
    return found
