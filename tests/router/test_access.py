"""Keys, tenants, and what a key opens."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import FakeEngine
from tests.router.conftest import Client, Routing
from vllm_workflow.cli import key as command
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.credentials import KeyHash, new_key, read_key

pytestmark = pytest.mark.anyio

KEY, OTHER, GATEWAY = new_key(), new_key(), new_key()
AUTH = {
    "keys": [
        {"tenant": "acme", "key_hash": str(KeyHash.of(KEY))},
        {"tenant": "umbra", "key_hash": str(KeyHash.of(OTHER)), "models": ["n"]},
        {"tenant": "gate", "key_hash": str(KeyHash.of(GATEWAY)), "acts_for": ["*"]},
    ]
}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def refused(client: Client, status: int, **call: Any) -> dict[str, Any]:
    """Call, expect a refusal in OpenAI's form, and return its error."""
    async with client.post(**call) as response:
        assert response.status == status, await response.text()
        error: dict[str, Any] = (await response.json())["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        if status == 401:
            assert response.headers["WWW-Authenticate"] == "Bearer"
    return error


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": "Bearer "},
        bearer(KEY[:-1]),
        bearer(KEY + "x"),
        bearer("x" * 600),
        bearer(new_key()),
        bearer(KEY[:16] + new_key()[16:]),
        {"X-Api-Key": KEY},
    ],
    ids=range(11),
)
async def test_without_a_known_key_nothing_is_answered(
    routing: Routing, headers: dict[str, str]
) -> None:
    async with FakeEngine().serving() as engine, routing(engine, auth=AUTH) as client:
        error = await refused(client, 401, headers=headers)
        async with client.session.get(client.router.url + "/v1/models", headers=headers) as models:
            assert models.status == 401

    assert error["code"] == "invalid_api_key"
    assert not engine.received
    assert KEY not in str(error)


async def test_the_body_of_a_call_without_a_key_is_not_even_read(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine, auth=AUTH) as client:
        await refused(client, 401, body=b"no JSON")


async def test_the_tenant_of_a_call_is_that_of_its_key(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine, auth=AUTH) as client:
        async with client.post(headers=bearer(KEY) | {"X-Workflow-Id": "w"}) as response:
            assert response.status == 200

    assert engine.received[0].xargs["wf_tenant"] == "acme"


CLAIMS: list[dict[str, Any]] = [
    {"headers": {"X-Tenant-Id": "umbra"}},
    {"metadata": {"tenant_id": "umbra"}},
    {"vllm_xargs": {"wf_tenant": "umbra"}},
    {"headers": {"X-Tenant-Id": "acme"}, "vllm_xargs": {"wf_tenant": "umbra"}},
]


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
async def test_another_tenant_than_that_of_the_key_cannot_be_claimed(
    routing: Routing, claim: dict[str, Any]
) -> None:
    call = claim | {"headers": bearer(KEY) | claim.get("headers", {})}
    async with FakeEngine().serving() as engine, routing(engine, auth=AUTH) as client:
        error = await refused(client, 403, **call)

    assert error["code"] == "tenant_not_allowed"
    assert "expected tenant 'acme' of the API key, got 'umbra'" in error["message"]
    assert not engine.received


async def test_the_key_of_a_gateway_calls_for_those_it_names(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine, auth=AUTH) as client:
        headers = bearer(GATEWAY) | {"X-Tenant-Id": "umbra", "X-Workflow-Id": "w"}
        async with client.post(headers=headers) as response:
            assert response.status == 200

    assert engine.received[0].xargs["wf_tenant"] == "umbra"


async def test_a_header_that_names_two_tenants_names_none(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine, auth=AUTH) as client:
        headers: Any = [*bearer(KEY).items(), ("X-Tenant-Id", "acme"), ("X-Tenant-Id", "umbra")]
        url = client.router.url + "/v1/chat/completions"
        async with client.session.post(url, json={}, headers=headers) as response:
            error = (await response.json())["error"]

    assert response.status == 400
    assert error["message"] == "header X-Tenant-Id: expected one such header, got 2 of them"


