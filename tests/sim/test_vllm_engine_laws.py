"""Level 2: what holds for every workload."""

import math
from typing import Any

import pytest

pytest.importorskip("vllm")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.sim.vllm_builders import (
    KIND_ORDER,
    VllmEngine,
    advance_to,
    call,
    drain,
    engine,
    part,
)
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.sim.types import EngineEvent, EventKind

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

NUM_BLOCKS = 61
BLOCK_SIZE = 16

arrivals = st.lists(
    st.fixed_dictionaries(
        {
            "gap_s": st.sampled_from([0.0, 0.001, 0.05, 1.0]),
            "prompt": st.integers(1, 400),
            "output": st.integers(1, 60),
            "template": st.sampled_from(["", "s", "t"]),
            "budget_s": st.sampled_from([math.inf, -1.0, 0.3, 4.0, 500.0]),
            "aborted_after_s": st.sampled_from([None, None, None, 0.0, 0.02, 0.5]),
        }
    ),
    min_size=1,
    max_size=12,
)
servers = st.fixed_dictionaries(
    {
        "policy": st.sampled_from([None, PolicyConfig(), PolicyConfig(prefill_chunk_cap=32)]),
        "async_scheduling": st.booleans(),
        "max_num_seqs": st.sampled_from([1, 3, 8]),
        "max_num_batched_tokens": st.sampled_from([32, 2048]),
        "schedule_s": st.sampled_from([0.0, 0.004]),
    }
)


def simulate(
    server: VllmEngine, workload: list[dict[str, Any]]
) -> tuple[list[EngineEvent], dict[str, dict[str, Any]], set[str]]:
    """Events; calls by id, with their `submitted` instant; ids that were aborted."""
    actions: list[tuple[float, int, str, dict[str, Any]]] = []
    now = 0.0
    for i, each in enumerate(workload):
        now += each["gap_s"]
        actions.append((now, i, "submit", each))
        if each["aborted_after_s"] is not None:
            actions.append((now + each["aborted_after_s"], i, "abort", each))
    events: list[EngineEvent] = []
    calls: dict[str, dict[str, Any]] = {}
    aborted: set[str] = set()
    for now, i, action, each in sorted(actions, key=lambda a: (a[0], a[2] == "abort", a[1])):
        events += advance_to(server, math.nextafter(now, -math.inf))
        request_id = f"r{i}"
        if action == "abort":
            server.abort(request_id, now)
            aborted.add(request_id)
            continue
        prefix = (part(each["template"], min(each["prompt"], 100)),) if each["template"] else ()
        server.submit(
            call(
                request_id,
                prompt=each["prompt"],
                output=each["output"],
                prefix=prefix,
                deadline=now + each["budget_s"],
                workflow_id="w",
            ),
            now,
        )
        calls[request_id] = each | {"submitted": now}
    return events + drain(server), calls, aborted


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(server=servers, workload=arrivals)
def test_every_call_ends_once_in_order_and_leaves_nothing_behind(
    server: dict[str, Any], workload: list[dict[str, Any]]
) -> None:
    simulated = engine(num_kv_blocks=NUM_BLOCKS, max_model_len=900, **server)

    events, calls, aborted = simulate(simulated, workload)

    assert [e.time for e in events] == sorted(e.time for e in events)
    seen: dict[str, list[EventKind]] = {}
    for event in events:
        seen.setdefault(event.request_id, []).append(event.kind)
        assert event.time > calls[event.request_id]["submitted"]
        assert event.num_cached_tokens % BLOCK_SIZE == 0
        assert event.num_cached_tokens < calls[event.request_id]["prompt"]
    for request_id in calls:
        kinds = seen.get(request_id, [])
        assert kinds == KIND_ORDER or (request_id in aborted and kinds == KIND_ORDER[: len(kinds)])
    assert simulated.next_event_time() == math.inf
    assert simulated.num_free_kv_blocks == NUM_BLOCKS - 1
    assert not simulated._scheduler.requests
    assert simulated.stats is None or simulated.stats.failures == 0


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(server=servers, workload=arrivals)
def test_every_token_is_computed_as_often_as_it_must_be(
    server: dict[str, Any], workload: list[dict[str, Any]]
) -> None:
    """With room for all and no aborts: prompts once, answers but for their last token once."""
    server = server | {"policy": None}
    workload = [each | {"aborted_after_s": None} for each in workload]
    simulated = engine(num_kv_blocks=1001, max_model_len=900, **server)

    events, calls, _ = simulate(simulated, workload)

    last = {e.request_id: e for e in events}
    assert all(e.num_preemptions == 0 for e in last.values())
    num_cached = sum(e.num_cached_tokens for e in last.values())
    assert simulated.num_prefill_tokens == sum(c["prompt"] for c in calls.values()) - num_cached
    num_decoded = sum(c["output"] - 1 for c in calls.values())
    if server["async_scheduling"]:  # once more, before the end was known
        num_decoded += len(calls)
    assert simulated.num_decode_tokens == num_decoded
    idle_s = sum(each["gap_s"] for each in workload)
    planning_s = simulated.num_steps * server["schedule_s"]
    assert max(e.time for e in events) <= simulated.busy_s + idle_s + planning_s + 1e-9
