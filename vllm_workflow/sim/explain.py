"""Why the calls of one run went where they did, from a decision log."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_workflow.core.call_events import Polled, Settled, Submitted, Withdrawn
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatch import build
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import Event, Started, Swapped, from_json
from vllm_workflow.core.types import Candidate, Decision, Outcome, StageRequest
from vllm_workflow.sim.fields import Place

_STATELESS = frozenset({"hexgen", "least-outstanding", "predicted-finish"})
"""Dispatch rules whose cost of every candidate can be computed again from one decision."""
_MAX_NEAR = 5

_Line = tuple[Place, Mapping[str, Any]]


@dataclass(slots=True, kw_only=True)
class Attempt:
    """A call on its way to one instance."""

    submit_time: float
    """Instant at which the dispatcher was asked."""
    policy: PolicyConfig
    """In force when it was decided."""
    exclude: tuple[str, ...] = ()
    """Instances that had failed before."""
    decide_time: float = math.nan
    decision: Decision | None = None
    """None: it was given up while it waited, or waits still."""
    outcome: Outcome | None = None
    withdrawn: bool = False

    @property
    def wait_s(self) -> float:
        """In the router, until it was decided."""
        return self.decide_time - self.submit_time

    @property
    def costs(self) -> list[float | None]:
        """Of each candidate; None where the rule's state then is not known, save the chosen."""
        if self.decision is None:
            return []
        decision = self.decision
        if self.policy.dispatch in _STATELESS:
            return list(build(self.policy).costs(_ANY, decision.candidates))
        return [decision.cost if c == decision.chosen else None for c in decision.candidates]


@dataclass(slots=True, kw_only=True)
class Call:
    """One call of the run, with its attempts in order."""

    request: StageRequest
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def outcome(self) -> Outcome | None:
        """Of the last attempt, None while it is under way."""
        return self.attempts[-1].outcome

    @property
    def end_time(self) -> float:
        """`nan` unless it ended well."""
        last = self.attempts[-1]
        return last.decide_time + last.outcome.e2el_s if last.outcome else math.nan


@dataclass(slots=True, kw_only=True)
class Run:
    """A run as the log tells it."""

    workflow_id: str
    tenant_id: str
    calls: list[Call] = field(default_factory=list)
    """In the order in which they came."""

    @property
    def arrival_time(self) -> float:
        return min(
            min(c.request.arrival_time, c.request.run_arrival_time)
            if math.isfinite(c.request.run_arrival_time)
            else c.request.arrival_time
            for c in self.calls
        )

    @property
    def deadline(self) -> float:
        """As the last call had it."""
        return self.calls[-1].request.deadline

    @property
    def end_time(self) -> float:
        """Of its last good answer; `nan` if there was none."""
        ends = [call.end_time for call in self.calls if math.isfinite(call.end_time)]
        return max(ends, default=math.nan)


_ANY = StageRequest(request_id="", arrival_time=0.0)
"""No rule of `_STATELESS` reads the request."""


def explain(lines: Iterable[_Line], run_id: str, *, source: str) -> list[Run]:
    """Return the runs of that name, one for each tenant and life of the router that has one.

    Args:
        lines: Of a log, parsed.
        run_id: `workflow_id`; the `request_id` of a call that belongs to no run.
        source: Name of the log, for errors.

    Raises:
        ConfigError: There is none: with the names that are most like it; or a line that is no
            event.
    """
    reading = _Reading(run_id)
    for place, data in lines:
        if reading.wants(data):
            try:
                event = from_json(json.dumps(data))
            except ConfigError as e:
                raise ConfigError(f"{place}: {e}") from None
            reading.take(event)
    if not reading.runs:
        raise ConfigError(_unknown(run_id, sorted(reading.known), source))
    return list(reading.runs.values())


