"""How much of lengths and of remaining work can be known before it happens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_workflow.bench.analysis_timing import Timed, Timeline
from vllm_workflow.sim.types import TraceCall, TraceRun, content


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """Variance of the output tokens of all calls, and what explains how much of it."""

    by_prompt_length: float | None
    """R² of one straight line over all calls; None where all answers are equally long."""
    by_stage: float | None
    """R² of the means of the stages."""
    by_stage_and_prompt_length: float | None
    """R² of one line per stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remaining:
    """The duration of the rest of a run, told at the end of a call from other runs' means."""

    stage: str
    num_calls: int
    """That could be told: some other run has the stage."""
    mean_s: float
    error_by_stage_s: float
    """Mean absolute error of the mean over the stage's calls in other runs."""
    error_by_round_s: float
    """The same, of the mean over calls that were the k-th of the stage in their run too."""
    r2_by_stage: float | None
    """Share of the variance that the mean by stage explains; below 0 if it misleads."""
    r2_by_round: float | None


def explained(calls: Sequence[TraceCall]) -> Explained:
    """Fit output tokens, on the calls that the fit is judged by."""
    outputs = np.array([call.num_output_tokens for call in calls], dtype=float)
    prompts = np.array([call.num_prompt_tokens for call in calls], dtype=float)
    by_stage: dict[str, list[int]] = defaultdict(list)
    for i, call in enumerate(calls):
        by_stage[call.stage].append(i)
    means, lines = np.empty_like(outputs), np.empty_like(outputs)
    for members in by_stage.values():
        means[members] = outputs[members].mean()
        lines[members] = _line(prompts[members], outputs[members])
    return Explained(
        by_prompt_length=_r2(outputs, _line(prompts, outputs)),
        by_stage=_r2(outputs, means),
        by_stage_and_prompt_length=_r2(outputs, lines),
    )


def _line(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares, at the points that it was fitted to."""
    spread = x - x.mean()
    variance = float(spread @ spread)
    slope = float(spread @ (y - y.mean())) / variance if variance > 0.0 else 0.0
    fitted: np.ndarray = y.mean() + slope * spread
    return fitted


def _r2(y: np.ndarray, fitted: np.ndarray) -> float | None:
    total = float(((y - y.mean()) ** 2).sum())
    return 1.0 - float(((y - fitted) ** 2).sum()) / total if total > 0.0 else None


@dataclass(frozen=True, slots=True)
class _End:
    """The end of one call."""

    owner: Hashable
    """Equal for runs with equal content: none of them may tell about another."""
    stage: str
    number: int
    rest_s: float


def remaining(
    runs: Sequence[TraceRun], timelines: Sequence[Timeline], stages: Sequence[str]
) -> list[Remaining]:
    """Tell what remains after each call from the runs that differ from its own.

    Args:
        runs: At least one.
        timelines: Of the runs.
        stages: To report on, in this order; one that no other run has is left out.
    """
    ends = [
        end for run, line in zip(runs, timelines, strict=True) for end in _ends(content(run), line)
    ]
    by_stage = _others_mean(ends, lambda end: end.stage)
    by_round = _others_mean(ends, lambda end: (end.stage, end.number))
    found = []
    for stage in stages:
        rows = [
            (end.rest_s, coarse, coarse if fine is None else fine)
            for end, coarse, fine in zip(ends, by_stage, by_round, strict=True)
            if end.stage == stage and coarse is not None
        ]
        if rows:
            rest, coarse, fine = (np.array(column, dtype=float) for column in zip(*rows))
            found.append(
                Remaining(
                    stage=stage,
                    num_calls=len(rows),
                    mean_s=float(rest.mean()),
                    error_by_stage_s=float(np.abs(rest - coarse).mean()),
                    error_by_round_s=float(np.abs(rest - fine).mean()),
                    r2_by_stage=_r2(rest, coarse),
                    r2_by_round=_r2(rest, fine),
                )
            )
    return found


def _ends(owner: Hashable, line: Timeline) -> Iterable[_End]:
    numbers: dict[str, int] = defaultdict(int)
    timed: Timed
    for timed in sorted(line.calls, key=lambda timed: timed.end_s):
        stage = timed.call.stage
        numbers[stage] += 1
        yield _End(owner, stage, numbers[stage], line.duration_s - timed.end_s)


def _others_mean(ends: Sequence[_End], key: Callable[[_End], Hashable]) -> list[float | None]:
    """Return for each end the mean rest at ends of the same key that other runs own."""
    total: dict[Hashable, list[float]] = defaultdict(lambda: [0.0, 0.0])
    own: dict[Hashable, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for end in ends:
        for sums, name in ((total, key(end)), (own, (key(end), end.owner))):
            sums[name][0] += end.rest_s
            sums[name][1] += 1.0
    means: list[float | None] = []
    for end in ends:
        sum_s, num = total[key(end)]
        own_s, num_own = own[key(end), end.owner]
        means.append((sum_s - own_s) / (num - num_own) if num > num_own else None)
    return means
