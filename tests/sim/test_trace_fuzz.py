"""Whatever a file holds, reading it ends in a trace or in the documented error."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.fields import Place
from vllm_workflow.sim.trace import read_trace, write_trace
from vllm_workflow.sim.trace_jsonl import check_edges, check_runs

FIELDS = [
    "run_id", "workflow", "tenant", "slo_s", "arrival_s", "calls", "call_id", "stage",
    "num_prompt_tokens", "num_output_tokens", "after", "gap_s", "prefix", "part_id", "id",
    "num_tokens", "vllm_workflow_trace", "source", "notes", "Text2SQLRequest", "step",
    "input_length", "output_length", "timestamp", "hash_ids", "session_id", "delay", "event",
    "now", "request", "request_id", "outcome", "ok", "e2el_s", "arrival_time", "workflow_id",
    "tenant_id", "deadline", "run_arrival_time", "expected_output_tokens", "decisions", "decision",
]  # fmt: skip
WORDS = [
    "a",
    "b",
    "started",
    "submitted",
    "settled",
    "polled",
    "withdrawn",
    "",
    "\ud800",
    "x" * 600,
]
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-2, 20)
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=5)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), inner, max_size=8)
    ),
    max_leaves=30,
)
RUN = {
    "run_id": "r",
    "workflow": "w",
    "arrival_s": 0,
    "calls": [
        {"call_id": "a", "stage": "s", "num_prompt_tokens": 9, "num_output_tokens": 2},
        {
            "call_id": "b",
            "stage": "t",
            "num_prompt_tokens": 9,
            "num_output_tokens": 2,
            "after": ["a"],
            "gap_s": 0.5,
            "prefix": [{"part_id": "p", "num_tokens": 4}],
        },
    ],
}
HEXGEN = [{"Text2SQLRequest": [{"step": "revise", "input_length": 3000, "output_length": 2}] * 2}]
MOONCAKE = {
    "timestamp": 5,
    "input_length": 600,
    "output_length": 3,
    "hash_ids": [1, 2],
    "session_id": "s",
}
SUBMITTED = {
    "event": "submitted",
    "now": 1.0,
    "request": {
        "request_id": "a",
        "arrival_time": 0.5,
        "workflow_id": "w",
        "deadline": 9.0,
        "num_prompt_tokens": 40,
        "prefix": [[7, 16], [8, 9]],
    },
}
POLLED = {"event": "polled", "now": 1.5, "decisions": [{"request_id": "a"}]}
SETTLED = {"event": "settled", "outcome": {"request_id": "a", "ok": True, "e2el_s": 1.0}}

GOOD: list[list[Any]] = [
    [RUN],
    [RUN, {**RUN, "run_id": "q"}],
    [HEXGEN],
    [MOONCAKE, MOONCAKE],
    [SUBMITTED, POLLED, SETTLED],
]


def paths(value: Any) -> list[tuple[Any, ...]]:
    """Ways to every value inside `value`."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    return [(), *((key, *rest) for key, inner in items for rest in paths(inner))]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return `value` with what stands at `path` replaced."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


def lines(*each: Any) -> bytes:
    return "".join(f"{json.dumps(line)}\n" for line in each).encode()


@st.composite
def nearly_right(draw: st.DrawFn) -> bytes:
    """A good file of one of the formats with one value replaced."""
    good = draw(st.sampled_from(GOOD))
    path = draw(st.sampled_from(paths(good)))
    bad = changed(good, path, draw(values))
    return lines(*bad) if isinstance(bad, list) else lines(bad)


def read_or_refuse(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        trace = read_trace(path)
    except ConfigError as e:
        assert str(path) in str(e)  # noqa: PT017
        str(e).encode()
        return
    places = [Place(str(path), i) for i in range(len(trace.runs))]
    assert trace.runs
    check_runs(trace.runs, places)
    for run, place in zip(trace.runs, places, strict=True):
        check_edges(run.calls, place)
    write_trace(path, trace)
    assert read_trace(path) == trace


fuzz = settings(max_examples=300, suppress_health_check=list(HealthCheck), deadline=None)


@fuzz
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    read_or_refuse(tmp_path_factory.getbasetemp() / "bytes", content)


@fuzz
@given(st.lists(values, max_size=3))
def test_any_json_lines(tmp_path_factory: pytest.TempPathFactory, each: list[Any]) -> None:
    read_or_refuse(tmp_path_factory.getbasetemp() / "lines", lines(*each))


@fuzz
@given(nearly_right())
def test_a_good_file_with_one_value_replaced(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    read_or_refuse(tmp_path_factory.getbasetemp() / "nearly", content)


@fuzz
@given(st.data())
def test_a_good_file_cut_or_damaged_anywhere(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    good = data.draw(
        st.sampled_from(
            [
                lines(RUN),
                lines(HEXGEN),
                lines(MOONCAKE, MOONCAKE),
                lines(SUBMITTED, POLLED, SETTLED),
            ]
        )
    )
    at = data.draw(st.integers(0, len(good)))
    content = (
        good[:at] + data.draw(st.binary(max_size=3)) + good[data.draw(st.integers(at, len(good))) :]
    )
    read_or_refuse(tmp_path_factory.getbasetemp() / "damaged", content)
