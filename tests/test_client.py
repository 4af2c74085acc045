"""The client hook, with real OpenAI and httpx clients against a real socket."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

import vllm_workflow
from tests.text2sql.scripted_server import Answer, Request, Server, completion, serving
from vllm_workflow.client import attach, copy_context, headers, stage, workflow
from vllm_workflow.core.errors import OverloadedError

pytestmark = pytest.mark.anyio

Ask = Callable[..., Awaitable[Any]]

HTTP_LIBRARIES = [name for name in ("httpx", "httpx2") if importlib.util.find_spec(name)]


@pytest.fixture(params=["sync", "async"])
async def ask(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., Ask]]:
    """Make a function that sends one chat request with the synchronous or the async client."""
    clients: list[Any] = []

    def make(server: Server, **options: Any) -> Ask:
        options = {"base_url": server.base_url, "api_key": "none", **options}
        if request.param == "async":
            client: Any = attach(openai.AsyncOpenAI(**options))
        else:
            client = attach(openai.OpenAI(**options))
        clients.append(client)

        async def send(**arguments: Any) -> Any:
            arguments = {"model": "m", "messages": [{"role": "user", "content": "?"}], **arguments}
            create = client.chat.completions.create
            if request.param == "async":
                return await create(**arguments)
            return await asyncio.to_thread(create, **arguments)

        send.client = client  # type: ignore[attr-defined]
        return send

    yield make
    for client in clients:
        if request.param == "async":
            await client.close()
        else:
            client.close()


async def test_a_call_carries_run_stage_tenant_and_budget(ask: Any) -> None:
    async with serving() as server:
        with workflow("text2sql", slo_s=30, id="run-1", tenant="acme"), stage("generate"):
            await ask(server)()

    sent = server.requests[0].headers
    assert sent["X-Workflow-Id"] == sent["X-Session-ID"] == "run-1"
    assert sent["X-Workflow-Name"] == "text2sql"
    assert sent["X-Workflow-Stage"] == "generate"
    assert sent["X-Tenant-Id"] == "acme"
    assert sent["X-Workflow-Slo-Ms"] == "30000"
    assert 25_000 < int(sent["X-Workflow-Budget-Ms"]) <= 30_000
    assert "X-Workflow-Final" not in sent


async def test_a_call_outside_of_a_run_carries_nothing(ask: Any) -> None:
    async with serving() as server:
        await ask(server)()

    names = {name.lower() for name in server.requests[0].headers}
    assert not any(name.startswith(("x-workflow", "x-session", "x-tenant")) for name in names)


async def test_a_run_without_slo_sends_neither_slo_nor_budget(ask: Any) -> None:
    async with serving() as server:
        with workflow("text2sql"):
            await ask(server)()

    sent = server.requests[0].headers
    assert len(sent["X-Workflow-Id"]) == 32
    assert "X-Workflow-Slo-Ms" not in sent
    assert "X-Workflow-Budget-Ms" not in sent


async def test_a_retry_carries_the_budget_that_is_left_then(ask: Any) -> None:
    def answer(request: Request) -> Answer:
        return "ok" if request.number else 503

    async with serving(answer) as server:
        with workflow("text2sql", slo_s=30) as run, stage("generate"):
            await ask(server)()

    first, second = (int(r.headers["X-Workflow-Budget-Ms"]) for r in server.requests)
    assert second < first
    assert [call.status for call in run.calls] == [503, 200]


async def test_a_spent_budget_is_sent_as_zero(ask: Any) -> None:
    async with serving() as server:
        with workflow("text2sql", slo_s=0.0001):
            await ask(server)()

    assert server.requests[0].headers["X-Workflow-Budget-Ms"] == "0"
    assert server.requests[0].headers["X-Workflow-Slo-Ms"] == "1"


async def test_headers_that_a_call_sets_itself_win(ask: Any) -> None:
    async with serving() as server:
        with workflow("text2sql", slo_s=30) as run, stage("generate"):
            await ask(server)(extra_headers={"x-workflow-stage": "judge"})

    assert server.requests[0].headers.getall("X-Workflow-Stage") == ["judge"]  # type: ignore[attr-defined]
    assert [call.stage for call in run.calls] == ["judge"]


async def test_attaching_twice_sends_and_records_once(ask: Any) -> None:
    async with serving() as server:
        send = ask(server)
        assert attach(send.client) is send.client
        with workflow("text2sql", slo_s=30) as run:
            await send()

    assert len(run.calls) == 1
    assert len(server.requests[0].headers.getall("X-Workflow-Budget-Ms")) == 1  # type: ignore[attr-defined]


async def test_a_copy_of_an_attached_client_is_attached(ask: Any) -> None:
    async with serving() as server:
        send = ask(server)
        copy = send.client.with_options(timeout=5)
        with workflow("text2sql", id="run-1"):
            sending = copy.chat.completions.create
            if isinstance(copy, openai.AsyncOpenAI):
                await sending(model="m", messages=[])
            else:
                await asyncio.to_thread(sending, model="m", messages=[])

    assert server.requests[0].headers["X-Workflow-Id"] == "run-1"


async def test_the_innermost_stage_counts_and_ends_with_its_block(ask: Any) -> None:
    async with serving() as server:
        send = ask(server)
        with workflow("text2sql"), stage("outer") as outer:
            with stage("inner", final=True) as inner:
                await send()
            await send()
        await send()

    assert [request.stage for request in server.requests] == ["inner", "outer", None]
    finals = [request.headers.get("X-Workflow-Final") for request in server.requests]
    assert finals == ["true", None, None]
    assert (len(inner.calls), len(outer.calls)) == (1, 1)


async def test_parallel_calls_keep_their_own_stages(ask: Any) -> None:
    async with serving() as server:
        send = ask(server)

        async def in_stage(name: str) -> None:
            with stage(name):
                await send()

        with workflow("text2sql", id="run-1") as run:
            await asyncio.gather(*(in_stage(f"s{number}") for number in range(8)))

    assert sorted(str(request.stage) for request in server.requests) == [f"s{n}" for n in range(8)]
    assert {request.headers["X-Workflow-Id"] for request in server.requests} == {"run-1"}
    assert sorted(str(call.stage) for call in run.calls) == [f"s{n}" for n in range(8)]


async def test_the_timeline_holds_what_the_router_says(ask: Any) -> None:
    said = {
        "X-Workflow-Instance": "a100-0",
        "X-Workflow-Slack-Ms": "-12.5",
        "X-Workflow-Queue-Ms": "7",
    }
    async with serving(response_headers=said) as server:
        with workflow("text2sql", slo_s=30) as run, stage("generate"):
            await ask(server)()

    (call,) = run.calls
    assert (call.instance, call.slack_ms, call.queue_ms) == ("a100-0", -12.5, 7.0)
    assert call.first_byte_s is not None
    assert call.end_s is not None
    assert 0 <= call.start_s <= call.first_byte_s <= call.end_s <= run.elapsed_s


async def test_router_headers_that_are_no_numbers_are_ignored(ask: Any) -> None:
    said = {"X-Workflow-Slack-Ms": "soon", "X-Workflow-Queue-Ms": "nan"}
    async with serving(response_headers=said) as server:
        with workflow("text2sql") as run:
            await ask(server)()

    assert (run.calls[0].slack_ms, run.calls[0].queue_ms) == (None, None)


async def test_a_streamed_call_ends_when_its_stream_ends(ask: Any) -> None:
    def answer(request: Request) -> Answer:
        chunk = '{"id":"1","object":"chat.completion.chunk","created":0,"model":"m","choices":[]}'
        body = f"data: {chunk}\n\ndata: [DONE]\n\n"
        return web.Response(text=body, content_type="text/event-stream")

    async with serving(answer) as server:
        with workflow("text2sql") as run:
            stream = await ask(server)(stream=True)
            (call,) = run.calls
            assert call.first_byte_s is not None
            assert call.end_s is None
            if isinstance(stream, openai.AsyncStream):
                async for _ in stream:
                    pass
            else:
                await asyncio.to_thread(list, stream)

    assert call.end_s is not None
    assert call.end_s >= call.first_byte_s


async def test_a_refused_connection_is_a_call_without_status(ask: Any) -> None:
    async with serving() as server:
        pass
    with workflow("text2sql") as run:
        with pytest.raises(openai.APIConnectionError):
            await ask(server, max_retries=0)()

    (call,) = run.calls
    assert (call.status, call.first_byte_s, call.end_s) == (None, None, None)


@pytest.mark.parametrize("library", HTTP_LIBRARIES)
async def test_bare_http_clients_can_be_attached(library: str) -> None:
    module = __import__(library)
    async with serving() as server:
        url = f"{server.base_url}/chat/completions"
        with workflow("text2sql", id="run-1"), stage("generate"):
            async with attach(module.AsyncClient()) as client:
                response = await client.post(url, json={})
            with attach(module.Client()) as blocking:
                await asyncio.to_thread(blocking.post, url, json={})

    assert response.json() == completion("ok")
    assert [r.headers["X-Workflow-Id"] for r in server.requests] == ["run-1", "run-1"]


@pytest.mark.parametrize("thing", [None, "http://127.0.0.1", object()])
def test_what_has_no_http_client_cannot_be_attached(thing: object) -> None:
    with pytest.raises(TypeError, match="wanted an OpenAI or httpx client"):
        attach(thing)


def test_a_copied_context_carries_the_run_into_many_threads_at_once() -> None:
    def seen(_: int) -> dict[str, str]:
        time.sleep(0.002)
        return headers()

    with workflow("text2sql", id="run-1"), stage("generate"), ThreadPoolExecutor(4) as pool:
        bare = pool.submit(seen, 0).result()
        copied = list(pool.map(copy_context(seen), range(16)))

    assert bare == {}
    assert {(each["X-Workflow-Id"], each["X-Workflow-Stage"]) for each in copied} == {
        ("run-1", "generate")
    }


def test_a_run_inside_a_stage_starts_without_a_stage() -> None:
    with workflow("outer"), stage("plan"), workflow("inner"):
        assert "X-Workflow-Stage" not in headers()


@pytest.mark.parametrize("label", ["a\r\nX-Evil: 1", "a\nb", "é", "", " a", "x" * 300, "\x00", 7])
def test_labels_that_cannot_travel_in_a_header_are_rejected(label: Any) -> None:
    for build in (
        lambda: workflow(label),
        lambda: workflow("w", id=label),
        lambda: workflow("w", tenant=label),
        lambda: stage(label),
    ):
        with pytest.raises(ValueError, match="wanted"), build():
            pass


@pytest.mark.parametrize("slo_s", [0, -1, float("nan"), float("inf")])
def test_an_slo_must_be_a_positive_number(slo_s: float) -> None:
    with pytest.raises(ValueError, match="positive number of seconds"):
        with workflow("w", slo_s=slo_s):
            pass


@given(st.text())
def test_no_text_can_inject_a_header(text: str) -> None:
    try:
        with workflow(text, id=text, tenant=text), stage(text):
            values = headers().values()
    except ValueError:
        return
    assert all(value.isascii() and value.isprintable() for value in values)


REFUSED = {"X-Workflow-Refused": "overloaded", "Retry-After": "7", "x-should-retry": "false"}


def refusal(request: Request) -> Answer:
    error = {"error": {"message": "too late", "code": "overloaded"}}
    return web.json_response(error, status=503, headers=REFUSED)


async def test_a_run_that_the_router_refuses_ends_with_an_error_of_its_own(ask: Any) -> None:
    async with serving(refusal) as server:
        with pytest.raises(OverloadedError, match=r"'run-1' was refused.* in 7 s") as info:
            with workflow("text2sql", slo_s=30, id="run-1") as run:
                await ask(server)()

    assert info.value.retry_after_s == 7.0
    assert isinstance(info.value.__cause__, openai.InternalServerError)
    assert run.calls[0].refused_for_s == 7.0


async def _two_side_by_side(server: Server) -> None:
    async with attach(openai.AsyncOpenAI(base_url=server.base_url, api_key="k")) as client:
        create = client.chat.completions.create
        with workflow("text2sql"):
            async with asyncio.TaskGroup() as tasks:
                for _ in range(2):
                    tasks.create_task(create(model="m", messages=[]))


async def test_calls_side_by_side_that_are_refused_end_alike() -> None:
    async with serving(refusal) as server:
        with pytest.raises(OverloadedError):
            await _two_side_by_side(server)


async def test_a_refused_run_whose_other_calls_were_never_answered_was_refused() -> None:
    is_second_here, is_over = asyncio.Event(), asyncio.Event()

    async def first_only(request: Request) -> Answer:
        if request.number:
            is_second_here.set()
            await is_over.wait()
        await is_second_here.wait()
        return refusal(request)

    async with serving(first_only) as server:
        with pytest.raises(OverloadedError):
            await _two_side_by_side(server)
        is_over.set()


async def test_a_run_that_is_let_in_at_another_try_was_not_refused(ask: Any) -> None:
    def second_try(request: Request) -> Answer:
        headers = {"X-Workflow-Refused": "overloaded", "Retry-After": "0", "retry-after-ms": "1"}
        return "ok" if request.number else web.json_response({}, status=503, headers=headers)

    async with serving(second_try) as server:
        with workflow("text2sql") as run:
            await ask(server)()

    assert [call.status for call in run.calls] == [503, 200]
    assert run.refusal is None


@pytest.mark.parametrize(
    "answer",
    [503, lambda request: "ok" if not request.number else refusal(request)],
    ids=["a router without instances", "a call after the first"],
)
async def test_other_errors_stay_what_they_are(ask: Any, answer: Any) -> None:
    async with serving(answer if callable(answer) else lambda request: answer) as server:
        send = ask(server, max_retries=0)

        async def twice() -> None:
            with workflow("text2sql"):
                await send()
                await send()

        with pytest.raises(openai.InternalServerError):
            await twice()


async def test_an_error_of_the_block_itself_is_not_taken_for_a_refusal(ask: Any) -> None:
    async with serving(refusal) as server:
        send = ask(server, max_retries=0)

        async def elsewhere() -> None:
            with workflow("text2sql"):
                with pytest.raises(openai.InternalServerError):
                    await send()
                raise LookupError("and there is no other place to go")

        with pytest.raises(LookupError):
            await elsewhere()


def test_what_threads_and_refused_runs_need_is_public() -> None:
    assert vllm_workflow.copy_context is copy_context
    assert vllm_workflow.OverloadedError is OverloadedError


def test_an_slo_that_is_no_number_is_named() -> None:
    text: Any = "30"
    with (
        pytest.raises(ValueError, match=r"workflow\(slo_s=\.\.\.\): wanted .*, got '30'"),
        workflow("w", slo_s=text),
    ):
        pass
