import math

import pytest

from tests.builders import (
    FAST,
    SLOW,
    dispatcher,
    instance,
    outcome,
    stage_request,
    workflow,
)
from vllm_workflow.core.config import DISPATCH_POLICIES, PolicyConfig
from vllm_workflow.core.errors import NoInstanceError
from vllm_workflow.core.types import StageRequest


def predicted(each: StageRequest, *, max_tokens: int | None = None, num_bytes: int = 400) -> float:
    brain = dispatcher(instance("a"), workflows=(workflow(generate=1.0, judge=1.0),))
    return brain.predict(each, num_prompt_bytes=num_bytes, max_tokens=max_tokens).rest_s


def test_a_call_is_sent_where_it_is_predicted_to_finish_first() -> None:
    brain = dispatcher(instance("slow", latency=SLOW), instance("fast", latency=FAST))

    decision = brain.submit(stage_request(deadline=10.0, rest_s=4.0), now=1.0)

    assert decision.chosen.instance_id == "fast"
    assert decision.slack_s == pytest.approx(10.0 - 1.0 - decision.chosen.finish_s - 4.0)
    assert [c.instance_id for c in decision.candidates] == ["slow", "fast"]


def test_a_call_without_deadline_has_endless_slack() -> None:
    assert dispatcher().submit(stage_request(), now=0.0).slack_s == math.inf


def test_load_moves_calls_to_the_slower_instance() -> None:
    brain = dispatcher(instance("fast", latency=FAST), instance("slow", latency=SLOW))

    chosen = [brain.submit(stage_request(f"r{i}"), now=0.0).chosen.instance_id for i in range(40)]

    assert chosen[0] == "fast"
    assert 0 < chosen.count("slow") < chosen.count("fast")


@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.parametrize("name", DISPATCH_POLICIES)
def test_what_is_submitted_and_settled_leaves_nothing_behind(name: str, ok: bool) -> None:
    brain = dispatcher(config=PolicyConfig(dispatch=name))
    for i in range(20):
        brain.submit(stage_request(f"r{i}"), now=0.0)
    assert brain.num_in_flight == brain.fleet.num_outstanding() == 20

    for i in range(20):
        for _ in range(2):
            brain.settle(outcome(f"r{i}", "a", ok=ok))

    assert brain.num_in_flight == brain.fleet.num_outstanding() == 0
    assert brain.fleet.outstanding_s("a") == brain.fleet.outstanding_s("b") == 0.0


def test_a_call_is_in_flight_once() -> None:
    brain = dispatcher()
    brain.submit(stage_request("r"), now=0.0)

    with pytest.raises(ValueError, match="request 'r' is already in flight"):
        brain.submit(stage_request("r"), now=0.0)


def test_a_call_that_failed_can_be_sent_elsewhere() -> None:
    brain = dispatcher()
    first = brain.submit(stage_request("r"), now=0.0).chosen.instance_id
    brain.settle(outcome("r", first, ok=False))

    second = brain.submit(stage_request("r"), now=0.0, exclude=[first]).chosen.instance_id

    assert {first, second} == {"a", "b"}


def test_it_is_said_why_no_instance_can_take_a_call() -> None:
    brain = dispatcher(instance("a", models=("m",)))

    with pytest.raises(NoInstanceError, match=r"no instance serves model 'x'; served are \['m'\]"):
        brain.submit(stage_request(model="x"), now=0.0)
    with pytest.raises(NoInstanceError, match=r"no healthy instance .* 'm'; tried \['a'\]"):
        brain.submit(stage_request(model="m"), now=0.0, exclude=["a"])


def test_the_rest_of_a_run_is_what_its_later_stages_take() -> None:
    first = predicted(stage_request(workflow="text2sql", stage="generate"))

    assert first > 0.0
    assert predicted(stage_request(workflow="text2sql", stage="judge")) == 0.0
    assert predicted(stage_request(workflow="text2sql", stage="dream")) == 0.0
    assert predicted(stage_request(workflow="other", stage="generate")) == 0.0
    assert predicted(stage_request(workflow="text2sql", stage="generate", final=True)) == 0.0


def test_the_rest_of_a_run_follows_what_is_learned_of_its_stages() -> None:
    brain = dispatcher(instance("a"), workflows=(workflow(generate=1.0, judge=1.0),))
    generate = stage_request(workflow="text2sql", stage="generate")

    def rest_s() -> float:
        return brain.predict(generate, num_prompt_bytes=100, max_tokens=None).rest_s

    before = rest_s()
    for i in range(100):
        judge = stage_request(f"r{i}", workflow="text2sql", stage="judge")
        chosen = brain.submit(judge, now=0.0).chosen
        actual_s = chosen.prefill_s + chosen.decode_s * 999 / 9
        brain.settle(outcome(f"r{i}", "a", e2el_s=actual_s, num_output_tokens=1000))

    assert rest_s() > 3 * before


def test_lengths_are_learned_from_calls_that_ended_well_only() -> None:
    brain = dispatcher()
    call = stage_request("r", workflow="w", stage="s")

    def output_tokens() -> float:
        return brain.predict(call, num_prompt_bytes=1, max_tokens=None).expected_output_tokens

    before = output_tokens()
    brain.submit(call, now=0.0)
    brain.settle(outcome("r", "a", ok=False, num_output_tokens=1))
    assert output_tokens() == before
    brain.submit(call, now=0.0)
    brain.settle(outcome("r", "a", num_output_tokens=7))
    assert output_tokens() == 7.0


def test_a_longer_answer_than_expected_is_not_taken_for_a_slower_instance() -> None:
    brain = dispatcher(instance("a"))
    for i in range(50):
        call = stage_request(f"r{i}", expected_output_tokens=11.0)
        chosen = brain.submit(call, now=0.0).chosen
        actual_s = chosen.prefill_s + 10 * chosen.decode_s
        brain.settle(outcome(f"r{i}", "a", e2el_s=actual_s, num_output_tokens=101))

    assert brain.fleet.drift("a") == pytest.approx(1.0)


def test_prompt_tokens_are_learned_from_the_bytes_that_made_them() -> None:
    brain = dispatcher()
    for i in range(200):
        decision = brain.submit(stage_request(f"r{i}"), now=0.0, num_prompt_bytes=1000)
        brain.settle(outcome(f"r{i}", decision.chosen.instance_id, num_prompt_tokens=500))

    learned = brain.predict(stage_request(), num_prompt_bytes=1000, max_tokens=None)
    assert 480 <= learned.num_prompt_tokens <= 500


def test_the_client_s_limit_bounds_the_expected_output() -> None:
    expected = dispatcher().predict(stage_request(), num_prompt_bytes=1, max_tokens=5)

    assert expected.expected_output_tokens == 5.0


def test_models_that_clients_invent_do_not_fill_the_memory() -> None:
    brain = dispatcher(workflows=(workflow(generate=1.0, judge=1.0),))
    for i in range(5000):
        call = stage_request(workflow="text2sql", stage="generate", model=f"m{i}")
        brain.predict(call, num_prompt_bytes=1, max_tokens=None)

    assert len(brain.predictor._rests) <= 1024


def test_a_call_without_prompt_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="request 'r': num_prompt_tokens must be at least 1"):
        dispatcher().submit(stage_request(num_prompt_tokens=0), now=0.0)
