"""Bytes sent to the router as they are, and what came back until it closed the connection."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.router.conftest import CHAT, Client

GOOD = b'{"model":"m","messages":[]}'
HOST = b"Host: router\r\n"


class Answer:
    """What came back on a connection until it was closed."""

    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        self.lines = head.decode("latin-1").split("\r\n")
        self.status = int(self.lines[0].split()[1]) if raw else 0

    @property
    def error(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return error


async def exchange(url: str, *pieces: bytes) -> Answer:
    """Send bytes and read until the router closes the connection."""
    host, _, port = url.partition("://")[2].partition(":")
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            return Answer(await reader.read())
        except ConnectionError:
            return Answer(b"")
        finally:
            writer.close()


def post(*headers: bytes, body: bytes = GOOD, length: bool = True) -> bytes:
    lines = [f"POST {CHAT} HTTP/1.1".encode(), *headers]
    if length:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, b"Host: router", b"Connection: close", b"", body])


async def still_serves(client: Client) -> None:
    async with client.post() as response:
        assert response.status == 200
