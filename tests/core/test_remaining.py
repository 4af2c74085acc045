import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import stage_request
from vllm_workflow.core import remaining
from vllm_workflow.core.remaining import MIN_ENDED, OVER_AFTER_S, RemainingTime
from vllm_workflow.core.types import StageRequest


class Agent:
    """Makes runs, one after the other, with a second of service per call and no gaps."""

    def __init__(self) -> None:
        self.learned = RemainingTime()
        self.now = 0.0
        self.num_runs = 0
        self.open: dict[str, tuple[StageRequest, float]] = {}

    def request(self, stage: str, *, call: str = "call", final: bool = False) -> StageRequest:
        return stage_request(
            call,
            workflow_id=f"run-{self.num_runs}",
            workflow="w",
            stage=stage,
            arrival_time=self.now,
            final=final,
        )

    def call(
        self, stage: str, *, took_s: float = 1.0, final: bool = False, ok: bool = True
    ) -> None:
        request = self.request(stage, final=final)
        self.learned.began(request)
        self.now += took_s
        self.learned.ended(request, end_time=self.now, alone_s=took_s, ok=ok)

    def run(self, *stages: str, final: bool = True) -> None:
        self.num_runs += 1
        for stage in stages:
            self.call(stage, final=final and stage is stages[-1])

    def rest_s(self, stage: str, quantile: float = 0.0) -> float | None:
        self.num_runs += 1
        return self.learned.after(self.request(stage), quantile)


def test_what_follows_a_stage_is_learned_from_runs() -> None:
    agent = Agent()
    for _ in range(100):
        agent.run("generate", "revise", "judge")

    assert agent.rest_s("generate") == pytest.approx(2.0, abs=0.1)
    assert agent.rest_s("revise") == pytest.approx(1.0, abs=0.1)
    assert agent.rest_s("judge") == 0.0


def test_nothing_is_believed_before_enough_runs_were_seen() -> None:
    agent = Agent()
    for _ in range(MIN_ENDED - 1):
        agent.run("generate", "judge")
    too_early = agent.rest_s("generate")
    agent.run("generate", "judge")

    assert too_early is None
    assert agent.rest_s("generate") is not None
    assert agent.rest_s("never seen") is None


def test_a_stage_that_one_run_in_two_enters_counts_half() -> None:
    agent = Agent()
    for number in range(400):
        agent.run("generate", "revise") if number % 2 else agent.run("generate")

    assert agent.rest_s("generate") == pytest.approx(0.5, abs=0.1)


def test_a_later_round_of_a_loop_is_another_state() -> None:
    agent = Agent()
    for _ in range(100):
        agent.run("revise", "revise", "judge")
    agent.num_runs += 1
    first = agent.learned.after(agent.request("revise"))
    agent.call("revise")
    second = agent.learned.after(agent.request("revise"))

    assert first == pytest.approx(2.0, abs=0.15)
    assert second == pytest.approx(1.0, abs=0.1)


def test_calls_side_by_side_are_followed_by_what_waits_for_them() -> None:
    agent = Agent()
    for _ in range(20):
        agent.num_runs += 1
        for name, took_s in (("short", 1.0), ("long", 3.0)):
            request = agent.request("generate", call=name)
            agent.learned.began(request)
            agent.open[name] = request, agent.now + took_s
        for name, (request, end_time) in agent.open.items():
            took_s = {"short": 1.0, "long": 3.0}[name]
            agent.learned.ended(request, end_time=end_time, alone_s=took_s, ok=True)
        agent.now += 3.0
        agent.call("judge", took_s=2.0, final=True)

    assert agent.rest_s("generate") == pytest.approx(2.0)


def test_a_quantile_tells_what_a_share_of_the_runs_did_not_exceed() -> None:
    agent = Agent()
    for number in range(100):
        agent.run("generate", *["revise"] * (4 if number % 5 == 0 else 1), "judge")

    assert agent.rest_s("generate", 0.5) == pytest.approx(2.0, rel=0.2)
    assert agent.rest_s("generate", 0.9) == pytest.approx(5.0, rel=0.2)
    assert agent.rest_s("generate") == pytest.approx(2.6, rel=0.1)


def test_what_was_learned_can_be_taken_over() -> None:
    agent, other = Agent(), Agent()
    for _ in range(20):
        agent.run("generate", "judge")
    for tenant, workflow, stage, number, row in agent.learned.to_rows():
        other.learned.restore((tenant, workflow, stage, number), row)

    assert other.rest_s("generate") == agent.rest_s("generate") == 1.0


def test_runs_of_two_workflows_are_two_runs_whatever_their_names() -> None:
    agent = Agent()
    for _ in range(20):
        agent.run("generate", "judge")
    request = stage_request(workflow_id="run-20", workflow="other", stage="generate")

    assert agent.learned.after(request) is None


def test_a_run_that_goes_silent_is_over() -> None:
    agent = Agent()
    for _ in range(40):
        agent.run("generate", final=False)
        agent.now += OVER_AFTER_S + 1.0
        agent.run("other", final=False)
        agent.now += OVER_AFTER_S + 1.0

    assert agent.rest_s("generate") == 0.0


def test_a_call_that_failed_teaches_nothing() -> None:
    agent = Agent()
    for _ in range(50):
        agent.num_runs += 1
        agent.call("generate", took_s=500.0, ok=False)
        agent.call("generate")
        agent.call("judge", final=True)

    assert agent.rest_s("generate") == pytest.approx(1.0, abs=0.1)


def test_memory_is_bounded_whatever_clients_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remaining, "MAX_RUNS", 10)
    monkeypatch.setattr(remaining, "MAX_STAGES", 10)
    learned = RemainingTime()
    for number in range(100):
        name = str(number)
        learned.began(
            stage_request(workflow_id=name, workflow=name, stage=name, arrival_time=number)
        )

        request = stage_request(workflow_id=name, workflow=name, stage=name)
        learned.ended(request, end_time=number, alone_s=1.0, ok=True)

    assert len(learned._runs) <= 10
    assert len(learned._rests) <= 10


def test_of_too_many_idle_runs_those_idle_longest_are_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remaining, "MAX_IDLE_RUNS", 5)
    agent = Agent()
    busy = agent.request("generate", call="busy")
    agent.learned.began(busy)  # of a run that stays busy
    for _ in range(3):
        for _ in range(5 + MIN_ENDED):
            agent.run("generate", final=False)
        assert len(agent.learned._runs) == 1 + 5
        agent.now += 2.0
    agent.learned.ended(busy, end_time=agent.now, alone_s=1.0, ok=True)
    agent.run("judge", final=False)

    assert len(agent.learned._runs) == 5
    assert agent.rest_s("generate") == 0.0


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.floats(0, 1e6), st.booleans()),
        max_size=60,
    )
)
def test_whatever_happens_the_time_left_is_a_duration(
    calls: list[tuple[str, str, float, bool]],
) -> None:
    learned, now = RemainingTime(), 0.0
    for run, stage, took_s, final in calls:
        request = stage_request(
            workflow_id=run, workflow="w", stage=stage, arrival_time=now, final=final
        )
        learned.began(request)
        now += took_s
        learned.ended(request, end_time=now, alone_s=took_s, ok=True)
        rest_s = learned.after(request)
        assert rest_s is None or (rest_s >= 0.0 and math.isfinite(rest_s))
