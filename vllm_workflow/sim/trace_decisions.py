"""A router's decision log as a trace, so that what happened live can be simulated."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.fields import (
    MAX_NAME_CHARS,
    MAX_TIME_S,
    MAX_TOKENS,
    Place,
    a_count,
    a_list,
    a_time,
    an_object,
    json_lines,
    parse,
    required,
)
from vllm_workflow.sim.types import PrefixPart, Trace, TraceCall, TraceRun


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedCall:
    """One call that ended well, on the clock of its router."""

    run: tuple[int, str, str]
    """Which life of the router, tenant, workflow_id (or the request's id, without one)."""
    name: str
    workflow: str
    stage: str
    instance_id: str
    arrival_time: float
    sent_time: float
    end_time: float
    run_arrival_time: float
    deadline: float
    num_prompt_tokens: int
    num_output_tokens: int
    prefix: tuple[PrefixPart, ...]
    rest_s: float
    service_s: float
    """This and the line before as predicted when it was forwarded, which engines order by."""
    final: bool


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


@dataclass(slots=True)
class _Reading:
    """What has been read so far."""

    life: int = 0
    """The router was started this often; each time its clock may begin anew."""
    open: dict[str, tuple[float, Mapping[str, Any], Place]] = field(default_factory=dict)
    """Request id -> instant of forwarding, the request, where it stands."""
    service_s: dict[str, float] = field(default_factory=dict)
    """Request id -> predicted duration, of the calls forwarded."""
    num_part_tokens: dict[int, int] = field(default_factory=dict)
    """Hash of a part -> its tokens, as first predicted: predictions change, the part does not."""
    calls: list[LoggedCall] = field(default_factory=list)
    num_failed: int = 0
    num_uncounted: int = 0

    def take(self, data: Mapping[str, Any], place: Place) -> None:
        """Read one event.

        Raises:
            ConfigError: With file, line, field, what was there and what was wanted.
        """
        match required(data, "event", place):
            case "started":
                _restart(self)
            case "submitted":
                _submitted(self, data, place)
            case "polled":
                _polled(self, data, place)
            case "withdrawn":
                _withdrawn(self, data, place)
            case "settled":
                _settled(self, data, place)


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
    reading = _Reading()
    text, is_cut = _without_cut_line(text)
    for place, value in json_lines(text, source):
        reading.take(an_object(value, place), place)
    _restart(reading)
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
    reading = _Reading()
    for place, data in events:
        reading.take(data, place)
    still_open = {
        (_text(request, "tenant_id", place), _text(request, "workflow_id", place))
        for _, request, place in reading.open.values()
    }
    return list(_runs(reading.calls, still_open))


def _without_cut_line(text: str) -> tuple[str, bool]:
    head, newline, last = text.rpartition("\n")
    if not newline or not last.strip():
        return text, False
    try:
        parse(last, Place("log"))
    except ConfigError:
        return head, True
    return text, False


def _restart(reading: _Reading) -> None:
    reading.num_failed += len(reading.open)
    reading.open.clear()
    reading.service_s.clear()
    reading.life += 1


def _submitted(reading: _Reading, data: Mapping[str, Any], place: Place) -> None:
    now = a_time(required(data, "now", place), place / "now")
    request = an_object(required(data, "request", place), place / "request")
    request_id = _request_id(request, place / "request")
    reading.open[request_id] = (now, request, place / "request")
    if data.get("decision") is not None:
        decision = an_object(data["decision"], place / "decision")
        reading.service_s[request_id] = _service_s(decision, place / "decision")


def _polled(reading: _Reading, data: Mapping[str, Any], place: Place) -> None:
    """Calls that had waited in the router were forwarded."""
    now = a_time(required(data, "now", place), place / "now")
    place = place / "decisions"
    for i, item in enumerate(a_list(data.get("decisions", []), place, of="decisions")):
        decision = an_object(item, place[i])
        request_id = _request_id(decision, place[i])
        if request_id in reading.open:
            reading.service_s[request_id] = _service_s(decision, place[i])
            reading.open[request_id] = (now, *reading.open[request_id][1:])


def _service_s(decision: Mapping[str, Any], place: Place) -> float:
    chosen = an_object(required(decision, "chosen", place), place / "chosen")
    return sum(
        a_time(chosen.get(name, 0.0), place / "chosen" / name) for name in ("prefill_s", "decode_s")
    )


def _withdrawn(reading: _Reading, data: Mapping[str, Any], place: Place) -> None:
    if reading.open.pop(_request_id(data, place), None) is not None:
        reading.num_failed += 1


def _request_id(data: Mapping[str, Any], place: Place) -> str:
    request_id = required(data, "request_id", place)
    if not isinstance(request_id, str):
        (place / "request_id").fail("text", request_id)
    return request_id


def _settled(reading: _Reading, data: Mapping[str, Any], place: Place) -> None:
    outcome = an_object(required(data, "outcome", place), place / "outcome")
    place = place / "outcome"
    request_id = _request_id(outcome, place)
    submitted = reading.open.pop(request_id, None)
    service_s = reading.service_s.pop(request_id, 0.0)
    if submitted is None:
        return  # the log begins after the call
    if required(outcome, "ok", place) is not True or outcome.get("e2el_s") is None:
        reading.num_failed += 1
        return
    if outcome.get("num_prompt_tokens") is None or outcome.get("num_output_tokens") is None:
        reading.num_uncounted += 1
    reading.calls.append(_call(reading, *submitted, outcome, place, service_s))


def _call(
    reading: _Reading,
    now: float,
    request: Mapping[str, Any],
    asked: Place,
    outcome: Mapping[str, Any],
    answered: Place,
    service_s: float,
) -> LoggedCall:
    arrival_time = a_time(required(request, "arrival_time", asked), asked / "arrival_time")
    ended = now + a_time(outcome["e2el_s"], answered / "e2el_s")
    workflow_id = _text(request, "workflow_id", asked)
    own_id = workflow_id or _request_id(request, asked)
    num_prompt_tokens = _num_prompt_tokens(request, asked, outcome, answered)
    began = request.get("run_arrival_time")
    deadline = request.get("deadline")
    return LoggedCall(
        run=(reading.life, _text(request, "tenant_id", asked), own_id),
        name=_printable(own_id),
        workflow=_printable(_text(request, "workflow", asked)),
        stage=_printable(_text(request, "stage", asked)),
        instance_id=_text(outcome, "instance_id", answered),
        arrival_time=arrival_time,
        sent_time=now,
        end_time=max(ended, math.nextafter(arrival_time, math.inf)),
        run_arrival_time=(
            arrival_time if began is None else a_time(began, asked / "run_arrival_time")
        ),
        deadline=math.inf if deadline is None else _instant(deadline, asked / "deadline"),
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=_num_output_tokens(request, asked, outcome, answered),
        prefix=_prefix(reading.num_part_tokens, request, asked, num_prompt_tokens),
        rest_s=a_time(request.get("rest_s", 0.0), asked / "rest_s"),
        service_s=service_s,
        final=request.get("final") is True,
    )


def _num_prompt_tokens(
    request: Mapping[str, Any], asked: Place, outcome: Mapping[str, Any], answered: Place
) -> int:
    """Return what the engine counted, else what was predicted."""
    name = "num_prompt_tokens"
    if outcome.get(name) is None:
        return a_count(request.get(name, 1), asked / name)
    return max(1, a_count(outcome[name], answered / name, minimum=0))


def _num_output_tokens(
    request: Mapping[str, Any], asked: Place, outcome: Mapping[str, Any], answered: Place
) -> int:
    """Return what the engine counted, else what was predicted."""
    if outcome.get("num_output_tokens") is not None:
        place = answered / "num_output_tokens"
        return max(1, a_count(outcome["num_output_tokens"], place, minimum=0))
    expected = request.get("expected_output_tokens", 1.0)
    place = asked / "expected_output_tokens"
    if isinstance(expected, bool) or not isinstance(expected, int | float):
        place.fail("a number of tokens", expected)
    if not 0 <= expected <= MAX_TOKENS:
        place.fail(f"a number of tokens up to {MAX_TOKENS}", expected)
    return max(1, round(expected))


def _instant(value: Any, place: Place) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
        place.fail("an instant", value)
    return float(value)


def _text(data: Mapping[str, Any], name: str, place: Place) -> str:
    value = data.get(name, "")
    if not isinstance(value, str):
        (place / name).fail("text", value)
    return value


def _printable(name: str) -> str:
    """Names come from clients, who may write anything into them."""
    clean = "".join(c if c.isprintable() else "�" for c in name)
    return clean[: MAX_NAME_CHARS - 16]


def _prefix(
    known: dict[int, int], request: Mapping[str, Any], place: Place, num_prompt_tokens: int
) -> tuple[PrefixPart, ...]:
    place = place / "prefix"
    parts = []
    num_left = num_prompt_tokens
    for i, item in enumerate(a_list(request.get("prefix", []), place, of="hash and tokens")):
        if not isinstance(item, list) or len(item) != 2:
            place[i].fail("a hash and its number of tokens", item)
        chain_hash = item[0]
        if isinstance(chain_hash, bool) or not isinstance(chain_hash, int):
            place[i][0].fail("an integer", chain_hash)
        num_tokens = known.setdefault(chain_hash, a_count(item[1], place[i][1], minimum=0))
        num_left -= num_tokens
        if num_left < 0:
            break
        if num_tokens:
            parts.append(PrefixPart(part_id=f"part/{chain_hash:x}", num_tokens=num_tokens))
    return tuple(parts)


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
            tenant=_printable(key[1]),
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


def _notes(reading: _Reading, *, is_cut: bool) -> Iterator[str]:
    yield "Decision log: a call follows what had ended in its run when it arrived."
    if reading.life > 2:
        yield (f"The router was started {reading.life - 1} times; the pauses between are left out.")
    if reading.num_failed:
        yield f"{reading.num_failed} calls did not end well and are left out."
    if reading.num_uncounted:
        yield f"{reading.num_uncounted} answers had no usage: their predicted lengths are used."
    if is_cut:
        yield "The last line is cut off and was left out."
