"""A field with a misspelled name does nothing, and that is told."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Routing
from vllm_workflow.router import spelling as module
from vllm_workflow.router.spelling import MAX_TOLD, OTHER, Spelling

Counted = Counter[tuple[str, str]]


def looked(*calls: tuple[dict[str, str], dict[str, Any]]) -> Counted:
    counted: Counted = Counter()

    def count(where: str, name: str) -> None:
        counted[where, name] += 1

    spelling = Spelling(count)
    for headers, body in calls:
        spelling.look(headers, body)
    return counted


@pytest.mark.anyio
async def test_a_misspelled_field_is_counted_logged_once_and_forwarded(
    routing: Routing, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"metadata": {"worflow_id": "r", "user": "u"}}
    async with FakeEngine().serving() as engine, routing(engine) as client:
        for _ in range(2):
            async with client.post(headers={"X-Workflow-Slo-Mss": "60000"}, **body) as response:
                assert response.status == 200
        counted = {
            (where, name): await client.metric("unknown_names_total", where=where, field=name)
            for where, name in (("header", "X-Workflow-Slo-Mss"), ("metadata", "worflow_id"))
        }

    assert list(counted.values()) == [2, 2]
    assert engine.received[0].header("X-Workflow-Slo-Mss") == "60000"
    assert engine.received[0].body["metadata"] == body["metadata"]
    assert [r.getMessage() for r in caplog.records if r.name.endswith(".spelling")] == [
        "header X-Workflow-Slo-Mss: not a name that is known here, it has no effect; "
        "was X-Workflow-Slo-Ms meant?",
        "metadata worflow_id: not a name that is known here, it has no effect; "
        "was workflow_id meant?",
    ]


@pytest.mark.parametrize(
    ("headers", "metadata", "xargs"),
    [
        (["x-workflow-id", "X-WORKFLOW-FINAL", "X-Tenant-Id", "X-Work-Id", "Workflow"], [], []),
        ([], ["workflow_id", "tenant_id", "user_id", "workspace_id", "trace_id", "workflow"], []),
        ([], [], ["wf_id", "wf_rest_ms", "wf_attained_path_ms", "agentic_context", "top_h"]),
    ],
)
def test_our_names_and_those_of_others_are_not_told(
    headers: list[str], metadata: list[str], xargs: list[str]
) -> None:
    body = {"metadata": dict.fromkeys(metadata, "1"), "vllm_xargs": dict.fromkeys(xargs, 1)}

    assert not looked((dict.fromkeys(headers, "1"), body), ({}, {}))


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("header", "X-Workflow"),
        ("header", "x-worfklow-stage"),
        ("header", "X-Workflow_Id"),
        ("metadata", "workflowId"),
        ("metadata", "Workflow_Id"),
        ("metadata", "workflow_slo"),
        ("vllm_xargs", "wf_slo"),
    ],
)
def test_what_looks_like_ours_is_told(where: str, name: str) -> None:
    named = {name: "1"}
    call = (named, {}) if where == "header" else ({}, {where: named})

    assert looked(call, call) == {(where, name): 2}


@pytest.mark.parametrize("members", [None, [], "workflow_x", 1])
def test_metadata_that_is_no_object_says_nothing(members: Any) -> None:
    assert not looked(({}, {"metadata": members, "vllm_xargs": members}))


def test_however_many_names_there_are_few_are_told_and_each_can_be_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MAX_FINE", 50)
    hostile = ({}, {"metadata": {"workflow_\ud800\n" + "x" * 100: 1}})
    bad = [({f"X-Workflow-{i}-{j}": "" for j in range(40)}, {}) for i in range(10)]
    fine = [({f"Other-{i}-{j}": "" for j in range(40)}, {}) for i in range(10)]

    counted = looked(hostile, *bad, *fine, hostile)

    names = {name for _, name in counted}
    assert len(names) == 1 + MAX_TOLD + 1
    assert OTHER in names
    assert all(name.isascii() and name.isprintable() and len(name) <= 64 for name in names)
