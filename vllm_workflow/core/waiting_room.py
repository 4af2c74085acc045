"""Where calls wait until an instance can start them, and which of them starts next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import NamedTuple

from vllm_workflow.core.backlog import Backlog, Waiting
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.deadline import is_hopeless
from vllm_workflow.core.dispatch import DispatchPolicy
from vllm_workflow.core.fleet import Fleet, max_stretch
from vllm_workflow.core.tenant_backlog import TenantBacklog
from vllm_workflow.core.tenant_ledger import GUEST_MARGIN, TenantLedger
from vllm_workflow.core.types import Candidate, StageRequest

_MAX_LOOKED_AT = 16
"""Calls that turn out not to fit, after which no more are looked at when something has changed.
Those for which every instance is full are passed over at no cost."""

_Kind = tuple[str, tuple[str, ...]]
"""Model and excluded instances: what decides which instances come into question."""


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
        tenants: Their shares and quotas; None: nobody asks whose a call is.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: DispatchPolicy,
        config: PolicyConfig,
        tenants: TenantLedger | None = None,
    ) -> None:
        self.backlog = Backlog() if tenants is None else TenantBacklog(tenants)
        self.relegated = Backlog() if tenants is None else TenantBacklog(tenants)
        """Calls of runs that can no longer be on time: they wait for all others."""
        self._fleet = fleet
        self._policy = policy
        self._config = config
        self._tenants = tenants
        self._ordering = config.build_ordering()
        self._num_since_relegated = 0
        self._looked_at_version = -1

    def __len__(self) -> int:
        return len(self.backlog) + len(self.relegated)

    @property
    def held_until(self) -> float:
        """Instant from which a quota has room for a call that it holds; `inf` if none does."""
        return min(self.backlog.held_until, self.relegated.held_until)

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

    def stranded(self) -> list[StageRequest]:
        """Calls that no healthy instance serves any more."""
        return [
            waiting.request
            for waiting in (*self.backlog, *self.relegated)
            if not self._fleet.serves_now(waiting.request.model, waiting.exclude)
        ]

    def starting(self, now: float, newest: Waiting | None = None) -> Iterator[Choice]:
        """Yield what can start now, first in order first; each must be reserved before the next.

        A call that cannot start holds up those behind it in one way: the instance that it is
        going to start on takes no call that would still be there by then.

        Args:
            now: Instant.
            newest: A call that has just come. If nothing else has changed since all were looked
                at, no other can start.
        """
        fleet = self._fleet
        only_newest = (
            newest is not None
            and fleet.version == self._looked_at_version
            and now < self.held_until
        )
        blocked: dict[_Kind, Waiting] = {}
        claims: dict[str, float] | None = None
        num_in_vain = 0
        for waiting in self._in_turn(now):
            if not fleet.has_room() or num_in_vain == _MAX_LOOKED_AT:
                break
            kind = waiting.request.model, waiting.exclude
            if only_newest and waiting is not newest:
                blocked.setdefault(kind, waiting)
                continue
            if not fleet.has_room(*kind):
                blocked.setdefault(kind, waiting)
                continue
            if not fleet.can_start(waiting.request, waiting.exclude):
                blocked.setdefault(kind, waiting)
                num_in_vain += 1
                continue
            candidates = fleet.candidates(waiting.request, now=now, exclude=waiting.exclude)
            if blocked and claims is None:
                claims = self._claims(blocked, now)
            costs = self._policy.costs(waiting.request, candidates)
            able = _able(candidates, claims or {})
            if not able:
                blocked.setdefault(kind, waiting)
            elif self._config.relegate and self._is_guest(waiting):
                able = [i for i in able if self._bears(waiting, candidates[i], now)]
            elif self._tenants is not None and self._tenants.is_guest(waiting.request.tenant_id):
                able = [i for i in able if self._is_spare(candidates[i])]
            if not able:
                num_in_vain += 1
                continue
            self._num_since_relegated += 1
            if self.backlog.remove(waiting.request.request_id) is None:
                self.relegated.remove(waiting.request.request_id)
                self._num_since_relegated = 0
            yield Choice(waiting, candidates, costs, min(able, key=costs.__getitem__))
        self._looked_at_version = fleet.version

    def released(self, now: float) -> Iterator[Choice]:
        """As `starting` where instances queue calls themselves: only quotas hold calls here."""
        for waiting in self._in_turn(now):
            candidates = self._fleet.candidates(waiting.request, now=now, exclude=waiting.exclude)
            if not candidates:
                continue
            costs = self._policy.costs(waiting.request, candidates)
            if self.backlog.remove(waiting.request.request_id) is None:
                self.relegated.remove(waiting.request.request_id)
            yield Choice(waiting, candidates, costs, min(range(len(costs)), key=costs.__getitem__))
        self._looked_at_version = self._fleet.version

    def _relegate(self, now: float) -> None:
        """Move what can no longer be on time behind all that can."""
        for waiting in self.backlog.first(_MAX_LOOKED_AT):
            if is_hopeless(waiting.request, now, self._config.relegation_margin):
                request = waiting.request
                self.backlog.remove(request.request_id)
                self.relegated.add(
                    request, request.deadline, waiting.num_prompt_bytes, waiting.exclude
                )

    def _in_turn(self, now: float) -> Iterable[Waiting]:
        """All calls in order; now and then a relegated one goes first, so that none starves."""
        if not self._config.relegate:
            return self.backlog.in_turn(now)
        self._relegate(now)
        hopeful, hopeless = self.backlog.in_turn(now), self.relegated.in_turn(now)
        if self._num_since_relegated >= 1.0 / self._config.relegated_share - 1.0:
            rest = iter(hopeless)
            return chain(islice(rest, 1), hopeful, rest)
        return chain(hopeful, hopeless)

    def _claims(self, blocked: Mapping[_Kind, Waiting], now: float) -> dict[str, float]:
        """Instances that the first blocked call of each kind waits for, and for how long."""
        claims: dict[str, float] = {}
        for waiting in blocked.values():
            candidates = self._fleet.candidates(waiting.request, now=now, exclude=waiting.exclude)
            first = min(candidates, key=lambda c: c.queue_s, default=None)
            if first is not None and first.queue_s > 0.0:
                claims.setdefault(first.instance_id, first.queue_s)
        return claims

    def _is_guest(self, waiting: Waiting) -> bool:
        """Whether a call's run has not begun, or is late anyway."""
        return waiting.request.attained_s <= 0.0 or waiting.request.request_id in self.relegated

    def _is_spare(self, candidate: Candidate) -> bool:
        """Whether an instance has room that those who are on it do not need to be on time."""
        return not candidate.num_outstanding or self._fleet.bears(candidate, margin=GUEST_MARGIN)

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
