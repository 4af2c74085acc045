"""Traces as others publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.trace import read_trace
from vllm_workflow.sim.trace_import import HexgenLayout, read_hexgen
from vllm_workflow.sim.types import PrefixPart, TraceRun


def step(name: str, num_prompt_tokens: int = 9000, num_output_tokens: int = 3) -> dict[str, Any]:
    return {"step": name, "input_length": num_prompt_tokens, "output_length": num_output_tokens}


def hexgen(tmp_path: Path, *runs: list[dict[str, Any]]) -> Path:
    path = tmp_path / "hexgen.json"
    path.write_text(json.dumps([{"Text2SQLRequest": run} for run in runs]), encoding="utf-8")
    return path


def mooncake(tmp_path: Path, *lines: dict[str, Any]) -> Path:
    path = tmp_path / "mooncake.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def line(timestamp: float = 0, *, tokens: int = 600, **fields: Any) -> dict[str, Any]:
    return {
        "timestamp": timestamp,
        "input_length": tokens,
        "output_length": 5,
        "hash_ids": [1, 2],
        **fields,
    }


def edges(run: TraceRun) -> dict[str, tuple[str, ...]]:
    """Stage and number of each call -> the same of the calls it follows."""
    names = {}
    counts: dict[str, int] = {}
    for call in run.calls:
        counts[call.stage] = counts.get(call.stage, 0) + 1
        names[call.call_id] = f"{call.stage}{counts[call.stage]}"
    return {names[c.call_id]: tuple(names[p] for p in c.after) for c in run.calls}


def test_candidates_and_evaluations_run_side_by_side_and_the_rest_one_by_one(
    tmp_path: Path,
) -> None:
    steps = [
        "Information Retriever",
        "extract_keywords",
        "Information Retriever",
        "generate_candidate_llama-agent",
        "generate_candidate_llama-agent",
        "revise",
        "revise",
        "unit_tester",
        "evaluate",
        "evaluate",
        "unit_tester",
    ]

    run = read_trace(hexgen(tmp_path, [step(name, 20_000) for name in steps])).runs[0]

    assert edges(run) == {
        "information_retriever1": (),
        "extract_keywords1": ("information_retriever1",),
        "information_retriever2": ("extract_keywords1",),
        "generate_candidate1": ("information_retriever2",),
        "generate_candidate2": ("information_retriever2",),
        "revise1": ("generate_candidate1", "generate_candidate2"),
        "revise2": ("revise1",),
        "unit_tester1": ("revise2",),
        "evaluate1": ("unit_tester1",),
        "evaluate2": ("unit_tester1",),
        "unit_tester2": ("evaluate1", "evaluate2"),
    }


def test_siblings_share_their_template_and_what_is_common_in_the_run(tmp_path: Path) -> None:
    steps = [step("revise", 5000), step("revise", 5100), step("unit_tester", 271)]

    first, second, tester = read_trace(hexgen(tmp_path, steps)).runs[0].calls

    assert first.prefix == (
        PrefixPart(part_id="template/revise/1", num_tokens=2863),
        PrefixPart(part_id="run-1/revise/1", num_tokens=5000 - 2863 - 50),
    )
    assert second.prefix == first.prefix
    assert tester.prefix == (PrefixPart(part_id="template/controller", num_tokens=210),)


def test_the_two_candidates_have_templates_of_their_own(tmp_path: Path) -> None:
    steps = [step("generate_candidate", 12_000), step("generate_candidate", 8_134)]

    calls = read_trace(hexgen(tmp_path, steps)).runs[0].calls

    assert [c.prefix[0].num_tokens for c in calls] == [9130, 5264]
    assert calls[0].prefix[0].part_id != calls[1].prefix[0].part_id


def test_a_prompt_shorter_than_the_template_shares_nothing(tmp_path: Path) -> None:
    assert read_trace(hexgen(tmp_path, [step("revise", 2000)])).runs[0].calls[0].prefix == ()


def test_an_unknown_step_is_a_stage_without_template(tmp_path: Path) -> None:
    (call,) = read_trace(hexgen(tmp_path, [step("Selector")])).runs[0].calls

    assert call.stage == "selector"
    assert call.prefix == ()


def test_runs_on_one_database_can_share_the_head_of_its_schema() -> None:
    value = [{"Text2SQLRequest": [step("revise", 5000)]} for _ in range(2)]

    trace = read_hexgen(value, "f", HexgenLayout(num_database_tokens=1000))

    heads = [run.calls[0].prefix[:2] for run in trace.runs]
    assert heads[0] == heads[1]
    assert heads[0][1] == PrefixPart(part_id="database", num_tokens=1000)


def test_the_notes_tell_what_repeats_and_that_revisions_were_flattened(tmp_path: Path) -> None:
    one, two = [step("revise", 5000)], [step("revise", 6000), step("revise", 6000)]

    trace = read_trace(hexgen(tmp_path, one, two, one, two))

    assert trace.num_duplicates == 2
    notes = " ".join(trace.notes)
    assert "2 of 4 runs repeat an earlier one, so 2 are distinct." in notes
    assert "The second half of the file repeats the first." in notes
    assert "Revisions per run: 1 to 2." in notes
    assert "flat 0 to 10" in notes
    assert len(trace.distinct().runs) == 2


def test_a_file_without_repeats_does_not_claim_any(tmp_path: Path) -> None:
    notes = " ".join(read_trace(hexgen(tmp_path, [step("a")], [step("b")])).notes)

    assert "repeat" not in notes
    assert "Revisions" not in notes


def test_a_call_without_output_counts_as_one_token(tmp_path: Path) -> None:
    trace = read_trace(hexgen(tmp_path, [step("a", 10, 0)]))

    assert trace.runs[0].calls[0].num_output_tokens == 1
    assert "1 calls without output count as 1 output token." in trace.notes


@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        (
            [{"step": "a", "input_length": 3}],
            r"\[0\]\.Text2SQLRequest\[0\]\.output_length: missing",
        ),
        ([step("a", -3)], r"\[0\]\.Text2SQLRequest\[0\]\.input_length: expected an integer from 1"),
        ([step("a", 3, -1)], r"output_length: expected an integer from 0"),
        ([step("")], r"step: expected text that is not empty, got ''"),
        ([], r"\[0\]\.Text2SQLRequest: expected a list of at least one call"),
    ],
)
def test_an_error_in_a_hexgen_file_names_the_field(
    tmp_path: Path, run: list[dict[str, Any]], wanted: str
) -> None:
    with pytest.raises(ConfigError, match=rf"hexgen\.json: .*{wanted}"):
        read_trace(hexgen(tmp_path, run))


def test_a_later_run_of_another_shape_is_named(tmp_path: Path) -> None:
    path = tmp_path / "hexgen.json"
    path.write_text(json.dumps([{"Text2SQLRequest": [step("a")]}, {"Other": []}]), "utf-8")

    with pytest.raises(ConfigError, match=r"\[1\]\.Text2SQLRequest: missing"):
        read_trace(path)


def test_a_mooncake_line_is_a_run_of_one_call_with_blocks_as_parts(tmp_path: Path) -> None:
    trace = read_trace(mooncake(tmp_path, line(0), line(1500, tokens=1024)))

    first, second = trace.runs
    assert (first.arrival_s, second.arrival_s) == (0.0, 1.5)
    assert [p.num_tokens for p in first.calls[0].prefix] == [512, 88]
    assert [p.num_tokens for p in second.calls[0].prefix] == [512, 512]
    assert first.calls[0].prefix[0] == second.calls[0].prefix[0]


def test_lines_of_one_conversation_are_the_turns_of_one_run(tmp_path: Path) -> None:
    lines = [line(0, session_id="s"), line(100), line(3000, session_id="s")]

    trace = read_trace(mooncake(tmp_path, *lines))

    conversation = trace.runs[0]
    assert [c.after for c in conversation.calls] == [(), ("turn-1",)]
    assert conversation.calls[1].gap_s == 3.0
    assert "includes the duration of the answer" in trace.notes[0]


def test_a_recorded_delay_is_the_gap(tmp_path: Path) -> None:
    lines = [line(0, conversation_id=7, delay=0), line(3000, conversation_id=7, delay=250)]

    trace = read_trace(mooncake(tmp_path, *lines))

    assert trace.runs[0].calls[1].gap_s == 0.25
    assert "includes the duration" not in trace.notes[0]


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ([line(hash_ids=[1, 2, 3])], ":1: hash_ids: expected at most 2 hashes, blocks of 512"),
        ([line(hash_ids=[-1])], r":1: hash_ids\[0\]: expected an integer from 0"),
        ([line(5), line(4)], ":2: timestamp: expected timestamps in order, so at least 5, got 4"),
        ([line(5, session_id="s"), line(6), line(4, session_id="s")], ":3: timestamp"),
        ([line(-1)], ":1: timestamp: expected milliseconds from 0"),
        ([line(tokens=0)], ":1: input_length: expected an integer from 1"),
        ([{"timestamp": 1, "input_length": 5}], ":1: output_length: missing"),
        ([line(session_id=[1])], ":1: session_id: expected text"),
    ],
)
def test_an_error_in_a_mooncake_file_names_line_and_field(
    tmp_path: Path, lines: list[dict[str, Any]], wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        read_trace(mooncake(tmp_path, *lines))
