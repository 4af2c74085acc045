"""What the scheduler remembers of each request, for as long as vLLM holds it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.deadline import slack_s
from vllm_workflow.core.types import StageRequest
from vllm_workflow.engine import metadata
from vllm_workflow.engine.queue import Key


@dataclass(slots=True)
class LiveCall:
    """One request: what was read of it, and what the scheduler did with it."""

    request: StageRequest
    key: Key
    """Rank among the waiting requests."""
    latest_start: float
    """Instant at which its slack is zero; slack is this minus now."""
    late_s: float = 0.0
    """What was added to both, since it can no longer be on time."""
    num_preemptions: int = 0
    """How often it lost its seat to a more urgent request."""
    protected_until: float = -math.inf
    """`time.monotonic()` before which it is not preempted again."""
    was_admitted: bool = False

    @property
    def run_id(self) -> str:
        """Its run; a call of none is a run of its own."""
        return self.request.workflow_id or self.request.request_id

    def is_late(self, now: float) -> bool:
        """Whether it will miss its deadline even if it runs now.

        Of one that has run before, it is not known how much is left: the deadline tells.
        """
        if self.was_admitted:
            return self.request.deadline < now
        return self.latest_start < now and self.request.has_deadline

    def is_urgent(self, now: float, urgent_slack_s: float) -> bool:
        """Whether it has little slack and a deadline that is still ahead.

        Patience running out is no urgency. Nor is a deadline that has passed: to preempt for it
        would cost other runs theirs and gain nothing.
        """
        return now < self.request.deadline < math.inf and self.latest_start - now < urgent_slack_s


class LiveCalls:
    """The requests of one engine by id, ranked by its policy."""

    def __init__(self, policy: PolicyConfig, *, by_priority: bool) -> None:
        """Make an empty set.

        Args:
            policy: Gives the order, and the patience of calls without a deadline.
            by_priority: `--scheduling-policy priority`: the request's own priority goes first.
        """
        self._ordering = policy.build_ordering()
        self._patience_s = policy.patience_s
        self._by_slack = policy.preempt
        self._by_priority = by_priority
        self._late_patience_s = policy.late_patience_s if policy.ordering == "slack" else 0.0
        self._calls: dict[str, LiveCall] = {}

    def of(self, request: Any) -> LiveCall:
        """The call of a vLLM request; read on first sight."""
        call = self._calls.get(request.request_id)
        return self.add(metadata.read(request).call) if call is None else call

    def add(self, request: StageRequest) -> LiveCall:
        """Remember a call, or its next turn: a session keeps its history."""
        call = LiveCall(request, self._key(request), self._latest_start(request))
        known = self._calls.get(request.request_id)
        if known is not None:
            call.num_preemptions = known.num_preemptions
            call.protected_until = known.protected_until
        self._calls[request.request_id] = call
        return call

    def put_off(self, call: LiveCall, now: float) -> bool:
        """Let those that can be on time go before a call that cannot; True if that is news.

        It keeps a place that does not depend on when it is put off, so it ages, and after
        `late_patience_s` none that comes goes before it.
        """
        late_s = self._late_patience_s
        if not late_s or call.late_s or not call.is_late(now):
            return False
        call.late_s = late_s
        call.latest_start += late_s
        call.key = (*call.key[:-1], call.key[-1] + late_s)
        return True

    def get(self, request_id: str) -> LiveCall | None:
        return self._calls.get(request_id)

    def pop(self, request_id: str) -> LiveCall | None:
        return self._calls.pop(request_id, None)

    def key(self, request: Any) -> Key:
        """Rank of a vLLM request among the waiting ones; smaller runs first."""
        return self.of(request).key

    def rank(self, request: Any) -> Key:
        """Rank of a vLLM request among the running ones; the last is the first victim.

        Where urgent requests take seats, slack decides who can spare one. Otherwise victims fall
        when blocks run out, and then the policy's own order says who comes last.
        """
        call = self.of(request)
        if not self._by_slack:
            return call.key
        if self._by_priority:
            return (call.request.priority, call.latest_start)
        return (call.latest_start,)

    def __len__(self) -> int:
        return len(self._calls)

    def _key(self, request: StageRequest) -> Key:
        key = self._ordering.key(request)
        if math.isnan(key):
            key = request.arrival_time
        return (request.priority, key) if self._by_priority else (key,)

    def _latest_start(self, request: StageRequest) -> float:
        deadline = request.deadline
        if not request.has_deadline:
            deadline = request.arrival_time + self._patience_s
        return slack_s(
            deadline=deadline, now=0.0, finish_s=request.service_s, rest_s=request.rest_s
        )
