"""A tuner for what a router's decision log says: the window, a fleet as fast as it was, a verdict.

Engines are simulated with the policy that the router began with, whatever the router runs now:
both are started with the same one, and only the router changes it while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.metrics import mean, percentile, slo_attainment
from vllm_workflow.core.workflow import WorkflowProfile
from vllm_workflow.sim.declare import declared
from vllm_workflow.sim.fleet import SimInstance
from vllm_workflow.sim.log_fit import MIN_CALLS, Speed, as_fast, speeds
from vllm_workflow.sim.log_refused import stand_ins
from vllm_workflow.sim.log_window import LogWindow, latest, sim_instance
from vllm_workflow.sim.simulator import simulate
from vllm_workflow.sim.tuner import TunerSettings, Verdict, Window, engines_of, tune

MAX_ERROR = 0.5
"""Median share by which a call's replayed duration may be off: beyond this the replay says
nothing about the fleet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Went:
    """How the whole runs of a window went."""

    attainment: float | None
    mean_s: float
    p95_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How well a replay under the policy of the log agrees with what happened."""

    happened: Went
    replayed: Went
    """Router and engines together; where a policy is unstable, small things make large ones."""
    speeds: Mapping[str, Speed]

    @property
    def error(self) -> float | None:
        """Share by which the median call of an instance is off, mean over calls.

        None if no instance has calls enough to tell.
        """
        known = [each for each in self.speeds.values() if math.isfinite(each.error)]
        num_calls = sum(each.num_calls for each in known)
        return sum(e.error * e.num_calls for e in known) / num_calls if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogVerdict:
    """A verdict, and how far the replay that it is from can be trusted."""

    verdict: Verdict
    fit: Fit | None
    """None if there were too few runs to tell, or another fleet was asked for."""


def tune_log(
    log: LogWindow,
    points: Sequence[PolicyConfig],
    settings: TunerSettings | None = None,
    *,
    incumbent: PolicyConfig | None = None,
    fleet: Sequence[SimInstance] | None = None,
    workflows: Sequence[WorkflowProfile] | None = None,
    engine_policy: PolicyConfig | None = None,
    max_runs: int | None = None,
) -> LogVerdict:
    """Return whether one of `points` would have served the window better.

    Args:
        log: The window.
        points: Policies to try.
        settings: When to believe a gain.
        incumbent: Policy that they are held against; by default the one in force at the end.
        fleet: In the place of the log's, which is corrected to be as fast as it was.
        workflows: Declared to the router; by default what its runs look like.
        engine_policy: Of the engines; by default the one that the router began with.
        max_runs: Of the window, the last so many; None for all.

    Raises:
        ConfigError: See `tune`.
    """
    settings = settings or TunerSettings()
    incumbent = incumbent or log.policy
    if max_runs is not None:
        log = latest(log, max_runs)
    window = _window(log, fleet, workflows, engine_policy)
    if len(window.runs) - len(window.uncounted) < settings.min_runs or fleet is not None:
        return LogVerdict(verdict=tune(window, incumbent, points, settings), fit=None)
    window, fit = fitted(log, window)
    reason = _why_not(fit)
    if reason is not None:
        verdict = Verdict(swap=False, reason=reason, policy=incumbent, incumbent=incumbent)
        return LogVerdict(verdict=verdict, fit=fit)
    return LogVerdict(verdict=tune(window, incumbent, points, settings), fit=fit)


def _why_not(fit: Fit) -> str | None:
    """Return why a replay says nothing about the fleet; None if it does."""
    if fit.error is None:
        return (
            f"nobody can tell whether the replay fits: no instance has {MIN_CALLS} calls, of "
            f"{sum(each.num_calls for each in fit.speeds.values())} in all"
        )
    if fit.error > MAX_ERROR:
        return (
            f"the replay does not fit: the median call of an instance is off by "
            f"{fit.error:.0%}, at most {MAX_ERROR:.0%} would do"
        )
    return None


def as_happened(log: LogWindow, *, fleet: Sequence[SimInstance] | None = None) -> Window:
    """Return the traffic of a log on instances as fast as they were, or on another fleet."""
    window = _window(log, fleet, None, None)
    return window if fleet is not None else _as_fast(log, window)[0]


def fitted(log: LogWindow, window: Window) -> tuple[Window, Fit]:
    """Make the instances of a window as fast as they were, and say how well it then agrees."""
    window, found = _as_fast(log, window)
    result = simulate(
        window.runs,
        window.fleet,
        log.policy,
        engines=engines_of(window.engine_policy),
        workflows=window.workflows,
        tenants=window.tenants,
    )
    whole = [each for each in log.runs if each.run.run_id in log.whole]
    again = [run for run in result.runs if run.run_id in log.whole]
    return window, Fit(
        happened=_went([each.latency_s for each in whole], [each.run.slo_s for each in whole]),
        replayed=_went([run.latency_s for run in again], [run.slo_s for run in again]),
        speeds=found,
    )


def _window(
    log: LogWindow,
    fleet: Sequence[SimInstance] | None,
    workflows: Sequence[WorkflowProfile] | None,
    engine_policy: PolicyConfig | None,
) -> Window:
    whole = [each for each in log.runs if each.run.run_id in log.whole]
    runs = [*(each.run for each in log.runs), *stand_ins(log.refused, whole)]
    return Window(
        runs=tuple(sorted(runs, key=lambda run: run.arrival_s or 0.0)),
        fleet=tuple(fleet or map(sim_instance, log.instances)),
        workflows=tuple(declared(e.run for e in log.runs) if workflows is None else workflows),
        engine_policy=engine_policy or log.first_policy,
        tenants=log.tenants,
        uncounted=frozenset(e.run.run_id for e in log.runs if e.run.run_id not in log.whole),
    )


def _as_fast(log: LogWindow, window: Window) -> tuple[Window, Mapping[str, Speed]]:
    found = speeds(log.runs, window.fleet, window.engine_policy or log.policy)
    known = [each.factor for each in found.values() if math.isfinite(each.error)]
    if known:  # the few calls of the others say less than what the rest of the fleet is like
        other = Speed(factor=median(known))
        used = {n: each if math.isfinite(each.error) else other for n, each in found.items()}
        window = replace(window, fleet=as_fast(window.fleet, used))
    return window, found


def _went(latencies_s: Sequence[float], slos_s: Sequence[float | None]) -> Went:
    return Went(
        attainment=slo_attainment(latencies_s, slos_s),
        mean_s=mean(latencies_s) or 0.0,
        p95_s=percentile(latencies_s, 95.0) or 0.0,
    )
