"""How much slower runs get by running beside each other, learned from their calls."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final, final

from vllm_workflow.core.types import Candidate, StageRequest

_INF: Final = math.inf

MAX_IDLE_RUNS: Final = 4_096
"""Runs without a call under way that are remembered: their names come from clients."""
MAX_IDLE_S: Final = 60.0
"""A run without a call for this long is taken to be over, and forgotten."""
_MEMORY_S: Final = 3000.0
"""Seconds of service, as on an idle fleet, after which what was seen has faded to a third."""
_PRIOR_RUNS: Final = 30.0
"""Runs that the prediction of the slope counts for."""
_PRIOR_ENDS: Final = 10.0
"""Ended runs that the belief that runs take what is expected counts for."""
_END_RATE: Final = 0.02
_MAX_HELD_SHARE: Final = 0.05
"""Share of its promise that a run may have waited and still counts as begun when it came."""
_SHARING_RATE: Final = 0.02
_GAP_RATE: Final = 0.02

_RunKey = tuple[str, str]


@final
class _Run:
    __slots__ = (
        "begin_run_seconds",
        "begin_time",
        "end_time",
        "goes_on",
        "is_counted",
        "is_final",
        "needed_s",
        "num_open",
        "tenant_id",
    )

    def __init__(
        self, tenant_id: str, needed_s: float, begin_time: float, begin_run_seconds: float
    ) -> None:
        self.tenant_id = tenant_id
        self.needed_s = needed_s
        """On an idle fleet, as predicted when it came; 0 if unknown, or compared already."""
        self.begin_time = begin_time
        self.begin_run_seconds = begin_run_seconds
        """Of all runs, up to then."""
        self.num_open = 0
        """Calls made and not yet ended."""
        self.end_time = 0.0
        """Of the call that ended last."""
        self.goes_on = True
        """Whether calls are expected to follow."""
        self.is_counted = False
        self.is_final = False
        """Its client has said that it is over; calls made beside the last one may be open."""


@final
class _Open:
    """A call that has not ended."""

    __slots__ = ("run_seconds", "time")

    def __init__(self, time: float, run_seconds: float) -> None:
        self.time = time
        self.run_seconds = run_seconds
        """Of all runs, up to then."""


@final
class Pace:
    """Follows the runs under way. Every step costs the same however many they are."""

    def __init__(self) -> None:
        self.num_runs = 0
        """Runs with a call under way, or soon to make one."""
        self.num_runs_of: dict[str, int] = {}
        """The same by tenant, of those that have any."""
        self._runs: dict[_RunKey, _Run] = {}
        self._idle: OrderedDict[_RunKey, None] = OrderedDict()
        """Runs between two calls, the one that is so longest first."""
        self._over: OrderedDict[_RunKey, None] = OrderedDict()
        """Runs taken to be over, likewise: how long they were not could still be learned."""
        self._calls: dict[str, _Open] = {}
        self._time = -_INF
        self._run_seconds = 0.0
        self._gap_s = 0.0
        self._lost_s = 0.0
        """Time that calls took longer than alone, faded."""
        self._beside_s = 0.0
        """Service of calls times the runs beside them, faded."""
        self._took_s = 0.0
        """Time that runs took from when they began, faded."""
        self._expected_s = 0.0
        """What was expected of the same, faded."""
        self._sharing: dict[str, tuple[float, float]] = {}
        """Instance -> what a call adds to each one beside it, and what it takes alone."""
        self._num_instances = 1

    def __len__(self) -> int:
        """Runs that are remembered."""
        return len(self._runs)

    def __contains__(self, key: _RunKey) -> bool:
        return key in self._runs

    @property
    def is_unused(self) -> bool:
        """Whether no run is under way and no call is open."""
        return not self.num_runs and not self._calls

    @property
    def next_expiry(self) -> float:
        """Instant at which the first run that makes no call is taken to be over; `inf` if none."""
        for key in self._idle:
            return self._runs[key].end_time + self._patience_s
        return _INF

    @property
    def _patience_s(self) -> float:
        patience_s = 1.0 + 4.0 * self._gap_s
        return patience_s if patience_s < MAX_IDLE_S else MAX_IDLE_S

    def tick(self, now: float) -> None:
        """Let time pass: runs that have made no call for long are over."""
        if now > self._time:
            if self.num_runs:
                self._run_seconds += self.num_runs * (now - self._time)
            self._time = now
        patience_s = self._patience_s
        while self._idle:
            key = next(iter(self._idle))
            run = self._runs[key]
            if run.end_time + patience_s > now:
                break
            del self._idle[key]
            self._over[key] = None
            self._count(run, False)
        while self._over:
            key = next(iter(self._over))
            if self._runs[key].end_time + MAX_IDLE_S > now:
                break
            del self._over[key], self._runs[key]

    def opened(
        self, key: _RunKey, request: StageRequest, now: float, needed_s: float = 0.0
    ) -> None:
        """Note that a run makes a call, or that one begins. Safe to call twice.

        Args:
            key: Of the run.
            request: The call.
            now: Instant.
            needed_s: What a run that begins is predicted to need on an idle fleet; 0 if unknown.
        """
        if request.request_id in self._calls:
            return
        self.tick(now)
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = _Run(key[0], needed_s, now, self._run_seconds)
        elif not run.num_open:
            self._idle.pop(key, None)
            self._over.pop(key, None)
            gap_s = now - run.end_time
            if gap_s < MAX_IDLE_S:
                self._gap_s += _GAP_RATE * (gap_s - self._gap_s)
        self._count(run, True)
        run.num_open += 1
        self._calls[request.request_id] = _Open(now, self._run_seconds)

    def bound(self, candidate: Candidate, num_instances: int) -> None:
        """Note what a call is predicted to add to those beside it.

        Args:
            candidate: Where it starts.
            num_instances: Those there are.
        """
        self._num_instances = num_instances
        if candidate.num_outstanding > 0 and candidate.alone_s > 0.0:
            adds_s, alone_s = self._sharing.get(candidate.instance_id, (0.0, 0.0))
            keep = 1.0 - _SHARING_RATE
            self._sharing[candidate.instance_id] = (
                keep * adds_s + candidate.harm_s / candidate.num_outstanding,
                keep * alone_s + candidate.alone_s,
            )

    def closed(
        self, key: _RunKey, request: StageRequest, *, end_time: float, idle_s: float, ok: bool
    ) -> None:
        """Note that a call ended.

        Args:
            key: Of its run.
            request: The call.
            end_time: When; ignored unless `ok`.
            idle_s: Its service on an idle fleet, for the tokens it turned out to have.
            ok: It ended well.
        """
        opened = self._calls.pop(request.request_id, None)
        run = self._runs.get(key)
        if opened is None or run is None:
            return
        run.num_open -= 1
        if ok:
            self.tick(end_time)
            self._learn(opened, end_time, idle_s)
            run.end_time = end_time
            run.goes_on = request.rest_s > 0.0
        run.is_final |= request.final
        if not run.num_open:
            if ok and (run.is_final or not run.goes_on):
                self._compare(run, request)
            if run.is_final or not request.workflow_id:
                self._count(run, False)
                del self._runs[key]
                return
            if not ok:
                run.end_time = max(run.end_time, self._time)
            if run.goes_on:
                self._idle[key] = None
            else:
                self._over[key] = None
                self._count(run, False)
            self._forget()

    def stretch(self, needed_s: float) -> float:
        """Time that runs which have ended took over what was expected of them.

        Calls side by side that have to share instances, gaps between calls, lengths that were
        declared wrong.

        Args:
            needed_s: What a run needs on an idle fleet: says how much was seen.
        """
        prior_s = _PRIOR_ENDS * needed_s
        weight = self._expected_s + prior_s
        return (self._took_s + prior_s) / weight if weight > 0.0 else 1.0

    def slowdown(self, num_runs: float, needed_s: float = 0.0) -> float:
        """Time that calls take over what they would alone, with so many runs under way.

        Args:
            num_runs: Itself included.
            needed_s: What a run needs on an idle fleet: says how much was seen.
        """
        return 1.0 + self.slope(needed_s) * max(0, num_runs - 1)

    def slope(self, needed_s: float = 0.0) -> float:
        """What each run adds to the slowdown of the others."""
        prior_s = _PRIOR_RUNS * needed_s * max(1, self.num_runs)
        weight = self._beside_s + prior_s
        if weight <= 0.0:
            return self._predicted_slope()
        return max(0.0, (self._lost_s + prior_s * self._predicted_slope()) / weight)

    def _predicted_slope(self) -> float:
        """From latency models alone, as if each instance got its share of the calls."""
        paces = [alone_s / adds_s for adds_s, alone_s in self._sharing.values() if adds_s > 0.0]
        if not paces:
            return 0.0
        # Those that no call has shared yet are taken to be like the others.
        pace = sum(paces) * max(1.0, self._num_instances / len(paces))
        return max(1.0, len(self._calls) / max(1, self.num_runs)) / pace

    def _learn(self, opened: _Open, end_time: float, idle_s: float) -> None:
        took_s = end_time - opened.time
        if took_s <= 0.0 or idle_s <= 0.0:
            return
        num_runs = (self._run_seconds - opened.run_seconds) / took_s
        keep = max(0.0, 1.0 - idle_s / _MEMORY_S)
        self._lost_s = keep * self._lost_s + took_s - idle_s
        self._beside_s = keep * self._beside_s + idle_s * max(0.0, num_runs - 1.0)

    def _compare(self, run: _Run, request: StageRequest) -> None:
        """Learn from a run that seems to be over how much longer runs take than expected.

        Only from those that began when they came: of those that had to wait, the longer their
        promise the more begin, and long promises are made to long runs. Past its deadline nobody
        hurries a run any more, so of one that was late as much counts as would have made it late,
        or as was expected if that is more.
        """
        took_s, left_s, needed_s = (
            run.end_time - run.begin_time,
            request.deadline - run.begin_time,
            run.needed_s,
        )
        run.needed_s = 0.0
        held_s = run.begin_time - request.run_arrival_time
        if took_s <= 0.0 or needed_s <= 0.0 or held_s > _MAX_HELD_SHARE * (left_s + held_s):
            return
        num_runs = (self._run_seconds - run.begin_run_seconds) / took_s
        expected_s = needed_s * self.slowdown(num_runs, needed_s)
        keep = 1.0 - _END_RATE
        self._took_s = keep * self._took_s + min(took_s, max(left_s, expected_s))
        self._expected_s = keep * self._expected_s + expected_s

    def _count(self, run: _Run, is_counted: bool) -> None:
        if run.is_counted == is_counted:
            return
        step = 1 if is_counted else -1
        self.num_runs += step
        run.is_counted = is_counted
        num_runs = self.num_runs_of.get(run.tenant_id, 0) + step
        if num_runs:
            self.num_runs_of[run.tenant_id] = num_runs
        else:
            del self.num_runs_of[run.tenant_id]

    def _forget(self) -> None:
        """Keep within bounds: the run longest without a call goes, first of those that are over."""
        while len(self._idle) + len(self._over) > MAX_IDLE_RUNS:
            key, _ = (self._over or self._idle).popitem(last=False)
            self._count(self._runs.pop(key), False)
