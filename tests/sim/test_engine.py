"""What the level 1 engine does, one thing at a time; `test_engine_exact` has the rest."""

from __future__ import annotations

import math

import pytest

from tests.sim.builders import LATENCY, drive, engine_request, parts
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.engine import EventEngine
from vllm_workflow.sim.types import EngineEvent, EngineRequest, EventKind

FCFS = PolicyConfig(ordering="fcfs", preempt=False)


def engine(
    *,
    config: PolicyConfig = FCFS,
    max_num_seqs: int = 16,
    num_kv_blocks: int = 4096,
) -> EventEngine:
    return EventEngine(
        "a", LATENCY, config=config, max_num_seqs=max_num_seqs, num_kv_blocks=num_kv_blocks
    )


def ends(events: list[EngineEvent]) -> dict[str, float]:
    return {e.request_id: e.time for e in events if e.kind is EventKind.FINISHED}


def first_tokens(events: list[EngineEvent]) -> list[str]:
    return [e.request_id for e in events if e.kind is EventKind.FIRST_TOKEN]


def test_ten_thousand_tokens_are_two_events() -> None:
    each = engine()
    each.submit(engine_request(prompt=100, output=10_000), 0.0)
    num_advances = 0

    while each.next_event_time() < math.inf:
        each.advance(each.next_event_time())
        num_advances += 1

    assert num_advances == 3  # its admission, its first token, its end


def test_decoding_takes_the_sum_of_its_steps() -> None:
    first, end = drive(engine(), [engine_request(prompt=100, output=51)])

    wanted_s = math.fsum(
        LATENCY.step_s(num_decode_seqs=1, num_kv_tokens=100 + i) for i in range(1, 51)
    )
    assert first.time == pytest.approx(LATENCY.prefill_s(100), rel=1e-12)
    assert end.time - first.time == pytest.approx(wanted_s, rel=1e-12)


def test_call_that_comes_during_a_step_waits_for_its_end() -> None:
    calls = [engine_request("a", output=50), engine_request("b", now=0.1, output=1)]

    events = drive(engine(), calls)

    alone = LATENCY.prefill_s(100)
    steps, at = 0, alone
    while at < 0.1:
        steps += 1
        at += LATENCY.step_s(num_decode_seqs=1, num_kv_tokens=100 + steps)
    step_s = LATENCY.step_s(
        num_prefill_tokens=100,
        num_decode_seqs=1,
        num_kv_tokens=100 + steps + 1,
        prefill_attention=5050,
    )
    assert ends(events)["b"] == pytest.approx(at + step_s, rel=1e-12)


def test_calls_that_come_together_share_their_first_step() -> None:
    first_a, first_b, *_ = drive(engine(), [engine_request("a"), engine_request("b")])

    assert first_a.time == first_b.time


def test_long_prompt_is_prefilled_in_chunks_beside_those_that_decode() -> None:
    calls = [engine_request("a", prompt=10, output=500), engine_request("b", now=0.1, prompt=9000)]

    events = drive(engine(), calls)

    (b,) = [e.time for e in events if e.request_id == "b" and e.kind is EventKind.FIRST_TOKEN]
    assert b - 0.1 > LATENCY.prefill_s(9000)
    assert ends(events)["a"] > b


def test_waiting_calls_go_in_the_order_of_the_policy() -> None:
    calls = [
        engine_request("runs", deadline=99.0, output=100),
        engine_request("late", now=0.1, deadline=30.0),
        engine_request("soon", now=0.2, deadline=20.0),
    ]
    by_deadline = PolicyConfig(ordering="deadline", preempt=False)

    assert first_tokens(drive(engine(max_num_seqs=1), calls)) == ["runs", "late", "soon"]
    assert first_tokens(drive(engine(config=by_deadline, max_num_seqs=1), calls)) == [
        "runs",
        "soon",
        "late",
    ]


def test_urgent_call_takes_the_seat_of_one_with_time_to_spare() -> None:
    calls = [
        engine_request("spare", deadline=500.0, output=1000),
        engine_request("urgent", now=1.0, deadline=2.0, service_s=0.5),
    ]

    patient = drive(engine(config=PolicyConfig(preempt=False), max_num_seqs=1), calls)
    taking = drive(engine(config=PolicyConfig(), max_num_seqs=1), calls)

    assert ends(patient)["urgent"] > ends(patient)["spare"]
    assert ends(taking)["urgent"] < 2.0
    (spare,) = [e for e in taking if e.request_id == "spare" and e.kind is EventKind.FINISHED]
    assert spare.num_preemptions == 1


