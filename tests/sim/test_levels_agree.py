"""Level 1 does what vLLM's own scheduler and KV-cache manager do with the plug-in in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

pytest.importorskip("vllm")

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.sim.builders import drive, engine_request, parts
from tests.sim.test_engine_exact import BLOCK_SIZE, cases, contended, latencies, policies
from tests.sim.vllm_builders import LATENCY
from tests.sim.vllm_builders import engine as vllm_engine
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.sim.engine import EventEngine
from vllm_workflow.sim.types import EngineEvent, EngineRequest

pytestmark = pytest.mark.vllm


@st.composite
def crowded(draw: st.DrawFn) -> tuple[object, ...]:
    """Many calls with long answers in few KV blocks: most of them lose theirs once or more."""
    num_blocks = draw(st.sampled_from([12, 18, 30]))
    found = []
    for index in range(draw(st.integers(4, 14))):
        now = draw(st.integers(0, 10**6)) * draw(st.sampled_from([0.0, 5.00009e-8, 3.00006e-7]))
        prompt = draw(st.integers(1, 24))
        found.append(
            engine_request(
                f"r{index}",
                now=now,
                prompt=prompt,
                output=draw(st.integers(1, min(40, (num_blocks - 1) * BLOCK_SIZE - prompt + 1))),
                prefix=parts(("head", 9)) if prompt >= 9 and draw(st.booleans()) else (),
                deadline=now + draw(st.sampled_from([0.05, 0.2, 0.4, 0.8, 3.0, math.inf])),
                rest_s=draw(st.sampled_from([0.0, 0.031])),
                service_s=draw(st.sampled_from([0.0, 0.017, 0.1])),
            )
        )
    seats = draw(st.sampled_from([2, 3, 5, 16]))
    return draw(latencies()), draw(policies()), num_blocks, seats, found, []


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases() | contended() | crowded())
def test_level_1_equals_level_2(async_scheduling: bool, case: tuple[object, ...]) -> None:
    latency, config, num_blocks, seats, found, _ = case
    assume(latency.max_num_batched_tokens >= seats)

    check(latency, config, num_blocks, seats, found, async_scheduling=async_scheduling)


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("preempt", [False, True], ids=["blocks run out", "seats are taken"])
def test_calls_that_lose_their_blocks_come_back_as_in_vllm(
    preempt: bool, async_scheduling: bool
) -> None:
    calls = [
        engine_request(
            f"r{i}",
            now=0.013 * i,
            prompt=9 + i % 7,
            output=12 + 5 * (i % 6),
            prefix=parts(("head", 9)) if i % 2 else (),
            deadline=0.013 * i + (0.4 if i % 3 == 0 else 30.0),
        )
        for i in range(24)
    ]
    config = PolicyConfig(
        ordering="slack" if preempt else "fcfs",
        preempt=preempt,
        urgent_slack_s=0.5,
        preempt_margin_s=0.01,
        preempt_cooldown_s=0.02,
        prefill_chunk_cap=5,
    )

    wanted = check(LATENCY, config, 24, 5, calls, async_scheduling=async_scheduling)

    assert sum(event.num_preemptions for event in wanted) >= 4


def test_an_ended_call_leaves_no_block_of_which_vllm_knows_no_token() -> None:
    """Its last block fills in a step that computes for nobody, and is the first to be reused."""
    head = {"prompt": 24, "output": 1, "prefix": parts(("head", 24))}
    calls = [
        engine_request("first", **head),
        engine_request("fills three blocks", prompt=1, output=11),
        engine_request("takes one", prompt=1, output=1),
        engine_request("again", now=4e-7, **head),
    ]

    wanted = check(LATENCY, FCFS, 9, 1, calls, async_scheduling=True)

    assert [e.num_cached_tokens for e in wanted if e.request_id == "again"] == [20, 20]


def test_the_cap_of_prefill_chunks_is_off_where_the_plug_in_leaves_vllms_order_alone() -> None:
    config = PolicyConfig(ordering="fcfs", preempt=False, urgent_slack_s=9.0, prefill_chunk_cap=2)
    calls = [
        engine_request("urgent", prompt=2, output=9, deadline=1.0),
        engine_request("long", prompt=40, output=2, deadline=99.0),
    ]

    check(LATENCY, config, 60, 4, calls, async_scheduling=True)


FCFS = PolicyConfig(ordering="fcfs", preempt=False)


def check(
    latency: LatencyModel,
    config: PolicyConfig,
    num_blocks: int,
    seats: int,
    found: Sequence[EngineRequest],
    *,
    async_scheduling: bool,
) -> list[EngineEvent]:
    """Compare what both levels make of the calls; return the events of level 2."""
    one = EventEngine(
        "one",
        latency,
        config=config,
        max_num_seqs=seats,
        num_kv_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        async_scheduling=async_scheduling,
    )
    two = vllm_engine(
        "two",
        latency=latency,
        policy=config,
        max_num_seqs=seats,
        max_num_batched_tokens=int(latency.max_num_batched_tokens),
        num_kv_blocks=num_blocks,
        max_model_len=(num_blocks - 1) * BLOCK_SIZE + 1,
        block_size=BLOCK_SIZE,
        async_scheduling=async_scheduling,
    )
    calls = [as_received(call) for call in found]

    got, wanted = ordered(drive(one, calls)), ordered(drive(two, calls))

    assert [row(e) for e in got] == [(*row(e)[:-1], approx(e.time)) for e in wanted]
    # vLLM counts one more for a call whose last step still runs as the next one takes its blocks.
    more = [e.num_preemptions - g.num_preemptions for e, g in zip(wanted, got, strict=True)]
    assert set(more) <= ({0, 1} if async_scheduling else {0})
    return wanted


def as_received(call: EngineRequest) -> EngineRequest:
    """A call of a run, with a budget in whole milliseconds, which is what travels."""
    told = call.request
    deadline = told.deadline
    if told.has_deadline:
        deadline = told.arrival_time + round(1e3 * (deadline - told.arrival_time)) / 1e3
    return call._replace(request=told._replace(workflow_id="run", deadline=deadline))


def ordered(events: list[EngineEvent]) -> list[EngineEvent]:
    return sorted(events, key=lambda e: (e.request_id, e.kind.value))


def row(event: EngineEvent) -> tuple[object, ...]:
    return event.request_id, event.kind, event.num_cached_tokens, event.time


def approx(time: float) -> object:
    return pytest.approx(time, rel=1e-9)
