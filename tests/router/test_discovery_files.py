"""Keys and certificates in files that what is found names."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
import trustme

from tests.fakes import FakeEngine
from tests.router.conftest import Routing, healthy, names, port_of, until
from tests.router.sources import write
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.discovery import DnsLookup, FileWatch
from vllm_workflow.router.discovery_config import DnsSource, FileSource

pytestmark = pytest.mark.anyio


async def test_an_instance_whose_key_is_missing_is_taken_in_when_the_key_is_there(
    routing: Routing, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, key = tmp_path / "instances.yaml", tmp_path / "key"
    async with FakeEngine().serving() as other, FakeEngine(api_key="the-key").serving() as engine:
        write(path, {"url": engine.url, "id": "b", "api_key_file": "key"})
        found = {"files": [{"path": str(path), "every_s": 0.02}]}
        async with routing(other, discovery=found) as client:
            await until(lambda: "cannot read a key" in caplog.text)
            assert names(client) == {"a"}
            key.write_text("the-key")
            # Found in the folder of the file that names it.
            await until(lambda: "b" in healthy(client))


async def test_a_key_that_was_replaced_is_sent_without_a_reload_where_instances_are_looked_up(
    routing: Routing, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("the-old-key")
    async with FakeEngine(api_key="the-new-key").serving() as engine:
        template = {"api_key_file": str(key)}
        source = {"name": "localhost", "port": port_of(engine), "every_s": 0.02}
        async with routing(discovery={"dns": [source | {"template": template}]}) as client:
            assert len(names(client)) == 1
            assert not healthy(client)
            key.write_text("the-new-key")
            await until(lambda: healthy(client) == names(client))


@pytest.mark.parametrize("names", ["one", "dir/two"])
async def test_a_key_that_was_replaced_is_sent_without_a_reload_where_a_watched_file_names_it(
    routing: Routing, tmp_path: Path, names: str
) -> None:
    path, key = tmp_path / "instances.yaml", tmp_path / names
    key.parent.mkdir(exist_ok=True)
    key.write_text("the-old-key")
    async with FakeEngine(api_key="the-new-key").serving() as engine:
        write(path, {"url": engine.url, "id": "b", "api_key_file": names})
        found = {"files": [{"path": str(path), "every_s": 0.02}]}
        async with routing(discovery=found) as client:
            assert not healthy(client)
            key.write_text("the-new-key")
            await until(lambda: healthy(client) == {"b"})


async def test_a_file_that_names_others_is_not_read_again_until_one_of_them_changes(
    tmp_path: Path,
) -> None:
    path, authority = tmp_path / "instances.yaml", tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(authority))
    write(path, {"url": "https://a:1", "tls": {"ca_file": "ca.pem"}})
    watch = FileWatch(FileSource(path=str(path)))

    (first,) = await watch.find() or ()
    assert await watch.find() is None
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "new.pem"))
    os.replace(tmp_path / "new.pem", authority)
    (second,) = await watch.find() or ()
    assert await watch.find() is None

    assert first != second
    assert first.ssl is not second.ssl


def test_paths_in_what_instances_share_are_relative_to_the_file_that_names_them(
    tmp_path: Path,
) -> None:
    (tmp_path / "key").write_text("the-key")
    (tmp_path / "certs").mkdir()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "certs/ca.pem"))
    template = "template: {api_key_file: key, tls: {ca_file: certs/ca.pem}}"
    path = tmp_path / "router.yaml"
    path.write_text(
        "discovery:\n"
        f"  dns: [{{name: vllm, port: 1, scheme: https, {template}}}]\n"
        f"  kubernetes: [{{service: vllm, token_file: token, {template}}}]\n"
    )

    config = RouterConfig.from_file(path)

    assert config.discovery is not None
    (by_name,), (pods,) = config.discovery.dns, config.discovery.kubernetes
    assert by_name.template == pods.template
    assert by_name.template["api_key_file"] == str(tmp_path / "key")
    assert by_name.template["tls"]["ca_file"] == str(tmp_path / "certs/ca.pem")
    assert pods.token_file == str(tmp_path / "token")
    assert pods.ca_file.startswith("/var/run/secrets/")


async def test_certificates_are_loaded_once_for_what_they_hold_and_not_by_the_event_loop(
    tmp_path: Path,
) -> None:
    authority = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(authority))
    addresses = ["10.0.0.1", "10.0.0.2"]

    async def resolve(name: str, port: int) -> list[str]:
        return addresses

    source = DnsSource(
        name="vllm", port=8000, scheme="https", template={"tls": {"ca_file": str(authority)}}
    )
    lookup = DnsLookup(source, resolve)
    read_by: list[int] = []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]) == str(authority):
            read_by.append(threading.get_ident())

    sys.addaudithook(watch)
    first, second, third = [*await lookup.find(), *(await lookup.find())[:1]]
    trustme.CA().cert_pem.write_to_path(str(authority))
    (renewed, _) = await lookup.find()

    assert first.ssl is second.ssl is third.ssl
    assert first == third
    assert renewed.ssl is not first.ssl
    assert renewed != first
    assert read_by.count(threading.get_ident()) == 1  # written above
    assert len(read_by) > 1
