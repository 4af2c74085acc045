"""What a client may put into an engine: nothing of it raises there."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.engine.metadata import MAX_DURATION_S, MAX_TEXT_LENGTH, has_extra_args, read

KEYS = st.sampled_from(
    [
        "wf_id",
        "wf_name",
        "wf_stage",
        "wf_tenant",
        "wf_budget_ms",
        "wf_rest_ms",
        "wf_service_ms",
        "wf_age_ms",
        "wf_attained_ms",
        "wf_attained_path_ms",
        "wf_final",
        "session_id",
    ]
)


class Rude(float):
    """Raises wherever it is looked at closely."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    def __lt__(self, other: object) -> bool:
        raise RuntimeError

    __le__ = __gt__ = __ge__ = __lt__

    def __str__(self) -> str:
        raise RuntimeError

    __hash__ = None  # type: ignore[assignment]


VALUES: Any = (
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=400)
    | st.binary(max_size=10)
    | st.sampled_from(["nan", "inf", "-1", "1e308", "1_000", "٣", "9" * 40, "\ud800", "TRUE"])
    | st.builds(Rude)
    | st.lists(st.integers() | st.text(), max_size=3)
    | st.dictionaries(st.text(), st.integers(), max_size=3)
)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "request_id": st.text() | st.none() | st.integers(),
        "arrival_time": VALUES,
        "priority": VALUES,
        "num_prompt_tokens": VALUES,
        "session_id": VALUES,
        "sampling_params": st.none()
        | st.builds(
            lambda extra: SimpleNamespace(extra_args=extra),
            st.dictionaries(KEYS | st.integers() | st.text(), VALUES) | VALUES,
        ),
    },
).map(lambda fields: SimpleNamespace(**fields))


@given(REQUESTS)
def test_nothing_that_a_client_sends_raises_in_an_engine(request: Any) -> None:
    has_extra_args(request)
    reading = read(request)
    call = reading.call

    for text in (call.workflow_id, call.workflow, call.stage, call.tenant_id):
        assert type(text) is str
        assert len(text) <= MAX_TEXT_LENGTH
    for duration_s in (call.rest_s, call.service_s, call.attained_s, call.attained_path_s):
        assert 0.0 <= duration_s <= MAX_DURATION_S
    assert not math.isnan(call.deadline)
    assert math.isfinite(call.arrival_time)
    assert type(call.priority) is int
    assert type(call.num_prompt_tokens) is int
    assert call.num_prompt_tokens >= 1
    assert reading.num_unreadable >= 0
