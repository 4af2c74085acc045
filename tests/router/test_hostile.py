"""What clients send who mean harm, or know no HTTP: over raw sockets, as they would."""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import CHAT, Routing
from tests.router.raw_http import GOOD, HOST, Answer, exchange, post, still_serves

pytestmark = pytest.mark.anyio


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status", "message"),
    [
        (
            post(b"Transfer-Encoding: chunked", body=b"0\r\n\r\n" + SMUGGLED),
            400,
            "request: expected HTTP/1.1, got an error: ",
        ),
        (post(b"Content-Length: 5"), 400, "request: expected HTTP/1.1, got an error: "),
        (
            post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", length=False),
            400,
            "request: expected HTTP/1.1, got an error: ",
        ),
        (post(b"Transfer-Encoding: xchunked", length=False), 400, "request: expected HTTP/1.1"),
        (post(b"Content-Length: +27", length=False), 400, "request: expected HTTP/1.1"),
        (post(b"Content-Length: -1", length=False), 400, "request: expected HTTP/1.1"),
        (post(b"Content-Length: 2_7", length=False), 400, "request: expected HTTP/1.1"),
        (post(b"Content-Length: 99999999999999999999", length=False), 400, "request: expected"),
        (post(b"X-Workflow-Id : w"), 400, "request: expected HTTP/1.1"),
        (post(b"X-Workflow-Id: a\nX-Tenant-Id: b"), 400, "request: expected HTTP/1.1"),
        (post(b"X-Workflow-Id: a\rX-Tenant-Id: b"), 400, "request: expected HTTP/1.1"),
        (post(b" folded: a"), 400, "request: expected HTTP/1.1"),
        (post(b"X-Workflow-Id: a\x00b"), 400, ""),
        (post(b"X: " + b"a" * 100_000), 431, "headers: expected at most 8190 bytes each"),
        (post(b"X" * 100_000 + b": a"), 431, "headers: expected at most 8190 bytes each"),
        (post(*[b"X-%d: a" % n for n in range(200)]), 431, "headers: expected at most 128"),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", 431, "headers: expected at most"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 3, 400, "request line: expected METHOD"),
        (b"\x00" * 64 + b"\r\n\r\n", 400, "request line: expected METHOD"),
        (b"GET / HTTP/9.9\r\n" + HOST + b"\r\n", 400, "request line: expected METHOD"),
        (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", 400, "request: expected HTTP/1.1"),
        (post(b"Expect: \x80"), 417, "header Expect: expected 100-continue"),
        (post(b"Expect: more"), 417, "header Expect: expected 100-continue"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "request"),
    ],
    ids=lambda value: repr(value)[:60] if isinstance(value, bytes) else None,
)
async def test_what_is_no_http_is_refused_in_openai_s_form(
    routing: Routing, request_bytes: bytes, status: int, message: str
) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        answer = await exchange(client.router.url, request_bytes)
        await still_serves(client)

    assert answer.status == status, answer.lines
    assert answer.error["message"].startswith(message)
    assert answer.error["type"] == "invalid_request_error"
    assert len(engine.received) == 1  # the one that shows that it still serves


async def test_a_client_that_waits_to_be_asked_for_its_body_is_asked(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        answer = await exchange(client.router.url, post(b"Expect: 100-continue"))

    assert answer.lines[0] == "HTTP/1.1 100 Continue"
    assert answer.body.startswith(b"HTTP/1.1 200 OK")


def large(number: int, size: int) -> bytes:
    """Headers that are none too long each."""
    return b"".join(b"X-%d: %b\r\n" % (n, b"a" * size) for n in range(number))


TRAILING = b"Host: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{    \r\n"


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ((large(8, 7_000), large(8, 7_000)), 431),
        ((TRAILING, b"0\r\n" + large(8, 7_000), large(8, 7_000)), 0),
        ((TRAILING, b"1\r\n}\r\n0\r\n\r\nGET / HTTP/1.1\r\n", large(99, 1_000)), 0),
    ],
    ids=["headers", "trailers", "headers of the next"],
)
async def test_headers_that_are_large_together_are_not_held(
    routing: Routing, pieces: tuple[bytes, ...], status: int
) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        first = f"POST {CHAT} HTTP/1.1\r\n".encode()
        host, _, port = client.router.url.partition("://")[2].partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        for piece in (first, *pieces):
            writer.write(piece)
            await asyncio.sleep(0.05)  # each is read by itself
        async with asyncio.timeout(5):  # far less than it waits for what does not come
            try:
                answer = Answer(await reader.read())
            except ConnectionError:
                answer = Answer(b"")
        writer.close()
        engine.release(1)
        await still_serves(client)

    assert answer.status == status


