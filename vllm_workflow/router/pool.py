"""Connections to one instance, kept for the next call."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from functools import partial
from typing import Any, cast

from aiohappyeyeballs import start_connection
from yarl import URL

from vllm_workflow.router.connection import Connection
from vllm_workflow.router.errors import RequestError
from vllm_workflow.router.head import head
from vllm_workflow.router.headers import Headers
from vllm_workflow.router.names import Names

CONNECT_TIMEOUT_S = 5.0
KEEPALIVE_S = 3.0
"""Below the 5 s after which vLLM closes a kept connection, so that no call meets the closing."""
_HAPPY_EYEBALLS_S = 0.25
"""Until the next address of a name is tried beside one that does not answer (RFC 8305)."""


class Pool:
    """Connections to one server.

    Args:
        url: Its root.
        tls: For https; else not looked at.
        names: Knows where servers are, beyond the life of a pool; None: nobody else asks.
    """

    def __init__(self, url: str, tls: ssl.SSLContext | bool, names: Names | None = None) -> None:
        self.url = url
        parsed = URL(url)
        self._host = parsed.raw_host or ""
        self._port = parsed.port or (443 if parsed.scheme == "https" else 80)
        self._tls = tls if parsed.scheme == "https" else None
        self._base = f"POST {parsed.raw_path.rstrip('/')}"
        self._host_line = f"Host: {parsed.host_port_subcomponent}\r\n"
        self._kept: list[Connection] = []
        """The one used last at the end."""
        self._is_closed = False
        self._sweep: asyncio.TimerHandle | None = None
        self._name = (Names() if names is None else names)[self._host, self._port]

    def head(self, path: str, headers: Headers, num_bytes: int) -> bytes:
        """Return request line and headers of a POST.

        Args:
            path: With its query, below the root of the server.
            headers: Those to be passed on.
            num_bytes: Of the body.

        Raises:
            RequestError: A path that would end before its end.
        """
        if "\n" in path or "\r" in path or "\0" in path:
            raise RequestError("path: expected none with a line break, got one")
        first = f"{self._base}{path} HTTP/1.1\r\n{self._host_line}"
        return head(first, headers, f"Content-Length: {num_bytes}\r\n")

    def kept(self) -> Connection | None:
        """Return a connection that was kept; None if there is none that can be trusted."""
        if not self._kept:
            return None
        now = time.monotonic()
        while self._kept:
            connection = self._kept.pop()
            if connection.idle_since + KEEPALIVE_S < now:
                self._kept.append(connection)
                self._drop_old(now)
                return None
            if connection.may_be_kept:
                return connection
        return None

    def give_back(self, connection: Connection) -> None:
        """Keep a connection for another call, or close it if it is not fit for one."""
        if self._is_closed or not connection.may_be_kept:
            connection.close()
            return
        connection.idle_since = time.monotonic()
        self._kept.append(connection)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(KEEPALIVE_S, self._sweep_now)

    def _sweep_now(self) -> None:
        self._sweep = None
        loop = asyncio.get_running_loop()
        self._drop_old(time.monotonic())
        if self._kept:
            self._sweep = loop.call_later(KEEPALIVE_S, self._sweep_now)

    def _drop_old(self, now: float) -> None:
        kept = []
        for connection in self._kept:
            if connection.may_be_kept and connection.idle_since + KEEPALIVE_S >= now:
                kept.append(connection)
            else:
                connection.close()
        self._kept = kept

    def close(self) -> None:
        """Keep nothing any more. Connections that are in use, or being made, go on."""
        self._is_closed = True
        for connection in self._kept:
            connection.close()
        self._kept = []
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None

    async def connect(self) -> Connection:
        """Return a new connection.

        Raises:
            OSError: None can be made; `TimeoutError`: it takes too long.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            found = await start_connection(
                list(await self._name.addresses()),
                happy_eyeballs_delay=_HAPPY_EYEBALLS_S,
                interleave=1,
            )
            try:
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _, connection = await loop.create_connection(
                    cast("Any", partial(Connection, loop)),
                    sock=found,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls is not None else None,
                )
            except BaseException:
                found.close()
                raise
        made: Connection = connection
        return made
