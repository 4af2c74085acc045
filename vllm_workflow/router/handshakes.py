"""TLS handshakes of clients.

An event loop that does them itself tells of a connection when its handshake is over: whoever
connects and says nothing is not known until then. Here each counts from its first packet on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable

from vllm_workflow.router.tls import RenewableTls

_logger = logging.getLogger(__name__)


class Arrival(asyncio.Protocol):
    """A connection on which nothing was said yet.

    Args:
        begin: Takes it away.
    """

    __slots__ = ("_begin",)

    def __init__(self, begin: Callable[[asyncio.BaseTransport], None]) -> None:
        self._begin = begin

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._begin(transport)


class Handshakes:
    """Those that are under way, on one address.

    Args:
        tls: What they are done with.
    """

    def __init__(self, tls: RenewableTls) -> None:
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def begin(
        self,
        arrived: asyncio.BaseTransport,
        protocol: Callable[[], asyncio.Protocol],
        *,
        timeout_s: float,
    ) -> None:
        """Do a handshake on a connection of which nothing was read yet.

        Args:
            arrived: Has the connection; it is over for it.
            protocol: Makes what has it when both sides have agreed.
            timeout_s: Until then; after that it is closed.
        """
        try:
            taken = socket.socket(fileno=os.dup(arrived.get_extra_info("socket").fileno()))
        except OSError as e:  # no descriptors are left, or it has ended already
            _logger.debug("a connection cannot be taken: %s", e)
            return
        finally:
            abort(arrived)
        taken.setblocking(False)
        task = asyncio.create_task(self._do(taken, protocol, timeout_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _do(
        self, taken: socket.socket, protocol: Callable[[], asyncio.Protocol], timeout_s: float
    ) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                protocol, taken, ssl=self._tls.current, ssl_handshake_timeout=timeout_s
            )
        except OSError as e:  # as errors of TLS are
            _logger.debug("no handshake: %s", e)

    async def end(self) -> None:
        """Give up all of them."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def abort(transport: asyncio.BaseTransport) -> None:
    """End a transport; uvloop's is no `asyncio.Transport`."""
    transport.abort()  # type: ignore[attr-defined]
