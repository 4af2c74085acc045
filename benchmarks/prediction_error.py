"""How well the router predicts lengths and what is left of runs, against what turns out.

python benchmarks/prediction_error.py --trace builtin:chase --load 0.85

A simulation at level 1. Each call's predictions are those that it was decided with; what is left is
the longest path after the call, alone on the fastest instance, as in LB1.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from vllm_workflow.bench.compare import Options
from vllm_workflow.bench.compare_jobs import Setting, find_capacity, inputs_of
from vllm_workflow.core.call_events import Submitted
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import Event
from vllm_workflow.sim.bounds import rest_after_s
from vllm_workflow.sim.simulator import simulate


class Told(NamedTuple):
    """One call: predicted and true."""

    stage: str
    sources: tuple[str, str]
    expected_tokens: float
    num_tokens: float
    rest_s: float
    true_rest_s: float


def predictions(trace: str, load: float, slo_scale: float, seed: int, *, cold: bool) -> list[Told]:
    """Simulate the default policy on the runs of one seed."""
    setup = Options().setup
    rate = load * find_capacity(setup, trace).rate
    setting = Setting(trace=trace, rate=rate, load=load, slo_scale=slo_scale, slo_s=None)
    inputs, fleet = inputs_of(setup, setting, seed), setup.build_fleet()
    log: list[Event] = []
    simulate(
        inputs.runs,
        fleet,
        PolicyConfig.from_name("workflow", source="policy"),
        arrivals=inputs.arrivals,
        workflows=() if cold else inputs.workflows,
        record=log.append,
    )
    calls = {f"{run.run_id}/{call.call_id}": call for run in inputs.runs for call in run.calls}
    rests_s = {
        f"{run.run_id}/{call_id}": rest_s
        for run in inputs.runs
        for call_id, rest_s in rest_after_s(run, fleet).items()
    }
    return [
        Told(
            request.stage,
            (request.expected_from, request.rest_from),
            request.expected_output_tokens,
            calls[request.request_id].num_output_tokens,
            request.rest_s,
            rests_s[request.request_id],
        )
        for request in (event.request for event in log if isinstance(event, Submitted))
    ]


def explained(true: Sequence[float], told: Sequence[float]) -> float:
    """Return the share of the variance that predictions explain; below 0 if they mislead."""
    mean = statistics.fmean(true)
    total = math.fsum((y - mean) ** 2 for y in true)
    return 1.0 - math.fsum((y - f) ** 2 for y, f in zip(true, told)) / total if total else math.nan


def correlation(true: Sequence[float], told: Sequence[float]) -> float:
    """Squared: what a straight line through the predictions would explain."""
    try:
        return statistics.correlation(true, told) ** 2
    except statistics.StatisticsError:
        return math.nan


def show(name: str, told: Sequence[Told]) -> None:
    tokens, expected = [t.num_tokens for t in told], [t.expected_tokens for t in told]
    true_s, rest_s = [t.true_rest_s for t in told], [t.rest_s for t in told]
    error = statistics.fmean(abs(y - f) for y, f in zip(tokens, expected))
    print(
        f"{name:24} {len(told):6} {statistics.fmean(tokens):8.0f} {statistics.fmean(expected):8.0f}"
        f" {error:7.1f} {explained(tokens, expected):7.3f}   {statistics.fmean(true_s):7.1f}"
        f" {statistics.fmean(rest_s):7.1f} {correlation(true_s, rest_s):7.3f}"
    )


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--trace", default="builtin:chess", help="as benchmarks/compare.py")
    flags.add_argument("--load", type=float, default=0.85, help="of what the fleet serves at most")
    flags.add_argument("--slo-scale", type=float, default=3.0, help="promise, in LB1")
    flags.add_argument("--seed", type=int, default=1)
    flags.add_argument("--cold", action="store_true", help="no workflow is declared")
    args = flags.parse_args()
    try:
        told = predictions(args.trace, args.load, args.slo_scale, args.seed, cold=args.cold)
    except ConfigError as e:
        flags.error(str(e))
    print(f"{args.trace}, load {args.load:g}, seed {args.seed}, level 1, policy workflow")
    print(f"{'':24} {'':6} {'output tokens':^33}   {'rest of the run, s':^23}")
    print(
        f"{'stage':24} {'calls':>6} {'mean':>8} {'told':>8} {'error':>7} {'R²':>7}   {'LB1':>7}"
        f" {'told':>7} {'r²':>7}"
    )
    for stage in dict.fromkeys(t.stage for t in told):
        show(stage, [t for t in told if t.stage == stage])
    show("all", told)
    for (length, rest), number in sorted(Counter(t.sources for t in told).items()):
        print(f"{100 * number / len(told):5.1f} % of calls: length {length}, rest {rest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
