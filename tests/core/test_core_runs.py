"""What runs have attained: kept by the dispatcher, read by `plas` and `atlas`."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import FAST, dispatcher, instance, outcome, stage_request
from vllm_workflow.core import runs as core_runs
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.runs import Attained, AttainedService
from vllm_workflow.core.types import StageRequest

seconds = st.floats(0.0, 1e3)


def call(
    request_id: str, workflow_id: str = "w", *, tenant_id: str = "", final: bool = False
) -> StageRequest:
    return stage_request(
        request_id,
        workflow_id=workflow_id,
        tenant_id=tenant_id,
        final=final,
        expected_output_tokens=11.0,
    )


def begin(brain: Dispatcher, each: StageRequest) -> float:
    """Predict and submit a call; returns its predicted service."""
    predicted = brain.predict(each, num_prompt_bytes=400, max_tokens=11)
    return brain.submit(predicted, now=0.0).chosen.service_s


def attained(brain: Dispatcher, workflow_id: str = "w", tenant_id: str = "") -> Attained:
    return brain.predictor.attained(call("x", workflow_id, tenant_id=tenant_id))


def test_one_call_after_the_other_adds_up_along_both() -> None:
    brain = dispatcher(instance("a"))
    served = []
    for request_id in ("r1", "r2"):
        served.append(begin(brain, call(request_id)))
        brain.settle(outcome(request_id, "a"))

    assert attained(brain).total_s == pytest.approx(sum(served))
    assert attained(brain).path_s == pytest.approx(sum(served))


def test_calls_side_by_side_count_once_along_the_path() -> None:
    brain = dispatcher(instance("a"))
    served = [begin(brain, call(f"r{i}")) for i in range(3)]
    for i in range(3):
        brain.settle(outcome(f"r{i}", "a"))

    assert attained(brain).total_s == pytest.approx(sum(served))
    assert attained(brain).path_s == pytest.approx(max(served))


def test_the_next_call_of_a_run_is_predicted_with_what_the_run_attained() -> None:
    brain = dispatcher(instance("a"))
    for i in range(2):
        begin(brain, call(f"r{i}"))
    for i in range(2):
        brain.settle(outcome(f"r{i}", "a"))

    following = brain.predict(call("next"), num_prompt_bytes=1, max_tokens=None)

    assert following.attained_s == attained(brain).total_s
    assert following.attained_path_s == attained(brain).path_s
    assert 0.0 < following.attained_path_s < following.attained_s


def test_time_spent_waiting_is_not_service() -> None:
    brain = dispatcher(instance("a"))
    service_s = begin(brain, call("r"))
    brain.settle(outcome("r", "a", e2el_s=1000.0))

    assert attained(brain).total_s == pytest.approx(service_s)


def test_service_is_that_of_the_tokens_that_came_and_were_not_cached() -> None:
    brain = dispatcher(instance("a", latency=FAST))
    begin(brain, call("r"))
    chosen = brain.submit(call("probe", "other"), now=0.0).chosen
    end = outcome(
        "r", "a", e2el_s=math.nan, num_prompt_tokens=4000, num_cached_tokens=3000,
        num_output_tokens=31,
    )  # fmt: skip
    brain.settle(end)

    # 11 tokens were expected, of which prefill gives the first: 30 steps instead of 10.
    alone_s = 3 * FAST.decode_s(10, batch_size=1, num_context_tokens=105)
    assert chosen.decode_s > 0.0
    assert attained(brain).total_s == pytest.approx(
        FAST.prefill_s(1000, num_cached_tokens=3000) + alone_s
    )


def test_a_call_that_failed_attained_nothing() -> None:
    brain = dispatcher(instance("a"))
    begin(brain, call("r"))
    brain.settle(outcome("r", "a", ok=False))

    assert attained(brain) == Attained()


def test_runs_of_two_tenants_are_two_runs() -> None:
    brain = dispatcher(instance("a"))
    begin(brain, call("r", tenant_id="a"))
    brain.settle(outcome("r", "a"))

    assert attained(brain, tenant_id="a").total_s > 0.0
    assert attained(brain, tenant_id="b") == Attained()


def test_a_call_without_a_run_is_remembered_nowhere() -> None:
    brain = dispatcher(instance("a"))
    for request_id in ("r1", "r2"):
        begin(brain, call(request_id, ""))
        brain.settle(outcome(request_id, "a"))

    assert attained(brain, "") == Attained()
    assert len(brain.predictor._attained) == 0


def test_a_run_is_forgotten_when_its_final_call_ended_well() -> None:
    brain = dispatcher(instance("a"))
    begin(brain, call("r1"))
    begin(brain, call("straggler"))
    brain.settle(outcome("r1", "a"))
    begin(brain, call("r2", final=True))
    brain.settle(outcome("r2", "a"))
    brain.settle(outcome("straggler", "a"))

    assert attained(brain) == Attained()
    assert len(brain.predictor._attained) == 0


def test_a_final_call_that_failed_leaves_the_run_what_it_had() -> None:
    brain = dispatcher(instance("a"))
    begin(brain, call("r1"))
    brain.settle(outcome("r1", "a"))
    had = attained(brain)
    begin(brain, call("r2", final=True))
    brain.settle(outcome("r2", "a", ok=False))

    assert attained(brain) == had != Attained()


def test_runs_that_clients_invent_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_runs, "MAX_RUNS", 3)
    runs = AttainedService()
    kept = call("r", "kept")
    for i in range(100):
        runs.begin(kept)
        runs.end(kept, 1.0)
        runs.begin(call("r", f"w{i}"))

    assert len(runs) == 3
    assert runs.of(kept).total_s == 100.0
    assert runs.of(call("r", "w0")) == Attained()


def test_to_ask_about_a_run_does_not_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_runs, "MAX_RUNS", 1)
    runs = AttainedService()
    runs.begin(call("r", "old"))
    runs.begin(call("r", "new"))
    runs.of(call("r", "old"))
    runs.end(call("r", "old"), 1.0)

    assert runs.of(call("r", "old")) == Attained()
    assert len(runs) == 1


@given(
    waves=st.lists(st.lists(seconds, min_size=1, max_size=4), max_size=6),
)
def test_a_path_is_the_longest_call_of_each_wave_and_never_more_than_the_sum(
    waves: list[list[float]],
) -> None:
    runs = AttainedService()
    for number, wave in enumerate(waves):
        before = runs.of(call("x"))
        for i, _ in enumerate(wave):
            runs.begin(call(f"r{number}.{i}"))
        for i, service_s in enumerate(wave):
            each = stage_request(f"r{number}.{i}", workflow_id="w", attained_path_s=before.path_s)
            runs.end(each, service_s)

    assert runs.of(call("x")).total_s == pytest.approx(sum(map(sum, waves)))
    assert runs.of(call("x")).path_s == pytest.approx(sum(map(max, waves)))
    assert runs.of(call("x")).path_s <= runs.of(call("x")).total_s * (1 + 1e-9)


def test_to_predict_a_call_does_not_begin_it() -> None:
    brain = dispatcher(instance("a"))
    brain.predict(call("r"), num_prompt_bytes=1, max_tokens=None)

    assert len(brain.predictor._attained) == 0
