"""Would another policy have served the last traffic better, by more than chance?

Successive halving at level 1, in three parts. Every point of the grid is tried on a quarter of
the window, the best few on half of it, each time otherwise arranged (`sim.replicates`) and all
on the same runs and arrivals. The best is then held against the present policy on further
arrangements of the same runs. So what was luck of an arrangement when it was chosen counts for
nothing then; what is luck of these runs counts again, and only fresh traffic can tell it.

What is compared is

    J = attainment + p95_weight · ln(P95 of the present policy / P95)

Attainment is the share of runs within their SLO. With the default weight a P95 that is 10 %
shorter is worth one point of it, so it decides only where attainment does not. Runs that are
refused are missed in attainment and are not in P95, which is that of the runs that finished.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.metrics import mean, percentile, slo_attainment
from vllm_workflow.core.policy_grid import changes
from vllm_workflow.core.tenants import TenantsConfig
from vllm_workflow.core.workflow import WorkflowProfile
from vllm_workflow.sim.fleet import EngineFactory, SimInstance, event_engine
from vllm_workflow.sim.replicates import lower_bound, replicate
from vllm_workflow.sim.results import RunResult
from vllm_workflow.sim.simulator import simulate
from vllm_workflow.sim.types import SimEngine, TraceRun

RUNGS = ((0.25, 4), (0.5, 1))
"""Share of the window that points are tried on, and how many others than the present go on."""
MIN_RUNG_RUNS = 20
MIN_REPLICATES = 3
"""Arrangements after which a challenger that is no better so far is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Traffic, and what served it."""

    runs: tuple[TraceRun, ...]
    """In order of arrival, each with its `arrival_s`."""
    fleet: tuple[SimInstance, ...]
    workflows: tuple[WorkflowProfile, ...] = ()
    """Declared to the router."""
    engine_policy: PolicyConfig | None = None
    """What the engines run whatever the router does; None: the same as the router."""
    tenants: TenantsConfig | None = None
    """Their shares, quotas and SLOs, as the router knows them."""
    uncounted: frozenset[str] = frozenset()
    """Ids of runs that are load only, because the window cuts them off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TunerSettings:
    """When to believe a gain."""

    min_runs: int = 30
    """Of the window that count; with fewer nothing is tried."""
    num_replicates: int = 6
    """Arrangements that the best point is held against the present policy on, at least 3."""
    confidence: float = 0.95
    """That the gain is more than `min_gain`, one-sided; above 0.5 and below 1."""
    min_gain: float = 0.01
    """Of J: less is not worth a change, >= 0."""
    p95_weight: float = 0.1
    """See J, >= 0."""
    seed: int = 0
    """Of the arrangements."""

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("min_runs", self.min_runs >= 1, "an integer from 1"),
            (
                "num_replicates",
                MIN_REPLICATES <= self.num_replicates <= 1000,
                f"an integer from {MIN_REPLICATES} to 1000",
            ),
            ("confidence", 0.5 < self.confidence < 1.0, "a number above 0.5 and below 1"),
            ("min_gain", 0.0 <= self.min_gain < math.inf, "a finite number from 0"),
            ("p95_weight", 0.0 <= self.p95_weight < math.inf, "a finite number from 0"),
        ):
            if not holds:
                raise ConfigError(f"{name}: expected {wanted}, got {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one policy came to, means over the arrangements it was last tried on."""

    attainment: float | None
    """None if no run has an SLO."""
    p95_s: float
    """Of the runs that finished; 0 if none did."""
    gain: float
    """J minus that of the present policy; 0 for the latter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One policy of the grid, and how far it came."""

    policy: PolicyConfig
    changes: dict[str, object]
    """Its fields that differ from the present policy's."""
    rung: int
    """The last that it was tried on: 1, 2, …; the one after the last of `RUNGS` is the final."""
    score: Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether to swap, and why."""

    swap: bool
    reason: str
    policy: PolicyConfig
    """The one to run from now on."""
    incumbent: PolicyConfig
    gain: float | None = None
    """Of the best other point, mean over the arrangements of the final; None if none was tried."""
    gain_low: float | None = None
    """What the gain exceeds with the confidence asked for."""
    num_replicates: int = 0
    """Arrangements that this is from."""
    num_runs: int = 0
    """Of the window that count."""
    num_calls: int = 0
    """Simulated, by all points together."""
    points: tuple[Point, ...] = field(default=())
    """Those that came furthest first, then by gain."""


def tune(
    window: Window,
    incumbent: PolicyConfig,
    points: Sequence[PolicyConfig],
    settings: TunerSettings | None = None,
) -> Verdict:
    """Return whether one of `points` should take the place of `incumbent`.

    Equal arguments give equal verdicts.

    Raises:
        ConfigError: A call that fits no instance, or a run without arrival.
    """
    return _Tuner(window, incumbent, points, settings or TunerSettings()).verdict()


class _Tuner:
    """One tuning under way."""

    def __init__(
        self,
        window: Window,
        incumbent: PolicyConfig,
        points: Sequence[PolicyConfig],
        settings: TunerSettings,
    ) -> None:
        self._window = window
        self._incumbent = incumbent
        self._others = [point for point in dict.fromkeys(points) if point != incumbent]
        self._settings = settings
        self._engines = engines_of(window.engine_policy)
        self._num_calls = 0
        self._points: dict[PolicyConfig, Point] = {}

    def verdict(self) -> Verdict:
        num_runs = sum(run.run_id not in self._window.uncounted for run in self._window.runs)
        wanted = self._settings.min_runs
        if num_runs < wanted:
            return self._keep(f"{num_runs} runs, of at least {wanted}", num_runs)
        if not self._others:
            return self._keep("no other policy to try", num_runs)
        for number, (share, num_kept) in enumerate(RUNGS, start=1):
            self._others = self._rung(number, share)[:num_kept]
        return self._final(self._others[0], num_runs)

    def _rung(self, number: int, share: float) -> list[PolicyConfig]:
        """Try what is left on a part of one arrangement; return it, the best first."""
        runs = self._arranged(number)
        runs = runs[: max(MIN_RUNG_RUNS, math.ceil(share * len(runs)))]
        present = self._simulated(self._incumbent, runs)
        self._note(self._incumbent, number, [present], [present])
        for point in self._others:
            self._note(point, number, [self._simulated(point, runs)], [present])
        return sorted(self._others, key=lambda p: self._points[p].score.gain, reverse=True)

    def _final(self, challenger: PolicyConfig, num_runs: int) -> Verdict:
        """Hold the best point against the present policy on further arrangements."""
        settings, number = self._settings, len(RUNGS) + 1
        mine: list[_Outcome] = []
        present: list[_Outcome] = []
        gains: list[float] = []
        for fresh in range(settings.num_replicates):
            runs = self._arranged(number + fresh)
            present.append(self._simulated(self._incumbent, runs))
            mine.append(self._simulated(challenger, runs))
            gains.append(mine[-1].gain_over(present[-1], settings.p95_weight))
            if fresh + 1 >= MIN_REPLICATES and (mean(gains) or 0.0) <= settings.min_gain:
                break
        self._note(self._incumbent, number, present, present)
        self._note(challenger, number, mine, present)
        gain = mean(gains) or 0.0
        low = lower_bound(gains, settings.confidence)
        swap = len(gains) == settings.num_replicates and low > settings.min_gain
        how = f"gain {gain:+.3f}, above {low:+.3f} at {settings.confidence:.0%} confidence"
        than = f"than the {settings.min_gain:g} that a change must bring"
        return Verdict(
            swap=swap,
            reason=f"{how}: {'more' if swap else 'not more'} {than}",
            policy=challenger if swap else self._incumbent,
            incumbent=self._incumbent,
            gain=gain,
            gain_low=low,
            num_replicates=len(gains),
            num_runs=num_runs,
            num_calls=self._num_calls,
            points=self._ranked(),
        )

    def _keep(self, reason: str, num_runs: int) -> Verdict:
        return Verdict(
            swap=False,
            reason=reason,
            policy=self._incumbent,
            incumbent=self._incumbent,
            num_runs=num_runs,
        )

    def _arranged(self, number: int) -> tuple[TraceRun, ...]:
        return replicate(self._window.runs, number, self._settings.seed)

    def _simulated(self, policy: PolicyConfig, runs: Sequence[TraceRun]) -> _Outcome:
        window = self._window
        result = simulate(
            runs,
            window.fleet,
            policy,
            engines=self._engines,
            workflows=window.workflows,
            tenants=window.tenants,
        )
        self._num_calls += len(result.calls)
        counted = [run for run in result.runs if run.run_id not in window.uncounted]
        return _outcome(counted)

    def _note(
        self,
        policy: PolicyConfig,
        rung: int,
        outcomes: Sequence[_Outcome],
        present: Sequence[_Outcome],
    ) -> None:
        weight = self._settings.p95_weight
        gains = [mine.gain_over(other, weight) for mine, other in zip(outcomes, present)]
        met = [each.attainment for each in outcomes if each.attainment is not None]
        self._points[policy] = Point(
            policy=policy,
            changes=changes(self._incumbent, policy),
            rung=rung,
            score=Score(
                attainment=mean(met),
                p95_s=mean([each.p95_s for each in outcomes]) or 0.0,
                gain=mean(gains) or 0.0,
            ),
        )

    def _ranked(self) -> tuple[Point, ...]:
        return tuple(
            sorted(self._points.values(), key=lambda p: (p.rung, p.score.gain), reverse=True)
        )


@dataclass(frozen=True, slots=True)
class _Outcome:
    """One policy on one arrangement."""

    attainment: float | None
    p95_s: float

    def gain_over(self, other: _Outcome, p95_weight: float) -> float:
        gain = 0.0
        if self.attainment is not None and other.attainment is not None:
            gain = self.attainment - other.attainment
        if self.p95_s > 0.0 and other.p95_s > 0.0:
            gain += p95_weight * math.log(other.p95_s / self.p95_s)
        return gain


def _outcome(runs: Sequence[RunResult]) -> _Outcome:
    latencies_s = [run.latency_s for run in runs]
    return _Outcome(
        slo_attainment(latencies_s, [run.slo_s for run in runs]),
        percentile([s for s in latencies_s if s < math.inf], 95.0) or 0.0,
    )


def engines_of(policy: PolicyConfig | None) -> EngineFactory:
    """Return a factory of level 1 engines that run `policy` whatever the router does.

    Args:
        policy: None: the same as the router.
    """
    if policy is None:
        return event_engine

    def engine(instance: SimInstance, _: PolicyConfig) -> SimEngine:
        return event_engine(instance, policy)

    return engine
