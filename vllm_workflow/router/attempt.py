"""One forwarding of a call, and what to do when it fails."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

import aiohttp
from multidict import CIMultiDict

from vllm_workflow.core.errors import UpstreamError
from vllm_workflow.core.types import Decision, Outcome
from vllm_workflow.router.usage import Usage

BUSY = frozenset({429, 503})
"""The instance refused the call unseen; another one may have room."""
BROKEN = frozenset({500, 502, 504})
"""The instance failed at the call; another one may not."""
MAX_RISKY_ATTEMPTS = 3
"""Attempts that may have reached an engine: a call that kills engines must not kill them all."""
BROKEN_OFF = (aiohttp.ClientError, OSError)
_MAX_REFUSAL_BYTES = 65_536
_REFUSAL_TIMEOUT_S = 5.0


class LostError(UpstreamError):
    """An attempt ended before the first byte of an answer.

    `reason` is `refused` (no connection, so nothing was sent), `disconnected` or `hung`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer after which another instance is asked; if none is left, the client gets it."""

    instance_id: str
    status: int
    headers: CIMultiDict[str]
    body: bytes


@dataclass(slots=True)
class Attempt:
    """One forwarding; what is known of it when it ends becomes its `Outcome`."""

    decision: Decision
    start_time: float
    usage: Usage
    ok: bool = False
    first_byte_time: float = math.nan
    write_s: float = 0.0
    """Spent on waiting for a client that reads slowly; the instance is not to blame for it."""

    @property
    def instance_id(self) -> str:
        return self.decision.chosen.instance_id

    def outcome(self, now: float) -> Outcome:
        num_prompt, num_cached, num_output = self.usage.counts() if self.ok else (None,) * 3
        return Outcome(
            request_id=self.decision.request_id,
            instance_id=self.instance_id,
            ok=self.ok,
            ttft_s=self.first_byte_time - self.start_time,
            e2el_s=now - self.start_time - self.write_s if self.ok else math.nan,
            num_prompt_tokens=num_prompt,
            num_cached_tokens=num_cached,
            num_output_tokens=num_output,
        )


class Tries:
    """Where one call has been, and whether it may go on to another instance."""

    def __init__(self) -> None:
        self.excluded: list[str] = []
        self.refusal: Refusal | None = None
        self.reasons: list[str] = []
        self._num_risky = 0
        self._disconnected: set[str] = set()

    @property
    def may_go_on(self) -> bool:
        return self._num_risky < MAX_RISKY_ATTEMPTS

    def lost(self, instance_id: str, reason: str) -> None:
        self.reasons.append(f"{instance_id}: {reason}")
        self._num_risky += reason != "refused"
        if reason == "disconnected" and instance_id not in self._disconnected:
            # A kept connection that the server closed just now looks like this: once more.
            self._disconnected.add(instance_id)
        else:
            self.excluded.append(instance_id)

    def refused(self, refusal: Refusal) -> None:
        self.refusal = refusal
        self.excluded.append(refusal.instance_id)
        self._num_risky += refusal.status in BROKEN


async def read_refusal(instance_id: str, upstream: aiohttp.ClientResponse, first: bytes) -> Refusal:
    """Read an answer that is not passed on yet.

    Raises:
        LostError: It did not come whole.
    """
    body = bytearray(first)
    try:
        async with asyncio.timeout(_REFUSAL_TIMEOUT_S):
            while chunk := await upstream.content.readany():
                body += chunk
                if len(body) > _MAX_REFUSAL_BYTES:
                    raise LostError("disconnected")
    except BROKEN_OFF:
        raise LostError("disconnected") from None
    return Refusal(instance_id, upstream.status, CIMultiDict(upstream.headers), bytes(body))
