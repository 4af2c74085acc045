"""Engines as processes that are really killed and really stopped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("engine.py")


@dataclass(kw_only=True)
class EngineProcess:
    """One engine; started again it keeps its port and its log."""

    log: Path
    port: int = 0
    behaviour: dict[str, Any] = field(default_factory=dict)
    ready_time: float = 0.0
    """Monotonic instant at which it last began to listen."""
    _process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, **behaviour: Any) -> None:
        """Start it, as it was or with something changed."""
        self.behaviour |= behaviour
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-S", "-E", str(SCRIPT), str(self.port), str(self.log)),
            json.dumps(self.behaviour),
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        self.ready_time = time.monotonic()
        self.port = int(line.split()[1])

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def kill(self) -> None:
        """End it as the OOM killer would; returns when it is gone."""
        if self._process is not None:
            self.send(signal.SIGKILL)
            await self._process.wait()

    def stop(self) -> None:
        self.send(signal.SIGSTOP)

    def go_on(self) -> None:
        self.send(signal.SIGCONT)

    async def control(self, **behaviour: Any) -> None:
        """Change how it behaves from now on."""
        body = json.dumps(behaviour).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST /control HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    def notes(self, what: str) -> dict[str, float]:
        """Call ids and the times at which that happened to them."""
        return {request_id: at for name, request_id, at in self._lines() if name == what}

    def count(self, what: str) -> int:
        return sum(name == what for name, _, _ in self._lines())

    def _lines(self) -> Iterator[tuple[str, str, float]]:
        text = self.log.read_text() if self.log.exists() else ""
        for line in text.splitlines():
            name, request_id, at = line.split()
            yield name, request_id, float(at)


@asynccontextmanager
async def engines(
    folder: Path, num_engines: int, **behaviour: Any
) -> AsyncIterator[list[EngineProcess]]:
    """Run engines until the block ends, however it ends."""
    found = [
        EngineProcess(log=folder / f"engine-{i}.log", behaviour=dict(behaviour))
        for i in range(num_engines)
    ]
    try:
        await asyncio.gather(*(engine.start() for engine in found))
        yield found
    finally:
        await asyncio.gather(*(engine.kill() for engine in found))
