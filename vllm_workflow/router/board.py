"""What a live page shows: the runs that come and go, from the events of the dispatcher.

Everything is bounded: so many runs, so many calls of each, and of tenants the ones seen first.
"""

from __future__ import annotations

import json
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from vllm_workflow.core.call_events import Polled, Settled, Submitted, Withdrawn
from vllm_workflow.core.events import Event
from vllm_workflow.core.types import Decision, StageRequest
from vllm_workflow.router.metrics import Capped
from vllm_workflow.router.runs import IDLE_TTL_S, over_at

MAX_RUNS = 1_000
MAX_CALLS = 20
"""Shown of one run, its latest; a run may have more."""
MAX_WAITING = 100
"""Shown of the queue, those with the least slack."""
REFRESH_S = 0.5
"""What has been told is told again, word for word, for this long: many who ask cost as one."""
WINDOW_S = 900.0
"""Attainment is that of runs which ended within this time."""
_SHARE_S = WINDOW_S / 60.0
"""They are counted together for so long: what is kept does not grow with their number."""

_Key = tuple[str, str]


class _Call:
    """A call of a run; no dataclass, which takes several times as long to make when compiled."""

    __slots__ = ("arrival", "end", "instance", "ok", "stage", "start")

    def __init__(self, stage: str, arrival: float) -> None:
        self.stage = stage
        self.arrival = arrival
        self.start = math.nan
        """Instant at which it was bound to an instance; `nan` while it waits."""
        self.end = math.nan
        self.instance = ""
        self.ok: bool | None = None
        """None until it has ended."""


class _Run:
    """A run; its names as they are shown."""

    __slots__ = (
        *("arrival", "calls", "deadline", "ended", "is_counted", "is_final", "key", "last"),
        *("last_ok", "met", "name", "num_calls", "num_open", "number", "tenant", "told"),
        "workflow",
    )

    def __init__(
        self, key: _Key, name: str, tenant: str, workflow: str, arrival: float, deadline: float
    ) -> None:
        self.key = key
        self.name = name
        self.tenant = tenant
        self.workflow = workflow
        self.arrival = arrival
        self.deadline = deadline
        self.number = 0
        """Of the run's latest change."""
        self.calls: deque[_Call] = deque(maxlen=MAX_CALLS)
        self.num_calls = 0
        self.num_open = 0
        self.last = 0.0
        self.last_ok = True
        self.is_final = False
        """Whether a call that said to be its last one has ended well."""
        self.met: bool | None = None
        """None while it goes on, or where nothing was promised."""
        self.ended = False
        self.is_counted = False
        """Whether it has been counted as met or missed."""
        self.told: tuple[float, int, str] = (math.nan, 0, "")
        """When, of which change, and what was told of it last."""


