"""The router from start to stop."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import CHAT, Routing
from vllm_workflow.cli import router as command
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.router.app import serve
from vllm_workflow.router.config import RouterConfig

pytestmark = pytest.mark.anyio


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["router", *words])


def test_flags_alone_make_a_configuration() -> None:
    config = command.read_config(
        parse("--instance", "http://a:1", "--instance", "http://b:2", "--port", "0")
    )

    assert [i.id for i in config.instances] == ["a:1", "b:2"]
    assert config.port == 0


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text("port: 1\nhost: 0.0.0.0\ninstances: [{url: 'http://a:1'}]\n")

    config = command.read_config(parse("--config", str(path), "--port", "2", "--policy", "hexgen"))

    assert (config.host, config.port, config.policy) == ("0.0.0.0", 2, "hexgen")


def test_without_any_instance_it_is_said_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="command line: instances: expected at least one"):
        command.read_config(parse())


async def test_an_address_that_is_taken_is_named(routing: Routing) -> None:
    async with FakeEngine().serving() as engine:
        port = int(engine.url.rpartition(":")[2])
        config = RouterConfig.from_mapping(
            {"port": port, "instances": [{"url": engine.url}]}, source="test"
        )
        with pytest.raises(ConfigError, match=f"host, port: cannot listen on 127.0.0.1:{port}"):
            async with serve(config):
                pass


async def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    log = str(tmp_path / "none" / "log")
    config = RouterConfig.from_mapping(
        {"port": 0, "instances": [{"url": "http://127.0.0.1:1"}], "decision_log": log},
        source="test",
    )
    with pytest.raises(ConfigError, match=r"decision_log: cannot append to .*No such file"):
        async with serve(config):
            pass


@asynccontextmanager
async def process(
    *words: str, log: bool = False
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run the command; yields it with the address it says it is ready on.

    Args:
        words: Of the command.
        log: Let the test read its stderr.
    """
    running = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "vllm_workflow.cli.main",
        "router",
        *words,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE if log else None,
    )
    assert running.stdout is not None
    try:
        async with asyncio.timeout(60):
            line = (await running.stdout.readline()).decode()
        assert line.startswith("router ready on http"), line
        yield running, line.split()[3].rstrip(":")
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


