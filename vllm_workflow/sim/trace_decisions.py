"""A router's decision log as a trace, so that what happened live can be simulated."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.fields import (
    MAX_TIME_S,
    Place,
    an_object,
    json_lines,
    parse,
)
from vllm_workflow.sim.log_calls import LoggedCall, Reading, printable
from vllm_workflow.sim.types import Trace, TraceCall, TraceRun


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedRun:
    """A run as a trace has it, and as it went."""

    run: TraceRun
    calls: tuple[LoggedCall, ...]
    """One for each of `run.calls`."""
    is_open: bool
    """A call of it had not ended when the log did."""

    @property
    def arrival_time(self) -> float:
        """On the clock of its router."""
        return min(min(call.run_arrival_time, call.arrival_time) for call in self.calls)

    @property
    def end_time(self) -> float:
        return max(call.end_time for call in self.calls)

    @property
    def latency_s(self) -> float:
        return self.end_time - self.arrival_time


def is_decision_log(first: Mapping[str, Any]) -> bool:
    """Whether a file that begins with this object is a decision log."""
    return isinstance(first.get("event"), str)


def read_decision_log(text: str, source: str) -> Trace:
    """Import the events of `core.events`, one per line.

    A call follows those calls of its run that had ended when it arrived, save what these
    followed themselves. Calls that did not end well are left out, and so is a line that the
    end of the file cuts off.

    Args:
        text: Of the log.
        source: Its name, for errors.

    Raises:
        ConfigError: With file, line, field, what was there and what was wanted; or no call
            ended well.
    """
    reading = Reading()
    text, is_cut = _without_cut_line(text)
    for place, value in json_lines(text, source):
        reading.take(an_object(value, place), place)
    reading.restart()
    if not reading.calls:
        raise ConfigError(f"{source}: expected at least one call that ended well, got none")
    runs = tuple(each.run for each in _runs(reading.calls))
    if (runs[-1].arrival_s or 0.0) > MAX_TIME_S:
        raise ConfigError(f"{source}: expected runs within {MAX_TIME_S:g} s, got {runs[-1]!r:.80}")
    return Trace(
        runs=runs,
        source=Path(source).name,
        notes=tuple(_notes(reading, is_cut=is_cut)),
    )


def logged_runs(events: Iterable[tuple[Place, Mapping[str, Any]]]) -> list[LoggedRun]:
    """Return the runs of a log, or of a part of it, by arrival; calls as `read_decision_log` does.

    Args:
        events: One life of a router, each with its place in the file.

    Raises:
        ConfigError: See `read_decision_log`; no calls are no error here.
    """
    reading = Reading()
    for place, data in events:
        reading.take(data, place)
    return list(_runs(reading.calls, reading.under_way()))


def _without_cut_line(text: str) -> tuple[str, bool]:
    head, newline, last = text.rpartition("\n")
    if not newline or not last.strip():
        return text, False
    try:
        parse(last, Place("log"))
    except ConfigError:
        return head, True
    return text, False


def _runs(
    calls: Iterable[LoggedCall], still_open: Collection[tuple[str, str]] = ()
) -> Iterator[LoggedRun]:
    """Yield the runs by arrival; the lives of the router follow each other without a pause."""
    grouped: dict[tuple[int, str, str], list[LoggedCall]] = {}
    for call in calls:
        grouped.setdefault(call.run, []).append(call)
    begun = {
        key: min(min(c.run_arrival_time, c.arrival_time) for c in each)
        for key, each in grouped.items()
    }
    offsets = _offsets(grouped, begun)
    names: dict[str, int] = {}
    for key in sorted(grouped, key=lambda key: begun[key] + offsets[key[0]]):
        each = sorted(grouped[key], key=lambda call: call.arrival_time)
        names[each[0].name] = names.get(each[0].name, 0) + 1
        again = names[each[0].name]
        first = each[0]
        run = TraceRun(
            run_id=first.name if again == 1 else f"{first.name}~{again}",
            workflow=first.workflow,
            calls=tuple(_linked(each, begun[key])),
            arrival_s=max(0.0, begun[key] + offsets[key[0]]),
            tenant=printable(key[1]),
            slo_s=_slo_s(first, begun[key]),
        )
        yield LoggedRun(run=run, calls=tuple(each), is_open=key[1:] in still_open)


def _offsets(
    grouped: Mapping[tuple[int, str, str], Sequence[LoggedCall]],
    begun: Mapping[tuple[int, str, str], float],
) -> dict[int, float]:
    """Return, per life of the router, what to add to its instants."""
    offsets: dict[int, float] = {}
    end = 0.0
    for life in sorted({key[0] for key in grouped}):
        keys = [key for key in grouped if key[0] == life]
        offsets[life] = end - min(begun[key] for key in keys)
        end = offsets[life] + max(call.end_time for key in keys for call in grouped[key])
    return offsets


def _slo_s(first: LoggedCall, begun: float) -> float | None:
    slo_s = max(0.0, first.deadline - begun)
    return slo_s if slo_s <= MAX_TIME_S else None


def _linked(calls: Sequence[LoggedCall], begun: float) -> Iterator[TraceCall]:
    """Yield the calls of one run with what each followed, as far as instants tell.

    Args:
        calls: By arrival.
        begun: Instant at which the run began.
    """
    ids = [f"call-{i + 1}" for i in range(len(calls))]
    by_end = sorted(range(len(calls)), key=lambda i: calls[i].end_time)
    ends = [calls[i].end_time for i in by_end]
    latest_starts: list[float] = []
    for i in by_end:
        before = latest_starts[-1] if latest_starts else -math.inf
        latest_starts.append(max(before, calls[i].arrival_time))
    for i, call in enumerate(calls):
        num_ended = bisect_right(ends, call.arrival_time)
        # What ended before one of the others began is known to the latter already.
        first = bisect_right(ends, latest_starts[num_ended - 1]) if num_ended else 0
        since = ends[num_ended - 1] if num_ended else begun
        yield TraceCall(
            call_id=ids[i],
            stage=call.stage,
            num_prompt_tokens=call.num_prompt_tokens,
            num_output_tokens=call.num_output_tokens,
            after=tuple(sorted((ids[k] for k in by_end[first:num_ended]), key=ids.index)),
            gap_s=call.arrival_time - since,
            prefix=call.prefix,
        )


def _notes(reading: Reading, *, is_cut: bool) -> Iterator[str]:
    yield "Decision log: a call follows what had ended in its run when it arrived."
    if reading.life > 2:
        yield (f"The router was started {reading.life - 1} times; the pauses between are left out.")
    if reading.num_failed:
        yield f"{reading.num_failed} calls did not end well and are left out."
    if reading.num_uncounted:
        yield f"{reading.num_uncounted} answers had no usage: their predicted lengths are used."
    if is_cut:
        yield "The last line is cut off and was left out."
