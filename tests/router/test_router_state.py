"""What the router tells and remembers: the wire to engines, metrics, the decision log."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes import FakeEngine, Received
from tests.router.conftest import CHAT, Client, Routing
from vllm_workflow.core.events import from_json
from vllm_workflow.core.replay import replay
from vllm_workflow.core.types import StageRequest
from vllm_workflow.engine import metadata
from vllm_workflow.engine.metadata import Reading
from vllm_workflow.router import parts
from vllm_workflow.router.metrics import MAX_LABEL_VALUES

pytestmark = pytest.mark.anyio

WORKFLOW = {
    "name": "text2sql",
    "stages": [{"name": "generate"}, {"name": "judge", "output_tokens": 1000}],
}


async def call(client: Client, body: Any = None, **headers: str) -> int:
    named = {"X-" + name.replace("_", "-"): value for name, value in headers.items()}
    async with client.post(body, headers=named) as response:
        await response.read()
        return int(response.status)


@pytest.mark.parametrize(
    ("headers", "fields"),
    [
        (
            {
                "X-Workflow-Id": "w1",
                "X-Workflow-Name": "text2sql",
                "X-Workflow-Stage": "generate",
                "X-Workflow-Budget-Ms": "20000",
                "X-Tenant-Id": "acme",
            },
            {},
        ),
        (
            {"X-Tenant-Id": "acme"},
            {
                "metadata": {
                    "workflow_id": "w1",
                    "workflow_name": "text2sql",
                    "workflow_stage": "generate",
                    "workflow_slo_ms": "20000",
                }
            },
        ),
        (
            {},
            {
                "vllm_xargs": {
                    "wf_id": "w1",
                    "wf_name": "text2sql",
                    "wf_stage": "generate",
                    "wf_budget_ms": 20000,
                    "wf_tenant": "acme",
                }
            },
        ),
    ],
    ids=["headers", "metadata", "vllm_xargs"],
)
async def test_every_way_to_say_it_reaches_the_engine_with_the_same_meaning(
    routing: Routing, headers: dict[str, str], fields: dict[str, Any]
) -> None:
    async with FakeEngine().serving() as engine, routing(engine, workflows=[WORKFLOW]) as client:
        async with client.post(headers=headers, **fields) as response:
            assert response.status == 200

    xargs = engine.received[0].xargs
    budget_ms = xargs.pop("wf_budget_ms")
    assert 19_000 < budget_ms <= 20_000
    assert xargs.pop("wf_rest_ms") > 5_000
    assert xargs.pop("wf_service_ms") > 0
    assert 0 <= xargs.pop("wf_age_ms") < 5_000
    assert xargs == {
        "wf_id": "w1",
        "wf_name": "text2sql",
        "wf_stage": "generate",
        "wf_tenant": "acme",
    }
    slack_ms = float(response.headers["X-Workflow-Slack-Ms"])
    assert 0 < slack_ms < 15_000


async def test_the_engine_is_told_that_a_call_is_the_last_one(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine, workflows=[WORKFLOW]) as client:
        await call(client, Workflow_Name="text2sql", Workflow_Stage="generate", Workflow_Final="1")

    xargs = engine.received[0].xargs
    assert (xargs["wf_final"], xargs["wf_rest_ms"]) == (1, 0)


def as_the_engine_reads(received: Received) -> Reading:
    params = SimpleNamespace(extra_args=received.xargs)
    return metadata.read(SimpleNamespace(sampling_params=params, arrival_time=1000.0))


async def test_the_engine_is_told_how_old_a_run_is_and_what_it_has_attained(
    routing: Routing,
) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        await call(client, Workflow_Id="w")
        (run,) = client.router.proxy.runs._idle.values()
        run.arrival_time -= 60.0
        await asyncio.gather(*(call(client, Workflow_Id="w") for _ in range(2)))
        await call(client, Workflow_Id="w")
        known = client.router.dispatcher.predictor.attained(StageRequest(
            request_id="", arrival_time=0.0, workflow_id="w"
        ))  # fmt: skip
        await call(client, Workflow_Id="w", Workflow_Final="true")
        await call(client, Workflow_Id="w")

    first, *_, last, again = map(as_the_engine_reads, engine.received)
    assert 995.0 < first.call.run_arrival_time <= 1000.0
    assert 935.0 < last.call.run_arrival_time <= 940.0
    assert (first.call.attained_s, first.call.attained_path_s) == (0.0, 0.0)
    assert last.call.attained_s == pytest.approx(known.total_s, abs=0.001)
    assert last.call.attained_path_s == pytest.approx(known.path_s, abs=0.001)
    assert 0.0 < last.call.attained_path_s < last.call.attained_s
    assert again.call.attained_s == 0.0  # the run before it ended with its final call
    assert [r.num_unreadable for r in (first, last, again)] == [0, 0, 0]


async def test_what_a_client_says_of_its_own_past_is_not_believed(routing: Routing) -> None:
    said = {"wf_id": "w", "wf_age_ms": 9e9, "wf_attained_ms": 0, "wf_attained_path_ms": "junk"}
    async with FakeEngine().serving() as engine, routing(engine) as client:
        assert await call(client, {"vllm_xargs": said}) == 200

    xargs = engine.received[0].xargs
    assert xargs["wf_age_ms"] < 5_000
    assert not {"wf_attained_ms", "wf_attained_path_ms"} & xargs.keys()


async def test_a_run_that_is_late_is_served(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with client.post(headers={"X-Workflow-Budget-Ms": "0"}) as response:
            assert response.status == 200

    assert float(response.headers["X-Workflow-Slack-Ms"]) < 0
    assert engine.received[0].xargs["wf_budget_ms"] == 0


async def test_a_budget_never_falls_below_zero_on_the_wire(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        await call(client, Workflow_Id="w", Workflow_Slo_Ms="1000")
        (run,) = client.router.proxy.runs._idle.values()
        run.deadline -= 60.0
        await call(client, Workflow_Id="w")

    assert 0 < engine.received[0].xargs["wf_budget_ms"] <= 1000
    assert engine.received[1].xargs["wf_budget_ms"] == 0


async def test_malformed_metadata_is_the_client_s_mistake(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with client.post(headers={"X-Workflow-Slo-Ms": "soon"}) as response:
            error = (await response.json())["error"]

    assert response.status == 400
    assert error == {
        "message": "header X-Workflow-Slo-Ms: expected a number of milliseconds "
        "from 0 to 100000000000, got 'soon'",
        "type": "invalid_request_error",
        "param": "X-Workflow-Slo-Ms",
        "code": None,
    }
    assert engine.received == []


async def test_header_bytes_that_are_no_text_are_refused(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        host, port = client.router.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n"
        writer.write(head.encode() + b"X-Name: \xff\r\n\r\n{}")
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"header X-Name: expected UTF-8" in answer
    assert engine.received == []


async def priority(client: Client, engine: FakeEngine, body: Any = None, **headers: str) -> Any:
    assert await call(client, body, **headers) == 200
    return engine.received[-1].body.get("priority")


async def test_priorities_for_a_stock_server_order_calls_by_latest_start(
    routing: Routing,
) -> None:
    async with FakeEngine().serving() as engine, routing(engine, set_priority=True) as client:
        before = 1000 * time.time()
        urgent = await priority(client, engine, Workflow_Budget_Ms="5000")
        relaxed = await priority(client, engine, Workflow_Budget_Ms="20000")
        ordinary = await priority(client, engine)
        hinted = await priority(client, engine, {"nvext": {"agent_hints": {"priority": 1}}})
        own = await priority(client, engine, {"priority": 3})
        await priority(client, engine, Vllm_Priority="4")

    assert before < urgent < before + 6_000
    assert hinted < urgent < relaxed < ordinary < 2**63
    assert own == 3
    assert "priority" not in engine.received[-1].body


@pytest.mark.parametrize(
    "policy", ["least-outstanding+sjf", "least-outstanding+shortest-remaining"]
)
async def test_priorities_by_length_do_not_depend_on_when_a_call_comes(
    routing: Routing, policy: str
) -> None:
    async with (
        FakeEngine().serving() as engine,
        routing(engine, set_priority=True, policy=policy) as client,
    ):
        long = await priority(client, engine, {"max_tokens": 60})
        short = await priority(client, engine, {"max_tokens": 3})

    assert 0 < short < long < 60_000


async def test_priorities_by_run_order_its_later_calls_before_younger_runs(
    routing: Routing,
) -> None:
    async with (
        FakeEngine().serving() as engine,
        routing(engine, set_priority=True, policy="least-outstanding+program-fcfs") as client,
    ):
        first = await priority(client, engine, Workflow_Id="old")
        (run,) = client.router.proxy.runs._idle.values()
        run.arrival_time -= 1.0
        younger = await priority(client, engine, Workflow_Id="young")
        second = await priority(client, engine, Workflow_Id="old")

    assert first - 1100 < second < younger


async def test_no_priority_is_added_unless_asked_for(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        assert await priority(client, engine, Workflow_Budget_Ms="5000") is None
        hint = {"nvext": {"agent_hints": {"priority": 7}}}
        assert await priority(client, engine, hint) == -7


async def test_runs_are_counted_by_whether_they_met_their_deadline(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        for workflow_id, slo_ms in (("a", "60000"), ("b", "60000"), ("c", "0.001")):
            headers = {"Workflow_Id": workflow_id, "Workflow_Name": "w"}
            await call(client, Workflow_Slo_Ms=slo_ms, **headers)
            await call(client, Workflow_Final="true", **headers)
        await call(client, Workflow_Id="no-deadline", Workflow_Final="true")

        assert await client.metric("runs_total", workflow="w", outcome="met") == 2
        assert await client.metric("runs_total", workflow="w", outcome="missed") == 1
        assert len(client.router.proxy.runs) == 0


async def test_a_run_whose_final_call_failed_goes_on(routing: Routing) -> None:
    async with FakeEngine(status=400).serving() as engine, routing(engine) as client:
        headers = {"Workflow_Id": "a", "Workflow_Slo_Ms": "60000", "Workflow_Final": "true"}
        assert await call(client, **headers) == 400
        assert len(client.router.proxy.runs) == 1
        engine.status = 200
        await call(client, Workflow_Id="a", Workflow_Final="true")

        assert await client.metric("runs_total", workflow="", outcome="met") == 1


async def test_an_idle_run_ends_without_another_call(
    routing: Routing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_EXPIRE_EVERY_S", 0.01)
    async with FakeEngine().serving() as engine, routing(engine) as client:
        client.router.proxy.runs._ttl_s = 0.01
        await call(client, Workflow_Id="a", Workflow_Slo_Ms="60000")
        async with asyncio.timeout(5):
            while len(client.router.proxy.runs):
                await asyncio.sleep(0.005)

        assert await client.metric("runs_total", workflow="", outcome="met") == 1


async def test_a_run_is_named_once(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine, workflows=[WORKFLOW]) as client:
        await call(client, Workflow_Id="w", Workflow_Name="text2sql")
        await call(client, Workflow_Id="w", Workflow_Stage="generate")

    assert engine.received[1].xargs["wf_name"] == "text2sql"
    assert engine.received[1].xargs["wf_rest_ms"] > 0


async def test_calls_leave_their_numbers(routing: Routing) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        headers = {"X-Workflow-Stage": "s", "X-Workflow-Budget-Ms": "9000"}
        pending = asyncio.create_task(client.post(headers=headers).__aenter__())
        await engine.wait_for(received=1)
        assert await client.metric("requests_in_flight", instance="a") == 1
        engine.release()
        await (await pending).read()

        assert await client.metric("requests_in_flight", instance="a") == 0
        assert await client.metric("requests_total", instance="a", stage="s", status="200") == 1
        for name in ("predicted_seconds", "actual_seconds"):
            assert await client.metric(f"{name}_count", instance="a") == 1
        for name in ("queue_seconds", "slack_seconds"):
            assert await client.metric(f"{name}_count") == 1
        async with client.get("/metrics") as response:
            text = await response.text()
        assert response.headers["Content-Type"].startswith("text/plain")

    assert 'vllm_workflow:router_instance_healthy{instance="a"} 1.0' in text


async def test_names_that_clients_invent_make_no_endless_series(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        for i in range(MAX_LABEL_VALUES + 20):
            await call(client, Workflow_Stage=f"s{i}")
        async with client.get("/metrics") as response:
            text = await response.text()

    lines = [x for x in text.splitlines() if x.startswith("vllm_workflow:router_requests_total{")]
    assert len(lines) == MAX_LABEL_VALUES + 1
    assert 'stage="other",status="200"} 20.0' in text


async def test_a_live_log_replays_to_the_same_decisions(routing: Routing, tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    async with (
        FakeEngine(held=True).serving() as a,
        FakeEngine().serving() as b,
        FakeEngine(status=503).serving() as c,
        routing(a, b, c, decision_log=str(log), workflows=[WORKFLOW]) as client,
    ):
        headers = {"Workflow_Name": "text2sql", "Workflow_Stage": "generate"}
        pending = [
            asyncio.create_task(
                call(client, Workflow_Id=f"w{i}", Workflow_Slo_Ms=f"{1000 + i}", **headers)
            )
            for i in range(12)
        ]
        await a.wait_for(received=1)
        pending[0].cancel()
        a.release(12)
        await asyncio.gather(*pending, return_exceptions=True)
        await call(client, Workflow_Stage="judge")

    events = [from_json(line) for line in log.read_text().splitlines()]
    pairs = list(replay(events))
    assert len(pairs) >= 13
    assert {recorded.chosen.instance_id for recorded, _ in pairs} == {"a", "b", "c"}
    for recorded, replayed in pairs:
        assert replayed == recorded
