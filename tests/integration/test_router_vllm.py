"""A real router process in front of a real vLLM server with two seats."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from tests.integration.vllm_process import VllmServer, free_port
from vllm_workflow.client import attach, stage, workflow

pytestmark = pytest.mark.anyio

VLLM_FLAGS = ("--scheduler", "workflow", "--max-num-seqs", "2")
CONFIG = """
host: 127.0.0.1
port: {port}
instances:
  - id: tiny
    url: {url}
    max_num_seqs: 2
    latency: {{overhead_ms: 1, weights_ms: 2, per_token_us: 20}}
workflows:
  - name: text2sql
    stages:
      - {{name: generate, prompt_tokens: 10, output_tokens: 20}}
      - {{name: judge, prompt_tokens: 10, output_tokens: 2000}}
"""


@pytest.fixture(scope="module", autouse=True)
def warm(vllm_server: VllmServer) -> None:
    vllm_server.warm_up()  # the first prompt below is a short one


class Client:
    """Calls the router, and remembers in which order calls ended."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.session = session
        self.ended: list[str] = []

    def post(self, *, headers: dict[str, str] | None = None, **fields: Any) -> Any:
        body = {"model": "tiny", "prompt": "select", "ignore_eos": True, "temperature": 0} | fields
        return self.session.post(f"{self.url}/v1/completions", json=body, headers=headers)

    async def complete(self, name: str, **how: Any) -> int:
        """Make a call; returns the number of tokens it got."""
        async with self.post(**how) as response:
            answer = await response.json()
            assert response.status == 200, answer
        self.ended.append(name)
        return int(answer["usage"]["completion_tokens"])

    async def num_waiting(self) -> int:
        """Calls that wait in the router, by its own metrics."""
        async with self.session.get(f"{self.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        name = "vllm_workflow:router_requests_waiting "
        return int(float(next(x for x in lines if x.startswith(name)).split()[-1]))


@asynccontextmanager
async def routing(server: VllmServer, folder: Path) -> AsyncIterator[Client]:
    config = folder / "router.yaml"
    config.write_text(CONFIG.format(port=free_port(), url=server.base_url))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vllm_workflow.cli.main", "router", "--config", str(config)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            line = (await process.stdout.readline()).decode()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session, asyncio.timeout(240):
            yield Client(line.split()[3].rstrip(":"), session)
        process.terminate()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(holds):
            await asyncio.sleep(0.02)


def num_requests(server: VllmServer) -> tuple[int, int]:
    """Running and waiting, as vLLM itself counts them."""
    return (
        int(server.metric("vllm:num_requests_running")),
        int(server.metric("vllm:num_requests_waiting")),
    )


async def test_tokens_stream_through_to_a_stock_client(
    vllm_server: VllmServer, tmp_path: Path
) -> None:
    async with routing(vllm_server, tmp_path) as client:
        async with openai.AsyncOpenAI(base_url=f"{client.url}/v1", api_key="k") as user:
            assert [m.id async for m in user.models.list()] == ["tiny"]
            chunks = await user.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "hi"}],
                max_tokens=20,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            usage = [chunk.usage async for chunk in chunks][-1]

    assert usage is not None
    assert usage.completion_tokens == 20


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_the_engine(
    vllm_server: VllmServer, tmp_path: Path, stream: bool
) -> None:
    before = vllm_server.metric("vllm:generation_tokens_total")
    async with routing(vllm_server, tmp_path) as client:
        # Two have a seat, the others wait for one.
        calls = [
            asyncio.create_task(client.post(max_tokens=1000, stream=stream).__aenter__())
            for _ in range(10)
        ]
        await until(lambda: num_requests(vllm_server)[0] == 2)
        for call in calls:
            if call.done():
                (await call).close()
            call.cancel()
        await until(lambda: num_requests(vllm_server) == (0, 0))

        assert vllm_server.metric("vllm:generation_tokens_total") < before + 5_000
        assert await client.complete("after", max_tokens=5) == 5


SAID: dict[str, dict[str, Any]] = {
    "headers": {
        "headers": {
            "X-Workflow-Id": "w",
            "X-Workflow-Name": "text2sql",
            "X-Workflow-Stage": "generate",
            "X-Workflow-Budget-Ms": "30000",
        }
    },
    "metadata": {
        "headers": {"X-Tenant-Id": "acme"},
        "metadata": {
            "workflow_id": "w",
            "workflow_name": "text2sql",
            "workflow_stage": "generate",
            "workflow_budget_ms": "30000",
            "ls_provider": "openai",
        },
    },
    "vllm_xargs": {
        "vllm_xargs": {
            "wf_id": "w",
            "wf_name": "text2sql",
            "wf_stage": "generate",
            "wf_budget_ms": 30000,
        }
    },
    "agentic_context": {
        "vllm_xargs": {
            "agentic_context": {"program_id": "w", "step_id": "generate", "deadline_seconds": 30}
        }
    },
}


