"""The calls of a router's decision log, read event by event."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_workflow.sim.fields import (
    MAX_NAME_CHARS,
    MAX_TOKENS,
    Place,
    a_count,
    a_list,
    a_time,
    an_object,
    required,
)
from vllm_workflow.sim.types import PrefixPart


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


@dataclass(slots=True)
class Reading:
    """What has been read of a log so far."""

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
                self.restart()
            case "submitted":
                _submitted(self, data, place)
            case "polled":
                _polled(self, data, place)
            case "withdrawn":
                _withdrawn(self, data, place)
            case "settled":
                _settled(self, data, place)

    def restart(self) -> None:
        """Begin another life of the router, or end the log: calls under way have failed."""
        self.num_failed += len(self.open)
        self.open.clear()
        self.service_s.clear()
        self.life += 1

    def under_way(self) -> set[tuple[str, str]]:
        """Return tenant and workflow_id of each call that has not ended."""
        return {
            (_text(request, "tenant_id", place), _text(request, "workflow_id", place))
            for _, request, place in self.open.values()
        }


def _submitted(reading: Reading, data: Mapping[str, Any], place: Place) -> None:
    now = a_time(required(data, "now", place), place / "now")
    request = an_object(required(data, "request", place), place / "request")
    request_id = _request_id(request, place / "request")
    reading.open[request_id] = (now, request, place / "request")
    if data.get("decision") is not None:
        decision = an_object(data["decision"], place / "decision")
        reading.service_s[request_id] = _service_s(decision, place / "decision")


def _polled(reading: Reading, data: Mapping[str, Any], place: Place) -> None:
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


def _withdrawn(reading: Reading, data: Mapping[str, Any], place: Place) -> None:
    if reading.open.pop(_request_id(data, place), None) is not None:
        reading.num_failed += 1


def _request_id(data: Mapping[str, Any], place: Place) -> str:
    request_id = required(data, "request_id", place)
    if not isinstance(request_id, str):
        (place / "request_id").fail("text", request_id)
    return request_id


def _settled(reading: Reading, data: Mapping[str, Any], place: Place) -> None:
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
    reading: Reading,
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
        name=printable(own_id),
        workflow=printable(_text(request, "workflow", asked)),
        stage=printable(_text(request, "stage", asked)),
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


def printable(name: str) -> str:
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
