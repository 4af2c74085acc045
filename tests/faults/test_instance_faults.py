"""What becomes of calls when an instance fails, in every way, under load, in both modes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import pytest

from tests.faults.conftest import Routed, is_healthy, until
from tests.faults.load import CHAT, Load, Tally, running
from vllm_workflow.router.app import Router

pytestmark = pytest.mark.anyio

NUM_RUNS = 36


def assert_nothing_lost(tally: Tally, *, num_runs: int = NUM_RUNS) -> None:
    assert tally.num_runs == num_runs
    assert (tally.num_lost_runs, tally.num_truncated) == (0, 0)
    assert set(tally.statuses) <= {200}


def condemned(router: Router, instance_id: str, reason: str) -> float:
    name = "vllm_workflow:router_condemned_total"
    labels = {"instance": instance_id, "reason": reason}
    return router.metrics.registry.get_sample_value(name, labels) or 0.0


async def test_killed_in_prefill_no_client_notices(fleet: Routed) -> None:
    async with fleet(prefill_s=0.4) as (router, (a, _)):
        async with running(Load(url=router.url, num_calls=2), NUM_RUNS) as load:
            await until(lambda: a.count("begin") >= 12)
            assert a.count("first") == 0
            await a.kill()

    assert_nothing_lost(load.tally)
    assert load.tally.signalled == []
    assert set(load.tally.served_by) == {"b"}


async def test_killed_in_mid_stream_the_streams_say_so_and_whole_answers_move(
    fleet: Routed,
) -> None:
    async with fleet(token_s=0.03) as (router, (a, _)):
        async with running(Load(url=router.url, num_tokens=20), NUM_RUNS) as load:
            await until(lambda: a.count("first") >= 6)
            begun = {i for i in a.notes("first") if i not in a.notes("end")}
            await a.kill()

    assert_nothing_lost(load.tally)
    # Streams that had begun, and those that began between the look and the kill.
    assert begun <= set(load.tally.signalled) <= set(a.notes("first"))


async def test_killed_while_calls_are_queued_on_it_they_move(fleet: Routed) -> None:
    policy = {"dispatch": "least-outstanding", "ordering": "fcfs"}
    async with fleet(seats=2, token_s=0.02, router={"policy": policy}) as (router, (a, _)):
        async with running(Load(url=router.url, num_calls=1), NUM_RUNS) as load:
            await until(lambda: a.count("begin") >= NUM_RUNS // 2 and a.count("first") >= 1)
            await a.kill()

    assert_nothing_lost(load.tally)
    assert len(load.tally.signalled) <= 2  # it had two seats


async def test_killed_while_calls_wait_in_the_router_they_never_notice(fleet: Routed) -> None:
    async with fleet(token_s=0.02, router={"seats": 4}) as (router, (a, _)):
        async with running(Load(url=router.url, num_calls=1), NUM_RUNS, mode="whole") as load:
            await until(lambda: len(router.dispatcher.waiting) >= 20)
            await a.kill()

    assert_nothing_lost(load.tally)
    assert load.tally.signalled == []


@pytest.mark.parametrize("mode", ["stream", "whole"])
async def test_stopped_it_is_found_out_within_two_seconds_and_back_within_two(
    fleet: Routed, mode: str
) -> None:
    async with fleet(token_s=0.03) as (router, (a, _)):
        async with running(
            Load(url=router.url, num_tokens=30, num_calls=2), NUM_RUNS, mode=mode
        ) as load:
            await until(lambda: a.count("first" if mode == "stream" else "begin") >= 8)
            a.stop()
            stopped_time = time.monotonic()
            await until(lambda: not is_healthy(router, "a"))
            found_s = time.monotonic() - stopped_time
            await until(lambda: not router.upstreams["a"].silence.attempts)
            told_s = time.monotonic() - stopped_time
        assert condemned(router, "a", "hung") == 1

        a.go_on()
        went_on_time = time.monotonic()
        await until(lambda: is_healthy(router, "a"))
        back_s = time.monotonic() - went_on_time

    print(f"{mode}: found after {found_s:.2f} s, told {told_s:.2f} s, back {back_s:.2f} s")
    assert found_s <= 2.0
    assert told_s <= 3.5
    assert back_s <= 2.0
    assert_nothing_lost(load.tally)
    assert set(load.tally.signalled) <= set(a.notes("first"))
    assert max(load.tally.latencies) < 8.0


async def test_stopped_for_a_moment_only_it_goes_on_with_its_streams(fleet: Routed) -> None:
    async with fleet(token_s=0.05) as (router, (a, _)):
        async with running(
            Load(url=router.url, num_tokens=40, num_calls=1), NUM_RUNS, mode="stream"
        ) as load:
            await until(lambda: a.count("first") >= 6)
            a.stop()
            await until(lambda: not is_healthy(router, "a"))
            a.go_on()

    assert_nothing_lost(load.tally)
    assert load.tally.signalled == []
    assert a.count("end") >= 6


async def test_stopped_before_the_first_byte_no_client_notices(fleet: Routed) -> None:
    async with fleet(prefill_s=0.5) as (router, (a, _)):
        async with running(Load(url=router.url, num_calls=1), NUM_RUNS) as load:
            await until(lambda: a.count("begin") >= 12)
            a.stop()

    assert_nothing_lost(load.tally)
    assert load.tally.signalled == []
    assert max(load.tally.latencies) < 6.0  # two for finding out, the rest for a slow machine


@pytest.mark.parametrize("mode", ["stream", "whole"])
async def test_told_to_stop_it_keeps_its_calls_and_gives_them_nothing(
    fleet: Routed, mode: str
) -> None:
    """vLLM after SIGTERM: the port is closed, the engine gone, and connections stay for minutes."""
    async with fleet(token_s=0.03) as (router, (a, _)):
        async with running(
            Load(url=router.url, num_tokens=30, num_calls=2), NUM_RUNS, mode=mode
        ) as load:
            await until(lambda: a.count("first" if mode == "stream" else "begin") >= 8)
            await a.control(closing="hang")
            closed_time = time.monotonic()
            await until(lambda: not is_healthy(router, "a"))
            await until(lambda: not router.upstreams["a"].silence.attempts)
            told_s = time.monotonic() - closed_time

    print(f"{mode}: told {told_s:.2f} s")
    assert told_s <= 3.5
    assert_nothing_lost(load.tally)
    assert set(load.tally.signalled) <= set(a.notes("first"))
    assert max(load.tally.latencies) < 8.0


@pytest.mark.parametrize("mode", ["stream", "whole"])
async def test_told_to_stop_it_ends_its_calls_as_if_they_were_complete(
    fleet: Routed, mode: str
) -> None:
    """vLLM: 200, half of the text, `"finish_reason":"abort"`, `[DONE]`."""
    async with fleet(token_s=0.03) as (router, (a, _)):
        async with running(
            Load(url=router.url, num_tokens=30, num_calls=2), NUM_RUNS, mode=mode
        ) as load:
            await until(lambda: a.count("first" if mode == "stream" else "begin") >= 8)
            await a.control(closing="abort")

    assert_nothing_lost(load.tally)
    assert set(load.tally.signalled) <= set(a.notes("first"))
    assert mode == "whole" or len(load.tally.signalled) >= 8


async def test_told_to_stop_it_may_end_the_calls_that_it_has(fleet: Routed) -> None:
    async with fleet(token_s=0.03) as (router, (a, _)):
        async with running(
            Load(url=router.url, num_tokens=120, num_calls=1), NUM_RUNS, mode="stream"
        ) as load:
            await until(lambda: a.count("first") >= 12)
            num_begun = a.count("begin")
            await a.control(closing="drain")
            await until(lambda: not is_healthy(router, "a"))

    assert_nothing_lost(load.tally)
    assert load.tally.signalled == []
    assert a.count("end") >= num_begun - 1  # the last one's connection may be a kept one


async def test_mute_from_the_start_it_costs_its_calls_two_seconds_at_most(fleet: Routed) -> None:
    async with fleet() as (router, (a, _)):
        await a.control(is_mute=True)
        load = Load(url=router.url)
        begin = time.monotonic()
        await load.runs(NUM_RUNS)

    assert_nothing_lost(load.tally)
    assert load.tally.signalled == []
    assert time.monotonic() - begin < 6.0


async def test_ten_times_slower_it_stays_and_gets_fewer_calls(fleet: Routed) -> None:
    async with fleet(router={"seats": 8}) as (router, (a, _)):
        await a.control(slowness=10.0)
        load = Load(url=router.url, num_calls=12)
        await load.runs(NUM_RUNS)
        assert is_healthy(router, "a")
        assert condemned(router, "a", "hung") + condemned(router, "a", "stuck") == 0
        assert router.dispatcher.fleet.drift("a") > 3.0 * router.dispatcher.fleet.drift("b")

    assert_nothing_lost(load.tally)
    assert load.tally.signalled == []
    # By its speed it would get a tenth of what the other one does.
    assert load.tally.served_by["a"] < 0.25 * load.tally.served_by["b"]


@pytest.mark.parametrize("status", [500, 502, 503, 429])
async def test_that_it_answers_with_an_error_no_client_notices(fleet: Routed, status: int) -> None:
    async with fleet(status=200) as (router, (a, _)):
        async with running(Load(url=router.url), NUM_RUNS) as load:
            await until(lambda: a.count("end") >= 5)
            await a.control(status=status)
        assert is_healthy(router, "a")

    assert_nothing_lost(load.tally)
    assert load.tally.signalled == []


async def test_one_that_is_well_among_many_that_fail_at_all_calls_is_enough(fleet: Routed) -> None:
    """Servers that are draining, say: /health is good, and each call is answered with 500."""
    async with fleet(5) as (router, (*failing, _)):
        for engine in failing:
            await engine.control(status=500)
        load = Load(url=router.url)
        await load.runs(NUM_RUNS)
        assert all(is_healthy(router, i) for i in "abcde")
        # They are believed again with the first call that they answer well.
        await asyncio.gather(*(engine.control(status=200) for engine in failing))
        await load.runs(NUM_RUNS, "later")

    tally = load.tally
    assert (tally.num_lost_runs, tally.num_truncated, tally.signalled) == (0, 0, [])
    # Until an instance has failed three times in a row, the call may be what it fails at.
    assert tally.statuses[500] <= 3 * len(failing)
    assert len(tally.served_by) == 5


async def test_a_call_that_engines_fail_at_is_tried_on_three_while_they_serve_others(
    fleet: Routed,
) -> None:
    async with fleet(5, models=["m", "bad"]) as (router, engines):
        good = Load(url=router.url)
        async with running(good, NUM_RUNS), aiohttp.ClientSession() as session:
            await until(lambda: sum(engine.count("end") for engine in engines) >= 10)
            for engine in engines:
                await engine.control(fails_at="bad")
            body = {"model": "bad", "messages": []}
            headers = {"X-Request-Id": "poison"}
            async with session.post(router.url + CHAT, json=body, headers=headers) as response:
                assert response.status == 500

    assert_nothing_lost(good.tally)
    assert sum("poison" in engine.notes("begin") for engine in engines) == 3


async def test_a_400_is_its_client_s_and_nobody_else_s(fleet: Routed) -> None:
    async with fleet() as (router, (a, b)):
        await asyncio.gather(a.control(status=400), b.control(status=400))
        bad = Load(url=router.url, num_calls=1)
        await bad.runs(NUM_RUNS)
        assert all(is_healthy(router, i) for i in "ab")
        assert a.count("begin") + b.count("begin") == bad.tally.statuses[400]
        await asyncio.gather(a.control(status=200), b.control(status=200))
        good = Load(url=router.url)
        await good.runs(NUM_RUNS, "good")

    assert set(bad.tally.statuses) == {400}
    assert_nothing_lost(good.tally)


async def test_a_queue_that_is_full_everywhere_is_waited_for(fleet: Routed) -> None:
    async with fleet(status=503) as (router, (a, b)):
        async with running(Load(url=router.url), NUM_RUNS) as load:
            await until(lambda: b.count("begin") >= NUM_RUNS)
            assert all(is_healthy(router, i) for i in "ab")
            await asyncio.gather(a.control(status=200), b.control(status=200))

    assert_nothing_lost(load.tally)


async def test_an_engine_that_gives_nothing_behind_a_server_that_is_well_is_found_out(
    fleet: Routed,
) -> None:
    async with fleet(is_deaf=True) as (router, (a, b)):
        await b.control(is_deaf=False)
        load = Load(url=router.url, num_calls=1)
        await load.runs(NUM_RUNS)
        assert condemned(router, "a", "stuck") == 1
        # Its word is not taken for it: an answer of its engine is.
        await until(lambda: a.count("abort") > NUM_RUNS // 2)
        assert not is_healthy(router, "a")
        await a.control(is_deaf=False)
        begin = time.monotonic()
        await until(lambda: is_healthy(router, "a"))
        assert time.monotonic() - begin < 3.0

    assert_nothing_lost(load.tally)
    # Fifteen times 0.13 s and three more; then the other instance.
    assert max(load.tally.latencies) < 7.0


async def test_kept_connections_that_it_closes_cost_nothing(fleet: Routed) -> None:
    async with fleet(closes_kept=True) as (router, (_, _)):
        load = Load(url=router.url, num_calls=6)
        await load.runs(NUM_RUNS)
        assert all(is_healthy(router, i) for i in "ab")

    assert_nothing_lost(load.tally)
    assert load.tally.signalled == []


async def test_restarted_with_another_model_calls_go_where_theirs_is(fleet: Routed) -> None:
    async with fleet() as (router, (a, _)):
        async with running(Load(url=router.url, num_calls=6), NUM_RUNS) as load:
            await until(lambda: a.count("end") >= 5)
            await a.kill()
            await a.start(models=["n"])
        await until(lambda: router.dispatcher.fleet.instance("a").models == ("n",))
        assert time.monotonic() - a.ready_time < 2.0 + max(load.tally.latencies)
        other = Load(url=router.url, model="n")
        await other.runs(NUM_RUNS, "other")

    assert_nothing_lost(load.tally)
    assert_nothing_lost(other.tally)
    assert set(other.tally.served_by) == {"a"}


async def test_another_model_behind_the_same_address_is_noticed_by_the_first_call(
    fleet: Routed,
) -> None:
    async with fleet() as (router, (a, _)):
        async with running(Load(url=router.url), NUM_RUNS) as load:
            await until(lambda: a.count("end") >= 5)
            await a.control(models=["n"])
        await until(lambda: router.dispatcher.fleet.instance("a").models == ("n",), 2.0)

    assert_nothing_lost(load.tally)
    assert load.tally.signalled == []


async def test_a_model_that_nobody_serves_any_more_is_said_to_be_missing(fleet: Routed) -> None:
    async with fleet(1) as (router, (a,)):
        await a.kill()
        load = Load(url=router.url, num_calls=1)
        async with running(load, 4):
            await until(lambda: router.proxy._binder.num_stranded == 4)
            await a.start(models=["n"])

    assert set(load.tally.statuses) == {404}
    assert load.tally.num_lost_runs == 4


async def test_with_no_instance_left_calls_wait_and_one_that_is_back_serves_them(
    fleet: Routed,
) -> None:
    async with fleet() as (router, (a, b)):
        await asyncio.gather(a.kill(), b.kill())
        async with running(Load(url=router.url), NUM_RUNS) as load:
            await until(lambda: router.proxy._binder.num_stranded == NUM_RUNS)
            await a.start()
            await until(lambda: is_healthy(router, "a"))
            back_s = time.monotonic() - a.ready_time

    print(f"restarted: back after {back_s:.2f} s")
    assert back_s <= 2.0
    assert_nothing_lost(load.tally)
    assert load.tally.signalled == []


@pytest.mark.parametrize("budget_s", [1.0, 3.0])
async def test_with_no_instance_left_a_call_waits_as_long_as_its_deadline_allows(
    fleet: Routed, budget_s: float
) -> None:
    async with fleet(1) as (router, (a,)), aiohttp.ClientSession() as session:
        await a.kill()
        begin = time.monotonic()
        headers = {"X-Workflow-Budget-Ms": f"{1000 * budget_s}"}
        body: dict[str, Any] = {"model": "m", "messages": [], "max_tokens": 10}
        async with session.post(router.url + CHAT, json=body, headers=headers) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "1")

    # Two seconds at least: so long takes an instance that is just being restarted.
    assert 0.8 < (time.monotonic() - begin) / max(2.0, budget_s) < 1.2