def test_call_becomes_urgent_while_it_waits() -> None:
    config = PolicyConfig(urgent_slack_s=1.0)
    calls = [
        engine_request("spare", deadline=500.0, output=1000),
        engine_request("other", now=1.0, deadline=8.0, service_s=0.5),
    ]

    events = drive(engine(config=config, max_num_seqs=1), calls)

    (first,) = [e.time for e in events if e.request_id == "other" and not e.num_preemptions][:1]
    assert 6.5 < first < 6.6


def urgent(request_id: str, now: float) -> EngineRequest:
    return engine_request(request_id, now=now, output=1, deadline=now + 3.0, service_s=0.1)


def first_token_times(events: list[EngineEvent]) -> dict[str, float]:
    return {e.request_id: e.time for e in events if e.kind is EventKind.FIRST_TOKEN}


SPARE = engine_request("spare", deadline=500.0, output=1000)


def test_call_that_lost_its_seat_keeps_the_next_one_for_the_cooldown() -> None:
    config = PolicyConfig(preempt_cooldown_s=1.0)
    calls = [SPARE, urgent("first", 1.0), urgent("second", 1.2)]

    times = first_token_times(drive(engine(config=config, max_num_seqs=1), calls))

    assert 1.0 < times["first"] < 1.1
    assert 2.0 < times["second"] < 2.2


def test_call_loses_its_seat_three_times_at_most() -> None:
    config = PolicyConfig(preempt_cooldown_s=0.0)
    calls = [SPARE, *(urgent(f"u{i}", 1.0 + i) for i in range(5))]

    events = drive(engine(config=config, max_num_seqs=1), calls)

    assert {e.num_preemptions for e in events if e.request_id == "spare"} == {0, 3}
    assert first_token_times(events)["u3"] > ends(events)["spare"]


def test_call_that_would_go_first_again_does_not_lose_its_seat() -> None:
    config = PolicyConfig(ordering="fcfs", preempt=True)

    events = drive(engine(config=config, max_num_seqs=1), [SPARE, urgent("urgent", 1.0)])

    assert first_token_times(events)["urgent"] > ends(events)["spare"]


def test_urgent_call_takes_the_blocks_of_one_with_time_to_spare() -> None:
    calls = [
        engine_request("spare", prompt=320, output=1000, deadline=500.0),
        engine_request("urgent", now=1.0, prompt=1000, output=1, deadline=4.0),
    ]

    events = drive(engine(config=PolicyConfig(), num_kv_blocks=84), calls)

    assert first_token_times(events)["urgent"] < 1.2


def test_last_of_the_running_computes_again_when_blocks_run_out() -> None:
    calls = [
        engine_request("a", prompt=160, output=200),
        engine_request("b", prompt=160, output=200),
    ]

    events = drive(engine(num_kv_blocks=30), calls)

    num_preemptions = {e.request_id: e.num_preemptions for e in events}
    assert num_preemptions == {"a": 0, "b": 1}


def test_whole_prompt_in_the_cache_leaves_its_last_block_to_compute() -> None:
    prefix = parts(("all", 160))
    calls = [
        engine_request("a", prompt=160, prefix=prefix),
        engine_request("b", now=5.0, prompt=160, prefix=prefix),
    ]

    num_cached = {e.request_id: e.num_cached_tokens for e in drive(engine(), calls)}

    assert num_cached == {"a": 0, "b": 144}


def test_aborted_call_leaves_its_seat_and_its_blocks() -> None:
    each = engine(max_num_seqs=1)
    calls = [engine_request("a", output=1000), engine_request("b", now=0.1)]

    events = drive(each, calls, aborts=[(1.0, "a")])

    assert list(ends(events)) == ["b"]
    assert 1.0 < ends(events)["b"] < 1.5
    assert each.pool.num_free == each.pool.num_blocks


def test_abort_of_an_unknown_call_changes_nothing() -> None:
    assert len(drive(engine(), [engine_request("a")], aborts=[(0.01, "nobody")])) == 2


def test_call_longer_than_the_kv_cache_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"expected at most 144 tokens, .* got 145"):
        engine(num_kv_blocks=10).submit(engine_request(prompt=140, output=6), 0.0)


def test_id_in_use_is_an_error() -> None:
    each = engine()
    each.submit(engine_request("a"), 0.0)

    with pytest.raises(ValueError, match="'a' is there already"):
        each.submit(engine_request("a"), 0.0)


@pytest.mark.parametrize("name", ["max_num_seqs", "num_kv_blocks"])
def test_engine_without_room_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected at least"):
        EventEngine("a", LATENCY, **{name: 0})


def test_true_length_does_not_change_what_is_decided_before_the_end() -> None:
    def run(output: int) -> list[EngineEvent]:
        calls: list[EngineRequest] = [
            engine_request("a", output=output, deadline=9.0),
            engine_request("b", now=0.1, deadline=3.0),
        ]
        return drive(engine(config=PolicyConfig(), max_num_seqs=1), calls)

    assert run(500)[:1] == run(900)[:1]
