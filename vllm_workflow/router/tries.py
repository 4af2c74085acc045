"""Where one call has been, and where and how long it may go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from vllm_workflow.router.attempt import BROKEN, BUSY, MISSING, Refusal

MAX_RISKY_ATTEMPTS = 3
"""Attempts that may have hurt an engine: a call that kills engines must not kill them all."""
MAX_REASONS = 8
"""Why attempts failed, the latest: a call may wait for an hour beside an instance that flaps."""
MIN_WAIT_S = 2.0
"""However short its budget, a call waits this long for an instance: so long takes re-admission."""
_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 2.0
_MAX_RETRY_AFTER_S = 5.0
"""Of what an instance asks for; another client may free it at any time."""


class _Exclusion(NamedTuple):
    until: float
    """Instant; `inf`: until the instance has been away and come back."""
    generation: int


class Tries:
    """Where one call has been, and whether it may go on to another instance.

    Args:
        give_up_time: Returns the instant from which on it is not tried again; None: `max_wait_s`
            after the call was left without an instance. Asked when that has happened: it seldom
            does, and the answer takes a look at every instance.
        max_wait_s: For a call without a deadline.
        generation: How often an instance has come back.
    """

    def __init__(
        self,
        give_up_time: Callable[[], float | None],
        max_wait_s: float,
        generation: Callable[[str], int],
    ) -> None:
        self.refusal: Refusal | None = None
        self.reasons: list[str] = []
        self.fresh_connection = False
        """Whether the next attempt must not take a kept connection."""
        self._give_up_time = give_up_time
        self._max_wait_s = max_wait_s
        self._left_time: float | None = None
        """Instant since which no instance could take it."""
        self._generation = generation
        self._excluded: dict[str, _Exclusion] = {}
        self._num_risky = 0
        self._next_pause_s = _FIRST_PAUSE_S
        self._maybe_stale = ""

    @property
    def may_go_on(self) -> bool:
        return self._num_risky < MAX_RISKY_ATTEMPTS

    @property
    def has_tried(self) -> bool:
        """Whether an instance was asked."""
        return bool(self.reasons) or self.refusal is not None

    def give_up_time(self, now: float) -> float:
        """Instant until which the call waits, now that no instance can take it."""
        if (until := self._give_up_time()) is not None:
            return until
        if self._left_time is None:
            self._left_time = now
        return self._left_time + self._max_wait_s

    def excluded(self, now: float) -> list[str]:
        """Instances that the call is not sent to now."""
        if not self._excluded:
            return []
        for instance_id, exclusion in list(self._excluded.items()):
            back = self._generation(instance_id) != exclusion.generation
            if exclusion.until <= now or back:
                del self._excluded[instance_id]
        return list(self._excluded)

    @property
    def next_time(self) -> float:
        """Instant at which the first exclusion ends; `inf` if none ends by itself."""
        return min((e.until for e in self._excluded.values()), default=math.inf)

    def is_hopeless_on(self, instance_id: str) -> bool:
        """Whether waiting does not help: the instance itself has answered, as it would again."""
        exclusion = self._excluded.get(instance_id)
        return exclusion is not None and exclusion.until == math.inf

    def lost(self, instance_id: str, reason: str, now: float) -> None:
        """Note that an attempt brought nothing."""
        del self.reasons[: 1 - MAX_REASONS]
        self.reasons.append(f"{instance_id}: {reason}")
        self.fresh_connection = True
        if reason == "closed":
            self._maybe_stale = instance_id
            return  # the connection was stale: the same instance once more, by a new one
        # Or it was not, and the process has gone since.
        was_killed = reason == "refused" and self._maybe_stale == instance_id
        is_taken = reason not in {"refused", "unauthorized"}
        self._num_risky += is_taken or was_killed
        if is_taken:
            self._left_time = None
        self._exclude(instance_id, now + self._pause_s())

    def refused(self, refusal: Refusal, now: float, *, is_risky: bool) -> None:
        """Note an answer that is not passed on yet.

        Args:
            refusal: The answer.
            now: Instant.
            is_risky: Whether the call may be what the instance failed at.
        """
        self.refusal = refusal
        self._num_risky += is_risky
        pause_s = math.inf
        if refusal.status in BUSY:
            pause_s = max(self._pause_s(), _retry_after_s(refusal))
        self._exclude(refusal.instance_id, now + pause_s)

    def _exclude(self, instance_id: str, until: float) -> None:
        self._excluded[instance_id] = _Exclusion(until, self._generation(instance_id))

    def _pause_s(self) -> float:
        pause_s = self._next_pause_s
        self._next_pause_s = min(2.0 * pause_s, _MAX_PAUSE_S)
        return pause_s


def is_refusal(status: int) -> bool:
    """Whether another instance is asked after such an answer."""
    return status in BUSY or status in BROKEN or status == MISSING


def _retry_after_s(refusal: Refusal) -> float:
    text = refusal.headers.get("retry-after")
    return min(float(text), _MAX_RETRY_AFTER_S) if text.isdecimal() else 0.0
