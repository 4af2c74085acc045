"""Whatever stands in headers and body: a value, or a 4xx that says what, where, got, wanted."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.router.auth import Caller, admitted
from vllm_workflow.router.body import Body, parse, with_additions
from vllm_workflow.router.call import request_headers
from vllm_workflow.router.dialects import read_run
from vllm_workflow.router.errors import RequestError
from vllm_workflow.router.headers import HeadError, Headers
from vllm_workflow.router.prefixes import head_of
from vllm_workflow.router.wire import MAX_MS, OWN_HEADERS, RunInfo, is_label

SCALARS: Any = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["nan", "-inf", "1e308", "1_0", "٣", "\ud800", "a\r\nb: c", "\x00", "true"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=20,
)
WF = ("wf_id", "wf_name", "wf_stage", "wf_tenant", "wf_slo_ms", "wf_budget_ms", "wf_final")
XARGS = st.dictionaries(st.sampled_from([*WF, "agentic_context", "x"]), SCALARS | JSON, max_size=6)
METADATA = st.dictionaries(
    st.sampled_from([n.lower().replace("-", "_")[2:] for n in OWN_HEADERS]), JSON, max_size=5
)
CONTEXT = st.dictionaries(
    st.sampled_from(
        ["program_id", "step_id", "deadline_seconds", "priority", "expected_output_length"]
    ),
    JSON,
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "model": JSON,
        "messages": JSON,
        "prompt": JSON,
        "max_tokens": JSON,
        "stream": JSON,
        "metadata": METADATA | JSON,
        "vllm_xargs": XARGS | st.builds(lambda c: {"agentic_context": c}, CONTEXT) | JSON,
        "nvext": st.builds(lambda c: {"agent_hints": c}, st.dictionaries(st.text(), JSON)) | JSON,
        "priority": JSON,
    },
)
HEADERS = st.lists(
    st.tuples(
        st.sampled_from([*OWN_HEADERS, "X-Session-ID", "baggage", "X-Request-Id", "Connection"]),
        st.text(max_size=40)
        | st.sampled_from(["nan", "1e308", "-1", "a\r\nb: c", "\udcff", "workflow.id=%ff,=,;"]),
    ),
    max_size=8,
)


def check_told(error: RequestError) -> None:
    """A refusal is a 4xx, and says what was wanted and what came."""
    text = str(error)
    assert 400 <= error.status < 500
    assert "expected " in text
    assert ", got " in text


def dumped(members: Any) -> bytes:
    return json.dumps(members, allow_nan=True).encode()


def check_run(info: RunInfo) -> None:
    for label in (info.workflow_id, info.workflow, info.stage, info.tenant_id):
        assert label == "" or is_label(label)
    assert info.slo_ms is None or 0.0 < info.slo_ms <= MAX_MS
    assert info.budget_ms is None or 0.0 <= info.budget_ms <= MAX_MS


@given(st.binary(max_size=400) | st.text(max_size=400).map(lambda t: t.encode(errors="replace")))
def test_any_bytes_are_a_body_or_a_refusal(raw: bytes) -> None:
    try:
        body = parse(raw)
    except RequestError as e:
        check_told(e)
    else:
        assert body.members == json.loads(raw)


@given(HEADERS, BODIES)
def test_any_request_is_read_or_refused(headers: list[tuple[str, str]], members: Any) -> None:
    try:
        given_headers = Headers.of(headers)
    except HeadError:
        return
    try:
        body = parse(dumped(members))
        forwarded, request_id = request_headers(given_headers)
        info = read_run(given_headers, body.members)
        admitted(None, info, given_headers, body.members, body.model)
    except RequestError as e:
        check_told(e)
        return
    check_run(info)
    assert is_label(request_id)
    assert not any("\r" in v or "\n" in v for k, v in forwarded.items() if k in OWN_HEADERS[:1])
    assert body.max_tokens is None or body.max_tokens > 0
    head_of(body.members)


@given(HEADERS, BODIES)
def test_no_request_passes_for_another_tenant(headers: list[tuple[str, str]], members: Any) -> None:
    caller = Caller("acme", frozenset(), frozenset())
    try:
        given_headers = Headers.of(headers)
    except HeadError:
        return
    try:
        body = parse(dumped(members))
        info = read_run(given_headers, body.members)
        info = admitted(caller, info, given_headers, body.members, body.model)
    except RequestError as e:
        check_told(e)
        return
    assert info.tenant_id == "acme"
    sent = with_additions(body, {"wf_tenant": "acme"})
    xargs = json.loads(sent).get("vllm_xargs")
    if isinstance(xargs, dict):
        assert xargs["wf_tenant"] == "acme"
    theirs = body.members.get("vllm_xargs")
    if isinstance(theirs, dict):
        assert theirs.get("wf_tenant") in {None, "", "acme"}


@given(BODIES, st.dictionaries(st.sampled_from(WF), st.integers(0, 10) | st.just("a"), max_size=4))
def test_a_body_that_is_read_stays_json_with_what_is_added(members: Any, xargs: Any) -> None:
    try:
        body: Body = parse(dumped(members))
    except RequestError as e:
        check_told(e)
        return
    again = json.loads(with_additions(body, xargs, priority=7))
    theirs = body.members.get("vllm_xargs")

    assert again["priority"] == body.members.get("priority", 7)
    if isinstance(theirs, dict) or theirs is None:
        assert xargs.items() <= (again.get("vllm_xargs") or {}).items()
    for name in body.members.keys() - {"vllm_xargs"}:
        assert again[name] == body.members[name]