class _Reading:
    """What has been read so far."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._policy = PolicyConfig()
        self._life = 0
        self._calls: dict[str, Call] = {}
        self.runs: dict[tuple[int, str], Run] = {}
        self.known: set[str] = set()

    def wants(self, data: Mapping[str, Any]) -> bool:
        """Whether an event has to do with the run; the rest is not worth building."""
        match data.get("event"):
            case "started" | "swapped":
                return True
            case "submitted":
                request = data.get("request")
                if not isinstance(request, dict):
                    return True
                name = request.get("workflow_id") or request.get("request_id")
                if isinstance(name, str):
                    self.known.add(name)
                return name == self._run_id
            case "polled":
                decisions = data.get("decisions")
                return isinstance(decisions, list) and any(
                    isinstance(d, dict) and d.get("request_id") in self._calls for d in decisions
                )
            case "withdrawn":
                return data.get("request_id") in self._calls
            case "settled":
                outcome = data.get("outcome")
                return isinstance(outcome, dict) and outcome.get("request_id") in self._calls
        return False

    def take(self, event: Event) -> None:
        match event:
            case Started():
                self._policy = event.policy
                self._life += 1
                self._calls.clear()
            case Swapped():
                self._policy = event.policy
            case Submitted():
                self._submitted(event)
            case Polled():
                for decision in event.decisions:
                    if decision.request_id in self._calls:
                        self._decided(self._calls[decision.request_id], decision, event.now)
            case Withdrawn():
                self._calls[event.request_id].attempts[-1].withdrawn = True
            case Settled():
                self._calls[event.outcome.request_id].attempts[-1].outcome = event.outcome

    def _submitted(self, event: Submitted) -> None:
        request = event.request
        call = self._calls.get(request.request_id)
        if call is None:
            call = self._calls[request.request_id] = Call(request=request)
            key = (self._life, request.tenant_id)
            run = self.runs.get(key)
            if run is None:
                run = self.runs[key] = Run(workflow_id=self._run_id, tenant_id=request.tenant_id)
            run.calls.append(call)
        call.attempts.append(
            Attempt(submit_time=event.now, policy=self._policy, exclude=event.exclude)
        )
        if event.decision is not None:
            self._decided(call, event.decision, event.now)

    def _decided(self, call: Call, decision: Decision, now: float) -> None:
        attempt = call.attempts[-1]
        attempt.decide_time = now
        attempt.decision = decision
        attempt.policy = self._policy


def _unknown(run_id: str, known: Sequence[str], source: str) -> str:
    near = difflib.get_close_matches(run_id, known, n=_MAX_NEAR, cutoff=0.4)
    text = f"{source}: no run {run_id!r} among {len(known)}"
    return f"{text}; most like it: {near}" if near else text


def reason(attempt: Attempt) -> str:
    """Say in one line why the chosen candidate was chosen."""
    decision = attempt.decision
    if decision is None:
        return "given up while it waited" if attempt.withdrawn else "waits"
    chosen, candidates = decision.chosen, decision.candidates
    if len(candidates) == 1:
        return "the only instance that could take it"
    rule = attempt.policy.dispatch
    if rule not in _STATELESS:
        return f"{rule}: not by cost in seconds alone"
    costs = dict(zip((c.instance_id for c in candidates), attempt.costs, strict=True))
    own = costs[chosen.instance_id] or 0.0
    better = [c for c in candidates if (costs[c.instance_id] or 0.0) < own]
    if better:
        best = min(better, key=lambda c: costs[c.instance_id] or 0.0)
        less = own - (costs[best.instance_id] or 0.0)
        why = (
            f"has room only in {best.queue_s:.3g} s"
            if best.queue_s > 0.0
            else "is kept for another"
        )
        return f"it can start there now; {best.instance_id} would cost {less:.3g} less but {why}"
    others = [c for c in candidates if c.instance_id != chosen.instance_id]
    second = min(others, key=lambda c: costs[c.instance_id] or 0.0)
    more = (costs[second.instance_id] or 0.0) - own
    if more == 0.0:
        return f"as good as {second.instance_id}, and named first"
    return f"least cost: {second.instance_id} would cost {more:.3g} more{_mostly(chosen, second)}"


def _mostly(chosen: Candidate, second: Candidate) -> str:
    """Name the part of the cost that differs most."""
    parts = {
        name: getattr(second, name) - getattr(chosen, name)
        for name in ("queue_s", "prefill_s", "decode_s", "harm_s")
    }
    name = max(parts, key=lambda part: abs(parts[part]))
    if parts[name] == 0.0:
        return ""
    return f", mostly {name.removesuffix('_s')} ({parts[name]:+.3g} s)"
