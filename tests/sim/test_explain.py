"""Every decision on a run can be asked why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.builders import FAST, SLOW, dispatcher, instance, outcome, stage_request
from tests.sim.tuner_builders import HEXGEN, logged
from vllm_workflow.cli.main import main
from vllm_workflow.core.config import PRESETS, PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import Event, to_json
from vllm_workflow.core.fleet import Instance
from vllm_workflow.sim.explain import Run, explain, reason
from vllm_workflow.sim.explain_text import as_json, text
from vllm_workflow.sim.fields import Place
from vllm_workflow.sim.log_window import logged_lines

FAST_AND_SLOW = (instance("fast", latency=FAST), instance("slow", latency=SLOW))


class Router:
    """A dispatcher with a log that can be asked."""

    def __init__(self, *instances: Instance, config: PolicyConfig | None = None) -> None:
        self.log: list[Event] = []
        self.brain: Dispatcher = dispatcher(*instances, config=config, record=self.log.append)

    def call(self, name: str, now: float = 0.0, run: str = "run", **fields: object) -> None:
        exclude = fields.pop("exclude", [])
        request = stage_request(name, arrival_time=now, workflow_id=run, **fields)  # type: ignore[arg-type]
        self.brain.submit(request, now=now, exclude=exclude)  # type: ignore[arg-type]

    def explained(self, run: str = "run") -> list[Run]:
        lines = [(Place("log", i), json.loads(to_json(e))) for i, e in enumerate(self.log)]
        return explain(lines, run, source="log")


def test_the_chosen_candidate_is_held_against_the_next_best() -> None:
    router = Router(*FAST_AND_SLOW)
    router.call("r", deadline=9.0)

    (run,) = router.explained()

    (attempt,) = run.calls[0].attempts
    fast, slow = attempt.costs
    assert attempt.decision is not None
    assert attempt.decision.chosen.instance_id == "fast"
    assert fast == attempt.decision.cost
    assert fast is not None
    assert slow is not None
    assert reason(attempt).startswith(f"least cost: slow would cost {slow - fast:.3g} more, mostly")
    assert "slack" in text(run)


def test_a_call_that_waited_says_how_long_and_why_it_went_where_it_could() -> None:
    config = PRESETS["workflow"]
    fast = instance("fast", latency=FAST, max_num_seqs=1)
    slow = instance("slow", latency=SLOW, max_num_seqs=1)
    router = Router(fast, slow, config=config)
    for name in ("a", "b"):
        router.call(name, run="others", expected_output_tokens=9000.0)
    router.call("c", now=1.0)
    router.brain.settle(outcome("b", "slow"))
    router.brain.poll(3.0)

    (run,) = router.explained()

    (attempt,) = run.calls[0].attempts
    assert attempt.wait_s == 2.0
    assert "after 2.000 s of waiting" in text(run)


def test_an_instance_with_less_cost_but_no_room_is_named() -> None:
    fast = instance("fast", latency=FAST, max_num_seqs=1)
    slow = instance("slow", latency=SLOW)
    router = Router(fast, slow, config=PRESETS["workflow"])
    router.call("a", run="others", expected_output_tokens=2.0)
    router.call("b", expected_output_tokens=500.0)

    (attempt,) = router.explained()[0].calls[0].attempts

    assert "it can start there now; fast would cost" in reason(attempt)
    assert "less but has room only in" in reason(attempt)


def test_a_retry_is_another_attempt_without_the_instance_that_failed() -> None:
    router = Router(*FAST_AND_SLOW)
    router.call("r")
    router.brain.settle(outcome("r", "fast", ok=False))
    router.call("r", now=2.0, exclude=["fast"])
    router.brain.settle(outcome("r", "slow", e2el_s=3.0, num_output_tokens=7))

    (run,) = router.explained()

    first, second = run.calls[0].attempts
    assert first.outcome is not None
    assert not first.outcome.ok
    assert second.exclude == ("fast",)
    assert reason(second) == "the only instance that could take it"
    assert run.end_time == 5.0
    said = text(run)
    assert "again, without fast" in said
    assert "3.000 s happened; answer 10 → 7 tokens" in said


def test_each_decision_is_explained_by_the_policy_then_in_force() -> None:
    router = Router(*FAST_AND_SLOW)
    router.call("a")
    router.brain.swap(HEXGEN, now=1.0)
    router.call("b", now=1.0)

    first, second = router.explained()[0].calls

    assert first.attempts[0].policy == PolicyConfig()
    assert second.attempts[0].policy == HEXGEN


def test_a_rule_with_a_state_of_its_own_claims_no_costs_of_others() -> None:
    router = Router(*FAST_AND_SLOW, config=PRESETS["round-robin"])
    router.call("r")

    (attempt,) = router.explained()[0].calls[0].attempts

    assert attempt.costs.count(None) == 1
    assert reason(attempt).startswith("round-robin: ")


def test_a_call_that_was_given_up_says_so() -> None:
    one = instance("a", max_num_seqs=1)
    router = Router(one, config=PRESETS["workflow"])
    router.call("first", run="others")
    router.call("r")
    router.brain.withdraw("r")

    (run,) = router.explained()

    assert "given up while it waited" in text(run)
    assert as_json(run)["calls"][0]["attempts"][0]["withdrawn"] is True


def test_what_happened_is_said_against_the_promise(tmp_path: Path) -> None:
    lines = logged_lines(logged(tmp_path / "log", num_runs=5))

    (run,) = explain(lines, "run-3", source="log")

    assert [call.request.stage for call in run.calls] == ["draft", "check"]
    assert run.deadline - run.arrival_time == pytest.approx(4.0)
    assert "promised 4 s: met" in text(run)


def test_runs_of_the_same_name_of_two_tenants_are_told_apart() -> None:
    router = Router(*FAST_AND_SLOW)
    router.call("a", tenant_id="acme")
    router.call("b", tenant_id="bolt")

    assert [run.tenant_id for run in router.explained()] == ["acme", "bolt"]


def test_an_unknown_run_is_answered_with_names_that_are_like_it() -> None:
    router = Router(*FAST_AND_SLOW)
    for name in ("report-17", "report-71", "other"):
        router.call(name, run=name)

    with pytest.raises(ConfigError, match=r"log: no run 'report-7' among 3; most like it: \['rep"):
        router.explained("report-7")


def test_a_call_without_a_run_is_found_by_its_request_id() -> None:
    router = Router(*FAST_AND_SLOW)
    router.call("req-1", run="")

    assert len(router.explained("req-1")[0].calls) == 1


def test_the_command_prints_text_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(logged(tmp_path / "log", num_runs=5))

    assert main(["explain", "run-2", path]) == 0
    said = capsys.readouterr().out
    assert main(["explain", "run-2", path, "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert main(["explain", "run-22", path]) == 2
    error = capsys.readouterr().err
    assert main(["explain", "run-2", path, "--tenant", "acme"]) == 2

    assert "1. 'draft' at 0.000 s" in said
    assert [call["stage"] for call in run["calls"]] == ["draft", "check"]
    first = run["calls"][0]["attempts"][0]
    assert first["outcome"]["ok"] is True
    assert min(c["cost"] for c in first["candidates"]) == next(
        c["cost"] for c in first["candidates"] if c["instance_id"] == first["instance"]
    )
    assert "no run 'run-22' among 5; most like it:" in error
    assert "--tenant: expected one of [''], got 'acme'" in capsys.readouterr().err