class Board:
    """Follows runs.

    Args:
        clock: The clock of the dispatcher's instants.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._runs: OrderedDict[_Key, _Run] = OrderedDict()
        self._open: dict[str, tuple[_Run, _Call, StageRequest]] = {}
        self._number = 0
        self._over: OrderedDict[_Key, None] = OrderedDict()
        """Those of the runs that have ended, the first one first."""
        self._counts: deque[tuple[float, dict[str, list[int]]]] = deque()
        """Of runs that ended within a share of the window: since when, tenant -> met, missed."""
        self._tenant = Capped()
        self._time = math.nan
        """Instant of what is being told."""
        self._rest: dict[str, Any] = {}
        """What is told beside runs."""

    def record(self, event: Event) -> None:
        """Take an event of the dispatcher."""
        if isinstance(event, Submitted):
            now = self._clock()
            self.waits(event.request)
            if event.decision is not None:
                self._bound(event.decision, now)
        elif isinstance(event, Polled):
            for decision in event.decisions:
                self._bound(decision, self._clock())
        elif isinstance(event, Settled):
            self._ended_call(event.outcome.request_id, self._clock(), ok=event.outcome.ok)
        elif isinstance(event, Withdrawn):
            self._ended_call(event.request_id, self._clock(), ok=False)

    def waits(self, request: StageRequest) -> None:
        """Note that a call waits, for an instance to come back if no event says so."""
        if request.request_id not in self._open:
            self._began(request, self._clock())

    def gave_up(self, tenant_id: str, request_id: str, *, alone: bool) -> None:
        """Note that a call failed for good.

        No event says so: after an attempt that failed another one may follow, and one that waits
        for an instance is in none.

        Args:
            tenant_id: Whose it is.
            request_id: Names it.
            alone: It is a run of its own, which has ended then.
        """
        now = self._clock()
        self._ended_call(request_id, now, ok=False)
        run = self._runs.get((tenant_id, request_id)) if alone else None
        if run is not None and not run.num_open and not run.ended:
            self._number += 1
            run.number = self._number
            self._end(run, now)

    def _began(self, request: StageRequest, now: float) -> None:
        key = (request.tenant_id, request.workflow_id or request.request_id)
        run = self._runs.get(key)
        if run is not None and not run.num_open and not run.is_final:
            self._go_on(run, now)
        if run is None or run.ended:
            # A new one goes to the end even if one of that name was there.
            self._forget(key)
            self._make_room()
            run = self._runs[key] = _Run(
                key,
                key[1],
                self._tenant(request.tenant_id),
                request.workflow,
                now if math.isnan(request.run_arrival_time) else request.run_arrival_time,
                request.deadline,
            )
        call = _Call(request.stage, now)
        run.calls.append(call)
        run.num_calls += 1
        run.num_open += 1
        run.deadline = request.deadline
        self._open[request.request_id] = run, call, request
        self._changed(run, now)

    def _go_on(self, run: _Run, now: float) -> None:
        """Let a run that made no call for long go on, for as long as `Runs` knows it."""
        if over_at(run.last, run.deadline) <= now:
            self._end(run, now)
        if now < run.last + IDLE_TTL_S:
            run.ended, run.met = False, None
            self._over.pop(run.key, None)

    def _make_room(self) -> None:
        """Forget the run that ended first, or if none has, the oldest."""
        if len(self._runs) >= MAX_RUNS:
            self._forget(next(iter(self._over or self._runs)))

    def _forget(self, key: _Key) -> None:
        self._runs.pop(key, None)
        self._over.pop(key, None)

    def _bound(self, decision: Decision, now: float) -> None:
        found = self._open.get(decision.request_id)
        if found is not None:
            run, call, _ = found
            call.start = now
            call.instance = decision.chosen.instance_id
            self._changed(run, now)

    def _ended_call(self, request_id: str, now: float, *, ok: bool) -> None:
        found = self._open.pop(request_id, None)
        if found is None:
            return
        run, call, request = found
        call.end, call.ok = now, ok
        run.num_open -= 1
        run.last_ok = ok
        self._changed(run, now)
        run.is_final |= ok and (request.final or not request.workflow_id)
        if run.is_final and not run.num_open:
            self._end(run, now)

    def _changed(self, run: _Run, now: float) -> None:
        self._number += 1
        run.number = self._number
        run.last = now

    def _end(self, run: _Run, now: float) -> None:
        if run.ended:
            return
        run.ended = True
        if self._runs.get(run.key) is run:
            self._over[run.key] = None
        if run.deadline != math.inf:
            run.met = run.last_ok and run.last <= run.deadline
            if not run.is_counted:
                run.is_counted = True
                self._count(run, now)

    def _count(self, run: _Run, now: float) -> None:
        if not self._counts or self._counts[-1][0] + _SHARE_S <= now:
            self._forget_counts(now)
            self._counts.append((now, {}))
        self._counts[-1][1].setdefault(run.tenant, [0, 0])[not run.met] += 1

    def _forget_counts(self, now: float) -> None:
        while self._counts and self._counts[0][0] < now - WINDOW_S:
            self._counts.popleft()

    def _expire(self, now: float) -> None:
        for run in self._runs.values():
            is_idle = not run.ended and not run.num_open
            if is_idle and over_at(run.last, run.deadline) <= now:
                self._end(run, now)
                self._number += 1
                run.number = self._number
        self._forget_counts(now)

    def snapshot(self, since: int = 0) -> str:
        """Return what is to be shown, as a JSON object; times are seconds before now.

        "Now" may be `REFRESH_S` ago.

        Args:
            since: `number` of the snapshot before this one: only what has changed is told.
        """
        now = self._clock()
        if not self._time <= now < self._time + REFRESH_S:
            self._time = now
            self._expire(now)
            self._rest = {
                "waiting": self._waiting(now),
                "num_waiting": sum(math.isnan(call.start) for _, call, _ in self._open.values()),
                "tenants": self._tenants(),
            }
        known = since <= self._number
        head = {
            "number": self._number,
            "num_runs": len(self._runs),
            "whole": not known or since == 0,
            **self._rest,
        }
        runs = ", ".join(
            self._told(run) for run in self._runs.values() if not known or run.number > since
        )
        return f'{json.dumps(head)[:-1]}, "runs": [{runs}]}}'

    def _told(self, run: _Run) -> str:
        """Return what is told of a run: the same as before unless it has changed or time has."""
        time, number, text = run.told
        if time != self._time or number != run.number:
            text = _run(run, self._time)
            run.told = self._time, run.number, text
        return text

    def _waiting(self, now: float) -> list[dict[str, Any]]:
        rows = [
            {
                "run": run.name,
                "stage": call.stage,
                "tenant": run.tenant,
                "waited_s": round(now - call.arrival, 2),
                "slack_s": _finite(request.deadline - now - request.rest_s - request.service_s),
            }
            for run, call, request in self._open.values()
            if math.isnan(call.start)
        ]
        rows.sort(key=lambda row: math.inf if row["slack_s"] is None else row["slack_s"])
        return rows[:MAX_WAITING]

    def _tenants(self) -> list[dict[str, Any]]:
        counts: dict[str, list[int]] = {}
        for run in self._runs.values():
            counts.setdefault(run.tenant, [0, 0, 0])[0] += not run.ended
        for _, ended in self._counts:
            for tenant, numbers in ended.items():
                each = counts.setdefault(tenant, [0, 0, 0])
                each[1] += numbers[0]
                each[2] += numbers[1]
        return [
            {"tenant": tenant, "running": running, "met": met, "missed": missed}
            for tenant, (running, met, missed) in sorted(counts.items())
        ]


def _run(run: _Run, now: float) -> str:
    row = {
        "run": run.name,
        "tenant": run.tenant,
        "workflow": run.workflow,
        "arrival": round(run.arrival - now, 3),
        "deadline": None if run.deadline == math.inf else round(run.deadline - now, 3),
        "ended": run.ended,
        "met": run.met,
        "num_calls": run.num_calls,
    }
    calls = ", ".join([_call(call, now) for call in run.calls])
    return f'{json.dumps(row)[:-1]}, "calls": [{calls}]}}'


def _call(call: _Call, now: float) -> str:
    """Stage, arrival, start, end (null: not yet), instance, whether it ended well.

    Put together here because there are many, and it takes a third of the time.
    """
    start = "null" if math.isnan(call.start) else f"{call.start - now:.3f}"
    end = "null" if math.isnan(call.end) else f"{call.end - now:.3f}"
    ok = "null" if call.ok is None else "true" if call.ok else "false"
    return (
        f"[{_quoted(call.stage)}, {call.arrival - now:.3f}, {start}, {end}, "
        f"{_quoted(call.instance)}, {ok}]"
    )


@lru_cache(maxsize=1024)
def _quoted(text: str) -> str:
    return json.dumps(text)


def _finite(seconds: float) -> float | None:
    return round(seconds, 3) if math.isfinite(seconds) else None
