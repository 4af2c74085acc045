"""How long runs go on after each of their stages, learned from the runs themselves.

What a run still had to do after a call is the longest path of calls and gaps that followed it, of
an idle fleet: service as it would be alone, and what the client does between calls. It is known
when the run is over, see `run_path`. What a loaded fleet adds is for the policy to decide.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from vllm_workflow.core.histogram import Histogram
from vllm_workflow.core.lengths import Mean
from vllm_workflow.core.run_path import RunPath
from vllm_workflow.core.types import StageRequest

MAX_RUNS: Final = 20_000
"""Runs followed at a time: their names come from clients."""
MAX_IDLE_RUNS: Final = 4_096
"""Of those, without a call in flight; beyond that the one idle longest is taken to be over."""
MAX_CALLS: Final = 1 << 17
"""Ended calls of those runs that are kept."""
MAX_STAGES: Final = 4_096
"""Of all workflows; the one longest without news is forgotten."""
MAX_ROUND: Final = 3
"""A stage entered again is another state, up to so many rounds: loops tire."""
MIN_ENDED: Final = 8
"""Calls whose rest is known before it is believed."""
OVER_AFTER_S: Final = 60.0
"""A run without a call in flight for this long is taken to be over."""

State = tuple[str, str, str, int]
"""Tenant, workflow, stage, and how many calls of the stage come before on the path."""
_RunKey = tuple[str, str, str]
"""Tenant, workflow, run."""
_RECOMPUTED_EVERY: Final = 16
"""Values after which a quantile is computed anew: it changes slowly, costs time."""

Learn = Callable[[str, str, RunPath], None]
"""Gets tenant, workflow and calls of each run that is over."""


class _Rest:
    """What was left of runs in one state."""

    __slots__ = ("_asked", "_quantile_s", "mean", "values")

    def __init__(self, values: Histogram, mean: Mean) -> None:
        self.values = values
        self.mean = mean
        """The same number as `values.mean` would be, at hand for every call."""
        self._asked: tuple[float, int] | None = None
        self._quantile_s = 0.0

    def add(self, rest_s: float) -> None:
        self.values.add(rest_s)
        self.mean.add(rest_s)

    def expected_s(self, quantile: float) -> float:
        """Return the mean, or what a share `quantile` of the runs did not exceed."""
        if quantile <= 0.0:
            return self.mean.value
        asked = quantile, self.values.num_values // _RECOMPUTED_EVERY
        if asked != self._asked:
            self._asked = asked
            self._quantile_s = self.values.quantile(quantile) or 0.0
        return self._quantile_s


class RemainingTime:
    """Learns from calls in the order in which they are settled.

    Args:
        learn: Called with each run that is over.
    """

    def __init__(self, learn: Learn | None = None) -> None:
        self._rests: OrderedDict[State, _Rest] = OrderedDict()
        self.changed: set[State] = set()
        """Of which something was learned since somebody emptied this."""
        self._runs: OrderedDict[_RunKey, RunPath] = OrderedDict()
        self._num_calls = self._num_idle = 0
        self._learn_run = learn

    def after(self, request: StageRequest, quantile: float = 0.0) -> float | None:
        """Seconds that a run is expected to go on after a call; None if too little is known.

        Args:
            request: The call, about to be made.
            quantile: 0 for the mean, else what that share of the runs did not exceed.
        """
        if not request.workflow:
            return None
        run = self._runs.get((request.tenant_id, request.workflow, request.workflow_id))
        num_before = run.num_before(request.stage) if run is not None else 0
        state = (request.tenant_id, request.workflow, request.stage, min(num_before, MAX_ROUND))
        rest = self._rests.get(state)
        if rest is None or rest.values.num_values < MIN_ENDED:
            return None
        return rest.expected_s(quantile)

    def began(self, request: StageRequest) -> None:
        """Note that a call of a run has been made."""
        if not request.workflow_id or not request.workflow:
            return  # sessions have no stages to learn from
        key = (request.tenant_id, request.workflow, request.workflow_id)
        run = self._runs.get(key)
        if run is not None and (
            not run.in_flight and request.arrival_time - run.end_time > OVER_AFTER_S
        ):
            # Somebody came back to it: another run, as far as time goes.
            self._over(key)
            run = None
        if run is None:
            run = self._runs[key] = RunPath(request.arrival_time)
            if len(self._runs) > MAX_RUNS or self._num_calls > MAX_CALLS:
                self._over(next(iter(self._runs)))
        elif not run.in_flight:
            self._num_idle -= 1
        run.began(request.request_id, request.stage, request.arrival_time)

    def ended(self, request: StageRequest, *, end_time: float, alone_s: float, ok: bool) -> None:
        """Note that a call of a run has ended.

        Args:
            request: The call.
            end_time: When; `nan` unless it ended well.
            alone_s: Its service on its instance, had it been alone there.
            ok: It ended well.
        """
        key = (request.tenant_id, request.workflow, request.workflow_id)
        run = self._runs.get(key)
        if run is None:
            return
        was_busy = bool(run.in_flight)
        if ok:
            self._num_calls -= len(run.ended)
            run.finished(request.request_id, end_time=end_time, alone_s=alone_s)
            self._num_calls += len(run.ended)
            run.is_final |= request.final
        else:
            run.failed(request.request_id)
        if not run.in_flight and was_busy:
            self._num_idle += 1
        if run.is_final and not run.in_flight:
            self._over(key)
        elif ok:
            self._runs.move_to_end(key)
        if ok:
            self._forget_idle(end_time - OVER_AFTER_S)

    def _forget_idle(self, before: float) -> None:
        """Take the runs whose last call ended long ago to be over, a few at a time."""
        for _ in range(2):
            key = next(iter(self._runs), None)
            if key is None:
                return
            run = self._runs[key]
            if run.in_flight:
                self._runs.move_to_end(key)
            elif run.end_time < before or self._num_idle > MAX_IDLE_RUNS:
                self._over(key)
            else:
                return

    def _over(self, key: _RunKey) -> None:
        """Learn from a run and forget it."""
        run = self._runs.pop(key)
        self._num_idle -= not run.in_flight
        self._num_calls -= len(run.ended)
        tenant, workflow, _ = key
        for call, rest_s in zip(run.ended, run.rests_s()):
            self._learn((tenant, workflow, call.stage, min(call.num_before, MAX_ROUND)), rest_s)
        if self._learn_run is not None:
            self._learn_run(tenant, workflow, run)

    def _learn(self, state: State, rest_s: float) -> None:
        rest = self._rests.get(state)
        if rest is None:
            rest = self._rests[state] = _Rest(Histogram(), Mean(0.0, weight=0.0))
            if len(self._rests) > MAX_STAGES:
                self.changed.discard(self._rests.popitem(last=False)[0])
        else:
            self._rests.move_to_end(state)
        rest.add(rest_s)
        self.changed.add(state)

    def mark_changed(self) -> None:
        """Have all count as changed."""
        self.changed.update(self._rests)

    def items(self) -> Iterator[tuple[State, Histogram]]:
        """What was learned, the state longest without news first."""
        for state, rest in self._rests.items():
            yield state, rest.values

    def to_rows(self) -> list[list[Any]]:
        """Return what `restore` takes, one row per state."""
        return [row for state in self._rests if (row := self.row(state)) is not None]

    def row(self, state: State) -> list[Any] | None:
        """Return the row of one state; None if nothing is known of it."""
        rest = self._rests.get(state)
        if rest is None:
            return None
        return [*state, {**rest.values.to_mapping(), "mean": [rest.mean.value, rest.mean.weight]}]

    def restore(self, state: State, row: Mapping[str, Any]) -> None:
        """Take in what an earlier process had learned.

        Raises:
            KeyError, TypeError, ValueError: `row` is not from `to_rows`.
        """
        value, weight = row["mean"]
        mean = Mean(float(value), float(weight))
        self._rests[state] = _Rest(Histogram.from_mapping(row), mean)
        if len(self._rests) > MAX_STAGES:
            self._rests.popitem(last=False)
