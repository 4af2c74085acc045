"""How fast the level 1 simulator is, and where its time goes.

    python benchmarks/sim_speed.py --trace builtin:chess --num-runs 300 --request-rate 0.5
    python scripts/compile_core.py && PYTHONPATH=out/compiled python benchmarks/sim_speed.py

Prints LLM calls per second, simulated over real time, and microseconds per call in the
dispatcher (predict, submit, poll, settle), in the engines, and in the loop between them; the
last three not of compiled code. Times are CPU time of one core; each is the least of several
repetitions: what else the machine does only adds. `results` is a digest of what was simulated.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from vllm_workflow.core import policy_names
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.sim.arrivals import arrival_times
from vllm_workflow.sim.bounds import with_slo_scale
from vllm_workflow.sim.compiled import is_compiled
from vllm_workflow.sim.engine import EventEngine
from vllm_workflow.sim.fleet import SimInstance, fleet_of
from vllm_workflow.sim.results import SimResult
from vllm_workflow.sim.simulator import simulate
from vllm_workflow.sim.types import TraceRun
from vllm_workflow.sim.workloads import load

_ENGINE = (EventEngine, ("submit", "advance"))
_DISPATCHER = (Dispatcher, ("predict", "submit", "poll", "settle"))


@dataclass(slots=True)
class Costs:
    """Seconds of one simulation, the least seen."""

    total_s: float = float("inf")
    engine_s: float = float("inf")
    dispatcher_s: float = float("inf")
    loop_s: float = float("inf")


@dataclass(slots=True)
class Stopwatch:
    """Adds up the time spent in some methods of a class while it is on them."""

    cls: type[Any]
    names: Sequence[str]
    seconds: float = 0.0
    _originals: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __enter__(self) -> Stopwatch:
        for name in self.names:
            self._originals[name] = getattr(self.cls, name)
            setattr(self.cls, name, self._timed(self._originals[name]))
        return self

    def __exit__(self, *_: object) -> None:
        for name, method in self._originals.items():
            setattr(self.cls, name, method)

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - begin

        return timed


def measure(run: Callable[[], SimResult], repetitions: int) -> tuple[SimResult, Costs]:
    """Run several times, in turn without and with stopwatches."""
    least = Costs()
    for _ in range(repetitions):
        gc.collect()
        begin = time.process_time()
        result = run()
        least.total_s = min(least.total_s, time.process_time() - begin)
        if is_compiled():
            continue
        with Stopwatch(*_ENGINE) as engine, Stopwatch(*_DISPATCHER) as dispatcher:
            begin = time.process_time()
            run()
            timed_s = time.process_time() - begin
        least.engine_s = min(least.engine_s, engine.seconds)
        least.dispatcher_s = min(least.dispatcher_s, dispatcher.seconds)
        least.loop_s = min(least.loop_s, timed_s - engine.seconds - dispatcher.seconds)
    return result, least


def report(name: str, result: SimResult, costs: Costs) -> str:
    num_calls = len(result.calls)
    parts = (costs.dispatcher_s, costs.engine_s, costs.loop_s)
    each = " ".join(f"{1e6 * s / num_calls:9.1f} {s / sum(parts):5.0%}" for s in parts)
    if is_compiled():
        each = f"{'':>47}"
    return (
        f"{name:24} {num_calls:7} {num_calls / costs.total_s:8,.0f} "
        f"{result.end_time / costs.total_s:8,.0f} {each} {digest(result)}"
    )


def digest(result: SimResult) -> str:
    """Return what two simulations share that went alike, to the last bit."""
    return hashlib.sha256(repr((result.runs, result.calls)).encode()).hexdigest()[:8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", default="builtin:chess", help="as `sim.workloads.load` takes it")
    parser.add_argument("--num-runs", type=int, default=300)
    parser.add_argument("--request-rate", type=float, default=0.5, help="runs per second")
    parser.add_argument("--slo-scale", type=float, default=4.0, help="times the lower bound")
    parser.add_argument("--fleet", default="A100:2,A6000:1,L40S:1")
    parser.add_argument("--model-shape", default="llama-3.1-8b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--policies",
        nargs="+",
        default=["least-outstanding+fcfs", "hexgen+urgency", "predicted-finish", "workflow"],
    )
    args = parser.parse_args()
    fleet: tuple[SimInstance, ...] = fleet_of(args.fleet, model_shape=args.model_shape)
    trace = load(args.trace, args.num_runs, args.seed)
    runs: list[TraceRun] = with_slo_scale(trace.runs, args.slo_scale, fleet)
    arrivals = arrival_times(len(runs), request_rate=args.request_rate, seed=args.seed)
    print(
        f"level 1; {args.trace}, {len(runs)} runs at {args.request_rate:g}/s, seed {args.seed}, "
        f"SLO {args.slo_scale:g} × LB1; {args.fleet} {args.model_shape}; Python "
        f"{platform.python_version()}, {'compiled' if is_compiled() else 'interpreted'}, "
        f"CPU time, least of {args.repetitions}"
    )
    print(
        f"{'policy':24} {'calls':>7} {'calls/s':>8} {'× real':>8} "
        f"{'dispatcher':>15} {'engine':>15} {'loop':>15} results  (µs per call, share)"
    )
    for name in args.policies:
        policy = policy_names.parse(name)

        def run() -> SimResult:
            return simulate(runs, fleet, policy, arrivals=arrivals)  # noqa: B023

        print(report(name, *measure(run, args.repetitions)))


if __name__ == "__main__":
    main()
