"""Runs that a router refused: a log holds their first call alone, so others stand in for them.

Whether a run is refused (`core.admission`) depends on when it comes and on what it is promised, not
on what it would have done. So a run of the same tenant and workflow that was promised about as much
tells what it would have been.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_workflow.sim.fields import Place, a_time, an_object, required
from vllm_workflow.sim.trace_decisions import LoggedRun
from vllm_workflow.sim.types import PrefixPart, TraceRun


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedRun:
    """What is known of a run that was refused."""

    arrival_time: float
    """On the clock of its router."""
    workflow: str
    tenant: str
    slo_s: float


def refused_runs(lines: Iterable[tuple[Place, Mapping[str, Any]]]) -> tuple[RefusedRun, ...]:
    """Return the runs that a part of a log says were refused, in its order.

    Raises:
        ConfigError: A field that does not fit.
    """
    first_calls: dict[object, RefusedRun] = {}
    found = []
    for place, data in lines:
        if data.get("event") == "submitted" and data.get("decision") is None:
            request = an_object(required(data, "request", place), place / "request")
            if request.get("deadline") is not None:
                first_calls[request.get("request_id")] = _refused(request, place / "request")
        elif data.get("event") == "withdrawn" and data.get("refused") is True:
            run = first_calls.pop(data.get("request_id"), None)
            if run is not None:
                found.append(run)
    return tuple(found)


def stand_ins(refused: Sequence[RefusedRun], donors: Sequence[LoggedRun]) -> tuple[TraceRun, ...]:
    """Return a run for each that was refused, made of one that was not; none without such.

    Each is promised what the refused one was. Equal promises take turns among the donors.

    Args:
        refused: What came.
        donors: Runs that are over, from the same log.
    """
    num_runs_with = Counter(part for each in donors for part in _parts(each.run))
    num_uses: Counter[str] = Counter()
    made = []
    for number, each in enumerate(refused, start=1):
        alike = [
            (_unlikeness(each, donor.run), num_uses[donor.run.run_id], place)
            for place, donor in enumerate(donors)
            if donor.run.slo_s is not None
        ]
        if not alike:
            return ()
        donor = donors[min(alike)[-1]]
        num_uses[donor.run.run_id] += 1
        offset_s = (donor.run.arrival_s or 0.0) - donor.arrival_time
        run_id = f"{donor.run.run_id}~refused-{number}"
        own = {part for part in _parts(donor.run) if num_runs_with[part] == 1}
        calls = []
        for call in donor.run.calls:
            prefix = tuple(_renamed(part, run_id) if part in own else part for part in call.prefix)
            calls.append(replace(call, prefix=prefix))
        made.append(
            TraceRun(
                run_id=run_id,
                workflow=each.workflow,
                calls=tuple(calls),
                arrival_s=max(0.0, each.arrival_time + offset_s),
                tenant=each.tenant,
                slo_s=each.slo_s,
            )
        )
    return tuple(made)


def _unlikeness(refused: RefusedRun, run: TraceRun) -> tuple[bool, bool, float]:
    assert run.slo_s is not None
    return (
        run.workflow != refused.workflow,
        run.tenant != refused.tenant,
        abs(run.slo_s - refused.slo_s),
    )


def _parts(run: TraceRun) -> set[PrefixPart]:
    return {part for call in run.calls for part in call.prefix}


def _renamed(part: PrefixPart, run_id: str) -> PrefixPart:
    """What only the donor's prompts shared is not what this run's share."""
    return replace(part, part_id=f"{part.part_id}/{run_id}")


def _refused(request: Mapping[str, Any], place: Place) -> RefusedRun:
    arrival_time = a_time(required(request, "arrival_time", place), place / "arrival_time")
    deadline = a_time(required(request, "deadline", place), place / "deadline")
    return RefusedRun(
        arrival_time=arrival_time,
        workflow=str(request.get("workflow", "")),
        tenant=str(request.get("tenant_id", "")),
        slo_s=max(0.0, deadline - arrival_time),
    )
