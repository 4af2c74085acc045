"""Traffic that one policy serves better than another, small enough to simulate often."""

from __future__ import annotations

from pathlib import Path

from vllm_workflow.core.config import PRESETS, PolicyConfig
from vllm_workflow.core.events import Event, to_json
from vllm_workflow.core.fleet import Instance
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.sim.arrivals import with_arrivals
from vllm_workflow.sim.fleet import SimInstance
from vllm_workflow.sim.simulator import simulate
from vllm_workflow.sim.tuner import Window
from vllm_workflow.sim.types import Trace, TraceCall, TraceRun

HEXGEN = PRESETS["hexgen"]
FAST = LatencyModel(overhead_s=0.002, weights_s=0.01, per_token_s=5e-5)
SLOW = LatencyModel(overhead_s=0.004, weights_s=0.08, per_token_s=4e-4)


def fleet() -> tuple[SimInstance, ...]:
    """One instance is eight times as fast as the other; two calls fit on each."""
    return tuple(
        SimInstance(
            instance=Instance(instance_id=name, models=(), latency=latency, max_num_seqs=2),
            num_kv_blocks=10_000,
        )
        for name, latency in (("fast", FAST), ("slow", SLOW))
    )


def runs(num_runs: int = 60, *, rate: float = 1.0, slo_s: float | None = 4.0) -> list[TraceRun]:
    """Runs of two calls, the second after the first."""
    made = [
        TraceRun(
            run_id=f"run-{i}",
            workflow="w",
            calls=(
                TraceCall(
                    call_id="a", stage="draft", num_prompt_tokens=400, num_output_tokens=30 + i % 7
                ),
                TraceCall(
                    call_id="b",
                    stage="check",
                    num_prompt_tokens=300,
                    num_output_tokens=20 + i % 5,
                    after=("a",),
                ),
            ),
            slo_s=slo_s,
        )
        for i in range(num_runs)
    ]
    return list(with_arrivals(Trace(runs=tuple(made), source="test"), rate, seed=1).runs)


def window(num_runs: int = 60, *, rate: float = 1.0, slo_s: float | None = 4.0) -> Window:
    return Window(runs=tuple(runs(num_runs, rate=rate, slo_s=slo_s)), fleet=fleet())


def logged(
    path: Path,
    policy: PolicyConfig = HEXGEN,
    *,
    num_runs: int = 60,
    rate: float = 1.0,
    slo_s: float | None = 4.0,
    actual: tuple[SimInstance, ...] | None = None,
) -> Path:
    """Write the decision log of a router that served such runs."""
    log: list[Event] = []
    simulate(runs(num_runs, rate=rate, slo_s=slo_s), actual or fleet(), policy, record=log.append)
    path.write_text("".join(f"{to_json(event)}\n" for event in log), encoding="utf-8")
    return path
