"""What instances say of their own load, and what the router makes of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import FakeEngine
from tests.router.conftest import Client, Routing
from vllm_workflow.core.account import Instance
from vllm_workflow.core.fleet import Fleet
from vllm_workflow.router.reports import Others, Report, read_report

pytestmark = pytest.mark.anyio
TEXT = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 4.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="101",user="None"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="201",user="None"} 1.0
"""


def test_a_vllm_servers_load_is_read():
    assert read_report(TEXT) == Report(num_calls=9.0, kv_usage=0.375, num_kv_tokens=4800)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<html>",
        TEXT.replace(b" 3.0", b" NaN"),
        TEXT.replace(b" 3.0", b" -1"),
        TEXT.replace(b"kv_cache_usage_perc", b"gpu_cache_usage_perc"),
        TEXT.replace(b" 0.5", b" half"),
    ],
)
def test_what_makes_no_sense_is_no_report(text: bytes):
    assert read_report(text) is None


def test_without_a_size_that_can_be_the_size_is_unknown():
    for size in (b"None", b"0", b"1", b"9" * 40):
        report = read_report(re.sub(rb'"[12]01"', b'"' + size + b'"', TEXT))
        assert report is not None
        assert report.num_kv_tokens is None


@given(st.binary(max_size=200))
def test_any_text_is_read_without_an_error(text: bytes):
    read_report(text)


def test_what_two_reports_agree_on_is_believed():
    others = Others()
    busy = Report(num_calls=7.0, kv_usage=0.8, num_kv_tokens=None)

    # The first may have caught calls of this router that it no longer counts.
    assert not others.take(busy, num_own_calls=2, own_kv_share=0.3)
    assert others.take(busy, num_own_calls=3, own_kv_share=0.3)
    assert (others.num_calls, round(others.kv_share, 6)) == (4, 0.5)
    assert others.take(Report(3.0, 0.9, None), num_own_calls=3, own_kv_share=0.3)
    # Nobody else is there, so more of the cache in use was a guess of this router.
    assert (others.num_calls, others.kv_share) == (0, 0.0)


def test_an_instance_that_says_nothing_is_taken_to_have_nobody_else():
    others = Others()
    for _ in range(2):
        others.take(Report(9.0, 0.9, None), num_own_calls=0, own_kv_share=0.0)

    assert others.forget()
    assert (others.num_calls, others.kv_share) == (0, 0.0)
    assert not others.forget()


def fleet_of(**fields: Any) -> Fleet:
    fleet = Fleet()
    fleet.add(Instance(instance_id="a", models=(), **fields))
    return fleet


def test_seats_and_blocks_that_others_hold_are_not_there():
    fleet = fleet_of(max_num_seqs=4, num_kv_tokens=1000)

    fleet.report("a", num_others=4, kv_share=0.1)
    assert not fleet.has_room("m")
    fleet.report("a", num_others=1, kv_share=1.0)
    assert not fleet.has_room("m")
    fleet.report("a", num_others=1, kv_share=0.5)
    assert fleet.has_room("m")
    fleet.report("a", num_others=0, kv_share=0.0)
    assert fleet.has_room("m")


def test_an_instance_that_comes_back_has_nobody_elses_calls():
    fleet = fleet_of(max_num_seqs=4)
    fleet.report("a", num_others=4, kv_share=0.0)
    fleet.mark("a", healthy=False)
    fleet.mark("a", healthy=True)

    assert fleet.has_room("m")


def test_a_report_of_an_instance_that_has_left_is_ignored():
    fleet_of().report("b", num_others=4, kv_share=0.5)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not holds():
            await asyncio.sleep(0.02)


def num_others(client: Client, instance_id: str) -> int:
    return client.router.upstreams[instance_id].others.num_calls


async def test_what_others_have_to_do_there_counts_as_load(routing: Routing) -> None:
    async with (
        FakeEngine(load=(200, 0.5)).serving() as busy,
        FakeEngine(load=(0, 0.0)).serving() as free,
        routing(busy, free, policy="least-outstanding") as client,
    ):
        await until(lambda: num_others(client, "a") == 200)
        for _ in range(3):
            async with client.post() as response:
                assert response.headers["X-Workflow-Instance"] == "b"
        # The others have gone elsewhere.
        busy.load, free.load = (0, 0.0), (50, 0.5)
        await until(lambda: num_others(client, "b") == 50)
        async with client.post() as response:
            assert response.headers["X-Workflow-Instance"] == "a"


async def test_what_others_have_to_do_counts_again_after_an_instance_was_out(
    routing: Routing,
) -> None:
    async with FakeEngine(load=(5, 0.2)).serving() as engine, routing(engine, seats=5) as client:
        fleet = client.router.dispatcher.fleet
        await until(lambda: fleet.is_healthy("a") and not fleet.has_room("m"))
        engine.health = 500
        client.router.upstreams.suspect("a")
        await until(lambda: not fleet.is_healthy("a"))
        engine.health = 200
        await until(lambda: fleet.has_room("m"))
        await until(lambda: not fleet.has_room("m"))
        assert fleet.is_healthy("a")


@pytest.mark.parametrize("policy", ["workflow", "least-outstanding"])
async def test_two_routers_without_shared_state_use_all_instances(
    routing: Routing, policy: str
) -> None:
    """Each knows of the other's calls only by what the instances say."""
    async with (
        FakeEngine(held=True, tells_own_load=True).serving() as one,
        FakeEngine(held=True, tells_own_load=True).serving() as two,
        routing(one, two, policy=policy) as first,
        routing(one, two, policy=policy) as second,
        asyncio.TaskGroup() as calls,
    ):
        for _ in range(4):
            calls.create_task(answered(first))
        await until(lambda: one.num_answering + two.num_answering == 4)
        there = {"a": one.num_answering, "b": two.num_answering}
        await until(lambda: all(num_others(second, i) == n for i, n in there.items()))
        for _ in range(4):
            calls.create_task(answered(second))
        await until(lambda: one.num_answering + two.num_answering == 8)
        assert abs(one.num_answering - two.num_answering) <= 1
        for engine in (one, two):
            engine.release(20)


async def answered(client: Client) -> None:
    async with client.post() as response:
        assert response.status == 200


async def test_a_call_waits_for_seats_that_others_hold_and_no_stale_word_holds_it_up(
    routing: Routing,
) -> None:
    async with FakeEngine(load=(2, 0.1)).serving() as engine, routing(engine, seats=2) as client:
        await until(lambda: num_others(client, "a") == 2)
        call = asyncio.create_task(client.post().__aenter__())
        await until(lambda: len(client.router.dispatcher.waiting) == 1)
        engine.load = None  # it does not say any more
        response = await call
        assert response.status == 200


async def test_the_size_of_the_kv_cache_is_asked_for_where_nobody_says(routing: Routing) -> None:
    async with FakeEngine(load=(0, 0.0), num_kv_blocks=101).serving() as engine:
        async with routing(engine) as client:
            fleet = client.router.dispatcher.fleet
            await until(lambda: fleet.instance("a").num_kv_tokens == 1600)


async def test_it_can_be_switched_off(routing: Routing) -> None:
    async with FakeEngine(load=(200, 0.5), num_kv_blocks=101).serving() as engine:
        async with routing(engine, read_load=False) as client, client.post() as response:
            assert response.status == 200
            assert client.router.dispatcher.fleet.instance("a").num_kv_tokens is None