async def test_a_key_opens_the_models_that_it_names(routing: Routing) -> None:
    engine = FakeEngine(models=("m", "n"))
    async with engine.serving(), routing(engine, auth=AUTH) as client:
        error = await refused(client, 403, headers=bearer(OTHER))
        await refused(client, 403, headers=bearer(OTHER), body={"messages": []})
        async with client.post(headers=bearer(OTHER), body={"model": "n"}) as response:
            assert response.status == 200
        url = client.router.url + "/v1/models"
        async with client.session.get(url, headers=bearer(OTHER)) as response:
            models = [card["id"] for card in (await response.json())["data"]]

    assert (error["code"], error["param"]) == ("model_not_allowed", "model")
    assert models == ["n"]


async def test_an_error_names_no_model_that_the_key_does_not_open(routing: Routing) -> None:
    engine = FakeEngine(models=("m", "secret"))
    async with engine.serving(), routing(engine, auth=AUTH) as client:
        error = await refused(client, 404, headers=bearer(OTHER), body={"model": "n"})
        known = await refused(client, 404, headers=bearer(KEY), body={"model": "n"})

    assert error["message"] == "model: 'n' is not served here; served are []"
    assert known["message"] == "model: 'n' is not served here; served are ['m', 'secret']"


async def test_a_client_s_key_does_not_reach_the_instances(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine, auth=AUTH) as client:
        async with client.post(headers=bearer(KEY)) as response:
            assert response.status == 200

    assert engine.received[0].header("Authorization") is None


