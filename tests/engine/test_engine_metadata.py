import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.core.ordering import ORDERING_POLICIES
from vllm_workflow.engine.metadata import MAX_TEXT_LENGTH, Reading, has_extra_args, read


def request(extra_args: Any = None, **fields: Any) -> Any:
    defaults = {
        "request_id": "r",
        "arrival_time": 1000.0,
        "priority": 0,
        "num_prompt_tokens": 5,
        "session_id": None,
        "sampling_params": SimpleNamespace(extra_args=extra_args),
    }
    return SimpleNamespace(**{**defaults, **fields})


def reading_of(**extra_args: Any) -> Reading:
    return read(request(extra_args))


def test_every_key_is_read() -> None:
    call = reading_of(
        wf_id="run-1",
        wf_name="text2sql",
        wf_stage="generate",
        wf_tenant="acme",
        wf_budget_ms=30_000,
        wf_rest_ms=2_500.0,
        wf_service_ms=1_500,
        wf_age_ms=12_000,
        wf_attained_ms=9_000,
        wf_attained_path_ms=4_000.5,
        wf_final=1,
    ).call

    assert (call.workflow_id, call.workflow, call.stage) == ("run-1", "text2sql", "generate")
    assert call.tenant_id == "acme"
    assert call.deadline == 1030.0
    assert (call.rest_s, call.service_s) == (2.5, 1.5)
    assert call.run_arrival_time == 988.0
    assert (call.attained_s, call.attained_path_s) == (9.0, 4.0005)
    assert call.final


def test_a_request_without_metadata_is_an_ordinary_call() -> None:
    reading = read(request(None, priority=-3, num_prompt_tokens=7))

    assert not reading.is_workflow
    assert not reading.call.has_deadline
    assert reading.call.priority == -3
    assert reading.call.num_prompt_tokens == 7


def test_a_pooling_request_is_an_ordinary_call() -> None:
    pooling = request(sampling_params=None)

    assert not has_extra_args(pooling)
    assert not read(pooling).is_workflow


@pytest.mark.parametrize("budget_ms", [0, 0.0, -1, -5_000, -(2**63), -1e308])
def test_a_spent_budget_is_late_not_absent(budget_ms: float) -> None:
    reading = reading_of(wf_budget_ms=budget_ms)

    assert reading.call.has_deadline
    assert reading.call.deadline <= 1000.0
    assert math.isfinite(reading.call.deadline)
    assert reading.num_unreadable == 0


@pytest.mark.parametrize(
    "budget_ms",
    [
        math.inf,
        -math.inf,
        math.nan,
        1e308,
        2**63,
        10**400,
        "5 s",
        "inf",
        "5_000",
        b"5",
        [5],
        {"a": 1},
        True,
    ],
)
def test_an_absurd_budget_is_no_deadline_and_counted(budget_ms: Any) -> None:
    reading = reading_of(wf_budget_ms=budget_ms, wf_stage="generate")

    assert not reading.call.has_deadline
    assert reading.call.stage == "generate"
    assert reading.num_unreadable == 1


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 2**63, "one", [1], None])
def test_an_absurd_duration_is_zero(value: Any) -> None:
    call = reading_of(wf_budget_ms=1, wf_rest_ms=value, wf_service_ms=value).call

    assert (call.rest_s, call.service_s) == (0.0, 0.0)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 2**63, 10**400, "one", [1], {}, True])
def test_an_absurd_past_of_a_run_is_unknown_and_counted(value: Any) -> None:
    reading = reading_of(
        wf_id="w", wf_age_ms=value, wf_attained_ms=value, wf_attained_path_ms=value
    )

    assert math.isnan(reading.call.run_arrival_time)
    assert (reading.call.attained_s, reading.call.attained_path_s) == (0.0, 0.0)
    assert reading.num_unreadable == 3
    assert reading.call.workflow_id == "w"


def test_a_run_of_which_no_age_is_said_has_none() -> None:
    reading = reading_of(wf_id="w")

    assert math.isnan(reading.call.run_arrival_time)
    assert reading.num_unreadable == 0


def test_long_texts_are_cut() -> None:
    call = reading_of(wf_id="x" * 10_000, wf_stage="y" * 10_000).call

    assert call.workflow_id == "x" * MAX_TEXT_LENGTH
    assert call.stage == "y" * MAX_TEXT_LENGTH


def test_a_number_may_name_a_stage() -> None:
    assert reading_of(wf_stage=2).call.stage == "2"


@pytest.mark.parametrize("carrier", ["field", "xargs"])
def test_session_id_stands_in_for_the_run_but_asks_for_nothing(carrier: str) -> None:
    if carrier == "field":
        reading = read(request({}, session_id="s-1"))
    else:
        reading = read(request({"session_id": "s-1"}))

    assert reading.call.workflow_id == "s-1"
    assert not reading.is_workflow


def test_wf_id_goes_before_session_id() -> None:
    assert read(request({"wf_id": "run"}, session_id="s")).call.workflow_id == "run"


@pytest.mark.parametrize("arrival_time", [None, math.nan, math.inf, "now", 1e300])
def test_an_unusable_arrival_time_is_now(arrival_time: Any) -> None:
    call = read(request({"wf_budget_ms": 1000}, arrival_time=arrival_time)).call

    assert abs(call.arrival_time - time.time()) < 60.0


class Hostile:
    """Raises at whatever it is asked."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    def __bool__(self) -> bool:
        raise RuntimeError

    def __float__(self) -> float:
        raise RuntimeError

    def __str__(self) -> str:
        raise RuntimeError

    __hash__ = None  # type: ignore[assignment]


_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.builds(Hostile)
)
_junk = st.recursive(_scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
_keys = st.sampled_from(
    [
        "wf_id",
        "wf_name",
        "wf_stage",
        "wf_budget_ms",
        "wf_rest_ms",
        "wf_service_ms",
        "wf_age_ms",
        "wf_attained_ms",
        "wf_attained_path_ms",
        "wf_tenant",
        "wf_final",
        "session_id",
    ]
)


@given(
    extra_args=st.dictionaries(_keys | st.text(), _junk) | _junk,
    fields=st.dictionaries(
        st.sampled_from(["arrival_time", "priority", "num_prompt_tokens", "session_id"]), _junk
    ),
)
def test_whatever_is_sent_gives_a_call_that_can_be_ranked(
    extra_args: Any, fields: dict[str, Any]
) -> None:
    reading = read(request(extra_args, **fields))

    assert not math.isnan(reading.call.deadline)
    assert math.isfinite(reading.call.rest_s + reading.call.service_s)
    assert math.isfinite(reading.call.attained_s + reading.call.attained_path_s)
    assert not math.isinf(reading.call.run_arrival_time)
    for build_ordering in ORDERING_POLICIES.values():
        assert math.isfinite(build_ordering(60.0, 1.0).key(reading.call))
    assert len(reading.call.workflow_id) <= MAX_TEXT_LENGTH
    assert reading.num_unreadable >= 0


def test_a_number_or_a_flag_sent_as_text_means_what_it_means_at_the_router() -> None:
    reading = reading_of(wf_budget_ms="5000", wf_rest_ms="1.5e3", wf_final="True")

    call = reading.call
    assert (call.deadline - call.arrival_time, call.rest_s, call.final) == (5.0, 1.5, True)
    assert reading.num_unreadable == 0
