"""Runs against real sockets: edges, fan-out, failures, what calls say of themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from tests.bench.builders import part, planned, trace_call
from tests.bench.replay_engine import ReplayEngine, num_shared
from vllm_workflow.bench.identity import Identity
from vllm_workflow.bench.serve import ServeOptions, ServeResult, serve
from vllm_workflow.core.errors import UpstreamError

pytestmark = pytest.mark.anyio

DIAMOND = (
    trace_call("plan"),
    trace_call("left", after=("plan",)),
    trace_call("right", after=("plan",)),
    trace_call("merge", after=("left", "right")),
)


def options(engine: ReplayEngine, **fields: object) -> ServeOptions:
    return ServeOptions(base_url=engine.url, disable_tqdm=True, **fields)  # type: ignore[arg-type]


async def test_a_call_is_made_when_the_last_of_those_before_it_has_ended() -> None:
    async with ReplayEngine(held=True).serving() as engine, asyncio.TaskGroup() as group:
        serving = group.create_task(serve(options(engine), [planned(*DIAMOND)]))
        await engine.wait_for(received=1)
        assert [call.name for call in engine.received] == ["plan"]

        engine.let_go("plan")
        await engine.wait_for(received=3)  # both are there while neither is answered
        assert {call.name for call in engine.received[1:]} == {"left", "right"}

        engine.let_go("left")
        while len(engine.ended) < 2:
            await asyncio.sleep(0)
        assert len(engine.received) == 3

        engine.let_go("right")
        engine.let_go("merge")
        result = await serving

    assert [call.call_id for call in result.runs[0].calls] == ["plan", "left", "right", "merge"]
    assert result.runs[0].finished


async def test_the_gap_before_a_call_passes_and_counts_for_the_run() -> None:
    calls = (trace_call("a"), trace_call("b", after=("a",), gap_s=0.3))
    async with ReplayEngine().serving() as engine:
        result = await serve(options(engine), [planned(*calls)])

    first, second = result.runs[0].calls
    assert second.sent_s - first.end_s >= 0.3
    assert second.planned_s - first.end_s == pytest.approx(0.3)
    assert result.runs[0].latency_s >= 0.3


async def test_arrivals_do_not_wait_for_runs_that_are_under_way() -> None:
    runs = [planned(run_id=f"r{n}", arrival_s=0.05 * n) for n in range(4)]
    async with ReplayEngine(held=True).serving() as engine, asyncio.TaskGroup() as group:
        serving = group.create_task(serve(options(engine), runs))
        await engine.wait_for(received=4)
        assert not engine.ended
        engine.let_go("a")
        result = await serving

    assert [run.run_id for run in result.runs] == ["r0", "r1", "r2", "r3"]
    assert [run.arrival_s for run in result.runs] == pytest.approx([0.0, 0.05, 0.1, 0.15])


async def test_runs_beyond_the_limit_wait_and_arrive_when_it_is_their_turn() -> None:
    runs = [planned(trace_call("a" if n else "b"), run_id=f"r{n}") for n in range(2)]
    async with ReplayEngine(held=True).serving() as engine, asyncio.TaskGroup() as group:
        serving = group.create_task(serve(options(engine, max_concurrency=1), runs))
        await engine.wait_for(received=1)
        engine.let_go("b")
        await engine.wait_for(received=2)
        engine.let_go("a")
        result = await serving

    first, second = result.runs
    assert second.arrival_s >= first.end_s
    assert result.figures["max_concurrent_requests"] == 1


async def test_a_failed_call_fails_its_run_and_reveals_nothing_more() -> None:
    engine = ReplayEngine(fails=lambda call: call.name == "left" and call.run.endswith("r0"))
    async with engine.serving():
        result = await serve(
            options(engine),
            [planned(*DIAMOND, run_id=f"r{n}", slo_s=60.0) for n in range(2)],
        )

    broken, whole = result.runs
    assert {call.name for call in engine.calls("r0")} == {"plan", "left", "right"}
    assert not broken.finished
    assert broken.met_slo is False
    assert next(c for c in broken.calls if c.call_id == "left").status == 500
    assert whole.finished
    assert (result.figures["completed"], result.figures["failed"]) == (1, 1)
    assert result.figures["slo_attainment"] == 0.5


async def test_a_stream_that_breaks_off_is_a_failed_call() -> None:
    async with ReplayEngine(breaks_off=True).serving() as engine:
        result = await serve(options(engine), [planned()])

    assert "ended before [DONE]" in result.runs[0].calls[0].error


@pytest.mark.parametrize(
    ("says", "error"),
    [
        (b"hello", "ended before [DONE]"),
        (b"data: [DONE]\n\n", "no token"),
        (b'data: {"error": {"message": "out of memory"}}\n\ndata: [DONE]\n\n', "out of memory"),
        (b'data: {"choices": [{}], "usage": {bad}\n\n', "JSONDecodeError"),
        (b'data: {"choices": [{}], "usage": {"prompt_tokens": "x"}}\n\ndata: [DONE]\n\n', ""),
        (b'data: [{"usage": {}}]\r\n\r\ndata:[DONE]\r\n\r\n', ""),
        (b"data: \xff\xfe\n\n\n\ndata: [DONE]\n", ""),
    ],
)
async def test_whatever_a_server_says_the_load_goes_on(says: bytes, error: str) -> None:
    async with ReplayEngine(says=says).serving() as engine:
        result = await serve(options(engine), [planned(), planned(run_id="s")])

    for run in result.runs:
        assert error in run.calls[0].error
        assert bool(run.calls[0].error) is bool(error)


async def test_a_server_is_ready_when_it_lists_a_model() -> None:
    engine = ReplayEngine(models=[])
    async with engine.serving(), asyncio.TaskGroup() as group:
        with pytest.raises(UpstreamError, match=r"not ready after 0\.3 s"):
            await serve(options(engine, ready_check_timeout_sec=0.3), [planned()])
        serving = group.create_task(serve(options(engine, ready_check_timeout_sec=10), [planned()]))
        await engine.wait_for_poll()
        engine.models.append("late")
        assert (await serving).model == "late"


async def test_a_call_that_takes_too_long_is_a_failed_call() -> None:
    async with ReplayEngine(held=True).serving() as engine:
        result = await serve(options(engine, call_timeout_s=0.2), [planned()])
        await engine.wait_for(aborted=1)

    assert "Timeout" in result.runs[0].calls[0].error


async def test_what_is_left_of_the_slo_shrinks_from_call_to_call() -> None:
    calls = (trace_call("a"), trace_call("b", after=("a",), gap_s=0.1))
    async with ReplayEngine().serving() as engine:
        await serve(options(engine), [planned(*calls, slo_s=10.0)])

    first, second = (int(call.headers["X-Workflow-Budget-Ms"]) for call in engine.received)
    assert 9_000 < first <= 10_000
    assert second <= first - 100
    assert [call.headers["X-Workflow-Slo-Ms"] for call in engine.received] == ["10000"] * 2


async def test_at_a_time_scale_the_clock_runs_faster_and_results_are_as_in_life() -> None:
    calls = (trace_call("a"), trace_call("b", after=("a",), gap_s=20.0))
    run = planned(*calls, slo_s=30.0, arrival_s=10.0)
    async with ReplayEngine().serving() as engine:
        result = await serve(options(engine, time_scale=100.0), [run])

    (record,) = result.runs
    assert 10.0 - 1e-6 <= record.arrival_s < 20.0  # a difference of two large instants
    assert record.latency_s >= 20.0
    assert record.calls[1].planned_s - record.calls[0].end_s == pytest.approx(20.0)
    first, second = (int(call.headers["X-Workflow-Budget-Ms"]) for call in engine.received)
    assert first <= 300
    assert second <= first - 200


async def test_another_load_finds_nothing_of_this_one_in_the_prefix_cache() -> None:
    async with ReplayEngine().serving() as engine:
        for prefix in ("", "", "again-", "again-"):
            await serve(options(engine, request_id_prefix=prefix), [planned()])

    prompts = [call.prompt for call in engine.received]
    assert num_shared(prompts[0], prompts[1]) < 3
    assert prompts[2] == prompts[3]


async def test_calls_name_run_workflow_stage_tenant_and_the_last_of_them() -> None:
    async with ReplayEngine().serving() as engine:
        await serve(options(engine), [planned(*DIAMOND, tenant="acme")])

    assert len({call.run for call in engine.received}) == 1
    assert engine.received[0].run.startswith("bench-")
    assert [call.stage for call in engine.received][::3] == ["plan", "merge"]
    assert {call.headers["X-Workflow-Name"] for call in engine.received} == {"w"}
    assert {call.headers["X-Tenant-Id"] for call in engine.received} == {"acme"}
    assert [call.name for call in engine.received if "X-Workflow-Final" in call.headers] == [
        "merge"
    ]


async def test_of_a_loop_no_call_says_that_it_is_the_last() -> None:
    loop = (trace_call("a", stage="x"), trace_call("b", stage="x", after=("a",)))
    async with ReplayEngine().serving() as engine:
        await serve(options(engine), [planned(*loop), planned(*DIAMOND[:3], run_id="open")])

    assert len(engine.received) == 5
    assert not any("X-Workflow-Final" in call.headers for call in engine.received)


@pytest.mark.parametrize(
    ("identity", "says"),
    [
        (Identity(headers=False), set()),
        (
            Identity(headers=False, xargs=True),
            {"wf_id", "wf_name", "wf_stage", "wf_budget_ms", "wf_final"},
        ),
        (Identity(headers=False, agentic_context=True), {"agentic_context"}),
    ],
)
async def test_runs_are_told_in_the_words_that_were_asked_for(
    identity: Identity, says: set[str]
) -> None:
    async with ReplayEngine().serving() as engine:
        await serve(options(engine, identity=identity), [planned(slo_s=9.0)])

    (call,) = engine.received
    assert not any(name.startswith("X-Workflow") for name in call.headers)
    assert set(call.body.get("vllm_xargs", {})) == says
    if identity.agentic_context:
        context = call.body["vllm_xargs"]["agentic_context"]
        assert context["step_id"] == "a"
        assert 8 < context["deadline_seconds"] <= 9
        assert context["program_id"].endswith("-r")


async def test_exact_lengths_are_asked_for_and_come() -> None:
    call = trace_call(num_prompt_tokens=123, num_output_tokens=17)
    async with ReplayEngine().serving() as engine:
        result = await serve(options(engine), [planned(call)])

    (sent,) = engine.received
    (record,) = result.runs[0].calls
    assert len(sent.prompt) == 123
    assert (sent.body["max_tokens"], sent.body["ignore_eos"]) == (17, True)
    assert (record.num_prompt_tokens, record.num_output_tokens) == (123, 17)
    assert record.has_trace_lengths


async def test_a_hidden_length_is_in_no_field_that_a_scheduler_reads() -> None:
    call = trace_call(num_output_tokens=17)
    async with ReplayEngine().serving() as engine:
        result = await serve(
            options(engine, output_length="hidden", max_tokens=900), [planned(call)]
        )

    (sent,) = engine.received
    assert sent.body["max_tokens"] == 900
    assert "ignore_eos" not in sent.body
    assert sent.body["vllm_xargs"] == {"emulated_num_output_tokens": 17}
    assert result.runs[0].calls[0].num_output_tokens == 17


async def test_what_the_user_adds_to_bodies_and_headers_wins() -> None:
    async with ReplayEngine().serving() as engine:
        await serve(
            options(
                engine,
                header={"Authorization": "Bearer k"},
                extra_body={"temperature": 0.5, "vllm_xargs": {"more": 1}},
                identity=Identity(xargs=True),
            ),
            [planned()],
        )

    (sent,) = engine.received
    assert sent.headers["Authorization"] == "Bearer k"
    assert sent.body["temperature"] == 0.5
    assert {"more", "wf_id"} <= set(sent.body["vllm_xargs"])


async def test_shared_parts_are_hits_of_the_prefix_cache() -> None:
    head = part("template", 20)
    runs = [planned(trace_call(prefix=(head,)), run_id=f"r{n}", arrival_s=0.1 * n) for n in (0, 1)]
    async with ReplayEngine().serving() as engine:
        result = await serve(options(engine), runs)

    assert [run.calls[0].num_cached_tokens for run in result.runs] == [0, 20]
    assert result.figures["total_cached_tokens"] == 20


async def test_warm_ups_come_first_and_are_not_counted() -> None:
    async with ReplayEngine().serving() as engine:
        result = await serve(options(engine), [planned()], [planned(run_id="before")])

    assert [call.run.partition("-")[2][9:] for call in engine.received] == ["warmup-before", "r"]
    assert [run.run_id for run in result.runs] == ["r"]


async def test_an_interrupt_ends_the_calls_under_way() -> None:
    async def interrupted(work: Awaitable[ServeResult]) -> None:
        task = asyncio.ensure_future(work)
        await engine.wait_for(received=2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async with ReplayEngine(held=True).serving() as engine:
        await interrupted(serve(options(engine), [planned(), planned(run_id="s")]))
        await engine.wait_for(aborted=2)


async def test_a_hundred_calls_at_a_time_use_a_hundred_connections() -> None:
    calls = [trace_call(f"c{n}") for n in range(150)]
    async with ReplayEngine(held=True).serving() as engine, asyncio.TaskGroup() as group:
        serving = group.create_task(serve(options(engine), [planned(*calls)]))
        await engine.wait_for(received=150)
        for call in calls:
            engine.let_go(call.call_id)
        assert (await serving).runs[0].finished
