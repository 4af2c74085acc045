"""The runs that are under way: when each must end, and how it ended."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

from vllm_workflow.router.wire import RunInfo

MAX_IDLE_RUNS = 4_096
IDLE_TTL_S = 900.0
IDLE_S = 60.0

RunKey = tuple[str, str]
"""(tenant, workflow_id): a tenant cannot touch the run of another one."""


def over_at(last_time: float, deadline: float) -> float:
    """Instant at which a run without a call under way is taken to have ended.

    After a minute, but not before its deadline, until when its next call could still be on time;
    after a quarter of an hour anyhow.

    Args:
        last_time: Instant at which its last call ended.
        deadline: Of the run; `inf` if nothing was promised.
    """
    if deadline == math.inf:
        return last_time + IDLE_S
    return min(max(last_time + IDLE_S, deadline), last_time + IDLE_TTL_S)


class Run:
    """One run as the router has seen it."""

    __slots__ = (
        "arrival_time",
        "deadline",
        "is_final",
        "is_over",
        "last_ok",
        "last_time",
        "num_open",
        "span",
        "tenant_id",
        "workflow",
    )

    def __init__(self, workflow: str, arrival_time: float, tenant_id: str) -> None:
        self.workflow = workflow
        self.arrival_time = arrival_time
        """Instant of the first call."""
        self.tenant_id = tenant_id
        self.deadline = math.inf
        self.num_open = 0
        """Calls under way."""
        self.last_time = 0.0
        """Instant at which a call last began or ended."""
        self.last_ok = True
        """Whether the call that ended last ended well."""
        self.is_final = False
        """Whether a call that said to be its last one has ended well."""
        self.is_over = False
        """Whether it was told that it has ended. It may go on, and is not told again."""
        self.span: object = None
        """Of whoever traces runs."""

    @property
    def met(self) -> bool:
        """Whether the last answer was a good one and came in time."""
        return self.last_ok and self.last_time <= self.deadline


class Runs:
    """Remembers runs from their first call until the final one, or until idle too long.

    Where several final calls run side by side, or others beside one, the last to end is the end.

    Args:
        on_end: Called once with each run that has ended: when its final call has, or when it is
            taken to have, see `over_at`.
        max_idle: Runs without a call under way remembered at most, the one idle longest goes
            first; those with one are as many as there are calls.
        ttl_s: A run without a call for this long is forgotten, its deadline too.
    """

    def __init__(
        self,
        on_end: Callable[[Run], None],
        *,
        max_idle: int = MAX_IDLE_RUNS,
        ttl_s: float = IDLE_TTL_S,
    ) -> None:
        self._on_end = on_end
        self._max_idle = max_idle
        self._ttl_s = ttl_s
        self._runs: dict[RunKey, Run] = {}
        """With a call under way."""
        self._idle: OrderedDict[RunKey, Run] = OrderedDict()
        """Without one, the run that is so longest first."""

    def __len__(self) -> int:
        return len(self._runs) + len(self._idle)

    def begin(self, info: RunInfo, now: float) -> Run:
        """Note that a call begins; `end` must follow. Returns its run.

        A budget sets the deadline anew, and beside an SLO tells when the run began. An SLO alone
        counts from the first call, and only where no deadline is known yet. A call without an id
        is a run of its own and not remembered.
        """
        key = (info.tenant_id, info.workflow_id)
        run = None
        if info.workflow_id:
            run = self._runs.get(key) or self._idle.pop(key, None)
        if run is None:
            run = Run(info.workflow, now, info.tenant_id)
        if info.workflow_id:
            self._runs[key] = run
        if info.workflow:
            run.workflow = info.workflow
        if info.budget_ms is not None:
            run.deadline = now + info.budget_ms / 1000.0
            if info.slo_ms is not None:  # so its age is known, whoever had its calls before
                age_s = max(0.0, info.slo_ms - info.budget_ms) / 1000.0
                run.arrival_time = min(run.arrival_time, now - age_s)
        elif info.slo_ms is not None and run.deadline == math.inf:
            run.deadline = run.arrival_time + info.slo_ms / 1000.0
        run.num_open += 1
        run.last_time = now
        return run

    def end(self, info: RunInfo, run: Run, now: float, *, ok: bool) -> None:
        """Note that a call ended. A final one that failed may be tried again: the run stays."""
        run.num_open -= 1
        run.last_time = now
        run.last_ok = ok
        run.is_final |= info.final and ok
        if run.num_open:
            return
        key = (info.tenant_id, info.workflow_id)
        self._runs.pop(key, None)
        if run.is_final or not info.workflow_id:
            self._end(run)
        else:
            self._idle[key] = run
            self._forget(now)

    def expire(self, now: float) -> None:
        """Tell of the runs that are taken to have ended; forget old ones, and too many."""
        for run in self._idle.values():
            if over_at(run.last_time, run.deadline) <= now:
                self._end(run)
        self._forget(now)

    def _forget(self, now: float) -> None:
        idle = self._idle
        while idle:
            oldest = next(iter(idle.values()))
            if len(idle) <= self._max_idle and oldest.last_time + self._ttl_s > now:
                return
            idle.popitem(last=False)
            self._end(oldest)

    def _end(self, run: Run) -> None:
        if not run.is_over:
            run.is_over = True
            self._on_end(run)
