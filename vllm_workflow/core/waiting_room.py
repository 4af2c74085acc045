"""Where calls wait until an instance can start them, and which of them starts next."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import chain
from typing import Final

from vllm_workflow.core.admission import Demand, Held, run_key
from vllm_workflow.core.admissions import Admissions
from vllm_workflow.core.backlog import Backlog, Kind, Waiting
from vllm_workflow.core.choice import MAX_LOOKED_AT, Choice, able_among, count_in_vain, without
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.deadline import is_hopeless
from vllm_workflow.core.dispatch import DispatchPolicy
from vllm_workflow.core.errors import OverloadedError
from vllm_workflow.core.fleet import Fleet
from vllm_workflow.core.pace import Pace
from vllm_workflow.core.types import Candidate, StageRequest

_INF: Final = math.inf


class WaitingRoom:
    """The calls that no instance has been chosen for yet.

    Args:
        fleet: What they wait for.
        policy: Chooses among the instances that can start a call.
        config: Order of the calls, and whether runs are relegated.
        paces: How runs of each model slow each other down.
        demands: What runs of each model are promised and need.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: DispatchPolicy,
        config: PolicyConfig,
        paces: dict[str, Pace] | None = None,
        demands: dict[str, Demand] | None = None,
    ) -> None:
        self.backlog = Backlog()
        self.relegated = Backlog()
        """Calls of runs under way that can no longer be on time: they wait for all others."""
        self.paces = {} if paces is None else paces
        self._demands = {} if demands is None else demands
        self._admissions = self._admissions_for(config)
        self._fleet = fleet
        self._policy = policy
        self._config = config
        self._has_guests = False
        self._relegates = config.relegate and config.late_binding
        self._ordering = config.build_ordering()
        self._num_since_relegated = 0
        self._looked_at_version = -1

    def _admissions_for(self, config: PolicyConfig) -> Admissions:
        return Admissions(self.paces, config, self._demands)

    def __len__(self) -> int:
        return len(self.backlog) + len(self.relegated) + self.num_held

    @property
    def num_held(self) -> int:
        """First calls of runs that have not begun."""
        return len(self._admissions)

    @property
    def held_until(self) -> float:
        """Instant from which a call may start that could not although there was room."""
        return self._admissions.next_expiry

    @property
    def num_relegated(self) -> int:
        """Runs that have begun although they could not be on time any more."""
        return self._admissions.num_relegated

    @property
    def has_news(self) -> bool:
        """Whether a call waits and something has changed since all were looked at."""
        return self._fleet.version != self._looked_at_version and len(self) > 0

    def enter(
        self,
        request: StageRequest,
        num_prompt_bytes: int,
        exclude: tuple[str, ...],
        now: float,
        *,
        idle_s: float = 0.0,
    ) -> Waiting | None:
        """Give a call its place.

        Args:
            request: The call, with its predictions.
            num_prompt_bytes: Size of its prompt.
            exclude: Instances that it is not to go to.
            now: Instant.
            idle_s: Its service on an idle fleet.

        Returns:
            None if its run may not begin yet.

        Raises:
            ValueError: It waits already.
        """
        held = Held(request, num_prompt_bytes, exclude, idle_s + request.rest_s)
        if not self._relegates:
            return self._line_up(held, now)
        admission = self._admissions.of(request.model, now)
        if request.request_id in admission:
            raise ValueError(f"request {request.request_id!r} is already waiting")
        if self._is_under_way(request, now):
            return self._line_up(held, now)
        admission.arrived(request, idle_s, now)
        self._admissions.hold(held, now)
        for waiting in self._begin(request.model, now):
            if waiting.request is request:
                return waiting
            self._looked_at_version = -1
        return None

    def take_over(self, calls: Iterable[Held], now: float) -> None:
        """Give calls that have waited in another room their places here; `starting` must follow.

        They count as arrivals no second time.

        Args:
            calls: In order of arrival.
            now: Instant.
        """
        for held in calls:
            if not self._relegates or self._is_under_way(held.request, now):
                self._line_up(held, now)
            else:
                self._admissions.hold(held, now)

    def _is_under_way(self, request: StageRequest, now: float) -> bool:
        """Whether a call does not have to wait for its run to begin.

        A run that has been forgotten, or began under another policy, is under way too; one
        without a deadline is never held.
        """
        pace = self._admissions.of(request.model, now).pace
        return run_key(request) in pace or request.attained_s > 0.0 or request.deadline == _INF

    def leave(self, request_id: str) -> StageRequest | None:
        """Take a call out; None if it does not wait."""
        waiting = self.backlog.remove(request_id) or self.relegated.remove(request_id)
        if waiting is not None:
            self._looked_at_version = -1  # others may have been held up by it
            self._closed(waiting.request, end_time=math.nan, idle_s=0.0, ok=False)
            return waiting.request
        held = self._admissions.leave(request_id)
        return None if held is None else held.request

    def ended(self, request: StageRequest, *, end_time: float, idle_s: float, ok: bool) -> None:
        """Note that a call that had been started has ended.

        Args:
            request: The call.
            end_time: When; `nan` unless it ended well.
            idle_s: Its service on an idle fleet.
            ok: It ended well.
        """
        self._closed(request, end_time=end_time, idle_s=idle_s, ok=ok)

    def check(self, request: StageRequest) -> None:
        """Refuse a run that has just come, if the policy says so; the caller withdraws it.

        Args:
            request: A call that waits; only the first of a run can be refused.

        Raises:
            OverloadedError: It would wait too long to begin.
        """
        admission = self._admissions.get(request.model)
        if (
            self._config.admission != "reject"
            or admission is None
            or not admission.is_first(request.request_id)
        ):
            return
        wait_s, promised_s = admission.wait_s(request), request.deadline - request.arrival_time
        most_s = self._config.max_hold_share * promised_s
        if wait_s > most_s:
            raise OverloadedError(
                f"model {request.model!r}: run {request.workflow_id!r} would begin in "
                f"{wait_s:.3g} s: expected at most {most_s:.3g} s of its SLO, {promised_s:.3g} s; "
                f"{admission.pace.num_runs} runs are under way, {admission.num_waiting_runs} wait "
                "to begin",
                retry_after_s=wait_s,
            )

    def _closed(self, request: StageRequest, *, end_time: float, idle_s: float, ok: bool) -> None:
        pace = self.paces.get(request.model)
        if pace is not None:
            pace.closed(run_key(request), request, end_time=end_time, idle_s=idle_s, ok=ok)

    def _begin_held(self, now: float) -> None:
        for model in list(self._admissions.holding):
            for _ in self._begin(model, now):
                pass

    def _begin(self, model: str, now: float) -> Iterator[Waiting]:
        """Let the runs of a model begin that may."""
        while True:
            is_idle = self._fleet.is_idle(model) and not self.backlog.has_model(model)
            begun = self._admissions.beginning(model, now, is_idle=is_idle)
            if not begun:
                return
            for held in begun:
                yield self._line_up(held, now)

    def _line_up(self, held: Held, now: float) -> Waiting:
        """Let a call of a run under way wait for an instance."""
        request = held.request
        if self._relegates:
            admission = self._admissions.of(request.model, now)
            admission.pace.opened(run_key(request), request, now, held.needed_s)
            if is_hopeless(request, now):
                return self.relegated.add(
                    request, request.deadline, held.num_prompt_bytes, held.exclude
                )
        key = self._ordering.key(request)
        return self.backlog.add(request, key, held.num_prompt_bytes, held.exclude)

    def by_arrival(self) -> list[Held]:
        """All calls, the one that came first first."""
        calls = [
            Held(w.request, w.num_prompt_bytes, w.exclude)
            for each in (self.backlog, self.relegated)
            for w in each
        ]
        for admission in self._admissions.holding.values():
            calls.extend(admission.calls())
        return sorted(calls, key=lambda h: h.request.arrival_time)

    def stranded(self) -> list[StageRequest]:
        """Calls that no healthy instance serves any more."""
        return [
            waiting.request
            for waiting in self.by_arrival()
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
        if newest is None:
            self._begin_held(now)
        is_alone = newest is not None and len(self.backlog) + len(self.relegated) == 1
        if self._relegates and not is_alone:
            self._relegate(now)
        full: set[Kind] = set()
        num_in_vain: dict[Kind, int] = {}
        blocked: dict[Kind, Waiting] = {}
        if newest is None or fleet.version != self._looked_at_version:
            turn = self._in_turn(full)
        else:
            turn = iter((newest,))
            if not is_alone and fleet.has_room():
                blocked = self._ahead_of(newest)
        claims: dict[str, float] | None = None
        num_started = 0
        for waiting in turn:
            if not fleet.has_room():
                break
            kind = waiting.kind
            if not fleet.has_room(waiting.request.model, waiting.exclude):
                blocked.setdefault(kind, waiting)
                full.add(kind)
                continue
            if not fleet.can_start(waiting.request, waiting.exclude):
                blocked.setdefault(kind, waiting)
                count_in_vain(kind, num_in_vain, full)
                continue
            if waiting is newest and newest_candidates and not num_started:
                candidates = newest_candidates
            else:
                candidates = self._candidates(waiting, now)
            if blocked and claims is None:
                claims = self._claims(blocked, now)
            costs = self._policy.costs(waiting.request, candidates)
            able = able_among(candidates, claims)
            if not able:
                blocked.setdefault(kind, waiting)
            elif self._has_guests and self._is_guest(waiting):
                able = [i for i in able if self._bears(waiting, candidates[i], now)]
            if not able:
                count_in_vain(kind, num_in_vain, full)
                continue
            num_started += 1
            self._num_since_relegated += 1
            if self.backlog.remove(waiting.request.request_id) is None:
                self.relegated.remove(waiting.request.request_id)
                self._num_since_relegated = 0
            chosen = able[0]
            for index in able:
                if costs[index] < costs[chosen]:
                    chosen = index
            if self._relegates:
                self.paces[waiting.request.model].bound(
                    candidates[chosen], self._fleet.num_instances
                )
            yield Choice(waiting, candidates, costs, chosen)
        self._looked_at_version = fleet.version

    def _relegate(self, now: float) -> None:
        """Move what can no longer be on time behind all that can."""
        for waiting in self.backlog.first(MAX_LOOKED_AT):
            if is_hopeless(waiting.request, now):
                request = waiting.request
                self.backlog.remove(request.request_id)
                self.relegated.add(
                    request, request.deadline, waiting.num_prompt_bytes, waiting.exclude
                )

    @property
    def _goes_first(self) -> Waiting | None:
        """The relegated call whose turn has come, so that none starves."""
        if (
            not len(self.relegated)
            or self._num_since_relegated < 1.0 / self._config.relegated_share - 1.0
        ):
            return None
        return next(iter(self.relegated), None)

    def _in_turn(self, passed_over: Container[Kind]) -> Iterator[Waiting]:
        """All calls in order; now and then a relegated one goes first."""
        if not len(self.relegated):
            return self.backlog.walk(passed_over)
        first = self._goes_first
        hopeful, hopeless = self.backlog.walk(passed_over), self.relegated.walk(passed_over)
        return chain([first] if first else [], hopeful, without(first, hopeless))

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
        """Instances that the first blocked call of each kind waits for, and for how long.

        One that waits for the end of others' calls holds nobody back: that may never come.
        """
        claims: dict[str, float] = {}
        for waiting in blocked.values():
            first, least_s = "", _INF
            for candidate in self._candidates(waiting, now):
                wait_s = self._fleet.own_wait_s(waiting.request, candidate, now)
                if wait_s < least_s:
                    first, least_s = candidate.instance_id, wait_s
            if 0.0 < least_s < _INF:
                claims.setdefault(first, least_s)
        return claims

    def _is_guest(self, waiting: Waiting) -> bool:
        """Whether a call may only go where it makes no other late."""
        return False

    def _bears(self, waiting: Waiting, candidate: Candidate, now: float) -> bool:
        """Whether a guest may join others on an instance."""
        return True
