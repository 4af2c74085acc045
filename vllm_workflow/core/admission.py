"""Which runs may begin: no more at a time than can be on time beside each other.

Instances share their steps among all calls that they run, so every run under way slows down all
others. How much is learned: the time that calls take, over what they would take alone, grows in
proportion to the runs beside them,

    slowdown(n) = 1 + slope · (n - 1)

A run begins if, with it, the slowdown stays within what runs are promised: their SLO over what
they need on an idle fleet. While that holds for whoever comes, nothing here changes anything.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from vllm_workflow.core.pace import Pace
from vllm_workflow.core.types import StageRequest

RunKey = tuple[str, str]
"""(tenant, workflow_id); of a call without an id, its own name."""

_ROOM = 0.9
"""Share of the slowdown that runs can bear, up to which runs begin that may well be late."""
_MIN_RATE = 0.03
"""Share of one arrival in what runs are promised and need: about the last thirty decide."""
_MAX_CLASSES = 1024
"""Workflows of tenants remembered at most: their names come from clients."""


def run_key(request: StageRequest) -> RunKey:
    return (request.tenant_id, request.workflow_id or f"#{request.request_id}")


class Held(NamedTuple):
    """A first call of a run that has not begun."""

    request: StageRequest
    num_prompt_bytes: int
    exclude: tuple[str, ...]


@dataclass(slots=True)
class _Class:
    """The runs of one workflow and tenant."""

    num_arrivals: int = 0
    promised_s: float = 0.0
    """SLO, mean over the latest."""
    needed_s: float = 0.0
    """What a run needs on an idle fleet."""

    @property
    def bearable(self) -> float:
        """Slowdown at which a run that begins when it comes is on time, on average."""
        return self.promised_s / self.needed_s if self.needed_s > 0.0 else math.inf


class Admission:
    """The runs of one model that wait to begin, and the rule by which they do.

    Args:
        margin: Kept in reserve, as a share of the predicted slowdown.
        relegated_share: Share of beginnings that go to runs that can no longer be on time
            while others wait, so that none starves.
    """

    def __init__(self, pace: Pace, *, margin: float, relegated_share: float) -> None:
        self.pace = pace
        self.num_relegated = 0
        """Runs that began although they could not be on time any more."""
        self._margin = margin
        self._relegated_share = relegated_share
        self._held: dict[int, OrderedDict[RunKey, list[Held]]] = {}
        """Priority -> runs in order of arrival."""
        self._key_of: dict[str, tuple[int, RunKey]] = {}
        self._classes: OrderedDict[RunKey, _Class] = OrderedDict()
        self._num_arrivals = 0
        self._needed_s = 0.0
        """What a run needs on an idle fleet, mean over the latest."""
        self._needed_share = 0.0
        """That over what is promised, likewise."""
        self._num_since_relegated = 0

    def __len__(self) -> int:
        return len(self._key_of)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._key_of

    def calls(self) -> list[Held]:
        """All that wait, in order of arrival."""
        held = [h for runs in self._held.values() for calls in runs.values() for h in calls]
        return sorted(held, key=lambda h: h.request.arrival_time)

    def arrived(self, request: StageRequest, idle_s: float, now: float) -> None:
        """Note what a run that has just come is promised and needs.

        Args:
            request: Its first call.
            idle_s: Service of that call on an idle fleet.
            now: Instant.
        """
        needed_s, promised_s = idle_s + request.rest_s, request.deadline - now
        if promised_s <= needed_s:
            return  # nobody can keep such a promise, and others are not to be held up by it
        key = (request.tenant_id, request.workflow)
        each = self._classes[key] = self._classes.pop(key, None) or _Class()
        if len(self._classes) > _MAX_CLASSES:
            self._classes.popitem(last=False)
        each.num_arrivals += 1
        rate = max(_MIN_RATE, 1.0 / each.num_arrivals)
        each.promised_s += rate * (promised_s - each.promised_s)
        each.needed_s += rate * (needed_s - each.needed_s)
        self._num_arrivals += 1
        rate = max(_MIN_RATE, 1.0 / self._num_arrivals)
        self._needed_s += rate * (needed_s - self._needed_s)
        self._needed_share += rate * (1.0 / each.bearable - self._needed_share)

    def hold(self, held: Held) -> None:
        """Let a run wait; its further calls wait with it."""
        request = held.request
        key = run_key(request)
        runs = self._held.setdefault(request.priority, OrderedDict())
        runs.setdefault(key, []).append(held)
        self._key_of[request.request_id] = (request.priority, key)

    def leave(self, request_id: str) -> Held | None:
        """Take a call out; None if it does not wait here."""
        place = self._key_of.pop(request_id, None)
        if place is None:
            return None
        priority, key = place
        calls = self._held[priority][key]
        found = next(h for h in calls if h.request.request_id == request_id)
        calls.remove(found)
        if not calls:
            self._drop(priority, key)
        return found

    def beginning(self, now: float, *, is_idle: bool) -> list[Held]:
        """Take out the calls of the next run that begins now; none if no run does.

        The one that came first, as long as it can be on time; else the one that came last,
        which has most of its time left: under overload the first would be late whatever is
        done, and to begin runs at the last moment makes all of them late.

        Args:
            now: Instant.
            is_idle: Nothing runs at all, so that nothing is gained by waiting.
        """
        if not self._key_of:
            return []
        priority = min(self._held)
        runs = self._held[priority]
        first, last = next(iter(runs)), next(reversed(runs))
        oldest, newest = runs[first][0].request, runs[last][0].request
        if self.can_begin(oldest, now):
            return self._take(priority, first)
        if self.can_begin(newest, now):
            if self._num_since_relegated < 1.0 / self._relegated_share - 1.0:
                self._num_since_relegated += 1
                return self._take(priority, last)
            return self._relegate(priority, first)
        # Nobody who waits is sure to be on time: what room there is, is for them all the same.
        if is_idle or self._slowdown_with_one_more(now) <= _ROOM * self._bearable:
            if self._is_late(newest, now):
                return self._relegate(priority, first)
            return self._take(priority, last)
        return []

    def can_begin(self, request: StageRequest, now: float) -> bool:
        """Whether a run that began now would be on time, and would leave others theirs.

        What it needs is taken to be in proportion to what it is promised, as for runs on
        average: one that has used up a part of its time bears that much less.
        """
        if self.pace.num_runs == 0:
            return True
        bearable = min(self._bearable, self._bearable_for(request, now))
        return self._slowdown_with_one_more(now) <= bearable

    def wait_s(self) -> float:
        """Seconds until the run that came last begins, if they begin in order."""
        num_runs = self.pace.num_runs
        if num_runs == 0:
            return 0.0
        run_s = self._needed_s * self.pace.slowdown(num_runs, self._needed_s)
        return len(self._key_of) * run_s / num_runs

    def _is_late(self, request: StageRequest, now: float) -> bool:
        """Whether a run would be late even if it began now, alone."""
        return self._bearable_for(request, now) < 1.0 + self._margin

    def _bearable_for(self, request: StageRequest, now: float) -> float:
        """What is left of the slowdown that a run could bear when it came."""
        promised_s = request.deadline - _arrival_time(request)
        if promised_s <= 0.0:
            return 0.0
        own = self._classes.get((request.tenant_id, request.workflow))
        bearable = own.bearable if own is not None else self._bearable
        return bearable * (request.deadline - now) / promised_s

    @property
    def _bearable(self) -> float:
        """Slowdown at which runs that begin when they come are on time, on average of all.

        Harmonic, so that those with little to spare count, not those with hours.
        """
        return 1.0 / self._needed_share if self._needed_share > 0.0 else math.inf

    def _slowdown_with_one_more(self, now: float) -> float:
        self.pace.tick(now)
        return (1.0 + self._margin) * self.pace.slowdown(self.pace.num_runs + 1, self._needed_s)

    def _relegate(self, priority: int, key: RunKey) -> list[Held]:
        self.num_relegated += 1
        self._num_since_relegated = 0
        return self._take(priority, key)

    def _take(self, priority: int, key: RunKey) -> list[Held]:
        calls = self._held[priority][key]
        for held in calls:
            del self._key_of[held.request.request_id]
        self._drop(priority, key)
        return calls

    def _drop(self, priority: int, key: RunKey) -> None:
        runs = self._held[priority]
        del runs[key]
        if not runs:
            del self._held[priority]


def _arrival_time(request: StageRequest) -> float:
    if math.isnan(request.run_arrival_time):
        return request.arrival_time
    return request.run_arrival_time
