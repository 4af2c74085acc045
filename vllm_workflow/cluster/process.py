"""One process of a cluster: started under its guard, watched, ended; and what its log says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_workflow.core.errors import WorkflowError

_GUARD = Path(__file__).with_name("guard.py")
_TAIL_BYTES = 64 * 1024
_KILL_MARGIN_S = 5.0
"""Beyond the grace: the guard itself kills when the grace is over."""
_ERROR = re.compile(r"(?:^|[\s.])(?:\w*(?:Error|Exception)|error|ERROR|fatal)\s?:\s*\S|Killed")
_PREFIX = re.compile(
    r"^(?:\(\S+ pid=\d+\)\s*)?"
    r"(?:(?:ERROR|WARNING|INFO)\s[\d\s:.-]+\[[^\]]*\]\s*)?"
    r"(?:vllm(?:-workflow| \S+): )?"
)
_NOT_THE_CAUSE = ("See root cause above", "DeprecationWarning", "UserWarning", "FutureWarning")


class ProcessError(WorkflowError, ChildProcessError):
    """A process of a cluster did not start, or ended when it should not have."""


@dataclass(slots=True, kw_only=True, eq=False)
class ManagedProcess:
    """A command with its log; `start` once, then `stop`, which may be called at any time."""

    name: str
    command: Sequence[str]
    url: str
    """Root of the HTTP server that the command is."""
    log_path: Path
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's own environment."""
    cpus: Sequence[int] | None = None
    nice: int = 0
    grace_s: float = 10.0
    start_time: float = 0.0
    """`time.monotonic()` when it was started."""
    is_ready: bool = False
    """Whether it has answered as a server that can be used."""
    _guard: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the command; its output goes to a fresh log."""
        settings = {
            "parent": os.getpid(),
            "grace_s": self.grace_s,
            "cpus": list(self.cpus or ()),
            "nice": self.nice,
        }
        guard = (sys.executable, "-I", "-S", str(_GUARD), json.dumps(settings))
        self.start_time = time.monotonic()
        with self.log_path.open("wb") as log:
            self._guard = await asyncio.create_subprocess_exec(
                *guard,
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.env},
                start_new_session=True,
            )

    @property
    def status(self) -> int | None:
        """Exit status as in a shell; None before the start and while it runs."""
        return None if self._guard is None else self._guard.returncode

    @property
    def pid(self) -> int:
        """Of the guard, whose child the command is; 0 before the start."""
        return 0 if self._guard is None else self._guard.pid

    @property
    def is_loading(self) -> bool:
        return self._guard is not None and self.status is None and not self.is_ready

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start_time

    async def ended(self) -> str:
        """Wait until the command has ended; return one line that says how and why."""
        assert self._guard is not None
        status = await self._guard.wait()
        how = f"was killed by signal {status - 128}" if status > 128 else f"ended, status {status}"
        return f"{self.name} {how} after {self.elapsed_s:.0f} s: {self.reason()}"

    async def ready(self, path: str, statuses: Sequence[int], timeout_s: float) -> None:
        """Wait until GET `path` gives one of `statuses`.

        Raises:
            ProcessError: The command ended before, or the time is over.
        """
        ended = asyncio.create_task(self.ended())
        try:
            async with asyncio.timeout(timeout_s):
                while not ended.done():
                    if (await http_get(self.url + path))[0] in statuses:
                        self.is_ready = True
                        return
                    await asyncio.wait([ended], timeout=0.25)
        except TimeoutError:
            raise ProcessError(
                f"{self.name} is not ready after {timeout_s:.0f} s: {self.reason()}"
            ) from None
        finally:
            ended.cancel()
        raise ProcessError(await ended)

    def reason(self) -> str:
        """Return the last error line of the log, and where the log is."""
        return f"{last_error(self.log_path)} (log: {self.log_path})"

    async def stop(self) -> None:
        """End the command and everything that it started; returns when they are gone."""
        guard = self._guard
        if guard is None or guard.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            guard.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self.grace_s + _KILL_MARGIN_S):
                await guard.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                guard.kill()
            await guard.wait()


def last_error(log_path: Path) -> str:
    """Return the line of a log that most probably says why its process ended."""
    try:
        with log_path.open("rb") as file:
            file.seek(max(0, log_path.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError as e:
        return f"no log: {e.strerror}"
    lines = [_PREFIX.sub("", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    causes = [
        number
        for number, line in enumerate(lines)
        if _ERROR.search(line) and not any(text in line for text in _NOT_THE_CAUSE)
    ]
    if not lines:
        return "the log is empty"
    last = causes[-1] if causes else len(lines) - 1
    # pydantic names the class on one line, and what is wrong on the next.
    num_lines = 2 if "validation error" in lines[last] else 1
    return ": ".join(lines[last : last + num_lines])[:300]


async def http_get(url: str, timeout_s: float = 2.0) -> tuple[int, bytes]:
    """Return status and body of a GET; status 0 if there was no answer.

    Args:
        url: `http://HOST:PORT/PATH`.
        timeout_s: For the whole exchange.
    """
    address, _, path = url.removeprefix("http://").partition("/")
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            try:
                lines = (f"GET /{path} HTTP/1.1", f"Host: {address}", "Connection: close", "", "")
                writer.write("\r\n".join(lines).encode())
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
        return int(head.split(maxsplit=2)[1]), body
    except (OSError, TimeoutError, ValueError, IndexError):
        return 0, b""


def as_json(body: bytes) -> Any:
    """Return what JSON a body holds, None if it is not JSON."""
    try:
        return json.loads(body)
    except ValueError:
        return None
