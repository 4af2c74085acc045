"""Calls through the router, over real sockets: anything else would buffer or not disconnect."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import openai
import pytest
from yarl import URL

from tests.fakes import USAGE, FakeEngine
from tests.router.conftest import CHAT, Client, Routing

pytestmark = pytest.mark.anyio


async def settled(client: Client) -> None:
    """Wait until the router holds nothing any more."""
    async with asyncio.timeout(5):
        while client.router.dispatcher.num_in_flight:
            await asyncio.sleep(0)


async def test_an_answer_arrives_as_the_engine_gave_it(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with client.post() as response:
            body = await response.json()

    assert response.status == 200
    assert body["choices"][0]["message"]["content"] == "ttt"
    assert response.headers["X-Workflow-Instance"] == "a"
    assert float(response.headers["X-Workflow-Queue-Ms"]) >= 0.0
    assert "X-Workflow-Slack-Ms" not in response.headers
    assert response.headers["X-Request-Id"] == engine.received[0].header("X-Request-Id")


async def test_tokens_reach_the_client_as_the_engine_makes_them(routing: Routing) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        engine.release()
        async with client.post(stream=True) as response:
            for i in range(engine.num_tokens):
                # Were anything buffered, this would wait for a token that was not released.
                async with asyncio.timeout(5):
                    event = await response.content.readuntil(b"\n\n")
                assert f'"content": "t{i}"'.encode() in event
                engine.release()
            rest = await response.read()

    assert rest == b"data: [DONE]\n\n"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stock_openai_client_works_through_the_router(
    routing: Routing, stream: bool
) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with openai.AsyncOpenAI(base_url=client.router.url + "/v1", api_key="k") as user:
            messages: Any = [{"role": "user", "content": "hi"}]
            if stream:
                chunks = await user.chat.completions.create(
                    model="m", messages=messages, stream=True
                )
                text = "".join([c.choices[0].delta.content or "" async for c in chunks])
            else:
                answer = await user.chat.completions.create(model="m", messages=messages)
                text = answer.choices[0].message.content or ""
            models = [model.id async for model in user.models.list()]

    assert text == ("t0t1t2" if stream else "ttt")
    assert models == ["m"]
    assert engine.received[0].header("Authorization") == "Bearer k"


@pytest.mark.parametrize("early_headers", [True, False])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_before_the_first_byte_aborts_the_engine(
    routing: Routing, stream: bool, early_headers: bool
) -> None:
    engine = FakeEngine(held=True, early_headers=early_headers)
    async with engine.serving(), routing(engine) as client:
        call = asyncio.create_task(client.post(stream=stream).__aenter__())
        await engine.wait_for(received=1)
        assert client.router.dispatcher.num_in_flight == 1
        call.cancel()

        await engine.wait_for(aborted=1)
        await settled(client)
        assert await client.metric("client_disconnects_total") == 1
        assert await client.metric(
            "requests_total", instance="", stage="", status="499"
        ) == 1  # fmt: skip


async def test_a_client_that_leaves_in_the_middle_of_a_stream_aborts_the_engine(
    routing: Routing,
) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        engine.release()
        async with client.post(stream=True) as response:
            await response.content.readuntil(b"\n\n")
            response.close()

        await engine.wait_for(aborted=1)
        await settled(client)


async def test_a_client_that_leaves_while_it_sends_reaches_no_engine(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        url = client.router.url.removeprefix("http://")
        host, port = url.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {url}\r\nContent-Length: 1000\r\n\r\n"
        writer.write(head.encode() + b'{"model"')
        await writer.drain()
        writer.close()
        async with client.post() as response:
            await response.read()

    assert len(engine.received) == 1


async def test_other_calls_go_on_when_a_client_leaves(routing: Routing) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        staying, leaving = (asyncio.create_task(client.post().__aenter__()) for _ in range(2))
        await engine.wait_for(received=2)
        leaving.cancel()
        await engine.wait_for(aborted=1)
        engine.release(2)

        assert (await staying).status == 200


async def test_a_4xx_is_the_client_s_and_takes_no_instance_away(routing: Routing) -> None:
    async with (
        FakeEngine(status=422).serving() as engine,
        FakeEngine(status=422).serving() as other,
        routing(engine, other) as client,
    ):
        for _ in range(10):
            async with client.post() as response:
                assert response.status == 422
                assert (await response.json())["error"]["message"] == "scripted"

        assert len(engine.received) + len(other.received) == 10
        assert await client.metric("instance_healthy", instance="a") == 1
        assert await client.metric("instance_healthy", instance="b") == 1


async def test_a_stream_that_breaks_off_ends_with_an_error_and_no_end(routing: Routing) -> None:
    async with FakeEngine(dies_after=2).serving() as engine, routing(engine) as client:
        chunks: list[bytes] = []

        async def read(response: aiohttp.ClientResponse) -> None:
            while chunk := await response.content.readany():
                chunks.append(chunk)

        async with client.post(stream=True) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await read(response)
        assert await client.metric("broken_answers_total", instance="a") == 1

    received = b"".join(chunks)
    *tokens, error = received.removesuffix(b"\n\n").split(b"\n\n")
    assert len(tokens) == 2
    assert json.loads(error.removeprefix(b"data: "))["error"] == {
        "message": "instance a broke off its answer",
        "type": "server_error",
        "param": None,
        "code": "upstream_lost",
    }
    assert b"[DONE]" not in received


async def test_half_an_event_is_kept_back_so_that_an_error_can_follow(routing: Routing) -> None:
    engine = FakeEngine(dies_after=1, last_words=b'data: {"half')
    async with engine.serving(), routing(engine) as client:
        async with client.post(stream=True) as response:
            await response.content.readuntil(b"\n\n")
            error = await response.content.readuntil(b"\n\n")

    assert error.startswith(b'data: {"error": {"message": "instance a broke off')


async def test_a_stock_client_sees_a_stream_that_breaks_off_as_an_error(routing: Routing) -> None:
    async with FakeEngine(dies_after=2).serving() as engine, routing(engine) as client:
        async with openai.AsyncOpenAI(base_url=client.router.url + "/v1", api_key="k") as user:
            chunks = await user.chat.completions.create(model="m", messages=[], stream=True)
            with pytest.raises(openai.APIError, match="broke off its answer"):
                async for _ in chunks:
                    pass


async def test_a_redirect_is_the_client_s_to_follow(routing: Routing) -> None:
    async with FakeEngine(location="/v1/elsewhere").serving() as engine, routing(engine) as client:
        url = client.router.url + CHAT
        async with client.session.post(url, data=b"{}", allow_redirects=False) as response:
            assert (response.status, response.headers["Location"]) == (307, "/v1/elsewhere")

    assert len(engine.received) == 1


async def test_a_compressed_answer_is_passed_on_as_it_is(routing: Routing) -> None:
    async with FakeEngine(compresses=True).serving() as engine, routing(engine) as client:
        async with client.post() as response:
            assert response.headers["Content-Encoding"] == "gzip"
            assert (await response.json())["usage"] == USAGE


async def test_nothing_is_learned_from_an_answer_that_is_none(routing: Routing) -> None:
    async with FakeEngine(status=400).serving() as engine, routing(engine) as client:
        async with client.post() as response:
            await response.read()

        assert await client.metric("actual_seconds_count", instance="a") is None


async def test_as_many_calls_as_there_are_run_side_by_side(routing: Routing) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        client.session.connector._limit = 0  # type: ignore[union-attr]
        calls = [asyncio.create_task(client.post().__aenter__()) for _ in range(150)]
        await engine.wait_for(received=150)
        engine.release(150)

        assert {(await call).status for call in calls} == {200}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
async def test_every_generating_endpoint_is_told_of_the_run(routing: Routing, path: str) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with client.post(path=path, headers={"X-Workflow-Id": "w"}) as response:
            assert response.status == 200

    assert engine.received[0].path == path
    assert engine.received[0].xargs["wf_id"] == "w"


async def test_an_embeddings_request_is_forwarded_unchanged(routing: Routing) -> None:
    raw = b'{"model": "m",  "input": "text"}'
    async with FakeEngine().serving() as engine, routing(engine, set_priority=True) as client:
        await (await client.post(raw, path="/v1/embeddings", headers={"X-Workflow-Id": "w"})).read()

    assert engine.received[0].raw == raw


async def test_an_embedding_has_nothing_to_decode(routing: Routing) -> None:
    headers = {"X-Workflow-Budget-Ms": "1000"}
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with client.post(path="/v1/embeddings", headers=headers) as response:
            await response.read()

    assert float(response.headers["X-Workflow-Slack-Ms"]) > 900


async def test_an_ordinary_call_is_forwarded_unchanged(routing: Routing) -> None:
    raw = b' {"model": "m" , "temperature": 1.0}\n'
    async with FakeEngine().serving() as engine, routing(engine) as client:
        url = URL(f"{client.router.url}{CHAT}?debug=%2Fx", encoded=True)
        async with client.session.post(url, data=raw) as response:
            await response.read()

    assert engine.received[0].raw == raw
    assert engine.received[0].path == f"{CHAT}?debug=%2Fx"


async def test_headers_for_one_hop_stay_there(routing: Routing) -> None:
    sent = {
        "Connection": "keep-alive, X-Private",
        "X-Private": "1",
        "Keep-Alive": "timeout=5",
        "TE": "trailers",
        "X-Custom": "kept",
        "traceparent": "00-1-2-03",
        "X-Session-ID": "s",
        "X-Request-Id": "mine",
    }
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with client.post(headers=sent) as response:
            await response.read()

    got = engine.received[0]
    assert [got.header(n) for n in ("X-Private", "Keep-Alive", "TE")] == [None, None, None]
    assert [got.header(n) for n in ("X-Custom", "traceparent", "X-Session-ID")] == [
        "kept",
        "00-1-2-03",
        "s",
    ]
    assert got.header("Host") == engine.url.removeprefix("http://")
    assert got.header("X-Request-Id") == response.headers["X-Request-Id"] == "mine"


async def test_no_header_is_invented(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        skipped = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
        url = client.router.url + CHAT
        async with client.session.post(url, data=b"{}", skip_auto_headers=skipped) as response:
            assert response.status == 200

    names = {name.lower() for name, _ in engine.received[0].headers}
    assert names == {"host", "content-length", "x-request-id"}


async def test_a_request_id_that_could_split_a_header_is_replaced(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        for bad in ("x" * 300, "é"):
            async with client.post(headers={"X-Request-Id": bad}) as response:
                assert response.status == 200
                assert response.headers["X-Request-Id"] != bad


async def test_two_calls_may_carry_the_same_request_id(routing: Routing) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        headers = {"X-Request-Id": "same"}
        calls = [asyncio.create_task(client.post(headers=headers).__aenter__()) for _ in range(2)]
        await engine.wait_for(received=2)
        engine.release(2)

        assert [(await call).status for call in calls] == [200, 200]


async def test_a_compressed_request_is_read(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        url = client.router.url + CHAT
        headers = {"X-Workflow-Id": "w"}
        async with client.session.post(
            url, json={"model": "m"}, headers=headers, compress="gzip"
        ) as response:
            assert response.status == 200

    assert engine.received[0].xargs["wf_id"] == "w"
    assert engine.received[0].header("Content-Encoding") is None


@pytest.mark.parametrize(
    ("raw", "status", "message", "param"),
    [
        (b"", 400, "body: expected JSON, got an error", None),
        (b"{", 400, "body: expected JSON, got an error", None),
        (b"[1]", 400, "body: expected a JSON object, got list", None),
        (b'"m"', 400, "body: expected a JSON object, got str", None),
        (b'{"model": "\xff"}', 400, "body: expected JSON in UTF-8", None),
        (b"[" * 100_000, 400, "body: expected JSON, got one nested too deeply", None),
        (b'{"model": 7}', 400, "model: expected a string, got 7", "model"),
        (b'{"model": "x"}', 404, "model: 'x' is not served here; served are ['m']", "model"),
        (b" " * 2_000_000, 413, "body: expected at most 1 MB", None),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_a_request_that_cannot_be_served_is_answered_in_openai_s_form(
    routing: Routing, raw: bytes, status: int, message: str, param: str | None
) -> None:
    async with FakeEngine().serving() as engine, routing(engine, max_body_mb=1) as client:
        async with client.post(raw) as response:
            error = (await response.json())["error"]

        assert response.status == status
        assert error["message"].startswith(message)
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert error["code"] == ("model_not_found" if status == 404 else None)
        assert engine.received == []
        async with client.post() as response:
            assert response.status == 200


async def test_a_model_may_be_left_out(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        for raw in (b"{}", b'{"model": null}'):
            async with client.post(raw) as response:
                assert response.status == 200

    assert [received.raw for received in engine.received] == [b"{}", b'{"model": null}']


async def test_an_unknown_path_is_answered_in_openai_s_form(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with client.post(path="/v1/audio") as response:
            assert response.status == 404
            assert "POST '/v1/audio' is not known here" in (await response.text())
        async with client.get(CHAT) as response:
            assert (response.status, response.headers["Allow"]) == (405, "POST")


@pytest.mark.parametrize("include_usage", [True, False])
async def test_what_an_answer_says_of_its_tokens_is_learned(
    routing: Routing, include_usage: bool
) -> None:
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": include_usage}}
    headers = {"X-Workflow-Name": "w", "X-Workflow-Stage": "s"}
    async with FakeEngine(num_tokens=20).serving() as engine, routing(engine) as client:
        async with client.post(headers=headers, **options) as response:
            await response.read()

        lengths = client.router.dispatcher.predictor.lengths
        learned, source = lengths.output_tokens(("", "w", "s"), 10)
    assert (learned, source) == (USAGE["completion_tokens"] if include_usage else 19, "learned")
