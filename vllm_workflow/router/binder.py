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

    def poll(self) -> None:
        """Wake the calls that can start now."""
        while decisions := self._dispatcher.poll(time.monotonic()):
            for decision in decisions:
                future = self._waiting.pop(decision.request_id, None)
                if future is None or future.cancelled():  # its client left a moment ago
                    self._release(decision)
                else:
                    future.set_result(decision)

    def instances_changed(self) -> None:
        """Wake the calls that can start now, and those that no instance can serve any more."""
        for request in self._dispatcher.waiting.stranded():
            future = self._waiting.pop(request.request_id, None)
            self._dispatcher.withdraw(request.request_id)
            if future is not None and not future.done():
                future.set_exception(
                    NoInstanceError(f"no healthy instance serves model {request.model!r} any more")
                )
        self.poll()

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
            return await self._wait(request)
        self.poll()
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
                    # It may have been bound in the same moment.
                    if not future.cancelled() and future.exception() is None:
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
