"""How long runs go on after each of their stages, learned from the runs themselves.

A run is seen as a walk from one ended call to the next that ends later, which is its critical
path as it turns out. When a run is over, each stage that it passed learns how much longer it
went on. Nothing is inferred from stages that are themselves not known yet, so what is believed
is right from the first runs on; no graph is declared.
Times are those of an idle fleet: service as it would be alone, and gaps between calls. What a
loaded fleet adds is for the policy to decide.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from vllm_workflow.core.types import StageRequest

MAX_RUNS = 20_000
"""Runs followed at a time: their names come from clients."""
MAX_STAGES = 4_096
"""Of all workflows; the one longest without news is forgotten."""
MAX_STAGES_OF_RUN = 64
MAX_ROUND = 3
"""A stage entered again is another state, up to so many rounds: loops tire."""
MIN_ENDED = 8
"""Runs seen to pass a state and end before its value is believed."""
OVER_AFTER_S = 60.0
"""A run without a call in flight for this long is taken to be over."""
_MIN_RATE = 0.05

_State = tuple[str, str, str, int]
"""Tenant, workflow, stage, and which round of it in the run."""
_RunKey = tuple[str, str]


@dataclass(slots=True)
class _Node:
    num_ended: float = 0.0
    """Runs that have been in the state and ended, faded."""
    rest_s: float = 0.0
    """Mean of what they went on for."""


@dataclass(slots=True)
class _Run:
    end_time: float
    """Of the call that ended last."""
    num_in_flight: int = 0
    rounds: dict[str, int] = field(default_factory=dict)
    total_s: float = 0.0
    """Idle-fleet time from its beginning to the call that ended last."""
    passed: list[tuple[_State, float]] = field(default_factory=list)
    """States it has been in, and `total_s` then."""


class RemainingTime:
    """Learns from calls in the order in which they are settled."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[_State, _Node] = OrderedDict()
        self._runs: OrderedDict[_RunKey, _Run] = OrderedDict()

    def after(self, request: StageRequest) -> float | None:
        """Seconds that a run is expected to go on after a call; None if too little is known."""
        if not request.workflow:
            return None
        run = self._runs.get((request.tenant_id, request.workflow_id))
        node = self._nodes.get(_state(request, run))
        if node is None or node.num_ended < MIN_ENDED:
            return None
        return node.rest_s

    def began(self, request: StageRequest) -> None:
        """Note that a call of a run has been made."""
        if not request.workflow_id or not request.workflow:
            return  # sessions have no stages to learn from
        key = (request.tenant_id, request.workflow_id)
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = _Run(request.arrival_time)
            if len(self._runs) > MAX_RUNS:
                _, oldest = self._runs.popitem(last=False)
                self._over(oldest)
        run.num_in_flight += 1

    def ended(self, request: StageRequest, *, end_time: float, alone_s: float, ok: bool) -> None:
        """Note that a call of a run has ended.

        Args:
            request: The call.
            end_time: When; `nan` unless it ended well.
            alone_s: Its service on its instance, had it been alone there.
            ok: It ended well.
        """
        key = (request.tenant_id, request.workflow_id)
        run = self._runs.get(key)
        if run is None:
            return
        run.num_in_flight -= 1
        if not ok:
            return
        if end_time > run.end_time:
            gap_s = request.arrival_time - run.end_time
            if gap_s > OVER_AFTER_S:  # somebody came back to it: another run, as far as time goes
                self._over(run)
                run.end_time, run.total_s = request.arrival_time, 0.0
                run.rounds.clear()
                run.passed.clear()
                gap_s = 0.0
            state = _state(request, run)
            # Of a call that ran beside the last one, only what it took longer counts.
            took_s = gap_s + alone_s if gap_s >= 0.0 else min(alone_s, end_time - run.end_time)
            run.total_s += took_s
            run.end_time = end_time
            if len(run.passed) < MAX_STAGES_OF_RUN:
                run.passed.append((state, run.total_s))
        if request.stage in run.rounds or len(run.rounds) < MAX_STAGES_OF_RUN:
            run.rounds[request.stage] = run.rounds.get(request.stage, 0) + 1
        self._runs.move_to_end(key)
        if request.final:
            self._over(run)
            del self._runs[key]
        self._forget_idle(end_time - OVER_AFTER_S)

    def _forget_idle(self, before: float) -> None:
        """Take the runs whose last call ended long ago to be over, a few at a time."""
        for _ in range(2):
            key = next(iter(self._runs), None)
            if key is None:
                return
            run = self._runs[key]
            if run.num_in_flight > 0:
                self._runs.move_to_end(key)
            elif run.end_time < before:
                del self._runs[key]
                self._over(run)

    def _over(self, run: _Run) -> None:
        """Learn from a run that has ended."""
        for state, total_s in run.passed:
            node = self._nodes.get(state)
            if node is None:
                node = self._nodes[state] = _Node()
                if len(self._nodes) > MAX_STAGES:
                    self._nodes.popitem(last=False)
            self._nodes.move_to_end(state)
            node.num_ended += 1.0
            rate = max(_MIN_RATE, 1.0 / node.num_ended)
            node.rest_s += rate * (run.total_s - total_s - node.rest_s)


def _state(request: StageRequest, run: _Run | None) -> _State:
    num_before = run.rounds.get(request.stage, 0) if run else 0
    return (request.tenant_id, request.workflow, request.stage, min(num_before, MAX_ROUND))
