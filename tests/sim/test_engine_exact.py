"""The event-driven engine does exactly what a step-by-step, block-by-block one does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.sim.builders import LATENCY, drive, engine_request, parts
from tests.sim.naive import NaiveEngine
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.core.ordering import ORDERING_POLICIES
from vllm_workflow.sim.engine import EventEngine
from vllm_workflow.sim.types import EngineRequest, PrefixPart

BLOCK_SIZE = 4
exactly = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# Times that are not multiples of one another, so that no two events fall together by chance.
_TIMES = st.integers(1, 10**6).map(lambda i: i * 1.0000193e-6)


@st.composite
def latencies(draw: st.DrawFn) -> LatencyModel:
    per_token_s = draw(st.sampled_from([1.37e-4, 1.9e-3]))
    return LatencyModel(
        overhead_s=draw(st.sampled_from([1.113e-3, 3.017e-3])),
        weights_s=draw(st.sampled_from([0.0, 7.3e-3])),
        per_token_s=per_token_s,
        per_token_below_knee_s=per_token_s * draw(st.sampled_from([0.0, 0.45, 1.0])),
        num_knee_tokens=draw(st.sampled_from([None, 0.0, 3.5, 12.0])),
        per_seq_s=2.3e-4,
        per_kv_token_s=draw(st.sampled_from([4.7e-5, 1.1e-6, 0.0])),
        per_prefill_kv_token_s=3.3e-7,
        max_num_batched_tokens=draw(st.sampled_from([3, 8, 17, 64])),
    )


@st.composite
def policies(draw: st.DrawFn) -> PolicyConfig:
    return PolicyConfig(
        ordering=draw(st.sampled_from(sorted(ORDERING_POLICIES))),
        preempt=draw(st.booleans()),
        patience_s=draw(st.sampled_from([0.1, 1.0])),
        urgent_slack_s=draw(st.sampled_from([0.0, 0.05, 0.3])),
        preempt_margin_s=draw(st.sampled_from([0.01, 0.1])),
        preempt_cooldown_s=draw(st.sampled_from([0.0, 0.02, 0.2])),
        preempt_waste_s=draw(st.sampled_from([0.0, 0.01, 10.0])),
        late_patience_s=draw(st.sampled_from([0.0, 0.05, 0.5])),
        prefill_chunk_cap=draw(st.sampled_from([0, 0, 2, 5])),
    )


@st.composite
def requests(draw: st.DrawFn, num_blocks: int) -> list[EngineRequest]:
    most = (num_blocks - 1) * BLOCK_SIZE
    found = []
    for index in range(draw(st.integers(1, 9))):
        now = draw(st.one_of(st.just(0.0), _TIMES)) * 0.4
        prompt = draw(st.integers(1, most))
        prefix, left = [], prompt
        for name, size in draw(st.lists(st.sampled_from(PARTS), max_size=3)):
            if size <= left:
                prefix.append(PrefixPart(part_id=name, num_tokens=size))
                left -= size
        if prefix and draw(st.booleans()):
            prompt -= left  # nothing of its own
        found.append(
            engine_request(
                f"r{index}",
                now=now,
                prompt=prompt,
                output=draw(st.integers(1, min(40, most - prompt + 1))),
                prefix=tuple(prefix),
                deadline=now + draw(st.one_of(st.just(math.inf), _TIMES)),
                rest_s=draw(st.sampled_from([0.0, 0.031])),
                service_s=draw(st.sampled_from([0.0, 0.017])),
            )
        )
    return found


PARTS = [("template", 12), ("template", 13), ("schema", 9), ("schema", 4), ("hint", 2)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[object, ...]:
    num_blocks = draw(st.sampled_from([4, 9, 16, 60]))
    found = draw(requests(num_blocks))
    aborts = draw(
        st.lists(
            st.tuples(_TIMES, st.sampled_from([r.request.request_id for r in found])), max_size=2
        )
    )
    seats = draw(st.sampled_from([1, 2, 3, 16]))
    return draw(latencies()), draw(policies()), num_blocks, seats, found, aborts


@st.composite
def contended(draw: st.DrawFn) -> tuple[object, ...]:
    """Urgent calls come while others with time to spare hold the seats and the blocks."""
    num_blocks = draw(st.sampled_from([12, 16, 24]))
    config = PolicyConfig(
        ordering=draw(st.sampled_from(["slack", "deadline", "sjf"])),
        patience_s=draw(st.sampled_from([0.5, 5.0])),
        urgent_slack_s=draw(st.sampled_from([0.1, 0.3])),
        preempt_margin_s=0.01,
        preempt_cooldown_s=draw(st.sampled_from([0.0, 0.03, 0.1])),
        preempt_waste_s=draw(st.sampled_from([0.02, 10.0])),
        late_patience_s=draw(st.sampled_from([0.0, 0.3])),
    )
    most = (num_blocks - 1) * BLOCK_SIZE
    found = []
    for index in range(draw(st.integers(3, 10))):
        now = draw(_TIMES) * 0.3
        prompt = draw(st.integers(1, most // 2))
        found.append(
            engine_request(
                f"r{index}",
                now=now,
                prompt=prompt,
                output=draw(st.integers(1, most - prompt)),
                prefix=parts(("head", 8)) if prompt >= 8 and draw(st.booleans()) else (),
                deadline=now + draw(st.sampled_from([0.05, 0.2, 0.4, 0.8, 3.0, math.inf])),
                service_s=draw(st.sampled_from([0.0, 0.017, 0.1])),
            )
        )
    return draw(latencies()), config, num_blocks, draw(st.sampled_from([1, 2, 4])), found, []


@exactly
@given(cases())
def test_event_engine_equals_stepping_engine(case: tuple[object, ...]) -> None:
    check(case)


@exactly
@given(contended())
def test_event_engine_takes_seats_and_blocks_when_the_stepping_engine_does(
    case: tuple[object, ...],
) -> None:
    check(case)


def test_many_calls_that_become_late_at_once_step_back_over_several_steps() -> None:
    late = [engine_request(f"l{i}", prompt=4, output=2, deadline=0.1) for i in range(150)]
    rest = [engine_request(f"x{i}", prompt=4, output=9, deadline=5.0 + i) for i in range(5)]
    begun = engine_request("begun", prompt=4, output=90, deadline=9.0)

    check((LATENCY, PolicyConfig(preempt=False), 60, 2, [begun, *late, *rest], []))


@pytest.mark.parametrize(
    ("num_ended", "prompt", "output", "urgent_prompt", "urgent_at", "num_blocks", "per_token_s"),
    [
        (9, 21, 119, 85, 0.8, 40, 4e-3),
        (5, 10, 86, 95, 0.2, 120, 4e-3),
        (3, 56, 28, 79, 0.3, 40, 1e-3),
        (2, 61, 81, 107, 0.5, 40, 2e-2),
    ],
)
def test_a_call_is_preempted_once_none_has_ended_for_as_long_as_that_is_worth(
    num_ended: int,
    prompt: int,
    output: int,
    urgent_prompt: int,
    urgent_at: float,
    num_blocks: int,
    per_token_s: float,
) -> None:
    """Some end one upon the other and say that the next ends soon, then none does."""
    ended = [engine_request(f"e{i}", prompt=3, output=1, deadline=50.0) for i in range(num_ended)]
    left = [
        engine_request(f"l{i}", now=0.02, prompt=prompt + i, output=output, deadline=60.0 + i)
        for i in range(2)
    ]
    urgent = engine_request(
        "u", now=urgent_at, prompt=urgent_prompt, output=3, deadline=urgent_at + 4.0
    )
    latency = replace(LATENCY, per_token_s=per_token_s, per_token_below_knee_s=per_token_s)
    config = PolicyConfig(preempt_waste_s=100.0)

    check((latency, config, num_blocks, 2, [*ended, *left, urgent], []))


def check(case: tuple[object, ...]) -> None:
    latency, config, num_blocks, seats, found, aborts = case
    options = {"config": config, "max_num_seqs": seats, "num_kv_blocks": num_blocks}
    fast = EventEngine("fast", latency, block_size=BLOCK_SIZE, **options)
    naive = NaiveEngine(latency, block_size=BLOCK_SIZE, **options)

    got, wanted = drive(fast, found, aborts), drive(naive, found, aborts)

    assert _rows(got) == [(pytest.approx(time, rel=1e-9), *rest) for time, *rest in _rows(wanted)]
    assert fast.pool.num_free == fast.pool.num_blocks
    assert len(naive.pool.queue) == num_blocks - 1


def _rows(events: list[object]) -> list[tuple[object, ...]]:
    """Events in an order that does not depend on who comes first at one instant."""
    rows = [
        (e.time, e.request_id, e.kind.value, e.num_cached_tokens, e.num_preemptions) for e in events
    ]
    return sorted(rows, key=lambda r: (r[1], r[2]))
