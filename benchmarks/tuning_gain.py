"""Does tuning pay? A policy is tuned on a log of some traffic and then meets fresh traffic.

    python benchmarks/tuning_gain.py --present "hexgen alpha=1" hexgen workflow --seeds 4

For each seed a router serves a window of runs under the present policy; from the log of it, as
`vllm-workflow tune` would, a policy is found. Both are then simulated on windows with other
runs and other arrivals, both on the same. Everything is level 1; intervals are Student's, 95 %,
over the windows that were tuned on: the fresh ones that one tuned policy meets share it and count
as their mean.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from vllm_workflow.core import policy_names
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.events import Event, to_json
from vllm_workflow.core.metrics import percentile, slo_attainment
from vllm_workflow.core.policy_grid import changes, default_grid, points
from vllm_workflow.sim.arrivals import with_arrivals
from vllm_workflow.sim.bounds import with_slo_scale
from vllm_workflow.sim.declare import declared
from vllm_workflow.sim.fleet import SimInstance, fleet_of
from vllm_workflow.sim.log_tuner import tune_log
from vllm_workflow.sim.log_window import read_window
from vllm_workflow.sim.replicates import estimate
from vllm_workflow.sim.simulator import simulate
from vllm_workflow.sim.tuner import TunerSettings, engines_of
from vllm_workflow.sim.types import TraceRun
from vllm_workflow.sim.workloads import load

_FRESH_SEED = 500_000
_PROFILE_SEED = 1_000_003


@dataclass(slots=True)
class Found:
    """What came of one present policy."""

    chosen: list[str] = field(default_factory=list)
    met: list[tuple[float, float]] = field(default_factory=list)
    """Attainment before and after, mean over the fresh windows of each window tuned on."""
    p95_s: list[tuple[float, float]] = field(default_factory=list)


class Bench:
    """The traffic and the fleet of all of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._fleet: tuple[SimInstance, ...] = fleet_of(
            args.fleet,
            model_shape=args.model_shape,
            weight_bits=args.weight_bits,
            gpu_memory_utilization=0.95,
        )
        self._workflows = declared(load(args.trace, 200, _PROFILE_SEED).runs)

    def runs(self, seed: int) -> list[TraceRun]:
        args = self._args
        trace = with_arrivals(load(args.trace, args.num_runs, seed), args.request_rate, seed=seed)
        return with_slo_scale(trace.runs, args.slo_scale, self._fleet)

    def tuned(self, present: PolicyConfig, seed: int) -> tuple[PolicyConfig, str]:
        """Serve a window, and tune on its log."""
        log: list[Event] = []
        simulate(
            self.runs(seed), self._fleet, present, workflows=self._workflows, record=log.append
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "decisions.jsonl")
            path.write_text("".join(f"{to_json(event)}\n" for event in log), encoding="utf-8")
            window = read_window(path)
        settings = TunerSettings(num_replicates=self._args.replicates)
        found = tune_log(window, points(present, default_grid(present)), settings)
        return found.verdict.policy, found.verdict.reason

    def met(self, policy: PolicyConfig, engines: PolicyConfig, seed: int) -> tuple[float, float]:
        """Return attainment and P95 on fresh traffic."""
        result = simulate(
            self.runs(_FRESH_SEED + seed),
            self._fleet,
            policy,
            engines=engines_of(engines),
            workflows=self._workflows,
        )
        latencies_s = [run.latency_s for run in result.runs]
        return (
            slo_attainment(latencies_s, [run.slo_s for run in result.runs]) or 0.0,
            percentile(latencies_s, 95.0) or 0.0,
        )


def found_for(bench: Bench, present: PolicyConfig, args: argparse.Namespace) -> Found:
    found = Found()
    for seed in range(args.seeds):
        policy, reason = bench.tuned(present, seed)
        found.chosen.append(json.dumps(changes(present, policy)) if policy != present else "kept")
        print(f"  seed {seed}: {found.chosen[-1]} ({reason})", flush=True)
        met: list[tuple[float, float]] = []
        p95_s: list[tuple[float, float]] = []
        for number in range(args.fresh):
            before = bench.met(present, present, args.fresh * seed + number)
            after = before
            if policy != present:
                after = bench.met(policy, present, args.fresh * seed + number)
            met.append((before[0], after[0]))
            p95_s.append((before[1], after[1]))
        found.met.append(cluster(met))
        found.p95_s.append(cluster(p95_s))
    return found


def cluster(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the means of pairs that share a tuned policy: one observation, not several."""
    return fmean(before for before, _ in pairs), fmean(after for _, after in pairs)


def lines(found: Found) -> Iterator[str]:
    swaps = sum(choice != "kept" for choice in found.chosen)
    yield f"  swapped in {swaps} of {len(found.chosen)} windows"
    yield f"  within SLO on fresh traffic: {_change(found.met, 100.0)} %"
    yield f"  P95: {_change(found.p95_s, 1.0)} s"


def _change(pairs: Sequence[tuple[float, float]], scale: float) -> str:
    before, after = (estimate([scale * pair[i] for pair in pairs]) for i in (0, 1))
    change = estimate([scale * (b - a) for a, b in pairs])
    return (
        f"{before.mean:.3g} → {after.mean:.3g}, difference {change.mean:+.3g} "
        f"({change.low:+.3g} to {change.high:+.3g})"
    )


def present_of(text: str) -> PolicyConfig:
    """Read `NAME` or `NAME alpha=X`."""
    name, _, alpha = text.partition(" alpha=")
    policy = policy_names.parse(name)
    return replace(policy, alpha=float(alpha)) if alpha else policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", default="builtin:chess", help="as `sim.workloads.load` takes it")
    parser.add_argument("--num-runs", type=int, default=100, help="of each window")
    parser.add_argument("--request-rate", type=float, default=0.18, help="runs per second")
    parser.add_argument("--slo-scale", type=float, default=5.0, help="times the lower bound")
    parser.add_argument("--fleet", default="A100:2,A6000:1,L40S:1")
    parser.add_argument("--model-shape", default="llama-3.1-70b")
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--replicates", type=int, default=6, help="of a tuning")
    parser.add_argument("--seeds", type=int, default=4, help="windows that are tuned on")
    parser.add_argument("--fresh", type=int, default=3, help="windows met afterwards, for each")
    parser.add_argument("--present", nargs="+", default=["hexgen alpha=1", "hexgen", "workflow"])
    args = parser.parse_args()
    print(
        f"level 1; {args.trace}, windows of {args.num_runs} runs at {args.request_rate:g}/s, SLO "
        f"{args.slo_scale:g} × LB1, {args.fleet} {args.model_shape} at {args.weight_bits} bits; "
        f"{args.seeds} windows tuned on, {args.fresh} fresh ones each"
    )
    bench = Bench(args)
    for text in args.present:
        print(text)
        for line in lines(found_for(bench, present_of(text), args)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