async def test_an_instance_is_sent_its_own_key_by_calls_and_probes(
    routing: Routing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", "sesame")
    async with FakeEngine(api_key="sesame").serving() as engine:
        instance = {"id": "a", "url": engine.url, "api_key_env": "UPSTREAM_KEY"}
        async with routing(instances=[instance]) as client:
            async with client.post(headers=bearer("of the client")) as response:
                assert response.status == 200
            async with client.get("/v1/models") as models:
                assert [card["id"] for card in (await models.json())["data"]] == ["m"]

    assert engine.received[0].header("Authorization") == "Bearer sesame"


async def test_an_instance_that_refuses_its_key_is_not_sent_calls(
    routing: Routing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", "wrong")
    async with FakeEngine(api_key="sesame", open_paths=("/health",)).serving() as engine:
        instance = {"id": "a", "url": engine.url, "api_key_env": "UPSTREAM_KEY", "models": ["m"]}
        async with routing(instances=[instance]) as client:
            async with client.get("/health") as response:
                assert (await response.json())["instances"] == {"a": False}
            engine.api_key = "wrong"
            async with asyncio.timeout(10):
                while not client.router.upstreams.is_healthy(client.router.upstreams["a"]):
                    await asyncio.sleep(0.02)


async def test_a_client_is_not_told_that_the_router_s_own_key_is_wrong(
    routing: Routing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take it for its own: SDKs do not try again after 401."""
    monkeypatch.setenv("UPSTREAM_KEY", "sesame")
    async with (
        FakeEngine(api_key="sesame", open_paths=("/health",)).serving() as a,
        FakeEngine(api_key="sesame", open_paths=("/health",)).serving() as b,
    ):
        instances = [
            {"id": name, "url": engine.url, "api_key_env": "UPSTREAM_KEY"}
            for name, engine in (("a", a), ("b", b))
        ]
        async with routing(instances=instances, policy="round-robin") as client:
            a.api_key = "another"
            for _ in range(4):
                async with client.post() as response:
                    assert response.status == 200
                    assert response.headers["X-Workflow-Instance"] == "b"
            upstreams = client.router.upstreams
            async with asyncio.timeout(5):
                while upstreams.is_healthy(upstreams["a"]):
                    await asyncio.sleep(0.02)
            b.api_key = "another"
            async with client.post(headers={"X-Workflow-Budget-Ms": "1000"}) as response:
                assert response.status == 503
                assert "unauthorized" in await response.text()


async def test_a_key_that_is_named_as_for_this_hop_only_is_a_key(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine, auth=AUTH) as client:
        headers = bearer(KEY) | {"Connection": "keep-alive, Authorization"}
        async with client.post(headers=headers) as response:
            assert response.status == 200

    assert engine.received[0].header("Authorization") is None


async def test_with_keys_health_is_open_and_says_no_names(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine, auth=AUTH) as client:
        async with client.get("/health") as response:
            assert (response.status, await response.json()) == (200, {"healthy": True})


@pytest.mark.parametrize("open_metrics", [True, False])
async def test_with_keys_metrics_are_for_operators_unless_opened(
    routing: Routing, open_metrics: bool
) -> None:
    auth = AUTH | {"open_metrics": open_metrics}
    admin = {"port": 0, "key_hash": str(KeyHash.of(GATEWAY))}
    async with FakeEngine().serving() as engine, routing(engine, auth=auth, admin=admin) as client:
        url = client.router.url + "/metrics"
        for headers, status in (({}, 401), (bearer(KEY), 401), (bearer(GATEWAY), 200)):
            async with client.session.get(url, headers=headers) as response:
                assert response.status == (200 if open_metrics else status)


def config(auth: Any = None, **fields: Any) -> RouterConfig:
    data = {"instances": [{"url": "http://a:1"}], "auth": auth, **fields}
    return RouterConfig.from_mapping(data, source="router.yaml")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ({"key": KEY}, "key: expected no key in plain text; give `key_hash`"),
        ({"key_hash": KEY}, "expected sha256:ID:SALT:DIGEST as `vllm-workflow key new` prints"),
        ({}, r"expected one of key_hash, key_env, key_file, got none"),
        ({"key_env": "A", "key_file": "b"}, r"got \['key_env', 'key_file'\]"),
        ({"key_env": "NOT_THERE"}, "environment variable NOT_THERE: expected a key, got none"),
        ({"key_env": "SHORT"}, "expected a key of at least 20 printable ASCII.* got 5 characters"),
        ({"key_env": "BLANK"}, "got 21 characters, others among them"),
        ({"key_file": "/not/there"}, "file /not/there: cannot read a key: No such file"),
    ],
    ids=range(8),
)
def test_a_key_that_cannot_be_used_is_told_and_not_repeated(
    key: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHORT", "abcde")
    monkeypatch.setenv("BLANK", "abcdefghij abcdefghij")
    with pytest.raises(ConfigError, match=message) as caught:
        config({"keys": [{"tenant": "t", **key}]})

    assert str(caught.value).startswith("router.yaml: auth.keys.0")
    assert not any(secret in str(caught.value) for secret in (KEY, "abcde"))


def test_a_section_that_is_a_key_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        config(KEY)

    assert "router.yaml: auth: expected a mapping of fields" in str(caught.value)
    assert KEY not in str(caught.value)


def test_one_key_for_two_tenants_is_refused() -> None:
    hashed = str(KeyHash.of(KEY))
    keys = [{"tenant": tenant, "key_hash": hashed} for tenant in "ab"]
    with pytest.raises(ConfigError, match="auth: keys: declared twice: "):
        config({"keys": keys})


async def test_a_key_that_was_not_made_here_is_read_from_a_file(
    routing: Routing, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("correct-horse-battery-staple\n")
    auth = {"keys": [*AUTH["keys"], {"tenant": "t", "key_file": str(tmp_path / "key")}]}
    async with FakeEngine().serving() as engine, routing(engine, auth=auth) as client:
        async with client.post(headers=bearer("correct-horse-battery-staple")) as response:
            assert response.status == 200
        await refused(client, 401, headers=bearer("correct-horse-battery-stable"))


def new(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    assert command.run(parser.parse_args(["key", "new", *words])) == 0
    out, err = capsys.readouterr()
    return out.strip(), err.partition("router.yaml:\n")[2]


def test_a_new_key_is_printed_once_with_the_lines_to_keep(
    capsys: pytest.CaptureFixture[str],
) -> None:
    key, lines = new(capsys, "--tenant", 'a "b" \\ c')
    admin_key, admin_lines = new(capsys, "--admin")

    kept = config(**yaml.safe_load(lines), **yaml.safe_load(admin_lines))
    assert kept.auth is not None
    assert kept.admin is not None
    assert kept.auth.keys[0].tenant == 'a "b" \\ c'
    assert kept.auth.keys[0].hashed.matches(key)
    assert kept.admin.hashed.matches(admin_key)
    assert key not in lines


@given(key=st.text(max_size=80), other=st.text(max_size=80))
def test_a_hash_matches_its_key_and_no_other(key: str, other: str) -> None:
    hashed = KeyHash.of(key)

    assert hashed.matches(key)
    assert hashed.matches(other) == (key == other)
    assert key == "" or len(key) < 4 or key not in str(hashed)


def test_two_hashes_of_a_key_differ() -> None:
    assert str(KeyHash.of(KEY)) != str(KeyHash.of(KEY))
    assert KeyHash.parse(str(KeyHash.of(KEY))).matches(KEY)


def test_a_file_may_end_in_a_line_end(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")

    assert read_key("", str(tmp_path / "key")) == KEY
