"""How long a tuning takes on one core, and where the calls that it simulates come from.

    python benchmarks/tune_speed.py --num-runs 100 --request-rate 0.15

One window of generated traffic, all points of each policy's default grid, as `vllm-workflow tune`
and a router's tuner do; without reading the log. Processor time of one process, the least of
several repetitions: what else the machine does only adds. From α 1, which is wrong, the best point
looks better until the end, so that every arrangement is simulated: the most that a tuning takes.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import replace

from vllm_workflow.core import policy_names
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.policy_grid import default_grid, points
from vllm_workflow.sim.arrivals import with_arrivals
from vllm_workflow.sim.bounds import with_slo_scale
from vllm_workflow.sim.compiled import is_compiled
from vllm_workflow.sim.declare import declared
from vllm_workflow.sim.fleet import fleet_of
from vllm_workflow.sim.tuner import Verdict, Window, tune
from vllm_workflow.sim.workloads import load

_PROFILE_SEED = 1_000_003


def window_of(args: argparse.Namespace) -> Window:
    """Make the traffic that is tuned on."""
    fleet = fleet_of(
        args.fleet,
        model_shape=args.model_shape,
        weight_bits=args.weight_bits,
        gpu_memory_utilization=0.95,
    )
    trace = with_arrivals(
        load(args.trace, args.num_runs, args.seed), args.request_rate, seed=args.seed
    )
    return Window(
        runs=tuple(with_slo_scale(trace.runs, args.slo_scale, fleet)),
        fleet=fleet,
        workflows=declared(load(args.trace, 200, _PROFILE_SEED).runs),
    )


def timed(window: Window, policy: PolicyConfig, repetitions: int) -> tuple[Verdict, float]:
    """Tune several times; returns the verdict and the least processor seconds."""
    grid = points(policy, default_grid(policy))
    least_s = float("inf")
    for _ in range(repetitions):
        begin = time.process_time()
        verdict = tune(window, policy, grid)
        least_s = min(least_s, time.process_time() - begin)
    return verdict, least_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", default="builtin:chess", help="as `sim.workloads.load` takes it")
    parser.add_argument("--num-runs", type=int, default=100)
    parser.add_argument("--request-rate", type=float, default=0.15, help="runs per second")
    parser.add_argument("--slo-scale", type=float, default=5.0, help="times the lower bound")
    parser.add_argument("--fleet", default="A100:2,A6000:1,L40S:1")
    parser.add_argument("--model-shape", default="llama-3.1-70b")
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--policies", nargs="+", default=["hexgen", "workflow"])
    args = parser.parse_args()
    window = window_of(args)
    print(
        f"level 1; {args.trace}, {args.num_runs} runs at {args.request_rate:g}/s, "
        f"{sum(len(r.calls) for r in window.runs)} calls, {args.fleet} {args.model_shape}; "
        f"{'compiled' if is_compiled() else 'not compiled'}, Python {platform.python_version()}, "
        f"processor seconds, least of {args.repetitions}"
    )
    print(f"{'present policy':20} {'points':>6} {'calls':>7} {'s':>6} {'calls/s':>8}  verdict")
    for name in args.policies:
        policy = policy_names.parse(name)
        cases = [(name, policy)]
        if policy.dispatch == "hexgen":
            cases.append((f"{name}, α 1", replace(policy, alpha=1.0)))
        for label, present in cases:
            verdict, least_s = timed(window, present, args.repetitions)
            print(
                f"{label:20} {len(verdict.points):6} {verdict.num_calls:7} {least_s:6.2f} "
                f"{verdict.num_calls / least_s:8,.0f}  {verdict.num_replicates} arrangements, "
                f"{'swap' if verdict.swap else 'keep'}: {verdict.reason}"
            )


if __name__ == "__main__":
    main()