@pytest.mark.parametrize("way", SAID)
async def test_every_way_to_say_it_reaches_the_scheduler(
    vllm_server: VllmServer, tmp_path: Path, way: str
) -> None:
    def met() -> float:
        return vllm_server.metric("vllm_workflow:deadline_met_total")

    def num_admitted(at_most_s: str) -> float:
        name = "vllm_workflow:slack_at_admission_seconds_bucket"
        return vllm_server.metric(name, le=at_most_s)

    before = met(), num_admitted("10.0"), num_admitted("30.0")
    async with routing(vllm_server, tmp_path) as client:
        assert await client.complete(way, max_tokens=3, **SAID[way]) == 3

    # 30 s less this call and, where the workflow is named, the rest of the run: about 6 s.
    after = met(), num_admitted("10.0"), num_admitted("30.0")
    assert after == (before[0] + 1, before[1], before[2] + 1)


async def test_the_client_library_s_run_and_stage_reach_the_scheduler(
    vllm_server: VllmServer, tmp_path: Path
) -> None:
    before = vllm_server.metric("vllm_workflow:deadline_met_total")
    async with routing(vllm_server, tmp_path) as client:
        async with attach(openai.AsyncOpenAI(base_url=f"{client.url}/v1", api_key="k")) as user:
            with workflow("text2sql", slo_s=60) as run:
                for name in ("generate", "judge"):
                    with stage(name, final=name == "judge"):
                        await user.completions.create(model="tiny", prompt="a", max_tokens=3)
        async with client.session.get(f"{client.url}/metrics") as response:
            metrics = await response.text()

    assert [(c.stage, c.status, c.instance) for c in run.calls] == [
        ("generate", 200, "tiny"),
        ("judge", 200, "tiny"),
    ]
    assert all(call.slack_ms is not None and call.slack_ms > 0 for call in run.calls)
    assert vllm_server.metric("vllm_workflow:deadline_met_total") == before + 2
    assert 'vllm_workflow:router_runs_total{outcome="met",workflow="text2sql"} 1.0' in metrics


async def test_calls_that_contend_run_in_the_order_of_their_slack(
    vllm_server: VllmServer, tmp_path: Path
) -> None:
    async with routing(vllm_server, tmp_path) as client, asyncio.TaskGroup() as tasks:
        # Late calls are nobody's victims: they keep both seats until the others wait.
        late = {"X-Workflow-Budget-Ms": "0"}
        keepers = [
            tasks.create_task(client.complete("late", max_tokens=8_000, headers=late))
            for _ in range(2)
        ]
        await until(lambda: num_requests(vllm_server) == (2, 0))
        for num_sent, budget_s in enumerate((400, 300, 60, 50), start=1):
            headers = {"X-Workflow-Budget-Ms": str(budget_s * 1000)}
            name = f"budget-{budget_s}"
            tasks.create_task(client.complete(name, max_tokens=300, headers=headers))
            while await client.num_waiting() != num_sent:
                await asyncio.sleep(0.02)
        for keeper in keepers:
            keeper.cancel()

    assert set(client.ended[:2]) == {"budget-50", "budget-60"}
    assert set(client.ended[2:]) == {"budget-300", "budget-400"}


async def test_a_storm_of_malformed_metadata_leaves_the_engine_serving(
    vllm_server: VllmServer, tmp_path: Path
) -> None:
    never: list[Any] = ["x" * 9000, 1e308, "a\r\nb", "é", [1], {"a": 1}, True]
    no_duration: list[Any] = [*never, "soon", -1, "NaN", "inf", 10**30]
    label_names = ("workflow_id", "workflow_name", "workflow_stage", "tenant_id")
    duration_names = ("workflow_slo_ms", "workflow_budget_ms")
    unreadable = vllm_server.metric("vllm_workflow:unreadable_metadata_total")

    async def status(**fields: Any) -> int:
        async with client.post(max_tokens=1, **fields) as response:
            answer = await response.json()
            assert response.status in {200, 400}, answer
            assert response.status == 200 or answer["error"]["message"]
            return int(response.status)

    async with routing(vllm_server, tmp_path) as client:
        ours = await asyncio.gather(
            *(status(metadata={name: value}) for name in label_names for value in never),
            *(status(metadata={n: v}) for n in duration_names for v in no_duration),
            *(status(vllm_xargs={"wf_id": value}) for value in never),
            *(status(vllm_xargs={"wf_budget_ms": value}) for value in no_duration),
        )
        theirs = await asyncio.gather(
            *(status(vllm_xargs={"agentic_context": {"program_id": v}}) for v in never),
            *(status(nvext={"agent_hints": {"priority": v}}) for v in never),
            *(status(headers={"X-Session-ID": "x" * n}) for n in (1, 300, 2000)),
        )
        assert await client.complete("good", max_tokens=5) == 5

    assert set(ours) == {400}
    assert set(theirs) == {200}
    assert vllm_server.metric("vllm_workflow:unreadable_metadata_total") == unreadable
    assert vllm_server.metric("vllm_workflow:failures_total") == 0
