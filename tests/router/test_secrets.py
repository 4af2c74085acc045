"""Keys and prompts stay where they belong: traffic with unique words, and a search for them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import CHAT, Client, Routing
from tests.router.raw_http import exchange
from tests.router.test_tracing import collecting
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.router import logs
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.credentials import KeyHash, new_key

pytestmark = pytest.mark.anyio

KEY, ADMIN_KEY = new_key(), new_key()
UPSTREAM_KEY = "upstream-4f1c9e0d7a"
PROMPT = "prompt-77d1f0e2b9"
SECRETS = (KEY, ADMIN_KEY, UPSTREAM_KEY, PROMPT, KEY[16:], ADMIN_KEY[16:])


async def traffic(client: Client, admin_url: str) -> list[str]:
    """Calls of every kind, good and bad; returns all that was answered."""
    good, wrong = {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"Bearer {KEY}x"}
    messages = [{"role": "user", "content": PROMPT}]
    body = json.dumps({"model": "m", "messages": messages}).encode()
    calls: list[dict[str, Any]] = [
        {"body": body, "headers": good},
        {"body": body[:-1] + b',"stream":true}', "headers": good},
        {"body": body, "headers": wrong},
        {"body": body[:-1], "headers": good},
        {"body": body[:-1] + b',"model":"other"}', "headers": good},
        {"body": body, "headers": good | {"X-Workflow-Slo-Ms": "x"}},
        {"body": body, "headers": good | {"X-Tenant-Id": "other"}},
        {"body": body, "headers": good, "path": "/v1/nothing"},
        {"body": body + b" " * 1_100_000, "headers": good},
    ]
    texts = []
    for call in calls:
        async with client.post(**call) as response:
            texts.append(f"{response.headers} {await response.text()}")
    raw = f"POST {CHAT} HTTP/1.1\r\nAuthorization: Bearer {KEY}\x00\r\nHost: a\r\n\r\n".encode()
    texts.append((await exchange(client.router.url, raw)).body.decode())
    raw = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY * 900}\r\n\r\n".encode()
    texts.append((await exchange(client.router.url, raw)).body.decode())
    for key in (ADMIN_KEY, KEY):
        headers = {"Authorization": f"Bearer {key}"}
        url = client.router.url + "/dashboard/state"
        async with client.session.get(url, headers=headers) as response:
            texts.append(f"{response.headers} {await response.text()}")
        for path in ("/admin/status", "/metrics"):
            async with client.session.get(admin_url + path, headers=headers) as response:
                texts.append(f"{response.headers} {await response.text()}")
        async with client.session.post(
            admin_url + "/admin/instances",
            json={"url": "http://a:1", "api_key": UPSTREAM_KEY},
            headers=headers,
        ) as response:
            texts.append(await response.text())
    return texts


def database(folder: Path) -> bytes:
    kept = b"".join(file.read_bytes() for file in folder.glob("store.db*"))
    assert kept
    return kept


@pytest.mark.parametrize("healthy", [True, False])
async def test_secrets_and_prompts_are_nowhere(
    routing: Routing,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    healthy: bool,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("UPSTREAM_KEY", UPSTREAM_KEY)
    log = tmp_path / "decisions.jsonl"
    engine = FakeEngine(api_key=UPSTREAM_KEY, status=200 if healthy else 500)
    monkeypatch.setattr(logs.calls, "level", logging.INFO)
    async with engine.serving(), collecting() as collector:
        async with routing(
            instances=[{"id": "a", "url": engine.url, "api_key_env": "UPSTREAM_KEY"}],
            auth={"keys": [{"tenant": "t", "key_hash": str(KeyHash.of(KEY))}]},
            admin={"port": 0, "key_hash": str(KeyHash.of(ADMIN_KEY))},
            decision_log=str(log),
            store={"path": str(tmp_path / "store.db")},
            tracing={"otlp_endpoint": collector.url},
            log_level="debug",
            log_calls=True,
            max_body_mb=1,
        ) as client:
            texts = await traffic(client, client.router.admin_url)
            metrics = client.router.metrics.exposition().decode()

    texts += [caplog.text, metrics, log.read_text("utf-8")]
    assert "call status=" in caplog.text
    assert collector.spans
    kept = database(tmp_path)
    for raw in (kept, collector.raw):
        assert not [secret for secret in SECRETS if secret.encode() in raw]
    assert len(engine.received) >= 2
    assert PROMPT in engine.received[0].raw.decode()
    assert '"submitted"' in log.read_text("utf-8")
    for secret in SECRETS:
        assert not [text for text in texts if secret in text]


async def test_prompts_are_logged_where_that_is_asked_for(
    routing: Routing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with FakeEngine().serving() as engine, routing(engine, log_prompts=True) as client:
        async with client.post(messages=[{"role": "user", "content": PROMPT}]) as response:
            assert response.status == 200

    assert PROMPT in caplog.text


@pytest.mark.parametrize(
    "fields",
    [
        {"auth": KEY},
        {"auth": {"keys": [{"tenant": "t", "key": KEY}]}},
        {"auth": {"keys": [{"tenant": "t", "key_hash": KEY}]}},
        {"auth": {"keys": [KEY]}},
        {"admin": {"key_hash": KEY}},
        {"admin": {"key_env": "X", "key_hash": KEY}},
        {"admin": {"key": KEY}},
        {"api_key": KEY},
        {"instances": [{"url": "http://a:1", "api_key": KEY}]},
        {"instances": [{"url": f"http://user:{KEY}@a:1"}]},
        {"instances": [{"url": "http://a:1", "api_key_env": ["x", KEY]}]},
        {"instances": [{"url": "http://a:1", "api_key_file": {"key": KEY}}]},
        {"instances": [{"url": "http://a:1", "api_key_env": KEY}]},
        {"auth": {"keys": [{"tenant": "t", "key_env": KEY}]}},
    ],
    ids=lambda fields: str(fields).replace(KEY, "KEY"),
)
def test_a_key_in_the_wrong_place_is_not_repeated(fields: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        RouterConfig.from_mapping(
            {"instances": [{"url": "http://a:1"}]} | fields, source="router.yaml"
        )

    assert KEY not in str(caught.value)
