"""What an author would declare of a workflow after looking at runs of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from vllm_workflow.core.workflow import StageProfile, WorkflowProfile
from vllm_workflow.sim.types import TraceCall, TraceRun


def declared(runs: Iterable[TraceRun]) -> tuple[WorkflowProfile, ...]:
    """Return one profile per workflow: means over its runs, stages as they first start.

    Rounds of a stage follow one another: of calls side by side, one counts.
    """
    by_workflow: dict[str, list[TraceRun]] = {}
    for run in runs:
        by_workflow.setdefault(run.workflow, []).append(run)
    return tuple(_profile(name, of_it) for name, of_it in by_workflow.items())


def _profile(name: str, runs: Sequence[TraceRun]) -> WorkflowProfile:
    calls: dict[str, list[TraceCall]] = {}
    starts: dict[str, list[float]] = {}
    rounds: Counter[str] = Counter()
    for run in runs:
        for call in run.calls:
            calls.setdefault(call.stage, []).append(call)
        for stage, start in _first_positions(run).items():
            starts.setdefault(stage, []).append(start)
        rounds.update(_rounds(run))
    order = sorted(calls, key=lambda stage: sum(starts[stage]) / len(starts[stage]))
    stages = tuple(
        StageProfile(
            name=stage,
            rounds=rounds[stage] / len(runs),
            prompt_tokens=round(_mean(c.num_prompt_tokens for c in calls[stage])),
            output_tokens=_mean(c.num_output_tokens for c in calls[stage]),
        )
        for stage in order
    )
    return WorkflowProfile(name=name, stages=stages)


def _first_positions(run: TraceRun) -> dict[str, float]:
    """Stage -> how far into the run its first call comes, from 0 to 1."""
    first: dict[str, float] = {}
    for position, call in enumerate(run.calls):
        first.setdefault(call.stage, position / len(run.calls))
    return first


def _rounds(run: TraceRun) -> dict[str, int]:
    """Stage -> how many of its calls follow one another, at most."""
    most: dict[str, int] = {}
    of_calls: dict[str, dict[str, int]] = {}
    for call in run.calls:
        counts: dict[str, int] = {}
        for before in call.after:
            for stage, count in of_calls[before].items():
                counts[stage] = max(counts.get(stage, 0), count)
        counts[call.stage] = counts.get(call.stage, 0) + 1
        of_calls[call.call_id] = counts
        for stage, count in counts.items():
            most[stage] = max(most.get(stage, 0), count)
    return most


def _mean(values: Iterable[int]) -> float:
    found = list(values)
    return sum(found) / len(found)
