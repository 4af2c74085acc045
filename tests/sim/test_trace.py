"""The trace format of this project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.trace import read_trace, write_trace
from vllm_workflow.sim.types import PrefixPart, Trace, TraceCall, TraceRun


def call(call_id: str = "a", **fields: Any) -> dict[str, Any]:
    return {
        "call_id": call_id,
        "stage": "s",
        "num_prompt_tokens": 10,
        "num_output_tokens": 2,
        **fields,
    }


def run(run_id: str = "r", **fields: Any) -> dict[str, Any]:
    return {"run_id": run_id, "workflow": "w", "calls": [call()], **fields}


def written(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "trace.jsonl"
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    first = TraceCall(
        call_id="a",
        stage="plan",
        num_prompt_tokens=30,
        num_output_tokens=4,
        prefix=(PrefixPart(part_id="t", num_tokens=20), PrefixPart(part_id="d", num_tokens=10)),
    )
    second = TraceCall(
        call_id="b", stage="", num_prompt_tokens=5, num_output_tokens=1, after=("a",), gap_s=0.25
    )
    trace = Trace(
        runs=(
            TraceRun(run_id="x", workflow="w", calls=(first, second), arrival_s=0.5, slo_s=9.0),
            TraceRun(run_id="y", workflow="", calls=(first,), arrival_s=0.5, tenant="Ω"),
        ),
        source="builtin:chess",
        notes=("Assumed.",),
    )

    write_trace(tmp_path / "t.jsonl", trace)

    assert read_trace(tmp_path / "t.jsonl") == trace


def test_a_file_by_hand_needs_no_header_and_few_fields(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, run(), "", run("q")))

    assert [r.run_id for r in trace.runs] == ["r", "q"]
    assert trace.runs[0].calls[0] == TraceCall(
        call_id="a", stage="s", num_prompt_tokens=10, num_output_tokens=2
    )
    assert trace.source == "trace.jsonl"


def test_the_id_of_a_part_may_be_called_id(tmp_path: Path) -> None:
    parts = [{"id": "t", "num_tokens": 3}]

    trace = read_trace(written(tmp_path, run(calls=[call(prefix=parts)])))

    assert trace.runs[0].calls[0].prefix == (PrefixPart(part_id="t", num_tokens=3),)


@pytest.mark.parametrize(
    ("calls", "where", "wanted"),
    [
        ([call(num_prompt_tokens=-1)], "calls[0].num_prompt_tokens", "integer from 1"),
        ([call(num_prompt_tokens=1.5)], "calls[0].num_prompt_tokens", "got 1.5"),
        ([call(num_output_tokens=True)], "calls[0].num_output_tokens", "got True"),
        ([call(num_output_tokens=10**9)], "calls[0].num_output_tokens", "to 10000000"),
        ([call(num_output_tokens="7")], "calls[0].num_output_tokens", "got '7'"),
        ([call(gap_s=-0.1)], "calls[0].gap_s", "seconds from 0"),
        ([call(), call()], "calls[1].call_id", "calls[0] has it too"),
        ([call(after=["b"])], "calls[0].after[0]", "the id of a call of this run"),
        ([call(after=["a"])], "calls[0].after[0]", "no cycle"),
        ([call(after=["b"]), call("b", after=["a"])], "calls[0].after[0]", "no cycle"),
        ([call(after=["b"]), call("b")], "calls[0].after[0]", "stands before this one"),
        ([call(), call("b", after=["a", "a"])], "calls[1].after", "each call once"),
        ([call(stage=7)], "calls[0].stage", "expected text, got 7"),
        ([call(stage="a\nb")], "calls[0].stage", "control characters"),
        ([call(prefix=[{"part_id": "t", "num_tokens": 11}])], "calls[0].prefix", "at most"),
        ([call(prefix=[{"part_id": "t"}])], "calls[0].prefix[0].num_tokens", "missing"),
        ([call(prefix=[{"id": "t", "part_id": "t", "num_tokens": 1}])], "prefix[0]", "got both"),
        ([call(tokens=3)], "calls[0]", "unknown field 'tokens'"),
        ([], "calls", "at least one call"),
        ("many", "calls", "got 'many'"),
        ([3], "calls[0]", "an object"),
    ],
)
def test_an_error_in_a_call_names_line_field_and_what_was_wanted(
    tmp_path: Path, calls: object, where: str, wanted: str
) -> None:
    path = written(tmp_path, run("fine"), run(calls=calls))

    with pytest.raises(ConfigError) as raised:
        read_trace(path)

    assert f"{path}:2: " in str(raised.value)
    assert where in str(raised.value)
    assert wanted in str(raised.value)


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ([run(), run()], ":2: run_id: expected an id of its own (line 1 has it too)"),
        ([run(arrival_s=2.0), run("q", arrival_s=1.0)], ":2: arrival_s: expected arrivals in ord"),
        ([run(arrival_s=-1.0)], ":1: arrival_s: expected seconds from 0"),
        ([run(arrival_s=1e12)], ":1: arrival_s: expected seconds from 0 to 1e+09"),
        ([run(arrival_s=1.0), run("q")], ":2: arrival_s: expected an arrival"),
        (['{"run_id": "r", "arrival_s": NaN}'], ":1: expected JSON"),
        (['{"run_id":"r","workflow":"w","calls":[],"slo_s":1e999}'], "calls: expected a list"),
        (['{"run_id":"r","workflow":"w","calls":[{'], ":1: expected JSON"),
        ([run(slo_s=float("1e300"))], ":1: slo_s: expected seconds"),
        ([{"run_id": "r", "workflow": "w"}], ":1: calls: missing"),
        ([run(deadline=3)], ":1: unknown field 'deadline'"),
        ([run(), [1]], ":2: expected an object, got [1]"),
        ([{"a": 1}], ":1: expected one of the formats"),
        (["[1, 2]"], "expected one of the formats"),
        (["[" * 100_000], "expected JSON"),
        (["   "], "got an empty file"),
        ([{"vllm_workflow_trace": 2}], ":1: vllm_workflow_trace: expected format version 1"),
        ([{"vllm_workflow_trace": 1}], "got a header only"),
    ],
)
def test_an_error_between_runs_names_line_and_what_was_wanted(
    tmp_path: Path, lines: list[object], wanted: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        read_trace(written(tmp_path, *lines))

    assert wanted in str(raised.value)


def test_a_file_that_is_not_text_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b'{"run_id": "r"}\n\xff')

    with pytest.raises(ConfigError, match=r":2: expected UTF-8 text, got the byte 0xff"):
        read_trace(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: cannot read the trace: No such file"):
        read_trace(tmp_path / "nowhere.jsonl")


def test_runs_that_differ_in_ids_and_arrival_only_are_duplicates(tmp_path: Path) -> None:
    renamed = run("c", calls=[call("z")], arrival_s=5)
    other = run("d", calls=[call(num_output_tokens=3)], arrival_s=6)
    trace = read_trace(written(tmp_path, run("b", arrival_s=1), renamed, other))

    assert trace.num_duplicates == 1
    assert [r.run_id for r in trace.distinct().runs] == ["b", "d"]
    assert "Of 3 runs, 2 distinct ones were kept." in trace.distinct().notes


def test_the_example_of_the_documentation_can_be_read(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "traces.md").read_text("utf-8")
    example = text.split("```json\n")[1].split("```")[0]
    path = tmp_path / "trace.jsonl"
    path.write_text(example.replace("\n", ""), encoding="utf-8")

    (only,) = read_trace(path).runs

    assert [c.call_id for c in only.calls] == ["plan", "fix"]
    assert (only.slo_s, only.arrival_s) == (30.0, 12.5)
