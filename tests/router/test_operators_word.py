"""What an operator has drained or added holds until its entry in the file changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Client, Routing, healthy, names, until
from tests.router.operators import ADMIN, Operator, from_file, text_of
from tests.router.sources import write

pytestmark = pytest.mark.anyio


async def changed(client: Client) -> list[str]:
    status, answer = await Operator(client).ask("POST", "/admin/reload")
    assert status == 200, answer
    fields: list[str] = answer["changed"]
    return fields


async def drained(client: Client, instance_id: str) -> None:
    status, _ = await Operator(client).ask("DELETE", f"/admin/instances/{instance_id}")
    assert status == 202
    await until(lambda: instance_id not in names(client))


async def posted(client: Client, instance_id: str, url: str) -> None:
    data = {"id": instance_id, "url": url}
    status, answer = await Operator(client).ask("POST", "/admin/instances", data)
    assert status == 201, answer


async def test_a_reload_of_the_same_file_brings_nothing_back_and_takes_nothing_away(
    tmp_path: Path,
) -> None:
    async with (
        FakeEngine().serving() as a,
        FakeEngine().serving() as b,
        FakeEngine().serving() as c,
        from_file(tmp_path / "router.yaml", text_of(a, b)) as (client, write),
    ):
        await drained(client, "b")
        await posted(client, "c", c.url)
        assert await changed(client) == []
        write(text_of(a, b, extra="log_prompts: true\n"))
        assert await changed(client) == ["log_prompts"]

        await until(lambda: healthy(client) == {"a", "c"})
        assert names(client) == {"a", "c"}


async def test_a_drained_instance_is_back_when_its_entry_changes(tmp_path: Path) -> None:
    async with FakeEngine().serving() as a, FakeEngine().serving() as b:
        text = text_of(a, b)
        async with from_file(tmp_path / "router.yaml", text) as (client, write):
            await drained(client, "b")
            write(text.replace("{id: b,", "{id: b, max_num_seqs: 9,"))
            assert await changed(client) == ["instances"]

            assert names(client) == {"a", "b"}
            assert await changed(client) == []
            assert names(client) == {"a", "b"}


async def test_a_drained_instance_is_back_when_its_entry_was_away(tmp_path: Path) -> None:
    async with FakeEngine().serving() as a, FakeEngine().serving() as b:
        async with from_file(tmp_path / "router.yaml", text_of(a, b)) as (client, write):
            await drained(client, "b")
            write(text_of(a))
            await changed(client)
            write(text_of(a, b))
            await changed(client)

            assert names(client) == {"a", "b"}


async def test_what_an_operator_put_in_the_place_of_an_entry_stays(tmp_path: Path) -> None:
    async with (
        FakeEngine().serving() as a,
        FakeEngine().serving() as b,
        FakeEngine().serving() as c,
        from_file(tmp_path / "router.yaml", text_of(a, b)) as (client, write),
    ):
        await drained(client, "b")
        await posted(client, "b", c.url)
        assert await changed(client) == []
        assert client.router.upstreams["b"].url == c.url

        write(text_of(a, b).replace("{id: b,", "{id: b, max_num_seqs: 9,"))
        await changed(client)
        assert client.router.upstreams["b"].url == b.url


async def test_what_was_posted_and_drained_may_be_found_later(tmp_path: Path) -> None:
    path = tmp_path / "instances.yaml"
    write(path)
    async with FakeEngine().serving() as a, FakeEngine().serving() as c:
        text = text_of(a) + f"\ndiscovery: {{files: [{{path: '{path}', every_s: 0.02}}]}}\n"
        async with from_file(tmp_path / "router.yaml", text) as (client, _):
            await posted(client, "c", c.url)
            await drained(client, "c")
            write(path, {"url": c.url, "id": "c"})
            await until(lambda: healthy(client) == {"a", "c"})


async def test_a_file_may_move_what_an_operator_posted_and_use_its_server(tmp_path: Path) -> None:
    async with (
        FakeEngine().serving() as a,
        FakeEngine().serving() as b,
        FakeEngine().serving() as c,
    ):
        async with from_file(tmp_path / "router.yaml", text_of(a)) as (client, rewrite):
            await posted(client, "b", c.url)
            instances = f"{{id: b, url: '{b.url}'}}, {{id: c, url: '{c.url}'}}"
            rewrite(text_of(a).replace("instances: [", f"instances: [{instances}, "))
            assert await changed(client) == ["instances"]
            await until(lambda: healthy(client) == {"a", "b", "c"})
            assert client.router.upstreams["c"].url == c.url


async def test_no_server_is_there_twice(tmp_path: Path) -> None:
    async with FakeEngine().serving() as a, FakeEngine().serving() as b:
        async with from_file(tmp_path / "router.yaml", text_of(a)) as (client, write):
            data = {"id": "again", "url": a.url + "/"}
            status, answer = await Operator(client).ask("POST", "/admin/instances", data)
            assert (status, answer["error"]["param"]) == (409, "url")
            assert "is there already as 'a'" in answer["error"]["message"]

            await posted(client, "mine", b.url)
            write(text_of(a, b))
            status, answer = await Operator(client).ask("POST", "/admin/reload")
            assert status == 400
            assert "was added by an operator as 'mine'" in answer["error"]["message"]
            assert names(client) == {"a", "mine"}


async def test_a_misspelled_question_drains_nothing(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine, admin=ADMIN) as client:
        path = "/admin/instances/a?drian=false"
        status, answer = await Operator(client).ask("DELETE", path)

        assert (status, answer["error"]["param"]) == (400, "drian")
        assert "a" in names(client)
        assert not client.router.upstreams["a"].leaving
