"""Every way to say what run a call belongs to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.router.dialects import read_run
from vllm_workflow.router.errors import RequestError
from vllm_workflow.router.headers import HeadError, Headers
from vllm_workflow.router.wire import RunInfo

FULL = RunInfo(
    workflow_id="w1",
    workflow="text2sql",
    stage="generate",
    tenant_id="acme",
    slo_ms=30_000.0,
    budget_ms=12_500.0,
    final=True,
)
HEADERS = {
    "X-Workflow-Id": "w1",
    "X-Workflow-Name": "text2sql",
    "X-Workflow-Stage": "generate",
    "X-Workflow-Slo-Ms": "30000",
    "X-Workflow-Budget-Ms": "12500",
    "X-Workflow-Final": "true",
    "X-Tenant-Id": "acme",
}
METADATA = {
    "workflow_id": "w1",
    "workflow_name": "text2sql",
    "workflow_stage": "generate",
    "workflow_slo_ms": "30000",
    "workflow_budget_ms": "12500",
    "workflow_final": "true",
    "tenant_id": "acme",
}
XARGS = {
    "wf_id": "w1",
    "wf_name": "text2sql",
    "wf_stage": "generate",
    "wf_slo_ms": 30000,
    "wf_budget_ms": 12500.0,
    "wf_final": 1,
    "wf_tenant": "acme",
}


def read(headers: dict[str, str] | None = None, **body: Any) -> RunInfo:
    return read_run(Headers.of((headers or {}).items()), body)


@pytest.mark.parametrize(
    "said",
    [
        {"headers": HEADERS},
        {"headers": {name.lower(): value for name, value in HEADERS.items()}},
        {"metadata": METADATA},
        {"metadata": METADATA | {"langgraph_node": "n", "thread": {"deep": 1}}},
        {"metadata": METADATA | {"workflow_slo_ms": 30000, "workflow_final": True}},
        {"vllm_xargs": XARGS},
        {"vllm_xargs": XARGS | {"other": [1, 2]}},
    ],
)
def test_our_own_ways_to_say_it_mean_the_same(said: dict[str, Any]) -> None:
    assert read(**said) == FULL


def test_a_call_that_says_nothing_is_an_ordinary_one() -> None:
    info = read({"Authorization": "Bearer k"}, model="m", metadata={"a": "b"}, vllm_xargs={"k": 1})

    assert info == RunInfo()
    assert not info.names_run


def test_a_source_is_taken_whole_and_never_mixed() -> None:
    assert read({"X-Workflow-Id": "h"}, metadata=METADATA, vllm_xargs=XARGS) == RunInfo(
        workflow_id="h", tenant_id="acme"
    )
    assert read(metadata={"workflow_stage": "s"}, vllm_xargs=XARGS) == RunInfo(
        stage="s", tenant_id="acme"
    )
    assert read({"X-Session-ID": "s"}, vllm_xargs={"wf_stage": "x"}) == RunInfo(stage="x")


def test_a_source_that_does_not_count_is_not_read() -> None:
    assert read({"X-Workflow-Id": "h"}, metadata={"workflow_slo_ms": "soon"}).workflow_id == "h"


def test_a_gateway_may_add_the_tenant_to_any_source() -> None:
    assert read({"X-Tenant-Id": "gw"}, metadata=METADATA).tenant_id == "gw"
    assert read({"X-Tenant-Id": "gw"}, metadata=METADATA).workflow_id == "w1"
    assert not read({"X-Tenant-Id": "gw"}).names_run


def test_an_empty_value_is_not_given() -> None:
    assert read({"X-Workflow-Id": "", "X-Workflow-Stage": "s"}) == RunInfo(stage="s")
    assert read({"X-Workflow-Id": ""}, metadata={"workflow_id": "m"}).workflow_id == "m"


def test_a_number_may_name_a_stage() -> None:
    assert read(vllm_xargs={"wf_stage": 2}).stage == "2"


BAD_MS = ["soon", "nan", "inf", "-inf", "-1", "1e308", "1_000", "0x10", "1,5", "٣", "9" * 400]
BAD_LABELS = ["x" * 257, "é", "日本", "a\tb"]


@pytest.mark.parametrize("value", BAD_MS)
@pytest.mark.parametrize("name", ["X-Workflow-Slo-Ms", "X-Workflow-Budget-Ms"])
def test_a_header_that_is_no_duration_is_refused(name: str, value: str) -> None:
    with pytest.raises(RequestError) as caught:
        read({name: value})

    assert str(caught.value).startswith(
        f"header {name}: expected a number of milliseconds from 0 to 100000000000, got '"
    )
    assert str(caught.value).isascii()
    assert len(str(caught.value)) < 200
    assert (caught.value.status, caught.value.param) == (400, name)


@pytest.mark.parametrize(
    "value", [*BAD_MS, -1, True, [], {}, float("nan"), float("inf"), 1e308, 10**30, "a\r\nb: c"]
)
@pytest.mark.parametrize(
    ("source", "name"), [("metadata", "workflow_budget_ms"), ("vllm_xargs", "wf_budget_ms")]
)
def test_a_body_value_that_is_no_duration_is_refused(source: str, name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{source}\.{name}: expected a number of mil"):
        read(**{source: {name: value}})


@pytest.mark.parametrize("value", [*BAD_LABELS, "a\r\nX-Evil: 1", "a\x00b", 1.5, True, [], {}])
@pytest.mark.parametrize("name", ["workflow_id", "workflow_name", "workflow_stage", "tenant_id"])
def test_a_label_that_could_break_a_header_or_a_log_is_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        read(metadata={name: value})

    assert str(caught.value).startswith(
        f"metadata.{name}: expected 1 to 256 printable ASCII characters, got "
    )
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("value", ["yes", "2", "", None, [], 2, 1.0])
def test_a_final_flag_is_true_or_false(value: Any) -> None:
    if value in ("", None):
        assert read(metadata={"workflow_final": value}) == RunInfo()
        return
    with pytest.raises(RequestError, match=r"metadata\.workflow_final: expected true or false"):
        read(metadata={"workflow_final": value})


def test_a_budget_of_zero_is_late_but_an_slo_of_zero_is_a_mistake() -> None:
    assert read({"X-Workflow-Budget-Ms": "0"}).budget_ms == 0.0
    with pytest.raises(RequestError, match="expected a number of milliseconds above 0, got '0'"):
        read({"X-Workflow-Slo-Ms": "0"})


CONTEXT = {
    "program_id": "p",
    "task_id": "t",
    "parent_id": "q",
    "step_id": 3,
    "priority": 2,
    "deadline_seconds": 12.5,
    "expected_output_length": 200,
}


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        ({"X-Session-ID": "s"}, {}, RunInfo(workflow_id="s")),
        ({"x-claude-code-session-id": "c"}, {}, RunInfo(workflow_id="c")),
        ({"session-id": "c"}, {}, RunInfo(workflow_id="c")),
        ({"baggage": "a=b, workflow.id=w%201;p=1 ,x"}, {}, RunInfo(workflow_id="w 1")),
        (
            {"baggage": "workflow.id=w,workflow.name=n,workflow.stage=s"},
            {},
            RunInfo(workflow_id="w", workflow="n", stage="s"),
        ),
        (
            {},
            {"vllm_xargs": {"agentic_context": CONTEXT}},
            RunInfo(
                workflow_id="p",
                stage="3",
                budget_ms=12_500.0,
                priority=2,
                expected_output_tokens=200.0,
            ),
        ),
        (
            {},
            {"nvext": {"agent_hints": {"priority": 5, "osl": 80, "latency_sensitivity": 1}}},
            RunInfo(priority=-5, expected_output_tokens=80.0),
        ),
        (
            {"X-Session-ID": "s", "baggage": "workflow.id=b", "session-id": "c"},
            {"nvext": {"agent_hints": {"osl": 80}}},
            RunInfo(workflow_id="s", expected_output_tokens=80.0),
        ),
        (
            {"X-Workflow-Id": "w"},
            {"vllm_xargs": {"agentic_context": CONTEXT}},
            RunInfo(workflow_id="w", priority=2, expected_output_tokens=200.0),
        ),
    ],
)
def test_other_dialects_are_understood(
    headers: dict[str, str], body: dict[str, Any], expected: RunInfo
) -> None:
    assert read(headers, **body) == expected


@pytest.mark.parametrize(
    "value", [None, [], "x" * 300, "é", "a\nb", -1, 1e308, float("nan"), 10**400, {}, True]
)
def test_other_dialects_are_ignored_where_they_make_no_sense(value: Any) -> None:
    context = dict.fromkeys(("deadline_seconds", "expected_output_length"), value)

    info = read(
        vllm_xargs={"agentic_context": context | {"program_id": [value]}},
        nvext={"agent_hints": {"priority": value if value != -1 else "no", "osl": value}},
    )

    assert info == RunInfo()
    assert read(vllm_xargs={"agentic_context": value}, nvext=value, metadata=value) == RunInfo()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from([*METADATA, *XARGS, *CONTEXT, "agentic_context", "agent_hints"])


@given(
    st.dictionaries(st.sampled_from([*HEADERS, "X-Session-ID", "baggage"]), st.text()),
    st.dictionaries(
        st.sampled_from(["metadata", "vllm_xargs", "nvext"]),
        json_values | st.dictionaries(fields, json_values | st.dictionaries(fields, json_values)),
    ),
)
def test_whatever_is_said_is_understood_or_refused(
    headers: dict[str, str], body: dict[str, Any]
) -> None:
    try:
        info = read(headers, **body)
    except (RequestError, HeadError):
        return
    assert info.budget_ms is None or 0.0 <= info.budget_ms <= 1e11
    for label in (info.workflow_id, info.workflow, info.stage, info.tenant_id):
        assert label.isascii()
        assert label.isprintable()
        assert len(label) <= 256
