"""The trace format of this project.

One run per line, a JSON object with the fields of `TraceRun`; `docs/traces.md` describes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.fields import (
    Place,
    a_count,
    a_list,
    a_name,
    a_time,
    an_object,
    json_lines,
    known_keys,
    required,
)
from vllm_workflow.sim.types import PrefixPart, Trace, TraceCall, TraceRun

FORMAT_VERSION = 1
_HEADER = "vllm_workflow_trace"
_HEADER_FIELDS = frozenset({_HEADER, "source", "notes"})
_RUN_FIELDS = frozenset({"run_id", "workflow", "tenant", "slo_s", "arrival_s", "calls"})
_CALL_FIELDS = frozenset(
    {
        "call_id",
        "stage",
        "num_prompt_tokens",
        "num_output_tokens",
        "after",
        "gap_s",
        "prefix",
    }
)
_PART_FIELDS = frozenset({"part_id", "id", "num_tokens"})


def write_trace(path: Path, trace: Trace) -> None:
    """Write a trace, replacing the file.

    Raises:
        ConfigError: The file cannot be written.
    """
    header = {_HEADER: FORMAT_VERSION, "source": trace.source, "notes": list(trace.notes)}
    lines = [header, *map(_run_to_mapping, trace.runs)]
    try:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(line, allow_nan=False)}\n" for line in lines)
    except OSError as e:
        raise ConfigError(f"{path}: cannot write the trace: {e.strerror}") from None


def is_jsonl(first: Mapping[str, Any]) -> bool:
    """Whether a file that begins with this object is in the format of this module."""
    return _HEADER in first or not _RUN_FIELDS.isdisjoint(first)


def read_jsonl(text: str, source: str) -> Trace:
    """Read what `write_trace` wrote, or somebody else by `docs/traces.md`.

    Raises:
        ConfigError: With file, line, field, what was there and what was wanted.
    """
    lines = json_lines(text, source)
    runs: list[TraceRun] = []
    places: list[Place] = []
    notes: tuple[str, ...] = ()
    origin = Path(source).name
    for place, value in lines:
        data = an_object(value, place)
        if _HEADER in data and not places:
            origin, notes = _header(data, place, origin)
            continue
        runs.append(_run(data, place))
        places.append(place)
    check_runs(runs, places)
    if not runs:
        raise ConfigError(f"{source}: expected at least one run, got a header only")
    return Trace(runs=tuple(runs), source=origin, notes=notes)


def check_runs(runs: Sequence[TraceRun], places: Sequence[Place]) -> None:
    """Check what only shows between runs: ids and arrivals.

    Raises:
        ConfigError: A run id is there twice, arrivals go backwards, or only some runs have one.
    """
    seen: dict[str, Place] = {}
    latest = 0.0
    for run, place in zip(runs, places, strict=True):
        if run.run_id in seen:
            (place / "run_id").fail(
                f"an id of its own (line {seen[run.run_id].line} has it too)", run.run_id
            )
        seen[run.run_id] = place
        if (run.arrival_s is None) != (runs[0].arrival_s is None):
            have = "no arrival" if runs[0].arrival_s is None else "an arrival"
            (place / "arrival_s").fail(
                f"{have}, like the first run: all runs have one or none has", run.arrival_s
            )
        if run.arrival_s is not None:
            if run.arrival_s < latest:
                (place / "arrival_s").fail(
                    f"arrivals in order, so at least {latest!r}", run.arrival_s
                )
            latest = run.arrival_s


def _header(data: Mapping[str, Any], place: Place, origin: str) -> tuple[str, tuple[str, ...]]:
    known_keys(data, _HEADER_FIELDS, place)
    if data[_HEADER] != FORMAT_VERSION:
        (place / _HEADER).fail(f"format version {FORMAT_VERSION}", data[_HEADER])
    notes = a_list(data.get("notes", []), place / "notes", of="sentences")
    for i, note in enumerate(notes):
        if not isinstance(note, str):
            (place / "notes")[i].fail("a sentence", note)
    return a_name(data.get("source", origin), place / "source"), tuple(notes)


def _run(data: Mapping[str, Any], place: Place) -> TraceRun:
    known_keys(data, _RUN_FIELDS, place)
    run_id = a_name(required(data, "run_id", place), place / "run_id")
    workflow = a_name(required(data, "workflow", place), place / "workflow", empty=True)
    listed = a_list(required(data, "calls", place), place / "calls", of="call", empty=False)
    calls = [_call(call, (place / "calls")[i]) for i, call in enumerate(listed)]
    check_edges(calls, place / "calls")
    arrival_s, slo_s = data.get("arrival_s"), data.get("slo_s")
    return TraceRun(
        run_id=run_id,
        workflow=workflow,
        calls=tuple(calls),
        tenant=a_name(data.get("tenant", ""), place / "tenant", empty=True),
        slo_s=None if slo_s is None else a_time(slo_s, place / "slo_s"),
        arrival_s=None if arrival_s is None else a_time(arrival_s, place / "arrival_s"),
    )


def _call(value: Any, place: Place) -> TraceCall:
    data = an_object(value, place)
    known_keys(data, _CALL_FIELDS, place)
    after = a_list(data.get("after", []), place / "after", of="call ids")
    return TraceCall(
        call_id=a_name(required(data, "call_id", place), place / "call_id"),
        stage=a_name(required(data, "stage", place), place / "stage", empty=True),
        num_prompt_tokens=(
            num_prompt_tokens := a_count(
                required(data, "num_prompt_tokens", place), place / "num_prompt_tokens"
            )
        ),
        num_output_tokens=a_count(
            required(data, "num_output_tokens", place), place / "num_output_tokens"
        ),
        after=tuple(a_name(name, (place / "after")[i]) for i, name in enumerate(after)),
        gap_s=a_time(data.get("gap_s", 0.0), place / "gap_s"),
        prefix=_prefix(data.get("prefix", []), place / "prefix", num_prompt_tokens),
    )


def _prefix(value: Any, place: Place, num_prompt_tokens: int) -> tuple[PrefixPart, ...]:
    parts = []
    for i, item in enumerate(a_list(value, place, of="parts")):
        data = an_object(item, place[i])
        known_keys(data, _PART_FIELDS, place[i])
        if "id" in data and "part_id" in data:
            raise ConfigError(f"{place[i]}: expected part_id or id, got both")
        name = "id" if "id" in data else "part_id"
        parts.append(
            PrefixPart(
                part_id=a_name(required(data, name, place[i]), place[i] / name),
                num_tokens=a_count(required(data, "num_tokens", place[i]), place[i] / "num_tokens"),
            )
        )
    total = sum(part.num_tokens for part in parts)
    if total > num_prompt_tokens:
        place.fail(f"parts of at most num_prompt_tokens = {num_prompt_tokens} together", total)
    return tuple(parts)


def check_edges(calls: Iterable[TraceCall], place: Place) -> None:
    """Check the calls of one run against each other.

    Raises:
        ConfigError: An id is there twice, an edge leads nowhere or in a circle, or a call
            stands before one that it needs.
    """
    calls = list(calls)
    index: dict[str, int] = {}
    for i, call in enumerate(calls):
        if call.call_id in index:
            (place[i] / "call_id").fail(
                f"an id of its own (calls[{index[call.call_id]}] has it too)", call.call_id
            )
        index[call.call_id] = i
    for i, call in enumerate(calls):
        if len(set(call.after)) != len(call.after):
            (place[i] / "after").fail("each call once", list(call.after))
        for k, parent in enumerate(call.after):
            if parent not in index:
                (place[i] / "after")[k].fail("the id of a call of this run", parent)
    for i, call in enumerate(calls):
        for k, parent in enumerate(call.after):
            if index[parent] >= i:
                if _leads_to(calls, index, start=index[parent], goal=i):
                    (place[i] / "after")[k].fail("no cycle among the calls", parent)
                (place[i] / "after")[k].fail("a call that stands before this one", parent)


def _leads_to(
    calls: Sequence[TraceCall], index: Mapping[str, int], *, start: int, goal: int
) -> bool:
    """Whether call `start` needs call `goal`, directly or through others, or is it."""
    seen: set[int] = set()
    waiting = [start]
    while waiting:
        i = waiting.pop()
        if i == goal:
            return True
        if i not in seen:
            seen.add(i)
            waiting.extend(index[parent] for parent in calls[i].after)
    return False


def _run_to_mapping(run: TraceRun) -> dict[str, Any]:
    data: dict[str, Any] = {"run_id": run.run_id, "workflow": run.workflow}
    if run.tenant:
        data["tenant"] = run.tenant
    if run.slo_s is not None:
        data["slo_s"] = run.slo_s
    if run.arrival_s is not None:
        data["arrival_s"] = run.arrival_s
    data["calls"] = list(_calls_to_mappings(run.calls))
    return data


def _calls_to_mappings(calls: Iterable[TraceCall]) -> Iterator[dict[str, Any]]:
    for call in calls:
        data: dict[str, Any] = {
            "call_id": call.call_id,
            "stage": call.stage,
            "num_prompt_tokens": call.num_prompt_tokens,
            "num_output_tokens": call.num_output_tokens,
        }
        if call.after:
            data["after"] = list(call.after)
        if call.gap_s:
            data["gap_s"] = call.gap_s
        if call.prefix:
            data["prefix"] = [
                {"part_id": part.part_id, "num_tokens": part.num_tokens} for part in call.prefix
            ]
        yield data
