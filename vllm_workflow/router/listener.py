"""An application on an address, and how its connections end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import cast

from aiohttp import web

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.router.exchange import Handle
from vllm_workflow.router.handshakes import Arrival, Handshakes, abort
from vllm_workflow.router.limits import Bodies, LimitsConfig
from vllm_workflow.router.plain_connection import PlainConnection
from vllm_workflow.router.protocol import Protocol
from vllm_workflow.router.tls import RenewableTls

_LAST_WORDS_S = 1.0
"""For answers to calls that took too long to end."""


class Listener:
    """An application on an address.

    Args:
        app: Answers what is no plain call.
        limits: Of connections.
        bodies: Keeps account of what is held of requests.
        tls: That connections are taken with; None: in plain text.
        grace_s: How long calls under way may take to end when it closes.
        calls: What answers plain calls, by path.
        hand_over: Called when that time is over, to have calls end at once.
    """

    def __init__(
        self,
        app: web.Application,
        limits: LimitsConfig,
        bodies: Bodies,
        tls: RenewableTls | None,
        *,
        grace_s: float,
        calls: Mapping[str, Handle] | None = None,
        hand_over: Callable[[], None] = lambda: None,
    ) -> None:
        self.handles = {
            f"POST {path} HTTP/1.1".encode(): handle for path, handle in (calls or {}).items()
        }
        """By request line."""
        self.plain: set[PlainConnection] = set()
        self.is_ending = False
        """Whether every answer is the last one on its connection."""
        self.limits = limits
        """May be replaced: connections made from then on have the new ones."""
        self.grace_s = grace_s
        """May be replaced."""
        self.num_connections = 0
        self.num_trusts = 0
        """To be raised when clients that were let in may be no more: each connection made before
        ends with its next answer."""
        self.bodies = bodies
        self._handshakes = None if tls is None else Handshakes(tls)
        self._hand_over = hand_over
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None)

    @property
    def server(self) -> web.Server:
        assert self._runner.server is not None
        return self._runner.server

    @asynccontextmanager
    async def listening(
        self, host: str, port: int, *, where: str = "host, port"
    ) -> AsyncIterator[str]:
        """Serve while the block runs; yields the url.

        Raises:
            ConfigError: The address cannot be listened on.
        """
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        try:
            try:
                server = await loop.create_server(self._arrival, host, port, backlog=1024)
            except OSError as e:
                raise ConfigError(
                    f"{where}: cannot listen on {host}:{port}: {e.strerror}"
                ) from None
            address, number = server.sockets[0].getsockname()[:2]
            name = f"[{address}]" if ":" in address else address
            try:
                yield f"{'http' if self._handshakes is None else 'https'}://{name}:{number}"
            finally:
                server.close()
                await self._end_connections()
        finally:
            await self._runner.cleanup()

    def _arrival(self) -> asyncio.Protocol:
        return self._protocol() if self._handshakes is None else Arrival(self._begin_handshake)

    def _begin_handshake(self, arrived: asyncio.BaseTransport) -> None:
        assert self._handshakes is not None
        num_connections = self.num_connections + len(self._handshakes)
        if self.is_ending or num_connections >= self.limits.max_connections:
            abort(arrived)
            return
        timeout_s = self.limits.header_timeout_s
        self._handshakes.begin(arrived, self._protocol, timeout_s=timeout_s)

    def _protocol(self) -> asyncio.Protocol:
        if self.handles:
            plain = PlainConnection(self, asyncio.get_running_loop())
            return cast("asyncio.Protocol", plain)
        return self.aiohttp_protocol(self.num_trusts)

    def aiohttp_protocol(self, num_trusts: int) -> Protocol:
        """Return what reads all that clients may send.

        Args:
            num_trusts: As it was when the connection was made.
        """
        return Protocol(self, num_trusts, loop=asyncio.get_running_loop())

    async def _end_connections(self) -> None:
        """Let calls under way end, for as long as they may."""
        await asyncio.sleep(0)  # what has been sent up to now is begun
        self.is_ending = True
        self.server.pre_shutdown()
        until_late = asyncio.get_running_loop().call_later(self.grace_s, self._hand_over)
        most_s = self.grace_s + _LAST_WORDS_S
        try:
            await asyncio.gather(
                self._end_plain(most_s), self.server.shutdown(most_s), self._end_handshakes()
            )
        finally:
            until_late.cancel()

    async def _end_handshakes(self) -> None:
        if self._handshakes is not None:
            await self._handshakes.end()

    async def _end_plain(self, most_s: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + most_s
        for connection in list(self.plain):
            connection.end()
        tasks = [
            connection.task
            for connection in self.plain
            if connection.task is not None and connection.is_answering
        ]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=most_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        ends = [connection.lost() for connection in self.plain if connection.is_sending]
        if ends:
            await asyncio.wait(ends, timeout=max(0.0, until - loop.time()))
        for connection in list(self.plain):
            connection.abort()
