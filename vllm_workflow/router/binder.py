"""Lets calls wait until the dispatcher binds them to an instance."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import NoInstanceError, OverloadedError
from vllm_workflow.core.types import Decision, Outcome, StageRequest
from vllm_workflow.router.tries import Tries

MAX_WAIT_S = 3600.0
"""Nothing waits longer than this for room, whatever its deadline."""


class Binder:
    """Hands each decision to the call that waits for it; owned by one event loop.

    Whatever may make room goes through here or is followed by `poll`.

    Args:
        dispatcher: Decides.
        stranded: Told of each call that cannot go to any instance now, perhaps again and again: no
            event tells of it.
    """

    def __init__(
        self, dispatcher: Dispatcher, stranded: Callable[[StageRequest], None] | None = None
    ) -> None:
        self._dispatcher = dispatcher
        self._tell_stranded = stranded
        self._waiting: dict[str, asyncio.Future[Decision | None]] = {}
        self._stranded: dict[str, tuple[StageRequest, asyncio.Future[None]]] = {}
        self._look: asyncio.TimerHandle | None = None
        self._look_time = math.inf

    @property
    def num_stranded(self) -> int:
        """Calls that wait for an instance to come back."""
        return len(self._stranded)

    def is_gone(self, model: str) -> bool:
        """Whether waiting for a model is in vain: there are instances, and none is for it.

        None at all means that they are found later, or are all being replaced.
        """
        fleet = self._dispatcher.fleet
        return not fleet.serves(model) and next(iter(fleet), None) is not None

    def poll(self) -> None:
        """Wake the calls that can start now."""
        while decisions := self._dispatcher.poll(time.monotonic()):
            for decision in decisions:
                future = self._waiting.pop(decision.request_id, None)
                if future is None or future.done():  # its client left a moment ago
                    self._release(decision)
                else:
                    future.set_result(decision)
        self._look_at(self._dispatcher.waiting.held_until)

    def _look_at(self, time_: float) -> None:
        """Poll again when time alone may have made room for a call that is held."""
        if time_ == self._look_time:
            return
        if self._look is not None:
            self._look.cancel()
        self._look_time, self._look = time_, None
        if time_ < math.inf:
            delay_s = max(0.0, time_ - time.monotonic())
            self._look = asyncio.get_running_loop().call_later(delay_s, self._look_now)

    def _look_now(self) -> None:
        self._look_time, self._look = math.inf, None
        self.poll()

    def instances_changed(self) -> None:
        """Wake the calls for which this may change something, in the order of the policy."""
        for request in self._dispatcher.waiting.stranded():
            future = self._waiting.pop(request.request_id, None)
            self._dispatcher.withdraw(request.request_id)
            if future is not None and not future.done():
                future.set_result(None)
        ordering = self._dispatcher.config.build_ordering()
        for _, wait in sorted(
            self._stranded.values(), key=lambda s: (s[0].priority, ordering.key(s[0]))
        ):
            if not wait.done():
                wait.set_result(None)
        self.poll()

    def hand_over(self) -> None:
        """Let no call wait any longer: the router is about to stop."""
        waiting: list[asyncio.Future[Any]] = list(self._waiting.values())
        waiting += [wait for _, wait in self._stranded.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(NoInstanceError("the router is being stopped"))

    def settle(self, outcome: Outcome) -> None:
        """Let go of a reservation, and give its room to whoever waits."""
        self._dispatcher.settle(outcome)
        self.poll()

    def submit(
        self, request: StageRequest, *, num_prompt_bytes: int, tries: Tries
    ) -> tuple[Decision | None, bool]:
        """Return where a call goes if it can start there at once; `settle` must follow.

        Args:
            request: The call.
            num_prompt_bytes: Size of its prompt.
            tries: Where it is not to go.

        Returns:
            Without a decision `bind` must follow; whether the call waits for room.

        Raises:
            OverloadedError: It is the first of a run that would begin too late.
            QuotaExceededError: Its tenant has no tokens for it before its deadline.
        """
        now = time.monotonic()
        try:
            decision = self._dispatcher.submit(
                request,
                now=now,
                num_prompt_bytes=num_prompt_bytes,
                exclude=tries.excluded(now),
            )
        except NoInstanceError:
            return None, False
        if decision is None:
            try:
                self._dispatcher.waiting.check(request)
            except OverloadedError:
                self._dispatcher.withdraw(request.request_id, refused=True)
                self.poll()
                raise
            return None, True
        self.poll()
        return decision, False

    async def bind(
        self,
        request: StageRequest,
        *,
        num_prompt_bytes: int,
        tries: Tries,
        waits: bool | None = None,
    ) -> Decision:
        """Return where a call goes, as soon as it can start there; `settle` must follow.

        Args:
            request: The call.
            num_prompt_bytes: Size of its prompt.
            tries: Where it is not to go, and how long it waits if it can go nowhere.
            waits: What `submit` has returned; None if it is still to be asked.

        Raises:
            NoInstanceError: It could go nowhere for so long, or none had room in time.
            OverloadedError: It is the first of a run that would begin too late.
            QuotaExceededError: Its tenant has no tokens for it before its deadline.
        """
        decision: Decision | None = None
        while True:
            if waits:
                decision = await self._wait_for_room(request, tries)
            elif waits is not None:
                await self._wait_for_instance(request, tries)
            if decision is None:
                decision, waits = self.submit(
                    request, num_prompt_bytes=num_prompt_bytes, tries=tries
                )
            if decision is not None:
                return decision

    async def _wait_for_instance(self, request: StageRequest, tries: Tries) -> None:
        """Wait until the call may be tried again.

        Raises:
            NoInstanceError: That will not help, or helps too late.
        """
        if self._tell_stranded is not None and not tries.has_tried:
            self._tell_stranded(request)  # even if it does not wait at all
        now = time.monotonic()
        serving = [i for i in self._dispatcher.fleet if i.serves(request.model)]
        is_hopeless = serving and all(tries.is_hopeless_on(i.instance_id) for i in serving)
        if is_hopeless or self.is_gone(request.model):
            raise NoInstanceError(f"no instance can serve model {request.model!r}")
        until = tries.give_up_time(now)
        if now >= until:
            raise NoInstanceError(f"no healthy instance serves model {request.model!r}")
        if self._tell_stranded is not None:
            self._tell_stranded(request)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stranded[request.request_id] = request, future
        try:
            async with asyncio.timeout(min(until, tries.next_time) - now):
                await future
        except TimeoutError:
            pass
        finally:
            del self._stranded[request.request_id]

    async def _wait_for_room(self, request: StageRequest, tries: Tries) -> Decision | None:
        """Wait for a seat; None if the call must be submitted again.

        Raises:
            NoInstanceError: There was none for very long.
        """
        future: asyncio.Future[Decision | None] = asyncio.get_running_loop().create_future()
        self._waiting[request.request_id] = future
        self.poll()
        now = time.monotonic()
        until = request.arrival_time + MAX_WAIT_S
        try:
            async with asyncio.timeout(min(until, tries.next_time) - now):
                try:
                    return await future
                except asyncio.CancelledError:
                    # It may have been bound in the same moment.
                    is_bound = future.done() and not (future.cancelled() or future.exception())
                    if is_bound and (late := future.result()):
                        self._release(late)
                    raise
        except TimeoutError:
            if time.monotonic() >= until:
                raise NoInstanceError(f"no instance had room within {MAX_WAIT_S:.0f} s") from None
            return None
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
