"""Level 1 against level 2, and the simulator on both."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

pytest.importorskip("vllm")

from tests.sim.builders import sim_instance, trace_call, trace_run
from tests.sim.vllm_builders import LATENCY, call, engine, part, run, vllm_engine
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.sim.engine import EventEngine
from vllm_workflow.sim.simulator import Outage, simulate
from vllm_workflow.sim.types import EngineEvent, EngineRequest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

POLICIES = {
    "fcfs": PolicyConfig(ordering="fcfs", preempt=False),
    "slack": PolicyConfig(preempt=False),
    "urgency": PolicyConfig(ordering="urgency", preempt=False),
    "deadline": PolicyConfig(ordering="deadline", preempt=False),
    "capped": PolicyConfig(preempt=False, prefill_chunk_cap=64),
    "preempting": PolicyConfig(),
}


def workload(seed: int) -> list[tuple[float, EngineRequest]]:
    rng, now, arrivals = random.Random(seed), 0.0, []
    for i in range(40):
        now += rng.choice([0.0, 0.001, 0.05, 0.2, 1.0])
        each = call(
            f"r{i}",
            prompt=rng.randrange(100, 600),
            output=rng.randrange(1, 150),
            prefix=(part(rng.choice("st"), rng.choice([64, 100])),) if rng.random() < 0.6 else (),
            deadline=now + rng.choice([math.inf, 1.0, 4.0, 20.0, 500.0]),
            workflow_id=f"w{i % 5}",
            service_s=rng.choice([0.0, 0.5]),
            rest_s=rng.choice([0.0, 1.0]),
        )
        arrivals.append((now, each._replace(request=each.request._replace(arrival_time=now))))
    return arrivals


def both_levels(
    policy: PolicyConfig, seed: int, *, num_kv_blocks: int, max_num_seqs: int
) -> tuple[list[EngineEvent], list[EngineEvent]]:
    level_1 = EventEngine(
        "a",
        replace(LATENCY, max_num_batched_tokens=512),
        config=policy,
        max_num_seqs=max_num_seqs,
        num_kv_blocks=num_kv_blocks,
    )
    level_2 = engine(
        policy=policy,
        async_scheduling=False,
        max_num_batched_tokens=512,
        max_num_seqs=max_num_seqs,
        num_kv_blocks=num_kv_blocks,
        max_model_len=(num_kv_blocks - 1) * 16,
    )
    return by_call(run(level_1, workload(seed))), by_call(run(level_2, workload(seed)))


def by_call(events: Sequence[EngineEvent]) -> list[EngineEvent]:
    return sorted(events, key=lambda e: (e.request_id, e.kind.value))


@pytest.mark.parametrize("max_num_seqs", [3, 64])
@pytest.mark.parametrize("policy", [p for n, p in POLICIES.items() if n != "preempting"])
@pytest.mark.parametrize("seed", [1, 2])
def test_without_preemption_level_1_does_what_vllms_scheduler_does(
    policy: PolicyConfig, max_num_seqs: int, seed: int
) -> None:
    level_1, level_2 = both_levels(policy, seed, num_kv_blocks=2001, max_num_seqs=max_num_seqs)

    assert [e.time for e in level_1] == pytest.approx([e.time for e in level_2], abs=1e-9)
    assert [e._replace(time=0.0) for e in level_1] == [e._replace(time=0.0) for e in level_2]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("seed", [1, 2])
def test_with_preemptions_they_stay_close(policy: PolicyConfig, seed: int) -> None:
    """They price the recomputed last token of a resumed call differently."""
    level_1, level_2 = both_levels(policy, seed, num_kv_blocks=61, max_num_seqs=8)

    assert sum(e.num_preemptions for e in level_2) > 0
    means = [sum(e.time for e in events) / len(events) for events in (level_1, level_2)]
    assert means[0] == pytest.approx(means[1], rel=0.01)


def test_the_simulator_runs_on_vllms_scheduler_as_on_level_1() -> None:
    runs = [
        trace_run(
            f"run-{i}",
            trace_call("a", output=40),
            trace_call("b", output=60),
            trace_call("c", after=("a", "b"), gap_s=0.1, output=20),
            arrival_s=0.1 * i,
        )
        for i in range(20)
    ]
    fleet = [sim_instance("fast"), sim_instance("other")]
    outages = [Outage(instance_id="other", start_s=0.55, end_s=1.5)]

    level_2 = simulate(runs, fleet, outages=outages, engines=vllm_engine)

    assert level_2 == simulate(runs, fleet, outages=outages, engines=vllm_engine)
    assert all(math.isfinite(each.end_time) for each in level_2.runs)
    level_1 = simulate(runs, fleet, outages=outages)
    ends = [each.end_time for each in level_1.runs]
    assert ends == pytest.approx([each.end_time for each in level_2.runs], rel=1e-9)
