"""Which runs may begin: no more at a time than can be on time beside each other.

Instances share their steps among all calls that they run, so every run under way slows down all
others. How much is learned: the time that calls take, over what they would take alone, grows in
proportion to the runs beside them,

    slowdown(n) = 1 + slope · (n - 1)

Runs that have ended tell how far the time they took differs from what they need times that, and it
is corrected by that factor.

A run begins if, with it, the slowdown stays within what runs are promised: their SLO over what they
need on an idle fleet. While that holds for whoever comes, nothing here changes anything.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, final

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.pace import Pace
from vllm_workflow.core.types import StageRequest

RunKey = tuple[str, str]
"""(tenant, workflow_id); of a call without an id, its own name."""

_MAX_SHRINK: Final = 0.15
"""Share of the expected time that runs are believed to take less, at most."""
_ROOM: Final = 0.9
"""Share of the slowdown that runs can bear, up to which runs begin that may well be late."""
_MIN_RATE: Final = 0.03
"""Share of one arrival in what runs are promised and need: about the last thirty decide."""
_MIN_ARRIVALS: Final = 30
"""Runs that must have come before any is made to wait."""
_MAX_CLASSES: Final = 1024
"""Workflows of tenants remembered at most: their names come from clients."""


def run_key(request: StageRequest) -> RunKey:
    return (request.tenant_id, request.workflow_id or f"#{request.request_id}")


@final
class Held:
    """A first call of a run that has not begun."""

    __slots__ = (
        "exclude",
        "needed_s",
        "num_prompt_bytes",
        "request",
    )

    request: Final[StageRequest]
    num_prompt_bytes: Final[int]
    exclude: Final[tuple[str, ...]]
    needed_s: Final[float]
    """What its run is predicted to need on an idle fleet; 0 if unknown."""

    def __init__(
        self,
        request: StageRequest,
        num_prompt_bytes: int,
        exclude: tuple[str, ...],
        needed_s: float = 0.0,
    ) -> None:
        self.request = request
        self.num_prompt_bytes = num_prompt_bytes
        self.exclude = exclude
        self.needed_s = needed_s


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


class Demand:
    """What the runs of one model are promised and need, learned as they come."""

    def __init__(self) -> None:
        self.needed_s = 0.0
        """What a run needs on an idle fleet, mean over the latest."""
        self._needed_share = 0.0
        """That over what is promised, likewise."""
        self._num_arrivals = 0
        self._classes: OrderedDict[RunKey, _Class] = OrderedDict()

    def arrived(self, request: StageRequest, idle_s: float, now: float) -> None:
        """Note a run that has just come; see `Admission.arrived`."""
        needed_s, promised_s = idle_s + request.rest_s, request.deadline - now
        if promised_s <= needed_s:
            return  # nobody can keep such a promise, and others are not to be held up by it
        key = (request.tenant_id, request.workflow)
        each = self._classes.setdefault(key, _Class())
        self._classes.move_to_end(key)
        if len(self._classes) > _MAX_CLASSES:
            self._classes.popitem(last=False)
        each.num_arrivals += 1
        rate = max(_MIN_RATE, 1.0 / each.num_arrivals)
        each.promised_s += rate * (promised_s - each.promised_s)
        each.needed_s += rate * (needed_s - each.needed_s)
        self._num_arrivals += 1
        rate = max(_MIN_RATE, 1.0 / self._num_arrivals)
        self.needed_s += rate * (needed_s - self.needed_s)
        self._needed_share += rate * (1.0 / each.bearable - self._needed_share)

    def bearable_for(self, request: StageRequest) -> float:
        """Slowdown at which a run is on time if it begins when it comes, and most others are."""
        own = self._classes.get((request.tenant_id, request.workflow))
        if own is None or own.num_arrivals < _MIN_ARRIVALS:
            return self.bearable
        return min(self.bearable, own.bearable)

    @property
    def bearable(self) -> float:
        """Slowdown at which runs that begin when they come are on time, on average of all.

        Harmonic, so that those with little to spare count, not those with hours.
        """
        if self._num_arrivals < _MIN_ARRIVALS:
            return math.inf
        return 1.0 / self._needed_share if self._needed_share > 0.0 else math.inf


class Admission:
    """The runs of one model that wait to begin, and the rule by which they do.

    Args:
        pace: Of the runs under way.
        config: `relegation_margin`, `max_hold_share` and `relegated_share` of the policy.
        demand: What was learned of the model's runs under another policy.
    """

    def __init__(self, pace: Pace, config: PolicyConfig, *, demand: Demand | None = None) -> None:
        self.pace = pace
        self._demand = Demand() if demand is None else demand
        self.num_relegated = 0
        """Runs that began although they could not be on time any more."""
        self._margin = config.relegation_margin
        self._max_hold_share = config.max_hold_share
        self._relegated_share = config.relegated_share
        self._held: dict[int, OrderedDict[RunKey, list[Held]]] = {}
        """Priority -> runs in order of arrival."""
        self._key_of: dict[str, tuple[int, RunKey]] = {}
        self._num_since_relegated = 0

    def __len__(self) -> int:
        return len(self._key_of)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._key_of

    @property
    def num_waiting_runs(self) -> int:
        """Runs that wait to begin, each with one call or more."""
        return sum(map(len, self._held.values()))

    def is_first(self, request_id: str) -> bool:
        """Whether a call waits here, and its run has none that waits for longer."""
        place = self._key_of.get(request_id)
        if place is None:
            return False
        priority, key = place
        return self._held[priority][key][0].request.request_id == request_id

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
        self._demand.arrived(request, idle_s, now)

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
            is_idle: Nothing runs where they could, so that nothing is gained by waiting.
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
        if is_idle or self._slowdown_with_one_more(now) <= _ROOM * self._demand.bearable:
            if self._is_late(newest, now):
                return self._relegate(priority, first)
            return self._take(priority, last)
        return []

    def can_begin(self, request: StageRequest, now: float) -> bool:
        """Whether a run that began now would be on time, and would leave others theirs."""
        if self.pace.num_runs == 0:
            return True
        return _share_left(
            request, now
        ) >= 1.0 - self._max_hold_share and self._slowdown_with_one_more(
            now
        ) <= self._demand.bearable_for(request)

    def wait_s(self, request: StageRequest) -> float:
        """Seconds until a run begins behind all that wait, if they begin as others end."""
        num_runs = self.pace.num_runs
        if num_runs == 0:
            return 0.0
        return self.num_waiting_runs * self._run_s() / num_runs

    def _run_s(self) -> float:
        """What a run takes beside those under way."""
        needed_s = self._demand.needed_s
        return needed_s * self._run_slowdown(self.pace.num_runs)

    def _is_late(self, request: StageRequest, now: float) -> bool:
        """Whether a run would be late even if it began now, alone."""
        left = _share_left(request, now)
        return left * self._demand.bearable_for(request) < 1.0 + self._margin

    def _slowdown_with_one_more(self, now: float) -> float:
        self.pace.tick(now)
        return (1.0 + self._margin) * self._run_slowdown(self._num_with_one_more())

    def _run_slowdown(self, num_runs: float) -> float:
        """Time that a run takes over what it needs on an idle fleet, with so many under way.

        The more wait, the less is it believed that runs take less time than expected: while a
        queue grows, those that have ended are the quick ones.
        """
        needed_s = self._demand.needed_s
        waiting_share = self.num_waiting_runs / max(1, self.pace.num_runs)
        least = 1.0 - _MAX_SHRINK * max(0.0, 1.0 - waiting_share)
        return max(least, self.pace.stretch(needed_s)) * self.pace.slowdown(num_runs, needed_s)

    def _num_with_one_more(self) -> float:
        """Runs that count for whether one more may begin, that one included."""
        return self.pace.num_runs + 1

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


def _share_left(request: StageRequest, now: float) -> float:
    """Of what a run was promised, what is left."""
    came = request.run_arrival_time
    promised_s = request.deadline - (request.arrival_time if math.isnan(came) else came)
    return (request.deadline - now) / promised_s if promised_s > 0.0 else 0.0
