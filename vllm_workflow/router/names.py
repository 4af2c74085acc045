"""Addresses of instances' names, which outlive an outage of name service."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence

from aiohappyeyeballs import AddrInfoType
from aiohttp.abc import AbstractResolver, ResolveResult

FRESH_S = 10.0
"""For so long a name is not looked up again."""
RETRY_S = 1.0
"""Until a name that could not be looked up is again."""
PATIENCE_S = 0.25
"""For so long a lookup is waited for if other addresses are known; an outage is mostly silence."""
GONE_S = 60.0
"""For so long a name is said not to exist before that is believed: a name service that has just
been started may say so of any."""
_MAX_NAMES = 4_096
_NOT_THERE = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})
_NUMERIC = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
_logger = logging.getLogger(__name__)


class Name:
    """One host and port, and where they were last known to be."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._known: Sequence[AddrInfoType] = ()
        self._error: Exception | None = None
        """Of the last lookup; None if it was good."""
        self._due = 0.0
        self._gone_at = 0.0
        """Since when the name is said not to exist; 0 if it is not."""
        self._asked_at = 0.0
        self._lookup: asyncio.Task[None] | None = None
        try:
            # An address needs no thread, of which lookups that hang may have taken all.
            self._known = _numeric(host, port)
            self._due = float("inf")
        except OSError:
            pass

    async def addresses(self) -> Sequence[AddrInfoType]:
        """Return where it is, or was when that could last be found out.

        Those who ask while it is looked up share the answer.

        Raises:
            OSError: It was never found, or is gone.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._lookup is None and now >= self._due:
            self._asked_at = now
            self._lookup = loop.create_task(self._look_up())
        if self._lookup is not None:
            left_s = self._asked_at + PATIENCE_S - now
            if not self._known:
                await asyncio.wait([self._lookup])
            elif left_s > 0.0:
                await asyncio.wait([self._lookup], timeout=left_s)
        if not self._known:
            raise OSError(f"cannot look up {self._host}: {self._error}")
        return self._known

    async def _look_up(self) -> None:
        loop = asyncio.get_running_loop()
        error: Exception | None = None
        try:
            self._known = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as e:  # the latter of what cannot be a name
            error = e
        finally:
            self._lookup = None
        now = loop.time()
        self._due = now + (RETRY_S if error else FRESH_S)
        if not (isinstance(error, socket.gaierror) and error.errno in _NOT_THERE):
            self._gone_at = 0.0
        elif not self._gone_at:
            self._gone_at = now
        if self._gone_at and now - self._gone_at >= GONE_S:
            self._known = ()
        if not self._known:
            self._due = 0.0
        elif (error is None) is not (self._error is None):
            if error:
                _logger.warning(
                    "cannot look up %s (%s); going on with the addresses last known",
                    self._host,
                    error,
                )
            else:
                _logger.info("%s can be looked up again", self._host)
        self._error = error


class Names(AbstractResolver):
    """All names of a router, for calls and for probes alike."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, int], Name] = {}

    def __getitem__(self, host_port: tuple[str, int]) -> Name:
        """Return a name; it is remembered for whoever asks next."""
        name = self._names.get(host_port)
        if name is None:
            if len(self._names) >= _MAX_NAMES:
                del self._names[next(iter(self._names))]
            name = self._names[host_port] = Name(*host_port)
        return name

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return where a host is, for aiohttp; errors as of `Name.addresses`."""
        return [
            ResolveResult(
                hostname=host,
                host=socket.getnameinfo(address, _NUMERIC)[0],
                port=port,
                family=found,
                proto=proto,
                flags=socket.AI_NUMERICHOST,
            )
            for found, _, proto, _, address in await self[host, port].addresses()
            if family in {socket.AF_UNSPEC, found}
        ]

    async def close(self) -> None:
        """Nothing is held."""


def _numeric(host: str, port: int) -> Sequence[AddrInfoType]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
