"""A router in front of two real vLLM servers, on emulated GPUs, that are stopped and killed.

The tests go in this order: the last two leave nothing that could be used again.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import openai
import pytest

from tests.faults.conftest import holds_nothing, is_healthy
from tests.faults.load import Load, running
from tests.integration.vllm_process import VllmServer, free_port, serving
from vllm_workflow.emulation.model_dir import write_model_dir
from vllm_workflow.profiles import catalogue
from vllm_workflow.router.app import Router, serve
from vllm_workflow.router.config import RouterConfig

pytestmark = [pytest.mark.anyio, pytest.mark.vllm, pytest.mark.slow]
pytest.importorskip("vllm")

SHAPE, GPU = "llama-3.1-8b", "A100-80G"
FLAGS = (
    *("--scheduler", "workflow", "--emulate-gpu", GPU, "--emulate-model-shape", SHAPE),
    *("--num-gpu-blocks-override", "4000"),
)
NUM_RUNS = 16
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[VllmServer]]:
    folder = tmp_path_factory.mktemp("pair")
    write_model_dir(catalogue.shape(SHAPE), folder / "model")
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        # They start side by side, and take their ports late.
        servers = [
            serving(folder / "model", folder / f"{port}.log", FLAGS, port=port)
            for port in (free_port() + 50, free_port() + 51)
        ]
        started = [pool.submit(stack.enter_context, server) for server in servers]
        yield [server.result() for server in started]


def engine_core(server: VllmServer) -> int:
    """The process in which the engine runs, a child of the API server."""
    for task in Path(f"/proc/{server.pid}/task").iterdir():
        for child in (task / "children").read_text(encoding="ascii").split():
            if b"EngineCore" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise LookupError(f"no engine process under {server.pid}")


@asynccontextmanager
async def routing(pair: list[VllmServer]) -> AsyncIterator[Router]:
    instances = [
        {"id": name, "url": server.base_url, "gpu": GPU, "model_shape": SHAPE}
        for name, server in zip("ab", pair)
    ]
    # Both get calls whatever they have shown of their speed.
    data = {"port": 0, "policy": "least-outstanding", "instances": instances}
    async with asyncio.timeout(60), serve(RouterConfig.from_mapping(data, source="t")) as router:
        yield router
        await until(lambda: holds_nothing(router))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.01)


def num_streaming(router: Router, instance_id: str) -> int:
    attempts = router.upstreams[instance_id].silence.attempts
    return sum(attempt.has_first_byte and attempt.stream for attempt in attempts)


async def test_a_server_that_is_stopped_is_found_out_and_taken_back(pair: list[VllmServer]) -> None:
    async with routing(pair) as router:
        load = Load(url=router.url, path=PATH, model="tiny", num_tokens=150, num_calls=2)
        async with running(load, NUM_RUNS):
            await until(lambda: num_streaming(router, "a") >= 2)
            os.killpg(pair[0].pid, signal.SIGSTOP)
            stopped_time = time.monotonic()
            await until(lambda: not is_healthy(router, "a"))
            found_s = time.monotonic() - stopped_time
        os.killpg(pair[0].pid, signal.SIGCONT)
        went_on_time = time.monotonic()
        await until(lambda: is_healthy(router, "a"))
        back_s = time.monotonic() - went_on_time

    print(f"found out after {found_s:.2f} s, back after {back_s:.2f} s")
    assert found_s <= 2.0
    assert back_s <= 2.0
    assert (load.tally.num_lost_runs, load.tally.num_truncated) == (0, 0)


async def test_an_engine_that_is_stopped_behind_a_server_that_is_well_is_found_out(
    pair: list[VllmServer],
) -> None:
    async with routing(pair) as router:
        warm = Load(url=router.url, path=PATH, model="tiny", num_tokens=60, num_calls=1)
        await warm.runs(NUM_RUNS, "warm")
        load = Load(url=router.url, path=PATH, model="tiny", num_tokens=150, num_calls=1)
        async with running(load, NUM_RUNS):
            await until(lambda: num_streaming(router, "a") >= 2)
            os.kill(engine_core(pair[0]), signal.SIGSTOP)
            stopped_time = time.monotonic()
            await until(lambda: not is_healthy(router, "a"))
            found_s = time.monotonic() - stopped_time
            await asyncio.sleep(2.0)  # probes find the server well all the time
            assert not is_healthy(router, "a")
        os.kill(engine_core(pair[0]), signal.SIGCONT)
        went_on_time = time.monotonic()
        await until(lambda: is_healthy(router, "a"))
        back_s = time.monotonic() - went_on_time

    print(f"found out after {found_s:.2f} s, back after {back_s:.2f} s")
    assert found_s < 15.0
    assert back_s <= 3.0
    assert (load.tally.num_lost_runs, load.tally.num_truncated) == (0, 0)


async def test_an_engine_that_is_killed_in_mid_stream_costs_no_run(pair: list[VllmServer]) -> None:
    async with routing(pair) as router:
        load = Load(url=router.url, path=PATH, model="tiny", num_tokens=150, num_calls=2)
        async with running(load, NUM_RUNS):
            await until(lambda: num_streaming(router, "a") >= 2)
            os.kill(engine_core(pair[0]), signal.SIGKILL)
        assert not is_healthy(router, "a")

    assert (load.tally.num_lost_runs, load.tally.num_truncated) == (0, 0)
    assert load.tally.signalled


async def test_a_server_that_is_told_to_stop_costs_no_run_and_little_time(
    pair: list[VllmServer], tmp_path: Path
) -> None:
    """It ends its engine, closes its port, and keeps the connections of calls for a minute."""
    write_model_dir(catalogue.shape(SHAPE), tmp_path / "model")
    with serving(tmp_path / "model", tmp_path / "log", FLAGS, port=free_port() + 52) as another:
        async with routing([another, pair[1]]) as router:
            load = Load(url=router.url, path=PATH, model="tiny", num_tokens=150, num_calls=2)
            async with running(load, NUM_RUNS):
                await until(lambda: num_streaming(router, "a") >= 2)
                os.kill(another.pid, signal.SIGTERM)
                begin = time.monotonic()
                await until(lambda: not is_healthy(router, "a"))
                await until(lambda: not router.upstreams["a"].silence.attempts)
                told_s = time.monotonic() - begin

    print(f"told to stop: its calls went on after {told_s:.2f} s")
    assert told_s <= 4.0
    assert (load.tally.num_lost_runs, load.tally.num_truncated) == (0, 0)


async def test_a_server_that_is_killed_in_mid_stream_is_an_error_to_an_sdk(
    pair: list[VllmServer],
) -> None:
    async with routing(pair) as router:
        async with openai.AsyncOpenAI(base_url=router.url + "/v1", api_key="k") as user:
            chunks = await user.completions.create(
                model="tiny", prompt="a", max_tokens=2000, stream=True
            )
            received = []

            async def read() -> None:
                async for chunk in chunks:
                    received.append(chunk)
                    if len(received) == 5:
                        os.killpg(pair[1].pid, signal.SIGKILL)

            with pytest.raises(openai.APIError, match="broke off its answer"):
                await read()
    assert 5 <= len(received) < 2000
