"""What the live page is told of runs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import candidate, stage_request
from vllm_workflow.core.call_events import Polled, Settled, Submitted, Withdrawn
from vllm_workflow.core.events import Event
from vllm_workflow.core.types import Decision, Outcome
from vllm_workflow.router import board as module
from vllm_workflow.router.board import MAX_CALLS, MAX_RUNS, MAX_WAITING, REFRESH_S, Board
from vllm_workflow.router.runs import IDLE_S, IDLE_TTL_S


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def decision(request_id: str, instance: str = "fast") -> Decision:
    chosen = candidate(instance)
    return Decision(
        request_id=request_id,
        chosen=chosen,
        cost=1.0,
        candidates=(chosen,),
        slack_s=1.0,
        policy="predicted-finish",
    )


def submitted(
    request_id: str, *, run: str = "", instance: str | None = "fast", **fields: Any
) -> Submitted:
    fields = {"workflow_id": run, "arrival_time": 1000.0, **fields}
    return Submitted(
        now=1000.0,
        request=stage_request(request_id=request_id, **fields),
        num_prompt_bytes=10,
        exclude=(),
        decision=None if instance is None else decision(request_id, instance),
    )


def settled(request_id: str, *, ok: bool = True) -> Settled:
    return Settled(outcome=Outcome(request_id=request_id, instance_id="fast", ok=ok, e2el_s=1.0))


def board(*events: Event, clock: Clock | None = None) -> Board:
    made = Board(clock or Clock())
    for event in events:
        made.record(event)
    return made


def shown(made: Board, since: int = 0) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(made.snapshot(since))
    return state


def test_a_call_is_told_from_its_arrival_to_its_end():
    clock = Clock()
    made = Board(clock)
    made.record(submitted("1", run="r", stage="draft", instance=None, deadline=1060.0))
    clock.now = 1002.0
    made.record(Polled(now=1002.0, decisions=(decision("1", "slow"),)))
    clock.now = 1005.0
    made.record(settled("1"))

    (run,) = shown(made)["runs"]

    assert (run["run"], run["ended"], run["met"], run["deadline"]) == ("r", False, None, 55.0)
    assert run["calls"] == [["draft", -5.0, -3.0, 0.0, "slow", True]]


def test_a_run_ends_with_its_final_call_and_has_met_its_deadline_or_not():
    made = board(
        submitted("1", run="good", final=True, deadline=1001.0, tenant_id="acme"),
        submitted("2", run="late", final=True, deadline=999.0, tenant_id="acme"),
        submitted("3", run="free", final=True, tenant_id="bolt"),
        submitted("4", run="on", deadline=2000.0, tenant_id="bolt"),
        *(settled(each) for each in "1234"),
    )

    state = shown(made)

    assert {run["run"]: run["met"] for run in state["runs"]} == {
        "good": True,
        "late": False,
        "free": None,
        "on": None,
    }
    assert state["tenants"] == [
        {"tenant": "acme", "running": 0, "met": 1, "missed": 1},
        {"tenant": "bolt", "running": 1, "met": 0, "missed": 0},
    ]


def test_a_run_that_says_nothing_of_its_end_has_ended_when_idle():
    clock = Clock()
    made = Board(clock)
    made.record(submitted("1", run="r", deadline=1010.0))
    made.record(settled("1"))
    clock.now += IDLE_S

    (run,) = shown(made)["runs"]

    assert (run["ended"], run["met"]) == (True, True)


def test_a_call_that_moves_to_another_instance_is_shown_twice():
    made = board(
        submitted("1", run="r", instance="one"), settled("1", ok=False), submitted("1", run="r")
    )

    (run,) = shown(made)["runs"]

    assert [(call[4], call[5]) for call in run["calls"]] == [("one", False), ("fast", None)]


def test_what_waits_is_told_by_slack_and_not_all_of_it():
    clock = Clock()
    made = board(
        *(
            submitted(f"{i}", run=f"r{i}", instance=None, deadline=2000.0 - i, rest_s=10.0)
            for i in range(MAX_WAITING + 20)
        ),
        submitted("free", run="free", instance=None),
        clock=clock,
    )

    state = shown(made)
    made.record(Withdrawn(request_id="free"))
    clock.now += REFRESH_S

    assert state["num_waiting"] == MAX_WAITING + 21
    assert [row["slack_s"] for row in state["waiting"]] == [
        1000.0 - i - 10.0 for i in reversed(range(20, MAX_WAITING + 20))
    ]
    assert shown(made)["num_waiting"] == MAX_WAITING + 20


def test_only_what_has_changed_is_told_again():
    made = board(submitted("1", run="a"), submitted("2", run="b"))
    first = shown(made)
    made.record(settled("2"))

    second = shown(made, first["number"])

    assert first["whole"]
    assert not second["whole"]
    assert [run["run"] for run in second["runs"]] == ["b"]
    assert shown(made, second["number"])["runs"] == []
    # A page that outlived the router has a number that this router never gave.
    assert [run["run"] for run in shown(made, 10**6)["runs"]] == ["a", "b"]


def test_there_are_never_more_runs_and_calls_than_so_many():
    made = board(*(submitted(f"c{i}", run="long") for i in range(MAX_CALLS + 50)))
    for i in range(MAX_RUNS + 50):
        made.record(submitted(f"{i}", run=f"r{i}", final=True))
        made.record(settled(f"{i}"))

    state = shown(made)
    long = next(run for run in state["runs"] if run["run"] == "long")

    assert state["num_runs"] == len(state["runs"]) == MAX_RUNS
    assert (len(long["calls"]), long["num_calls"]) == (MAX_CALLS, MAX_CALLS + 50)


def test_of_a_long_run_the_latest_calls_are_told():
    made = board(*(submitted(f"{i}", run="r", stage=f"s{i}") for i in range(MAX_CALLS + 5)))

    (run,) = shown(made)["runs"]

    assert [call[0] for call in run["calls"]] == [f"s{i}" for i in range(5, MAX_CALLS + 5)]


def test_many_who_ask_cost_as_one(monkeypatch: pytest.MonkeyPatch):
    clock, told = Clock(), []
    tell = module._run
    monkeypatch.setattr(module, "_run", lambda run, now: told.append(run.name) or tell(run, now))
    made = board(submitted("1", run="a"), submitted("2", run="b"), clock=clock)
    for _ in range(10):
        assert len(shown(made)["runs"]) == 2
        assert [run["run"] for run in shown(made, 2)["runs"]] == ["b"]
    assert told == ["a", "b"]

    made.record(settled("1"))  # what has changed is told at once
    (changed,) = shown(made, 4)["runs"]
    assert (changed["run"], changed["calls"][0][5]) == ("a", True)

    clock.now += REFRESH_S
    assert [run["arrival"] for run in shown(made)["runs"]] == [-REFRESH_S] * 2
    assert told == ["a", "b", "a", "a", "b"]


CALLS = st.lists(
    st.tuples(
        st.sampled_from("abcd"),
        st.sampled_from(("submit", "wait", "poll", "settle", "withdraw", "give up")),
    ),
    max_size=40,
)


@given(CALLS)
def test_any_order_of_events_leaves_a_state_that_can_be_shown(steps: list[tuple[str, str]]):
    made = Board(Clock())
    open_calls: set[str] = set()
    for name, step in steps:
        if step == "submit" and name not in open_calls:
            made.record(submitted(name, run=name, instance=None))
            open_calls.add(name)
        elif step == "wait":
            made.waits(stage_request(request_id=name, workflow_id=name, arrival_time=1000.0))
            open_calls.add(name)
        elif step == "give up":
            made.gave_up("", name, alone=False)
            open_calls.discard(name)
        elif step == "poll":
            made.record(Polled(now=1000.0, decisions=(decision(name),)))
        elif step in {"settle", "withdraw"}:
            made.record(settled(name) if step == "settle" else Withdrawn(request_id=name))
            open_calls.discard(name)

    state = shown(made)

    assert state["num_waiting"] <= len(open_calls)
    num_open = sum(call[3] is None for run in state["runs"] for call in run["calls"])
    assert num_open == len(open_calls)
    assert all(math.isfinite(run["arrival"]) for run in state["runs"])


def test_a_run_that_idles_and_goes_on_counts_once_as_in_the_metrics() -> None:
    clock = Clock()
    made = Board(clock)

    def call(name: str, *, final: bool = False) -> None:
        made.record(submitted(name, run="r", deadline=clock.now + 10.0, final=final))
        clock.now += 1.0
        made.record(settled(name))

    call("1")
    clock.now += 2 * IDLE_S
    json.loads(made.snapshot())
    call("2", final=True)
    (tenant,) = json.loads(made.snapshot())["tenants"]

    assert (tenant["met"], tenant["missed"]) == (1, 0)


def test_a_run_idle_for_longer_than_runs_are_known_is_another_one() -> None:
    clock = Clock()
    made = Board(clock)
    for name, idle_s in (("1", IDLE_TTL_S + 10.0), ("2", 2 * IDLE_S)):
        made.record(submitted(name, run="r", deadline=clock.now + 10.0))
        made.record(settled(name))
        clock.now += idle_s
    (tenant,) = json.loads(made.snapshot())["tenants"]

    assert tenant["met"] == 2
