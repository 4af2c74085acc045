"""Bytes that are almost HTTP, sent to a router process over raw sockets."""

from __future__ import annotations

import json
import re
import socket

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.conftest import Target

METHODS = st.sampled_from([b"POST", b"GET", b"PUT", b"HEAD", b"OPTIONS", b"CONNECT", b"post", b""])
PATHS = st.sampled_from(
    [
        b"/v1/chat/completions",
        b"/v1/chat/completions?a=b&c=%00%0d%0a",
        b"/v1/models",
        b"/health",
        b"/metrics",
        b"//v1/../admin/status",
        b"http://elsewhere/v1/models",
        b"*",
        b"/\xff\xfe",
        b"/" + b"%2e" * 2000,
    ]
)
VERSIONS = st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.1\x00", b"", b"HTCPCP"])
NAMES = st.sampled_from(
    [
        b"Content-Length",
        b"Transfer-Encoding",
        b"Content-Encoding",
        b"Content-Type",
        b"Connection",
        b"Upgrade",
        b"Expect",
        b"Host",
        b"X-Workflow-Id",
        b"X-Workflow-Slo-Ms",
        b"X-Workflow-Final",
        b"X-Tenant-Id",
        b"X-Request-Id",
        b"X-Session-ID",
        b"baggage",
        b"Authorization",
        b"Cookie",
        b" Folded",
        b"",
    ]
) | st.binary(max_size=20)
VALUES = st.sampled_from(
    [
        b"0",
        b"5",
        b"-1",
        b"99999999999999999999",
        b"0x10",
        b"chunked",
        b"chunked, identity",
        b"identity",
        b"gzip",
        b"deflate",
        b"br",
        b"zstd",
        b"close",
        b"keep-alive",
        b"Authorization, Host, X-Request-Id",
        b"Upgrade, HTTP2-Settings",
        b"h2c",
        b"websocket",
        b"100-continue",
        b"nan",
        b"1e308",
        b"a\r\nX-Evil: 1",
        b"a\nX-Evil: 1",
        b"\x00",
        b"\xff",
        b"workflow.id=%0d%0a,workflow.id=%ff",
        b"a" * 9000,
    ]
) | st.binary(max_size=40)
BODIES = st.sampled_from(
    [
        b'{"model":"m","messages":[]}',
        b'{"model":"m","stream":true}',
        b"5\r\n{}   \r\n0\r\n\r\n",
        b"ffffffffffffffffff\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n",
        b"",
    ]
) | st.binary(max_size=200)
SILENT_S = 0.1
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A call as it should be, but for a part or two."""
    odd = draw(st.sets(st.integers(0, 6), max_size=2))
    method = draw(METHODS) if 0 in odd else b"POST"
    path = draw(PATHS) if 1 in odd else b"/v1/chat/completions"
    version = draw(VERSIONS) if 2 in odd else b"HTTP/1.1"
    body = draw(BODIES) if 3 in odd else b'{"model":"m","messages":[]}'
    lines = [b" ".join((method, path, version)), b"Host: router", b"AUTHORIZATION"]
    if 4 in odd:
        lines += [
            name + b": " + value
            for name, value in draw(st.lists(st.tuples(NAMES, VALUES), min_size=1, max_size=4))
        ]
    if 5 not in odd:
        lines.append(b"Content-Length: %d" % len(body))
    lines.append(draw(st.sampled_from([b"Connection: close", b"Connection: keep-alive"])))
    end = draw(st.sampled_from([b"\n\n", b"\r\n", b""])) if 6 in odd else b"\r\n\r\n"
    return b"\r\n".join(lines) + end + body


def exchange(target: Target, data: bytes) -> bytes:
    """Send, and read what is answered until the router closes or is silent."""
    received = b""
    with socket.create_connection(target.address, timeout=10) as connection:
        try:
            connection.sendall(data)
            connection.settimeout(SILENT_S)
            while chunk := connection.recv(65_536):
                received += chunk
        except (ConnectionError, TimeoutError):
            pass
    return received


@given(st.lists(requests(), min_size=1, max_size=3))
@settings(
    max_examples=3 * settings().max_examples,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_bytes_that_are_almost_http_get_no_5xx(target: Target, parts: list[bytes]) -> None:
    key = b"Authorization: Bearer " + target.key.encode()
    answer = exchange(target, b"".join(part.replace(b"AUTHORIZATION", key) for part in parts))

    for status in STATUS.findall(answer):
        assert status < b"500", answer
    if answer.startswith(b"HTTP/1.1 4") and b"HEAD" not in parts[0]:
        body = answer.partition(b"\r\n\r\n")[2]
        error, _ = json.JSONDecoder().raw_decode(body.decode())
        assert error["error"].keys() == {"message", "type", "param", "code"}
    assert b"X-Evil" not in answer.partition(b"\r\n\r\n")[0]


def test_memory_is_bounded_after_all_that(target: Target) -> None:
    assert target.serves()
    assert target.rss_mb() < 400
