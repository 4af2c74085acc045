"""A server is one instance, whoever names it and however often."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Routing, healthy, names, until
from tests.router.operators import Operator, from_file, text_of
from tests.router.sources import Named, discovering, write
from vllm_workflow.router.instance_config import InstanceConfig
from vllm_workflow.router.upstream import POSTED

pytestmark = pytest.mark.anyio


async def test_a_server_that_is_there_under_another_name_is_not_taken_in_twice(
    routing: Routing, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        FakeEngine().serving() as one,
        FakeEngine().serving() as two,
        routing(one) as client,
    ):
        upstreams = client.router.upstreams
        upstreams.add(InstanceConfig(id="mine", url=two.url), source=POSTED)
        found = [InstanceConfig(id=f"found{i}", url=e.url) for i, e in enumerate((one, two))]
        source, other = Named("s1", found), Named("s2", [InstanceConfig(id="late", url=two.url)])
        async with discovering(client, source, other):
            await source.asked_twice_more()
            await other.asked_twice_more()
            assert names(client) == {"a", "mine"}

            # What an operator gave and takes back may be found, by the first that names it.
            upstreams.drain_for_good("mine")
            await until(lambda: "mine" not in names(client))
            await until(lambda: len(names(client)) == 2)
            (taken,) = names(client) - {"a"}
            await source.asked_twice_more()
            await other.asked_twice_more()
            assert names(client) == {"a", taken}
            assert taken in {"found1", "late"}

            # The file's word holds for the server, whatever name it is found under.
            upstreams.drain_for_good("a")
            await until(lambda: "a" not in names(client))
            await source.asked_twice_more()
            assert names(client) == {taken}

    told = [r.getMessage() for r in caplog.records if "it is there already as" in r.getMessage()]
    assert (
        f"discovery: s1: 'found0', {one.url}, is not taken in: it is there already as 'a'" in told
    )
    assert (
        f"discovery: s2: 'late', {two.url}, is not taken in: it is there already as 'mine'" in told
    )
    assert len(told) <= 4


async def test_a_server_that_a_file_names_later_goes_by_the_name_in_the_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "instances.yaml"
    async with FakeEngine().serving() as one, FakeEngine().serving() as two:
        write(path, {"url": two.url, "id": "found"})
        text = text_of(one) + f"\ndiscovery: {{files: [{{path: '{path}', every_s: 0.02}}]}}\n"
        async with from_file(tmp_path / "router.yaml", text) as (client, rewrite):
            assert names(client) == {"a", "found"}
            rewrite(text.replace("{id: a,", f"{{id: b, url: '{two.url}'}}, {{id: a,"))
            assert (await Operator(client).ask("POST", "/admin/reload"))[0] == 200
            await until(lambda: healthy(client) == names(client) == {"a", "b"})
            rewrite(text)
            assert (await Operator(client).ask("POST", "/admin/reload"))[0] == 200
            await until(lambda: healthy(client) == names(client) == {"a", "found"})


async def test_a_source_that_names_a_server_twice_brings_it_once_under_the_name_it_has(
    routing: Routing,
) -> None:
    async with (
        FakeEngine().serving() as one,
        FakeEngine().serving() as two,
        FakeEngine().serving() as three,
        routing(one) as client,
    ):
        first, second = two.url, three.url
        source = Named("s", [InstanceConfig(id="y", url=first)])
        async with discovering(client, source):
            await until(lambda: names(client) == {"a", "y"})
            source.found = [InstanceConfig(id=name, url=first) for name in ("x", "y", "z")]
            await source.asked_twice_more()
            assert names(client) == {"a", "y"}

            source.found = [
                InstanceConfig(id="x", url=second),
                InstanceConfig(id="y", url=first),
            ]
            await until(lambda: names(client) == {"a", "x", "y"})
            source.found = [  # they change places, and neither is drained for it
                InstanceConfig(id="x", url=first),
                InstanceConfig(id="y", url=second),
            ]
            await source.asked_twice_more()
            upstreams = client.router.upstreams
            assert [upstreams[name].url for name in ("x", "y")] == [first, second]
            assert not any(upstream.leaving for upstream in upstreams)
