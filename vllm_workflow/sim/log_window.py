"""The last part of a decision log: what came, what served it, and how it went."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import (
    Added,
    Apportioned,
    Marked,
    Removed,
    Started,
    Swapped,
    from_json,
)
from vllm_workflow.core.fleet import Instance
from vllm_workflow.core.tenants import TenantsConfig
from vllm_workflow.router.store import StoreReader, is_store
from vllm_workflow.sim.engine import DEFAULT_BLOCK_SIZE
from vllm_workflow.sim.fields import Place, an_object, json_lines, parse, read_text, required
from vllm_workflow.sim.fleet import SimInstance
from vllm_workflow.sim.log_refused import RefusedRun, refused_runs
from vllm_workflow.sim.trace_decisions import LoggedRun, is_decision_log, logged_runs

OVER_AFTER_S = 60.0
"""A run whose last call ended so long ago is over, if no call said that it was the last."""
UNKNOWN_KV_BLOCKS = 1 << 20
"""Of an instance whose configuration does not say."""
MAX_TAIL_BYTES = 256 << 20
_FIRST_TAIL_BYTES = 4 << 20
_STATE = frozenset({"started", "swapped", "apportioned", "added", "removed", "marked"})

_Line = tuple[Place, Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogWindow:
    """The last minutes of one life of a router."""

    source: str
    policy: PolicyConfig
    """In force at the end."""
    first_policy: PolicyConfig
    """That the router began with: what its engines run, if they were started with the same."""
    instances: tuple[Instance, ...]
    """Healthy at the end; all, if none was."""
    runs: tuple[LoggedRun, ...]
    """By arrival."""
    refused: tuple[RefusedRun, ...] = ()
    """In the order in which they came."""
    tenants: TenantsConfig | None = None
    """Their shares, quotas and SLOs at the end; None: nobody asked whose a call was."""
    whole: frozenset[str]
    """Ids of the runs that began within the window and were over when it ended."""
    duration_s: float
    """From its first event to its last."""


def read_window(path: Path, *, window_s: float = math.inf) -> LogWindow:
    """Read the last `window_s` seconds of the last life of a router in a log.

    Args:
        path: The file that `decision_log` in router.yaml names, or the database of `store`.
        window_s: How far back to go.

    Raises:
        ConfigError: The file cannot be read or is no decision log; with file, line and field.
    """
    lines = logged_lines(path)
    source = str(path)
    place, first = lines[0]
    if not is_decision_log(first):
        place.fail("a decision log, whose first line is an event 'started'", dict(first))
    return window_of(lines, source=source, window_s=window_s)


def logged_lines(path: Path) -> list[tuple[Place, Mapping[str, Any]]]:
    """Return the events of a decision log or a store, parsed, at least one.

    Raises:
        ConfigError: See `read_window`.
    """
    source = str(path)
    if is_store(path):
        with StoreReader(path) as reader:
            stored = [(Place(source, n), line) for n, line in enumerate(reader.events(), start=1)]
        if not stored:
            raise ConfigError(f"{path}: expected events in the store, got none")
        return [(place, an_object(parse(line, place), place)) for place, line in stored]
    return [(place, an_object(value, place)) for place, value in _parsed(read_text(path), source)]


def tail_window(
    path: Path, state: Sequence[str], *, window_s: float, max_bytes: int = MAX_TAIL_BYTES
) -> LogWindow:
    """Read the end of a log that may be very long.

    Args:
        path: The log, or a store.
        state: Lines of it that say what was in force before its last part: `started` and `added`.
        window_s: How far back to go.
        max_bytes: Of the file, that are read at most.

    Raises:
        ConfigError: See `read_window`.
    """
    source = str(path)
    head: list[_Line] = []
    for number, line in enumerate(state, start=1):
        place = Place(f"{source} (state)", number)
        head.append((place, an_object(json.loads(line), place)))
    values = _stored_tail(path, window_s) if is_store(path) else _tail(path, window_s, max_bytes)
    lines = [(place, an_object(value, place)) for place, value in values]
    return window_of([*head, *lines], source=source, window_s=window_s)


def window_of(lines: Sequence[_Line], *, source: str, window_s: float = math.inf) -> LogWindow:
    """Return the window at the end of a log.

    Raises:
        ConfigError: A field that does not fit, or no `started`.
    """
    kinds = [required(data, "event", place) for place, data in lines]
    began = max((i for i, kind in enumerate(kinds) if kind == "started"), default=None)
    if began is None:
        raise ConfigError(f"{source}: expected an event 'started' before all others, got none")
    lines, kinds = lines[began:], kinds[began:]
    times = [_now(data, place) for place, data in lines]
    known = [time for time in times if time is not None]
    end = max(known, default=0.0)
    since = end - window_s
    first = next((i for i, time in enumerate(times) if time is not None and time >= since), 0)
    started, policy, tenants, instances = _state(
        line for line, kind in zip(lines, kinds) if kind in _STATE
    )
    events = [line for line, kind in zip(lines[first:], kinds[first:]) if kind not in _STATE]
    runs = tuple(logged_runs(events))
    begin = min((time for time in known if time >= since), default=0.0)
    return LogWindow(
        source=source,
        policy=policy,
        first_policy=started,
        instances=instances,
        runs=runs,
        refused=refused_runs(events),
        tenants=tenants,
        whole=frozenset(each.run.run_id for each in runs if _is_whole(each, begin, end)),
        duration_s=end - begin,
    )


def latest(log: LogWindow, num_runs: int) -> LogWindow:
    """Return a window with the last runs of one, those that were refused among them."""
    began = [run.arrival_time for run in log.runs] + [each.arrival_time for each in log.refused]
    since = sorted(began)[-num_runs:][0] if began else 0.0
    return replace(
        log,
        runs=tuple(run for run in log.runs if run.arrival_time >= since),
        refused=tuple(each for each in log.refused if each.arrival_time >= since),
    )


def sim_instance(instance: Instance) -> SimInstance:
    """Return an instance that is as the router was told."""
    num_blocks = UNKNOWN_KV_BLOCKS
    if instance.num_kv_tokens is not None:
        num_blocks = 1 + instance.num_kv_tokens // DEFAULT_BLOCK_SIZE
    return SimInstance(instance=instance, num_kv_blocks=num_blocks)


def _is_whole(run: LoggedRun, begin: float, end: float) -> bool:
    if run.is_open or run.arrival_time < begin:
        return False
    return any(call.final for call in run.calls) or run.end_time <= end - OVER_AFTER_S


def _state(
    lines: Iterable[_Line],
) -> tuple[PolicyConfig, PolicyConfig, TenantsConfig | None, tuple[Instance, ...]]:
    """Return the policy at the beginning, and policy, tenants and instances at the end."""
    first = policy = PolicyConfig()
    tenants: TenantsConfig | None = None
    instances: dict[str, Instance] = {}
    healthy: dict[str, bool] = {}
    for place, data in lines:
        try:
            event = from_json(json.dumps(data))
        except ConfigError as e:
            raise ConfigError(f"{place}: {e}") from None
        match event:
            case Started():
                first = policy = event.policy
                tenants = event.tenants
            case Swapped():
                policy = event.policy
            case Apportioned():
                tenants = event.tenants
            case Added():
                instances[event.instance.instance_id] = event.instance
            case Removed():
                instances.pop(event.instance_id, None)
            case Marked():
                healthy[event.instance_id] = event.healthy
    alive = [each for name, each in instances.items() if healthy.get(name, True)]
    return first, policy, tenants, tuple(alive or instances.values())


def _now(data: Mapping[str, Any], place: Place) -> float | None:
    now = data.get("now")
    if now is None:
        return None
    if isinstance(now, bool) or not isinstance(now, int | float) or not math.isfinite(now):
        (place / "now").fail("an instant", now)
    return float(now)


def _parsed(text: str, source: str) -> Iterator[tuple[Place, Any]]:
    """Parse the lines of a log, of which the last may be cut off."""
    whole, newline, last = text.rpartition("\n")
    yield from json_lines(whole if newline else text, source)
    if newline and last.strip():
        try:
            yield Place(source, text.count("\n") + 1), json.loads(last)
        except ValueError:
            return


def _tail(path: Path, window_s: float, max_bytes: int) -> list[tuple[Place, Any]]:
    """Return the lines at the end of a file that reach `window_s` back, and some before."""
    num_bytes = _FIRST_TAIL_BYTES
    while True:
        data, is_all = _last_bytes(path, min(num_bytes, max_bytes))
        text = data.decode("utf-8", errors="replace")
        lines = list(_parsed(text, f"{path} (end)"))
        times = [v["now"] for _, v in lines if isinstance(v, dict) and "now" in v]
        reaches = bool(times) and times[0] < times[-1] - window_s
        if is_all or reaches or num_bytes >= max_bytes:
            return lines
        num_bytes *= 2


def _stored_tail(path: Path, window_s: float) -> list[tuple[Place, Any]]:
    place = Place(f"{path} (end)")
    with StoreReader(path) as reader:
        return [(place, parse(line, place)) for line in reader.latest_events(window_s)]


def _last_bytes(path: Path, num_bytes: int) -> tuple[bytes, bool]:
    """Return the end of a file, from the beginning of a line on, and whether it is all of it."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            start = max(0, size - num_bytes)
            file.seek(start)
            data = file.read()
    except OSError as e:
        raise ConfigError(f"{path}: cannot read the decision log: {e.strerror}") from None
    return (data, True) if start == 0 else (data[data.find(b"\n") + 1 :], False)
