"""How runs of a workflow go from stage to stage, learned from runs that are over."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Final

from vllm_workflow.core.run_path import RunPath

MAX_WORKFLOWS: Final = 1024
"""Of all tenants; the one longest without a run is forgotten."""
MAX_STAGES: Final = 64
"""Of one workflow."""
END: Final = ""
"""What follows a call that nothing follows; also where runs begin."""
_MEMORY: Final = 200.0
"""Runs after which older ones fade."""
_GROWTH: Final = _MEMORY / (_MEMORY - 1.0)
_MAX_INCREMENT: Final = 1e12

FlowKey = tuple[str, str]
"""Tenant, workflow."""


class StageFlow:
    """Sums over runs, of one stage; the newest run weighs most."""

    __slots__ = ("calls", "groups", "next", "rounds", "runs")

    def __init__(self) -> None:
        self.runs = 0.0
        """That entered it."""
        self.calls = 0.0
        self.groups = 0.0
        """Of calls that followed the same call: those of a fan-out are one."""
        self.rounds = 0.0
        """Calls that came one after another on one path, at most, per run."""
        self.next: dict[str, float] = {}
        """Stage -> calls that it followed."""

    def scale(self, factor: float) -> None:
        for name in ("runs", "calls", "groups", "rounds"):
            setattr(self, name, factor * getattr(self, name))
        self.next = {stage: factor * weight for stage, weight in self.next.items()}


class Flow:
    """Runs of one workflow of one tenant."""

    __slots__ = ("_increment", "runs", "stages")

    def __init__(self) -> None:
        self._increment = 1.0
        self.runs = 0.0
        self.stages: dict[str, StageFlow] = {}

    def learn(self, run: RunPath) -> None:
        """Count a run that is over."""
        if not run.ended:
            return
        weight = self._increment
        self.runs += weight
        rounds: dict[str, int] = {}
        groups: dict[tuple[int, str], int] = {}
        for call in run.ended:
            stage, group = call.stage, (call.after, call.stage)
            groups[group] = groups.get(group, 0) + 1
            if call.num_before >= rounds.get(stage, 0):
                rounds[stage] = call.num_before + 1
        for (after, stage), num_calls in groups.items():
            flow = self._stage(stage)
            if flow is not None:
                flow.calls += weight * num_calls
                flow.groups += weight
            self._followed(run.ended[after].stage if after >= 0 else END, stage, weight)
        self._followed(run.ended[-1].stage, END, weight)
        for stage, number in rounds.items():
            flow = self._stage(stage)
            if flow is not None:
                flow.runs += weight
                flow.rounds += weight * number
        self._increment = weight * _GROWTH
        if self._increment > _MAX_INCREMENT:
            self._shrink()

    def _stage(self, name: str) -> StageFlow | None:
        flow = self.stages.get(name)
        if flow is None and len(self.stages) < MAX_STAGES:
            flow = self.stages[name] = StageFlow()
        return flow

    def _followed(self, stage: str, by: str, weight: float) -> None:
        flow = self._stage(stage)
        if flow is not None and (by in flow.next or len(flow.next) < MAX_STAGES):
            flow.next[by] = flow.next.get(by, 0.0) + weight

    def _shrink(self) -> None:
        """Take the newest weight as 1 again."""
        factor = 1.0 / self._increment
        self.runs *= factor
        self._increment = 1.0
        for flow in self.stages.values():
            flow.scale(factor)

    def stage(self, name: str) -> dict[str, Any]:
        """Tell means of one stage, for people."""
        flow = self.stages[name]
        num_next = sum(flow.next.values())
        return {
            "share_of_runs": _ratio(flow.runs, self.runs),
            "calls_per_run": _ratio(flow.calls, self.runs),
            "fan_out": _ratio(flow.calls, flow.groups),
            "rounds": _ratio(flow.rounds, flow.runs),
            "next": {by or "(end)": _ratio(w, num_next) for by, w in sorted(flow.next.items())},
        }

    def to_mapping(self) -> dict[str, Any]:
        """Return what `from_mapping` takes."""
        self._shrink()
        return {
            "runs": self.runs,
            "stages": {
                name: [flow.runs, flow.calls, flow.groups, flow.rounds, dict(flow.next)]
                for name, flow in self.stages.items()
            },
        }

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Flow:
        """Read back what was written.

        Raises:
            KeyError, TypeError, ValueError: `data` is not that.
        """
        made = cls()
        made.runs = float(data["runs"])
        for name, (runs, calls, groups, rounds, following) in dict(data["stages"]).items():
            flow = made.stages[str(name)] = StageFlow()
            flow.runs, flow.calls = float(runs), float(calls)
            flow.groups, flow.rounds = float(groups), float(rounds)
            flow.next = {str(by): float(weight) for by, weight in dict(following).items()}
        return made


class Transitions:
    """Flows of all workflows."""

    def __init__(self) -> None:
        self._flows: OrderedDict[FlowKey, Flow] = OrderedDict()
        self.changed: set[FlowKey] = set()
        """Of which something was learned since somebody emptied this."""

    def learn(self, tenant: str, workflow: str, run: RunPath) -> None:
        """Count a run that is over."""
        key = (tenant, workflow)
        flow = self._flows.get(key)
        if flow is None:
            flow = Flow()
            self.restore(key, flow)
        else:
            self._flows.move_to_end(key)
        flow.learn(run)
        self.changed.add(key)

    def get(self, key: FlowKey) -> Flow | None:
        return self._flows.get(key)

    def mark_changed(self) -> None:
        """Have all count as changed."""
        self.changed.update(self._flows)

    def items(self) -> Iterator[tuple[FlowKey, Flow]]:
        """The workflow longest without a run first."""
        return iter(self._flows.items())

    def restore(self, key: FlowKey, flow: Flow) -> None:
        """Take in what an earlier process had learned."""
        self._flows[key] = flow
        if len(self._flows) > MAX_WORKFLOWS:
            self.changed.discard(self._flows.popitem(last=False)[0])


def _ratio(one: float, other: float) -> float:
    return round(one / other, 3) if other else 0.0
