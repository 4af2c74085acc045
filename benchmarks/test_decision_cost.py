"""CPU time of what the router decides and of what the simulator simulates, by pytest-benchmark.

    pytest benchmarks/test_decision_cost.py

Times are CPU time of the thread. A decision is `predict`, `submit` and `settle` of one call with
others in flight; `benchmarks/compare.py` reports decisions under load.
"""

from __future__ import annotations

import itertools
import time

import pytest

from tests.builders import SLOW, stage_request
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.fleet import Fleet, Instance
from vllm_workflow.core.ordering import ORDERING_POLICIES
from vllm_workflow.core.types import Outcome
from vllm_workflow.sim.arrivals import arrival_times
from vllm_workflow.sim.capacity import REFERENCE_POLICIES
from vllm_workflow.sim.fleet import fleet_of
from vllm_workflow.sim.simulator import simulate
from vllm_workflow.sim.workloads import load

NUM_IN_FLIGHT = 64


def dispatcher(policy: str, num_instances: int) -> Dispatcher:
    """A dispatcher with calls in flight."""
    fleet = Fleet()
    for i in range(num_instances):
        fleet.add(Instance(instance_id=f"i{i}", models=(), latency=SLOW, num_kv_tokens=100_000))
    made = Dispatcher(fleet, PolicyConfig.from_name(policy, source="benchmark"))
    for n in range(NUM_IN_FLIGHT):
        made.submit(stage_request(f"before-{n}", num_prompt_tokens=500), now=0.0)
    return made


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("num_instances", [4, 8, 64, 1000])
@pytest.mark.parametrize("policy", ["workflow", "hexgen", "least-outstanding"])
def test_decision(benchmark, policy: str, num_instances: int) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"a decision, {num_instances} instances"
    made = dispatcher(policy, num_instances)
    numbers = itertools.count()

    def decide() -> None:
        request = made.predict(
            stage_request(f"r{next(numbers)}", workflow="w", stage="s", deadline=60.0),
            num_prompt_bytes=4000,
            max_tokens=None,
        )
        decision = made.submit(request, now=1.0, num_prompt_bytes=4000)
        assert decision is not None
        made.settle(
            Outcome(
                request_id=request.request_id,
                instance_id=decision.chosen.instance_id,
                ok=True,
                ttft_s=0.1,
                e2el_s=1.0,
                num_prompt_tokens=1000,
                num_output_tokens=10,
            )
        )

    benchmark.pedantic(decide, rounds=max(20, 4_000 // num_instances), warmup_rounds=10)

    assert made.num_in_flight == NUM_IN_FLIGHT


@pytest.mark.benchmark(group="an ordering key", timer=time.thread_time)
@pytest.mark.parametrize("name", sorted(ORDERING_POLICIES))
def test_ordering_key(benchmark, name: str) -> None:  # type: ignore[no-untyped-def]
    ordering = PolicyConfig(ordering=name).build_ordering()
    request = stage_request(deadline=60.0, rest_s=3.0, service_s=1.0, run_arrival_time=0.0)

    def thousand_keys() -> None:
        for _ in range(1000):
            ordering.key(request)

    benchmark.pedantic(thousand_keys, rounds=50, warmup_rounds=3)


@pytest.mark.benchmark(group="60 runs of CHESS at level 1", timer=time.thread_time)
@pytest.mark.parametrize("policy", ["workflow", *REFERENCE_POLICIES])
def test_simulation(benchmark, policy: str) -> None:  # type: ignore[no-untyped-def]
    fleet = fleet_of(
        "A100:2,A6000:1,L40S:1",
        model_shape="llama-3.1-70b",
        weight_bits=4,
        gpu_memory_utilization=0.95,
    )
    runs = load("builtin:chess", 60, 0).runs
    arrivals = arrival_times(60, request_rate=0.15)
    config = PolicyConfig.from_name(policy, source="benchmark")

    result = benchmark.pedantic(
        simulate, args=(runs, fleet, config), kwargs={"arrivals": arrivals}, rounds=3
    )

    assert all(run.finished for run in result.runs)
    benchmark.extra_info["simulated_s"] = result.end_time
    benchmark.extra_info["simulated_over_real"] = result.end_time / benchmark.stats["mean"]
