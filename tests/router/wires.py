"""A client's connection to the router, and what is sent on it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.router.conftest import CHAT, Client
from vllm_workflow.router.listener import Listener

BODY = b'{"model":"m","messages":[]}'
STREAM = b'{"model":"m","messages":[],"stream":true}'
LINE = f"POST {CHAT} HTTP/1.1".encode()
HEALTH = b"GET /health HTTP/1.1\r\nHost: router\r\n\r\n"


def post(body: bytes = BODY, *headers: bytes) -> bytes:
    lines = [LINE, b"Host: router", *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", body])


class Answered:
    """One answer, as it stood on the wire."""

    def __init__(self, head: bytes, body: bytes) -> None:
        first, *lines = head.decode().split("\r\n")
        self.status = int(first.split()[1])
        self.first = first
        self.headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines if line)}
        self.body = body


class Wire:
    """A connection to the router."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> Answered:
        head = await self.reader.readuntil(b"\r\n\r\n")
        answered = Answered(head.removesuffix(b"\r\n\r\n"), b"")
        if "content-length" in answered.headers:
            answered.body = await self.reader.readexactly(int(answered.headers["content-length"]))
            return answered
        while size := int(await self.reader.readline(), 16):
            answered.body += (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)
        return answered


@asynccontextmanager
async def wire(client: Client, tls: ssl.SSLContext | None = None) -> AsyncIterator[Wire]:
    host, _, port = client.router.url.partition("://")[2].partition(":")
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(host, int(port), ssl=tls)
        try:
            yield Wire(reader, writer)
        finally:
            writer.close()


def listener_of(client: Client) -> Listener:
    """What takes the connections of a router's clients."""
    (listener,) = [each for each in client.router.reload.listeners if each.handles]
    return listener


CHUNKED = LINE + b"\r\nHost: router\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
