"""CPU time of what the router decides and of what the simulator simulates, by pytest-benchmark.

    pytest benchmarks/test_decision_cost.py

Times are CPU time of the thread. A decision is `settle` of a call in flight, `poll`, and `predict`,
`submit` and `poll` of the next one, whose prompt shares its head with others; as many calls run and
wait as before. `benchmarks/compare.py` reports decisions under load.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import deque

import pytest

from tests.builders import FAST, SLOW, stage_request
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.fleet import Fleet, Instance
from vllm_workflow.core.ordering import ORDERING_POLICIES
from vllm_workflow.core.tenants import TenantConfig, TenantsConfig
from vllm_workflow.core.types import Decision, Outcome
from vllm_workflow.sim.arrivals import arrival_times
from vllm_workflow.sim.capacity import REFERENCE_POLICIES
from vllm_workflow.sim.fleet import fleet_of
from vllm_workflow.sim.simulator import simulate
from vllm_workflow.sim.workloads import load


class Load:
    """A dispatcher with a constant number of calls, in flight and waiting."""

    def __init__(self, policy: str, num_instances: int, num_seats: int, num_waiting: int) -> None:
        fleet = Fleet()
        for i in range(num_instances):
            fleet.add(
                Instance(
                    instance_id=f"i{i}",
                    models=(),
                    latency=SLOW if i % 2 else FAST,
                    max_num_seqs=num_seats,
                    num_kv_tokens=100_000,
                )
            )
        self._brain = Dispatcher(fleet, PolicyConfig.from_name(policy, source="benchmark"))
        self._in_flight: deque[Decision] = deque()
        self._numbers = itertools.count()
        self._random = random.Random(0)
        self._now = 0.0
        num_calls = num_instances * num_seats + num_waiting
        for _ in range(num_calls if num_waiting else num_calls // 2):
            self._submit()

    @property
    def num_calls(self) -> tuple[int, int]:
        return len(self._in_flight), len(self._brain.waiting)

    def turn(self) -> None:
        """One call ends, one comes."""
        self._now += 0.01
        decision = self._in_flight.popleft()
        self._brain.settle(
            Outcome(
                request_id=decision.request_id,
                instance_id=decision.chosen.instance_id,
                ok=True,
                ttft_s=0.1,
                e2el_s=1.0,
                num_prompt_tokens=2000,
                num_cached_tokens=decision.chosen.num_cached_tokens,
                num_output_tokens=60,
            )
        )
        self._in_flight.extend(self._brain.poll(self._now))
        self._submit()

    def _submit(self) -> None:
        number, draw = next(self._numbers), self._random.randrange(400)
        run = number // 4
        # A template, a schema, what one question retrieved, and the run's own.
        head = [(1, 2000), (10 + draw % 50, 2400), (1000 + draw, 1600), (100_000 + run, 800)]
        request = self._brain.predict(
            stage_request(
                f"r{number}",
                workflow="w",
                workflow_id=f"run{run}",
                stage="s",
                arrival_time=self._now,
                deadline=self._now + 60.0 + draw % 60,
            ),
            num_prompt_bytes=8000,
            max_tokens=512,
            head=head,
        )
        decision = self._brain.submit(request, now=self._now, num_prompt_bytes=8000)
        self._in_flight.extend([decision] if decision else [])
        self._in_flight.extend(self._brain.poll(self._now))


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize(
    ("num_instances", "num_seats", "num_waiting"),
    [(4, 32, 0), (8, 32, 0), (8, 16, 100), (64, 32, 0), (64, 16, 1_000), (1_000, 2, 10_000)],
)
@pytest.mark.parametrize("policy", ["workflow", "predicted-finish", "hexgen", "least-outstanding"])
def test_decision(  # type: ignore[no-untyped-def]
    benchmark, policy: str, num_instances: int, num_seats: int, num_waiting: int
) -> None:
    if num_waiting and policy != "workflow":
        pytest.skip("calls wait with late binding only")
    benchmark.group = f"a decision, {num_instances} instances, {num_waiting} calls waiting"
    load = Load(policy, num_instances, num_seats, num_waiting)
    before = load.num_calls

    benchmark.pedantic(load.turn, rounds=40, iterations=20, warmup_rounds=2)

    assert load.num_calls == before


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize(
    ("num_tenants", "num_waiting", "most_runs"),
    [(1, 1_000, None), (1_000, 1_000, None), (1, 20_000, 8), (1, 20_000, None)],
)
def test_decision_with_tenants(  # type: ignore[no-untyped-def]
    benchmark, num_tenants: int, num_waiting: int, most_runs: int | None
) -> None:
    """A call comes while others wait, each of a run of its own, and is withdrawn again."""
    benchmark.group = f"a call of {num_tenants} tenants with {num_waiting} waiting"
    fleet = Fleet()
    fleet.add(Instance(instance_id="a", models=(), max_num_seqs=256 if most_runs else 8))
    config = TenantsConfig(default=TenantConfig(max_concurrent_runs=most_runs))
    brain = Dispatcher(
        fleet, PolicyConfig.from_name("workflow", source="benchmark"), tenants=config
    )

    def come(number: int) -> None:
        request = stage_request(
            f"r{number}", workflow_id=f"run{number}", tenant_id=f"t{number % num_tenants}"
        )
        brain.submit(request, now=1.0)
        brain.poll(1.0)

    for number in range(num_waiting + 8):
        come(number)

    def turn() -> None:
        come(num_waiting + 8)
        brain.withdraw(f"r{num_waiting + 8}")

    benchmark.pedantic(turn, rounds=40, iterations=5, warmup_rounds=2)

    assert len(brain.waiting) == num_waiting


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
