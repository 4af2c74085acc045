"""One forwarding of a call, and what is known of it when it ends."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

from vllm_workflow.core.types import Decision, Outcome, StageRequest
from vllm_workflow.router.connection import Connection
from vllm_workflow.router.errors import BrokenOffError, LostError
from vllm_workflow.router.headers import Headers
from vllm_workflow.router.usage import Usage

BUSY = frozenset({429, 503})
"""The instance refused the call unseen; another one may have room."""
BROKEN = frozenset({500, 502, 504})
"""The instance failed at the call; another one may not."""
MISSING = 404
"""The instance does not serve the model (any more); another one may."""
_MAX_REFUSAL_BYTES = 65_536
_REFUSAL_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer after which another instance is asked; if none is left, the client gets it."""

    instance_id: str
    status: int
    headers: Headers
    body: bytes


class Attempt:
    """One forwarding; what is known of it when it ends becomes its `Outcome`."""

    __slots__ = (
        "decision",
        "first_byte_s",
        "first_byte_time",
        "give_up",
        "heard_at",
        "instance_id",
        "is_begun",
        "is_reading",
        "ok",
        "request",
        "start_time",
        "stream",
        "usage",
        "write_s",
    )

    def __init__(
        self,
        decision: Decision,
        request: StageRequest,
        start_time: float,
        usage: Usage,
        stream: bool,
    ) -> None:
        self.decision = decision
        self.request = request
        self.start_time = start_time
        self.usage = usage
        self.stream = stream
        self.instance_id = decision.chosen.instance_id
        self.first_byte_s = 0.0
        """Predicted, from forwarding on."""
        self.ok = False
        self.first_byte_time = math.nan
        self.write_s = 0.0
        """Spent on waiting for a client that reads slowly; the instance is not to blame for it."""
        self.give_up: Callable[[], None] | None = None
        """Ends what it waits for when its instance is found hung; None when it waits for
        nothing."""
        self.heard_at = 0.0
        """When bytes last came or, after a slow client, were last asked for; on the watch's
        clock."""
        self.is_reading = True
        """Waits for the instance, not for the client."""
        self.is_begun = False
        """The client has a part of the answer, so that nobody else can give it."""

    @property
    def has_first_byte(self) -> bool:
        return not math.isnan(self.first_byte_time)

    def abandon(self) -> None:
        """End the wait for an answer that will not come, by `TimeoutError`."""
        give_up, self.give_up = self.give_up, None
        if give_up is not None:
            give_up()

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


async def read_refusal(instance_id: str, upstream: Connection, first: bytes) -> Refusal:
    """Read an answer that is not passed on yet.

    Raises:
        LostError: It did not come whole.
    """
    body = bytearray(first)
    try:
        async with asyncio.timeout(_REFUSAL_TIMEOUT_S):
            while chunk := await upstream.read():
                body += chunk
                if len(body) > _MAX_REFUSAL_BYTES:
                    raise LostError("disconnected")
    except BrokenOffError:
        raise LostError("disconnected") from None
    return Refusal(instance_id, upstream.status, upstream.headers, bytes(body))
