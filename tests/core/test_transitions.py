import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.core import transitions
from vllm_workflow.core.run_path import RunPath
from vllm_workflow.core.transitions import END, Flow, Transitions


def run(*steps: str) -> RunPath:
    """A run whose steps follow one another; `evaluate*3` are three calls side by side."""
    path = RunPath(0.0)
    for number, step in enumerate(steps):
        stage, _, count = step.partition("*")
        names = [f"{number}-{i}" for i in range(int(count or 1))]
        for name in names:
            path.began(name, stage, 0.0)
        for name in names:
            path.finished(name, end_time=float(number), alone_s=1.0)
    return path


def flow(*runs: RunPath) -> Flow:
    made = Flow()
    for each in runs:
        made.learn(each)
    return made


def test_calls_side_by_side_are_one_group_and_one_round() -> None:
    stage = flow(run("generate", "evaluate*5", "judge")).stage("evaluate")

    assert (stage["fan_out"], stage["rounds"], stage["calls_per_run"]) == (5.0, 1.0, 5.0)


def test_calls_one_after_the_other_are_rounds() -> None:
    stage = flow(run("generate", "revise", "revise", "revise", "judge")).stage("revise")

    assert (stage["fan_out"], stage["rounds"], stage["calls_per_run"]) == (1.0, 3.0, 3.0)
    assert stage["next"] == {"judge": pytest.approx(1 / 3, abs=1e-3), "revise": 0.667}


def test_shares_tell_how_often_a_stage_is_entered_and_what_follows_it() -> None:
    runs = [run("generate", *(["revise"] if i % 4 == 0 else []), "judge") for i in range(100)]
    learned = flow(*runs)

    assert learned.stage("revise")["share_of_runs"] == pytest.approx(0.25, abs=0.02)
    assert learned.stage("generate")["next"]["revise"] == pytest.approx(0.25, abs=0.02)
    assert learned.stage("judge")["next"] == {"(end)": 1.0}
    assert learned.stage(END)["next"] == {"generate": 1.0}


def test_a_workflow_that_changed_is_noticed() -> None:
    learned = flow(*[run("generate", "revise")] * 2000, *[run("generate", "judge")] * 600)

    assert learned.stage("generate")["next"]["judge"] > 0.9


@given(st.lists(st.lists(st.sampled_from(["a", "b*2", "c*3"]), max_size=8), max_size=30))
def test_what_is_written_down_is_read_back(steps: list[list[str]]) -> None:
    learned = flow(*(run(*each) for each in steps))
    again = Flow.from_mapping(learned.to_mapping())

    assert again.stages.keys() == learned.stages.keys()
    for name in learned.stages:
        assert again.stage(name) == learned.stage(name)
        assert sum(again.stage(name)["next"].values()) == pytest.approx(1.0, abs=0.01)


def test_memory_is_bounded_whatever_clients_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transitions, "MAX_WORKFLOWS", 3)
    monkeypatch.setattr(transitions, "MAX_STAGES", 4)
    learned = Transitions()
    for number in range(20):
        learned.learn("t", "w", run(f"s{number}", f"s{number + 1}"))
        learned.learn("t", f"w{number}", run("s"))

    flows = dict(learned.items())
    assert len(flows) <= 3
    of_one = learned.get(("t", "w"))
    assert of_one is not None
    assert len(of_one.stages) <= 4
    assert all(len(stage.next) <= 4 for stage in of_one.stages.values())
