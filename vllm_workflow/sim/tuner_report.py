"""A tuner's verdict for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.sim.log_tuner import Fit, LogVerdict, Went
from vllm_workflow.sim.tuner import RUNGS, Point

_FINAL = len(RUNGS) + 1


def as_json(found: LogVerdict) -> dict[str, Any]:
    """Return everything that led to a verdict, for a history file; finite numbers only."""
    verdict = found.verdict
    return {
        "swap": verdict.swap,
        "reason": verdict.reason,
        "policy": verdict.policy.fingerprint,
        "incumbent": verdict.incumbent.fingerprint,
        "gain": _finite(verdict.gain),
        "gain_low": _finite(verdict.gain_low),
        "num_replicates": verdict.num_replicates,
        "num_runs": verdict.num_runs,
        "num_calls": verdict.num_calls,
        "fit": None if found.fit is None else _fit(found.fit),
        "points": [_point(point) for point in verdict.points],
    }


def text(found: LogVerdict) -> str:
    """Return the verdict as a table of the points, the best first, with what is behind it."""
    verdict = found.verdict
    lines = [f"{verdict.num_runs} runs; {verdict.num_calls} calls simulated at level 1"]
    if found.fit is not None:
        lines += _fit_lines(found.fit)
    if verdict.points:
        lines += ["", *_table(verdict.points, verdict.incumbent), ""]
        lines.append(
            f"Tried on {_shares()} of the window, otherwise arranged each time; those at "
            f"'final' on {verdict.num_replicates} further arrangements of all of it: the same runs "
            "that they were chosen on, in another order. Gain: "
            "attainment + 0.1 · ln(P95 ratio) unless set otherwise, against the present policy on "
            "the same runs and arrivals. Rows of different rungs do not compare."
        )
    lines.append(f"{'SWAP' if verdict.swap else 'KEEP'}: {verdict.reason}")
    lines.append(f"policy from now on: {verdict.policy.fingerprint}")
    return "\n".join(lines)


def _table(points: Sequence[Point], incumbent: PolicyConfig) -> Iterable[str]:
    yield f"{'tried on':>8} {'gain':>8} {'attainment':>10} {'P95 s':>9}  change"
    for point in points:
        score = point.score
        met = "none" if score.attainment is None else f"{score.attainment:.1%}"
        rung = "final" if point.rung == _FINAL else f"{RUNGS[point.rung - 1][0]:.0%}"
        what = ", ".join(f"{name}: {value}" for name, value in point.changes.items())
        if point.policy == incumbent:
            what = "(present policy)"
        yield f"{rung:>8} {score.gain:+8.3f} {met:>10} {score.p95_s:9.3g}  {what}"


def _shares() -> str:
    return ", then ".join(f"{share:.0%}" for share, _ in RUNGS)


def _fit_lines(fit: Fit) -> Iterable[str]:
    for name, went in (("happened", fit.happened), ("replayed", fit.replayed)):
        met = "none with an SLO" if went.attainment is None else f"{went.attainment:.1%} within SLO"
        yield f"  {name}: mean {went.mean_s:.3g} s, P95 {went.p95_s:.3g} s, {met}"
    for name, speed in sorted(fit.speeds.items()):
        known = f"steps {speed.factor:.2f} times as long as configured, calls off by "
        known += f"{speed.error:.0%} in the median"
        what = known if math.isfinite(speed.error) else "too few calls to tell how fast it is"
        yield f"  {name}: {speed.num_calls} calls; {what}"


def _point(point: Point) -> dict[str, Any]:
    return {
        "fingerprint": point.policy.fingerprint,
        "changes": point.changes,
        "rung": point.rung,
        "attainment": point.score.attainment,
        "p95_s": _finite(point.score.p95_s),
        "gain": _finite(point.score.gain),
    }


def _fit(fit: Fit) -> dict[str, Any]:
    return {
        "happened": _went(fit.happened),
        "replayed": _went(fit.replayed),
        "speeds": {
            name: {"factor": each.factor, "error": _finite(each.error), "num_calls": each.num_calls}
            for name, each in fit.speeds.items()
        },
    }


def _went(went: Went) -> dict[str, Any]:
    return {
        "attainment": went.attainment,
        "mean_s": _finite(went.mean_s),
        "p95_s": _finite(went.p95_s),
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