async def until_gone(url: str) -> None:
    """Connect again and again; ends by the error of a connection refused."""
    while True:
        try:
            async with aiohttp.ClientSession() as session, session.get(url + "/health"):
                pass
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            pass  # made in the moment in which it stopped listening


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_router_told_to_stop_lets_calls_end(number: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    async with FakeEngine(held=True).serving() as engine, aiohttp.ClientSession() as session:
        words = ("--instance", engine.url, "--port", "0", "--decision-log", str(log))
        async with process(*words) as (running, url), asyncio.timeout(20):
            engine.release()
            async with session.post(url + CHAT, json={"stream": True}) as response:
                await response.content.readuntil(b"\n\n")
                running.send_signal(number)
                with pytest.raises(aiohttp.ClientConnectorError):
                    await until_gone(url)
                engine.release(2)
                rest = await response.read()
            assert await running.wait() == 0

    assert rest.endswith(b"data: [DONE]\n\n")
    assert json.loads(log.read_text().splitlines()[-1])["event"] == "settled"


async def test_calls_that_take_longer_than_the_grace_are_handed_over(tmp_path: Path) -> None:
    """One is at the instance, one waits for a seat there, one for an instance, one streams."""
    async with FakeEngine(held=True).serving() as engine, aiohttp.ClientSession() as session:
        path = tmp_path / "router.yaml"
        instance = f"{{url: '{engine.url}', models: [m], max_num_seqs: 2}}"
        lost = "{url: 'http://127.0.0.1:9', models: [other]}"
        path.write_text(f"port: 0\nshutdown_grace_s: 0.1\ninstances: [{instance}, {lost}]\n")
        async with process("--config", str(path)) as (running, url), asyncio.timeout(60):
            engine.release()
            async with session.post(url + CHAT, json={"model": "m", "stream": True}) as stream:
                await stream.content.readuntil(b"\n\n")
                waiting = [
                    asyncio.create_task(session.post(url + CHAT, json={"model": m}).__aenter__())
                    for m in ("m", "m", "other")
                ]
                await engine.wait_for(received=2)
                while await waiting_calls(session, url) < 2:
                    await asyncio.sleep(0.02)
                running.terminate()
                told = await stream.content.readuntil(b"\n\n")
                with pytest.raises(aiohttp.ClientPayloadError):  # it is not whole
                    told += await stream.read()
                await engine.wait_for(aborted=2)
                answers = await asyncio.gather(*waiting)
                errors = [(await answer.json())["error"]["code"] for answer in answers]
            assert await running.wait() == 0

    assert b'"error"' in told
    assert b"[DONE]" not in told
    assert [answer.status for answer in answers] == [503] * 3
    assert errors == ["shutting_down"] * 3
    assert {answer.headers["Retry-After"] for answer in answers} == {"1"}
    assert len(engine.received) == 2


async def test_a_hangup_while_it_starts_has_the_file_read_again(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    async with (
        FakeEngine(slow_health=True).serving() as engine,
        aiohttp.ClientSession() as session,
        asyncio.timeout(60),
    ):
        text = f"port: 0\ninstances: [{{id: a, url: '{engine.url}'}}]\n"
        path.write_text(text)
        words = ("-m", "vllm_workflow.cli.main", "router", "--config", str(path))
        running = await asyncio.create_subprocess_exec(
            sys.executable, *words, stdout=asyncio.subprocess.PIPE
        )
        assert running.stdout is not None
        try:
            while not engine.num_health_asks:  # it waits for the answer before it is ready
                await asyncio.sleep(0.01)
            path.write_text(text.replace("id: a", "id: b"))
            running.send_signal(signal.SIGHUP)
            engine.slow_health = False
            line = (await running.stdout.readline()).decode()
            assert line.startswith("router ready on "), line
            url = line.split()[3].rstrip(":")
            names = set[str]()
            while names != {"b"}:
                async with session.get(url + "/health") as response:
                    names = set((await response.json())["instances"])
        finally:
            if running.returncode is None:
                running.kill()
            await running.communicate()


async def waiting_calls(session: aiohttp.ClientSession, url: str) -> float:
    async with session.get(url + "/metrics") as response:
        for line in (await response.text()).splitlines():
            if line.startswith("vllm_workflow:router_requests_waiting "):
                return float(line.split()[-1])
    raise AssertionError("no such series")


async def test_before_it_stops_it_takes_calls_and_says_that_it_is_not_ready(
    tmp_path: Path,
) -> None:
    async with FakeEngine().serving() as engine, aiohttp.ClientSession() as session:
        path = tmp_path / "router.yaml"
        path.write_text(f"port: 0\nshutdown_delay_s: 3600\ninstances: [{{url: '{engine.url}'}}]\n")
        async with process("--config", str(path)) as (running, url), asyncio.timeout(60):
            async with session.get(url + "/ready") as response:
                assert (response.status, await response.json()) == (200, {"ready": True})
            running.terminate()
            status = 200
            while status == 200:
                async with session.get(url + "/ready") as response:
                    status = response.status
            assert status == 503
            async with session.get(url + "/live") as response:
                assert response.status == 200
            async with session.post(url + CHAT, json={}) as response:
                assert response.status == 200
            running.terminate()  # a second time: at once
            assert await running.wait() == 0


async def test_however_few_files_may_be_open_clients_are_served_one_after_another(
    tmp_path: Path,
) -> None:
    """Clients that hold every descriptor would leave none to reach an instance by."""
    num_clients, max_files = 100, 80
    path = tmp_path / "router.yaml"
    async with FakeEngine().serving() as engine:
        path.write_text(json.dumps({"port": 0, "instances": [{"url": engine.url}]}))
        words = (sys.executable, "-m", "vllm_workflow.cli.main", "router", "--config", str(path))
        running = await asyncio.create_subprocess_exec(
            *("sh", "-c", f'ulimit -n {max_files}; exec "$@"', "sh", *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert running.stdout is not None
        url = (await running.stdout.readline()).decode().split()[3].rstrip(":")

        async def served() -> None:
            connector = aiohttp.TCPConnector(limit=1)
            async with aiohttp.ClientSession(connector=connector) as session:
                while True:
                    with suppress(aiohttp.ClientError):
                        async with session.post(url + CHAT, json={}) as response:
                            if response.status == 200:
                                return
                            assert response.status == 503
                    await asyncio.sleep(0.1)

        try:
            async with asyncio.timeout(30):
                await asyncio.gather(*(served() for _ in range(num_clients)))
        finally:
            running.terminate()
            _, errors = await running.communicate()

    assert b"limits.max_connections: 10000 wanted, 16 taken: 80 files may be open" in errors
    assert b"is not healthy" not in errors