async def test_headers_and_bodies_in_small_pieces_may_be_large(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        body = b"".join(b"1\r\n%c\r\n" % each for each in GOOD + b" " * 20_000) + b"0\r\n"
        answer = await exchange(
            client.router.url,
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode(),
            large(7, 8_000) + b"Transfer-Encoding: chunked\r\n\r\n",
            body + large(7, 8_000) + b"\r\n",
        )

    assert answer.status == 200


async def test_a_compressed_body_may_be_long_in_coming_to_its_contents(routing: Routing) -> None:
    packed = zlib.compress(GOOD, wbits=31)
    named = packed[:3] + b"\x08" + packed[4:10] + b"n" * 200_000 + b"\0" + packed[10:]
    head = b"POST %b HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n" + HOST
    async with FakeEngine().serving() as engine, routing(engine) as client:
        host, _, port = client.router.url.partition("://")[2].partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head % (CHAT.encode(), len(named)) + b"Connection: close\r\n\r\n")
        for at in range(0, len(named), 30_000):
            writer.write(named[at : at + 30_000])
            await asyncio.sleep(0.02)  # each is read by itself
        answer = Answer(await reader.read())
        writer.close()

    assert answer.status == 200


async def test_ten_megabytes_of_headers_are_refused_before_they_are_held(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        many = b"".join(b"X-%d: %s\r\n" % (n, b"a" * 8000) for n in range(1250))
        answer = await exchange(client.router.url, f"POST {CHAT} HTTP/1.1\r\n".encode() + many)
        await still_serves(client)

    assert answer.status in {0, 431}  # 0: it was closed before all was sent


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"X-Workflow-Slo-Ms": "nan"}, "X-Workflow-Slo-Ms"),
        ({"X-Workflow-Slo-Ms": "inf"}, "X-Workflow-Slo-Ms"),
        ({"X-Workflow-Slo-Ms": "-1"}, "X-Workflow-Slo-Ms"),
        ({"X-Workflow-Slo-Ms": "0"}, "X-Workflow-Slo-Ms"),
        ({"X-Workflow-Slo-Ms": "1e308"}, "X-Workflow-Slo-Ms"),
        ({"X-Workflow-Slo-Ms": "1e999"}, "X-Workflow-Slo-Ms"),
        ({"X-Workflow-Slo-Ms": "9" * 300}, "X-Workflow-Slo-Ms"),
        ({"X-Workflow-Slo-Ms": "١٢"}, "X-Workflow-Slo-Ms"),
        ({"X-Workflow-Budget-Ms": "-0.1"}, "X-Workflow-Budget-Ms"),
        ({"X-Workflow-Budget-Ms": "NaN"}, "X-Workflow-Budget-Ms"),
        ({"X-Workflow-Final": "perhaps"}, "X-Workflow-Final"),
        ({"X-Workflow-Id": "a" * 257}, "X-Workflow-Id"),
        ({"X-Workflow-Stage": "é"}, "X-Workflow-Stage"),
        ({"X-Tenant-Id": "a\tb"}, "X-Tenant-Id"),
    ],
    ids=str,
)
async def test_a_value_of_ours_that_makes_no_sense_is_told(
    routing: Routing, headers: dict[str, str], param: str
) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with client.post(headers=headers) as response:
            error = (await response.json())["error"]
        await still_serves(client)

    assert (response.status, error["param"]) == (400, param)
    assert error["message"].startswith(f"header {param}: expected ")
    assert ", got " in error["message"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a":NaN}', "body: expected JSON, got an error: NaN is no JSON"),
        (b'{"a":-Infinity}', "body: expected JSON, got an error: -Infinity is no JSON"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "body: expected JSON at most 100 deep"),
        (b'{"a":' * 90_000 + b"1" + b"}" * 90_000, "body: expected JSON, got one nested too"),
        (b'{"a":[' + b"[]," * 200_000 + b"1]}", "body: expected at most 100000 objects and lists"),
        (b'{"a":[' + b"[]," * 400_000 + b"1]}", "body: expected at most 100000 objects and lists"),
        (b'{"a":[' + b"1," * 2_000_000 + b"1]}", "body: expected at most 1000000 values, got 2000"),
        (b'{"a":' + b"9" * 5000 + b"}", "body: expected JSON, got an error: Exceeds the limit"),
        (b'{"a":"\xff\xfe"}', "body: expected JSON in UTF-8"),
        (b'\xef\xbb\xbf{"a":1}', "body: expected JSON, got an error: Expecting value"),
        (b"[" * 3, "body: expected JSON, got an error"),
        (b"", "body: expected JSON, got an error"),
        (b"null", "body: expected a JSON object, got NoneType"),
        (b'{"metadata":{"workflow_slo_ms":1e999}}', "metadata.workflow_slo_ms: expected a number"),
        (b'{"vllm_xargs":{"wf_budget_ms":-5}}', "vllm_xargs.wf_budget_ms: expected a number"),
        (b'{"vllm_xargs":{"wf_id":"a\\r\\nX-Evil: b"}}', "vllm_xargs.wf_id: expected 1 to 256"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes) else None,
)
async def test_a_body_that_makes_no_sense_is_told(
    routing: Routing, raw: bytes, message: str
) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with client.post(raw) as response:
            error = (await response.json())["error"]
        await still_serves(client)

    assert response.status == 400
    assert error["message"].startswith(message)
    assert len(engine.received) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 10**400},
        {"max_tokens": -1},
        {"max_tokens": 2**63},
        {"model": "m", "messages": [{"content": "\ud800"}]},
        {"messages": {"a": 1}},
        {"messages": [[[]]], "stream": "yes"},
        {"prompt": [1, 2**70]},
        {"vllm_xargs": {"wf_id": 2**62}, "metadata": 5},
        {"vllm_xargs": {"agentic_context": {"program_id": "p", "deadline_seconds": 1e300}}},
        {"nvext": {"agent_hints": {"osl": 1e308, "priority": -(2**80)}}},
    ],
    ids=lambda fields: str(fields)[:50],
)
async def test_what_is_odd_but_not_ours_is_for_the_engine_to_judge(
    routing: Routing, fields: dict[str, Any]
) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with client.post(**fields) as response:
            assert response.status == 200
            await response.read()

    assert engine.received[0].body.items() >= fields.items() or "vllm_xargs" in fields


async def test_of_members_that_are_there_twice_the_last_one_counts(routing: Routing) -> None:
    engine = FakeEngine(models=("m", "n"))
    async with engine.serving(), routing(engine) as client:
        raw = b'{"model":"no","model":"n","vllm_xargs":{"wf_id":"a"},"vllm_xargs":{"wf_id":"b"}}'
        async with client.post(raw) as response:
            assert response.status == 200

    assert engine.received[0].raw.count(b'"model"') == 2
    assert engine.received[0].xargs["wf_id"] == "b"


async def test_a_request_id_cannot_bring_headers_along(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        answer = await exchange(client.router.url, post(b"X-Request-Id: a\xc4\x8d\xc4\x8ab"))

    assert answer.status == 200
    sent = engine.received[0].header("X-Request-Id")
    assert sent is not None
    assert sent.isalnum()
    assert f"X-Request-Id: {sent}" in answer.lines
