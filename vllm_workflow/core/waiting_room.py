"""Where calls wait until an instance can start them, and which of them starts next."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from vllm_workflow.core.backlog import Backlog, Kind, Waiting
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.deadline import is_hopeless
from vllm_workflow.core.dispatch import DispatchPolicy
from vllm_workflow.core.fleet import Fleet, max_stretch
from vllm_workflow.core.types import Candidate, StageRequest

_MAX_LOOKED_AT = 16
"""Calls that turn out not to fit, after which no more are looked at when something has changed.
Those for which every instance is full are passed over at no cost."""


class Choice(NamedTuple):
    """A call that starts now, and where."""

    waiting: Waiting
    candidates: tuple[Candidate, ...]
    costs: Sequence[float]
    chosen: int
    """Index of the candidate that it starts on."""


class WaitingRoom:
    """The calls that no instance has been chosen for yet.

    Args:
        fleet: What they wait for.
        policy: Chooses among the instances that can start a call.
        config: Order of the calls, and whether runs are relegated.
    """

    held_until: float = math.inf
    """Instant from which a call may start that could not although there was room."""

    def __init__(self, fleet: Fleet, policy: DispatchPolicy, config: PolicyConfig) -> None:
        self.backlog = Backlog()
        self.relegated = Backlog()
        """Calls of runs that can no longer be on time: they wait for all others."""
        self._fleet = fleet
        self._policy = policy
        self._config = config
        self._has_guests = config.relegate
        self._ordering = config.build_ordering()
        self._num_since_relegated = 0
        self._looked_at_version = -1

    def __len__(self) -> int:
        return len(self.backlog) + len(self.relegated)

    @property
    def has_news(self) -> bool:
        """Whether a call waits and something has changed since all were looked at."""
        return len(self) > 0 and self._fleet.version != self._looked_at_version

    def enter(
        self, request: StageRequest, num_prompt_bytes: int, exclude: tuple[str, ...], now: float
    ) -> Waiting:
        """Give a call its place.

        Raises:
            ValueError: It waits already.
        """
        if self._config.relegate and is_hopeless(request, now, self._config.relegation_margin):
            return self.relegated.add(request, request.deadline, num_prompt_bytes, exclude)
        level = 0 if self._config.relegate and request.attained_s > 0.0 else 1
        key = self._ordering.key(request)
        return self.backlog.add(request, key, num_prompt_bytes, exclude, level=level)

    def leave(self, request_id: str) -> Waiting | None:
        """Take a call out; None if it does not wait."""
        waiting = self.backlog.remove(request_id) or self.relegated.remove(request_id)
        if waiting is not None:
            self._looked_at_version = -1  # others may have been held up by it
        return waiting

    def by_arrival(self) -> list[Waiting]:
        """All calls, the one that came first first."""
        return sorted((*self.backlog, *self.relegated), key=lambda w: w.request.arrival_time)

    def stranded(self) -> list[StageRequest]:
        """Calls that no healthy instance serves any more."""
        return [
            waiting.request
            for waiting in (*self.backlog, *self.relegated)
            if not self._fleet.serves_now(waiting.request.model, waiting.exclude)
        ]

    def starting(
        self,
        now: float,
        newest: Waiting | None = None,
        newest_candidates: tuple[Candidate, ...] = (),
    ) -> Iterator[Choice]:
        """Yield what can start now, first in order first; each must be reserved before the next.

        A call that cannot start holds up those behind it in one way: the instance that it is
        going to start on takes no call that would still be there by then.

        Args:
            now: Instant.
            newest: A call that has just come. If nothing else has changed since all were looked
                at, no other can start.
            newest_candidates: What has just been predicted of it, if anything has.
        """
        fleet = self._fleet
        if self._config.relegate:
            self._relegate(now)
        full: set[Kind] = set()
        blocked: dict[Kind, Waiting] = {}
        if newest is None or fleet.version != self._looked_at_version:
            turn = self._in_turn(full)
        else:
            turn = iter((newest,))
            if fleet.has_room():
                blocked = self._ahead_of(newest)
        claims: dict[str, float] | None = None
        num_in_vain = num_started = 0
        for waiting in turn:
            if not fleet.has_room() or num_in_vain == _MAX_LOOKED_AT:
                break
            kind = waiting.kind
            if not fleet.has_room(*kind):
                blocked.setdefault(kind, waiting)
                full.add(kind)
                continue
            if not fleet.can_start(waiting.request, waiting.exclude):
                blocked.setdefault(kind, waiting)
                num_in_vain += 1
                continue
            if waiting is newest and newest_candidates and not num_started:
                candidates = newest_candidates
            else:
                candidates = self._candidates(waiting, now)
            if blocked and claims is None:
                claims = self._claims(blocked, now)
            costs = self._policy.costs(waiting.request, candidates)
            able = _able(candidates, claims or {})
            if not able:
                blocked.setdefault(kind, waiting)
            elif self._has_guests and self._is_guest(waiting):
                able = [i for i in able if self._bears(waiting, candidates[i], now)]
            if not able:
                num_in_vain += 1
                continue
            num_started += 1
            self._num_since_relegated += 1
            if self.backlog.remove(waiting.request.request_id) is None:
                self.relegated.remove(waiting.request.request_id)
                self._num_since_relegated = 0
            yield Choice(waiting, candidates, costs, min(able, key=costs.__getitem__))
        self._looked_at_version = fleet.version

    def _relegate(self, now: float) -> None:
        """Move what can no longer be on time behind all that can."""
        for waiting in self.backlog.first(_MAX_LOOKED_AT):
            if is_hopeless(waiting.request, now, self._config.relegation_margin):
                request = waiting.request
                self.backlog.remove(request.request_id)
                self.relegated.add(
                    request, request.deadline, waiting.num_prompt_bytes, waiting.exclude
                )

    @property
    def _goes_first(self) -> Waiting | None:
        """The relegated call whose turn has come, so that none starves."""
        if self._num_since_relegated < 1.0 / self._config.relegated_share - 1.0:
            return None
        return next(iter(self.relegated), None)

    def _in_turn(self, passed_over: Container[Kind]) -> Iterator[Waiting]:
        """All calls in order; now and then a relegated one goes first."""
        if not self._config.relegate:
            return self.backlog.walk(passed_over)
        first = self._goes_first
        hopeful, hopeless = self.backlog.walk(passed_over), self.relegated.walk(passed_over)
        return chain([first] if first else [], hopeful, _without(first, hopeless))

    def _ahead_of(self, newest: Waiting) -> dict[Kind, Waiting]:
        """The first call of each kind of those that go before `newest`, in order."""
        hopeful, hopeless, first = self.backlog.heads(), self.relegated.heads(), self._goes_first
        if newest is first:
            return {}
        if newest.request.request_id in self.backlog:
            hopeful, hopeless = [w for w in hopeful if w < newest], []
        else:
            hopeless = [w for w in hopeless if w < newest]
        ahead: dict[Kind, Waiting] = {}
        for waiting in ([first] if first else []) + hopeful + hopeless:
            ahead.setdefault(waiting.kind, waiting)
        return ahead

    def _candidates(self, waiting: Waiting, now: float) -> tuple[Candidate, ...]:
        return self._fleet.candidates(
            waiting.request, now=now, exclude=waiting.exclude, shortlist=True
        )

    def _claims(self, blocked: Mapping[Kind, Waiting], now: float) -> dict[str, float]:
        """Instances that the first blocked call of each kind waits for, and for how long."""
        claims: dict[str, float] = {}
        for waiting in blocked.values():
            candidates = self._candidates(waiting, now)
            first = min(candidates, key=lambda c: c.queue_s, default=None)
            if first is not None and first.queue_s > 0.0:
                claims.setdefault(first.instance_id, first.queue_s)
        return claims

    def _is_guest(self, waiting: Waiting) -> bool:
        """Whether a call's run has not begun, or is late anyway."""
        return waiting.request.attained_s <= 0.0 or waiting.request.request_id in self.relegated

    def _bears(self, waiting: Waiting, candidate: Candidate, now: float) -> bool:
        """Whether such a call may join others on an instance without making them late."""
        if not candidate.num_outstanding:
            return True
        margin = self._config.relegation_margin
        if not self._fleet.bears(candidate, margin=margin):
            return False
        if waiting.request.request_id in self.relegated:
            return True
        return candidate.stretch * (1.0 + margin) <= max_stretch(waiting.request, candidate, now)


def _without(first: Waiting | None, calls: Iterator[Waiting]) -> Iterator[Waiting]:
    for waiting in calls:
        if waiting is not first:
            yield waiting


def _able(candidates: Sequence[Candidate], claims: Mapping[str, float]) -> list[int]:
    """Indexes of the candidates that a call could start on now.

    A call does not wait for a faster instance while a slower one could start it: that pays for
    the call, and leaves the fleet idle when many do it.

    Args:
        candidates: Predictions; those with no `queue_s` can start it.
        claims: Seconds until a call that goes first starts on an instance: what would still be
            there by then is not started there.
    """
    return [
        index
        for index, candidate in enumerate(candidates)
        if candidate.queue_s <= 0.0
        and candidate.finish_s <= claims.get(candidate.instance_id, math.inf)
    ]
