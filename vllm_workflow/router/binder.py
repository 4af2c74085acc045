"""Lets calls wait until the dispatcher binds them to an instance."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import NoInstanceError
from vllm_workflow.core.types import Decision, Outcome, StageRequest

MAX_WAIT_S = 3600.0
"""Nothing waits longer than this, whatever its deadline."""


class Binder:
    """Hands each decision to the call that waits for it; owned by one event loop.

    Whatever may make room goes through here or is followed by `poll`.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._waiting: dict[str, asyncio.Future[Decision]] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def poll(self) -> None:
        """Wake the calls that can start now."""
        while decisions := self._dispatcher.poll(time.monotonic()):
            for decision in decisions:
                future = self._waiting.pop(decision.request_id)
                if future.cancelled():  # its client left a moment ago
                    self._release(decision)
                else:
                    future.set_result(decision)

    def settle(self, outcome: Outcome) -> None:
        """Let go of a reservation, and give its room to whoever waits."""
        self._dispatcher.settle(outcome)
        self.poll()

    async def bind(
        self, request: StageRequest, *, num_prompt_bytes: int, exclude: Collection[str]
    ) -> Decision:
        """Return where a call goes, as soon as it can start there; `settle` must follow.

        Raises:
            NoInstanceError: No healthy instance serves the model, or none had room in time.
        """
        decision = self._dispatcher.submit(
            request, now=time.monotonic(), num_prompt_bytes=num_prompt_bytes, exclude=exclude
        )
        if decision is None:
            decision = await self._wait(request)
        return decision

    async def _wait(self, request: StageRequest) -> Decision:
        future: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self._waiting[request.request_id] = future
        self.poll()
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                try:
                    return await future
                except asyncio.CancelledError:
                    if not future.cancelled():  # it was bound in the same moment
                        self._release(future.result())
                    raise
        except TimeoutError:
            raise NoInstanceError(f"no instance had room within {MAX_WAIT_S:.0f} s") from None
        finally:
            if self._waiting.pop(request.request_id, None) is not None:
                self._dispatcher.withdraw(request.request_id)
                self.poll()

    def _release(self, decision: Decision) -> None:
        self._dispatcher.settle(
            Outcome(
                request_id=decision.request_id,
                instance_id=decision.chosen.instance_id,
                ok=False,
            )
        )
