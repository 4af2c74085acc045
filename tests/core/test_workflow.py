import pytest

from tests.builders import workflow
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.workflow import StageProfile, WorkflowProfile


def test_what_is_declared_later_follows() -> None:
    profile = workflow(select=1.0, generate=1.0, judge=0.3)

    assert [(s.name, s.rounds) for s in profile.after("select")] == [
        ("generate", 1.0),
        ("judge", 0.3),
    ]
    assert profile.after("judge") == ()


def test_half_of_the_further_rounds_are_still_to_come() -> None:
    profile = workflow(generate=1.0, revise=4.0)

    assert [(s.name, s.rounds) for s in profile.after("revise")] == [("revise", 1.5)]


def test_nothing_is_known_of_an_undeclared_stage() -> None:
    assert workflow(generate=1.0).after("dream") == ()


def test_a_stage_declared_twice_is_an_error() -> None:
    stages = (StageProfile(name="a"), StageProfile(name="a"))

    with pytest.raises(ConfigError, match="workflow 'w': a stage is declared twice"):
        WorkflowProfile(name="w", stages=stages)


@pytest.mark.parametrize("rounds", [-1.0, float("nan"), float("inf")])
def test_rounds_are_a_finite_number_from_zero(rounds: float) -> None:
    with pytest.raises(ConfigError, match="stage 'a': rounds: expected 0 to 1e9"):
        StageProfile(name="a", rounds=rounds)
