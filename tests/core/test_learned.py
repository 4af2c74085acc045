import json
from typing import Any

import pytest

from tests.builders import dispatcher, instance, outcome, stage_request, workflow
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.learned import Learned
from vllm_workflow.core.types import StageRequest


def predicted(brain: Dispatcher, request_id: str, stage: str, **fields: Any) -> StageRequest:
    call = stage_request(request_id, workflow="text2sql", stage=stage, **fields)
    return brain.predict(call, num_prompt_bytes=4000, max_tokens=None)


def taught(num_runs: int, **config: Any) -> Dispatcher:
    """A dispatcher that has seen runs of two calls."""
    brain = dispatcher(instance("a"), **config)
    for run in range(num_runs):
        for number, stage in enumerate(("generate", "judge")):
            now = 10.0 * run + number
            call = predicted(
                brain,
                f"{run}-{stage}",
                stage,
                workflow_id=f"run-{run}",
                arrival_time=now,
                final=stage == "judge",
            )
            brain.submit(call, now=now, num_prompt_bytes=4000)
            brain.settle(
                outcome(
                    call.request_id, "a", e2el_s=1.0, num_prompt_tokens=900, num_output_tokens=300
                )
            )
    return brain


def test_a_cold_start_is_visible_in_each_prediction_and_in_the_counts() -> None:
    brain = taught(0)
    call = predicted(brain, "r", "generate")

    assert (call.expected_from, call.rest_from) == ("prior", "prior")
    assert brain.predictor.num_predicted == {("prior", "prior"): 1}


def test_what_is_declared_is_believed_until_runs_have_been_seen() -> None:
    declared = (workflow(generate=1.0, judge=1.0),)
    before = predicted(taught(0, workflows=declared), "r", "generate")
    after = predicted(taught(20, workflows=declared), "r", "generate")

    assert (before.expected_from, before.rest_from) == ("declared", "declared")
    assert (after.expected_from, after.rest_from) == ("learned", "learned")


def test_a_call_that_is_the_last_by_the_client_s_word_leaves_nothing() -> None:
    call = predicted(taught(20), "r", "judge", final=True)

    assert (call.rest_s, call.rest_from) == (0.0, "client")


def test_a_policy_that_counts_on_luck_expects_less_of_the_run_than_one_that_does_not() -> None:
    brain = dispatcher(instance("a"))
    for run in range(30):  # every third run revises
        revised = ["revise"] if run % 3 == 0 else []
        for number, stage in enumerate(["generate", *revised, "judge"]):
            now = 10.0 * run + number
            final = stage == "judge"
            name = f"{run}-{stage}"
            call = predicted(
                brain, name, stage, workflow_id=f"{run}", arrival_time=now, final=final
            )
            brain.submit(call, now=now)
            brain.settle(outcome(name, "a", num_prompt_tokens=900, num_output_tokens=300))
    mean_s = predicted(brain, "r", "generate").rest_s
    rests_s = []
    for quantile in (0.1, 0.9):
        brain.swap(PolicyConfig(risk_quantile=quantile), now=400.0)
        rests_s.append(predicted(brain, "r", "generate").rest_s)

    assert rests_s[0] < mean_s < rests_s[1]


def test_a_router_that_starts_again_predicts_as_the_one_before() -> None:
    brain, again = taught(20), dispatcher(instance("a"))
    again.predictor.restore(
        json.loads(json.dumps(brain.predictor.learned.to_mapping())), source="state"
    )
    before, after = predicted(brain, "r", "generate"), predicted(again, "r", "generate")

    assert after.expected_output_tokens == pytest.approx(before.expected_output_tokens)
    assert after.num_prompt_tokens == before.num_prompt_tokens
    assert after.rest_s == pytest.approx(before.rest_s)
    assert after.rest_from == "learned"
    assert again.predictor.learned.summary() == brain.predictor.learned.summary()


def test_the_summary_tells_calls_lengths_rest_and_what_follows() -> None:
    summary = {entry["stage"]: entry for entry in taught(20).predictor.learned.summary()}

    assert summary["generate"]["next"] == {"judge": 1.0}
    assert summary["generate"]["calls_per_run"] == 1.0
    assert summary["generate"]["output_tokens"]["p50"] == pytest.approx(300.0, rel=0.1)
    assert summary["generate"]["rest_s"]["0"]["mean"] > 0.0
    assert summary["judge"]["next"] == {"(end)": 1.0}


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"version": 2},
        {"version": 1},
        {
            "version": 1,
            "tokens_per_byte": [0.25, 4.0],
            "lengths": [["t"]],
            "rests": [],
            "flows": [],
        },
        {"version": 1, "tokens_per_byte": [-1, 4.0], "lengths": [], "rests": [], "flows": []},
    ],
)
def test_what_cannot_be_read_is_refused_by_name_and_changes_nothing(data: Any) -> None:
    brain = taught(20)
    before = brain.predictor.learned

    with pytest.raises(ConfigError, match=r"state\.json"):
        brain.predictor.restore(data, source="state.json")
    assert brain.predictor.learned is before


def test_an_empty_state_is_read_back() -> None:
    assert Learned.from_mapping(Learned().to_mapping(), source="s").summary() == []
