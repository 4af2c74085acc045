"""Workflow profiles as their author would declare them."""

from __future__ import annotations

from tests.sim.builders import trace_call, trace_run
from vllm_workflow.sim.declare import declared


def test_calls_that_follow_one_another_are_rounds_and_calls_side_by_side_are_one() -> None:
    run = trace_run(
        "r",
        trace_call("a1", stage="draft"),
        trace_call("a2", stage="draft"),
        trace_call("b1", stage="fix", after=("a1", "a2")),
        trace_call("b2", stage="fix", after=("b1",)),
    )

    (profile,) = declared([run])

    assert [(s.name, s.rounds) for s in profile.stages] == [("draft", 1.0), ("fix", 2.0)]


def test_a_stage_that_half_of_the_runs_have_is_entered_half_a_time() -> None:
    with_fix = trace_run(
        "r1", trace_call("a", stage="draft"), trace_call("b", stage="fix", after=("a",))
    )
    without = trace_run("r2", trace_call("a", stage="draft"))

    (profile,) = declared([with_fix, without])

    assert {s.name: s.rounds for s in profile.stages} == {"draft": 1.0, "fix": 0.5}


def test_lengths_are_means_over_the_calls_of_a_stage() -> None:
    runs = [
        trace_run("r1", trace_call(stage="draft", prompt=100, output=10)),
        trace_run("r2", trace_call(stage="draft", prompt=300, output=20)),
    ]

    (profile,) = declared(runs)

    assert (profile.stages[0].prompt_tokens, profile.stages[0].output_tokens) == (200, 15.0)


def test_each_workflow_has_its_own_profile() -> None:
    runs = [trace_run("r1", workflow="chess"), trace_run("r2", workflow="mac")]

    assert [profile.name for profile in declared(runs)] == ["chess", "mac"]
