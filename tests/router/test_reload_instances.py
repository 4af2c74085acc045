"""Instances, their keys and their sources as a changed router.yaml names them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import yaml

from tests.fakes import FakeEngine
from tests.router.conftest import answered_by, healthy, names, port_of, until
from tests.router.operators import ADMIN, changed, from_file, text_of

pytestmark = pytest.mark.anyio


async def test_a_key_for_an_instance_is_read_again_and_the_old_one_sent_no_more(
    tmp_path: Path,
) -> None:
    file = tmp_path / "vllm.key"
    file.write_text("old")
    async with FakeEngine().serving() as engine:
        text = f"port: 0\nadmin: {{port: 0, key_hash: '{ADMIN['key_hash']}'}}\n" + yaml.safe_dump(
            {"instances": [{"id": "a", "url": engine.url, "api_key_file": "vllm.key"}]}
        )
        async with from_file(tmp_path / "router.yaml", text) as (client, _):
            await answered_by(client)
            file.write_text("new")
            assert await changed(client) == {"instances"}
            await answered_by(client)
            assert await changed(client) == set()

    assert [received.header("Authorization") for received in engine.received] == [
        "Bearer old",
        "Bearer new",
    ]


async def test_keys_of_instances_that_a_file_lists_are_read_again(tmp_path: Path) -> None:
    key, path = tmp_path / "vllm.key", tmp_path / "instances.yaml"
    key.write_text("old")
    async with FakeEngine().serving() as engine:
        path.write_text(f"[{{id: a, url: '{engine.url}', api_key_file: vllm.key}}]")
        text = text_of(extra="discovery: {files: [{path: instances.yaml}]}\n")
        async with from_file(tmp_path / "router.yaml", text) as (client, _):
            await answered_by(client)
            key.write_text("new")
            await changed(client)
            await answered_by(client)

    assert engine.received[-1].header("Authorization") == "Bearer new"


async def test_an_instance_that_changes_hands_is_sent_calls_throughout(tmp_path: Path) -> None:
    path = tmp_path / "instances.yaml"
    async with FakeEngine().serving() as engine:
        instance_id = f"127.0.0.1:{port_of(engine)}"
        path.write_text(f"[{{url: '{engine.url}'}}]")
        static = text_of(extra="").replace("instances: []", f"instances: [{{url: '{engine.url}'}}]")
        by_file = text_of(extra="discovery: {files: [{path: instances.yaml}]}\n")
        dns = f"{{name: localhost, port: {port_of(engine)}}}"
        by_name = text_of(extra=f"discovery: {{dns: [{dns}]}}\n")
        async with from_file(tmp_path / "router.yaml", static) as (client, write):
            upstream = client.router.upstreams[instance_id]
            before = upstream.generation, upstream.num_moves
            for text in (by_file, by_name, by_file, static, by_name, static):
                write(text)
                await changed(client)
                assert healthy(client) == names(client) == {instance_id}
                assert await answered_by(client) == instance_id
            assert client.router.upstreams[instance_id] is upstream
            assert (upstream.generation, upstream.num_moves) == before


async def test_sources_are_added_changed_and_removed(tmp_path: Path) -> None:
    async with (
        FakeEngine().serving() as a,
        FakeEngine(held=True).serving() as b,
        FakeEngine().serving() as c,
    ):
        one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
        two.write_text(f"[{{id: two, url: '{b.url}', models: [n]}}]")
        both = "discovery: {files: [{path: one.yaml}, {path: two.yaml, every_s: 0.02}]}\n"
        async with from_file(tmp_path / "router.yaml", text_of(a)) as (client, write):
            write(text_of(a, extra=both))  # one of which cannot be read yet
            assert await changed(client) == {"discovery"}
            await until(lambda: healthy(client) == {"a", "two"})
            one.write_text(f"[{{id: one, url: '{c.url}'}}]")
            await until(lambda: healthy(client) == {"a", "one", "two"})

            call = asyncio.ensure_future(answered_by(client, model="n"))
            await b.wait_for(received=1)
            write(text_of(a, extra="discovery: {files: [{path: one.yaml}]}\n"))
            await changed(client)
            assert healthy(client) == {"a", "one"}
            b.release()
            assert await call == "two"  # what was under way there ends there
            await until(lambda: names(client) == {"a", "one"})
            two.write_text(f"[{{id: three, url: '{b.url}'}}]")  # nobody looks any more
            write(text_of(a))
            await changed(client)
            await until(lambda: names(client) == {"a"})


async def test_a_source_that_does_not_answer_at_a_reload_keeps_its_instances(
    tmp_path: Path,
) -> None:
    path = tmp_path / "instances.yaml"
    async with FakeEngine().serving() as engine:
        path.write_text(f"[{{id: a, url: '{engine.url}'}}]")
        text = text_of(extra="discovery: {files: [{path: instances.yaml, every_s: {}}]}\n")
        async with from_file(tmp_path / "router.yaml", text.replace("{}", "1")) as (client, write):
            path.unlink()
            write(text.replace("{}", "2"))
            assert await changed(client) == {"discovery"}
            assert healthy(client) == {"a"}
