"""Finds instances that come and go, and takes them in or lets them leave.

A source that fails or answers nothing usable changes nothing: instances that it named before stay,
and whether they live is for the probes to say.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from vllm_workflow.core.errors import ConfigError, UpstreamError
from vllm_workflow.router.config_paths import INSTANCE_FILES, locate, paths
from vllm_workflow.router.discovery_config import (
    DiscoveryConfig,
    DnsSource,
    FileSource,
    KubernetesSource,
)
from vllm_workflow.router.instance_config import InstanceConfig
from vllm_workflow.router.tls import upstream_tls
from vllm_workflow.router.upstreams import Upstreams
from vllm_workflow.yaml_config import read_yaml, validated

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Addresses of a name and port."""
_FIRST_LOOK_S = 5.0
"""That a reload waits for sources; one that answers later is heard then."""
_TIMEOUT = aiohttp.ClientTimeout(total=10, sock_connect=3)
_logger = logging.getLogger(__name__)


class Source(Protocol):
    """Where instances are found."""

    name: str
    """That no other source has."""
    every_s: float

    async def find(self) -> list[InstanceConfig] | None:
        """Return what is there now; None if nothing has changed.

        Raises:
            ConfigError: What was found cannot be used.
            UpstreamError: Nothing could be asked.
        """
        ...


class Discovery:
    """Asks each source now and then, and tells the upstreams.

    Args:
        sources: Each responsible for the instances that it found itself.
        upstreams: Gets them; what others have put there is left alone.
    """

    def __init__(self, sources: Iterable[Source], upstreams: Upstreams) -> None:
        self._sources = {source.name: source for source in sources}
        self._upstreams = upstreams
        self._found: dict[str, list[InstanceConfig]] = {}
        """What each source has found last."""
        self._problems: dict[str, str] = {}
        """What went wrong with each when it was asked last."""
        self._told: set[tuple[str, str]] = set()
        """Sources and instances of theirs that are there already."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None

    async def look(self) -> None:
        """Ask every source once."""
        async with asyncio.TaskGroup() as tasks:
            for source in self._sources.values():
                tasks.create_task(self._ask(source))

    async def run(self) -> None:
        """Ask until cancelled."""
        async with asyncio.TaskGroup() as self._group:
            for source in self._sources.values():
                self._keep_on(source)
            await asyncio.Event().wait()  # others may come

    async def found_by(self, sources: Iterable[Source]) -> dict[str, list[InstanceConfig]]:
        """Ask sources that are not in use yet; returns what each found, if it did.

        What goes wrong is logged, and for them to find out again when they are in use.
        """
        found: dict[str, list[InstanceConfig]] = {}

        async def ask(source: Source) -> None:
            try:
                async with asyncio.timeout(_FIRST_LOOK_S):
                    instances = await self._answer(source)
            except TimeoutError:
                _logger.error("discovery: %s: no answer in %g s", source.name, _FIRST_LOOK_S)
                return
            if instances is not None:
                found[source.name] = instances

        async with asyncio.TaskGroup() as tasks:
            for source in sources:
                tasks.create_task(ask(source))
        return found

    def replace(self, sources: Iterable[Source], found: Mapping[str, list[InstanceConfig]]) -> None:
        """Ask other sources from now on, and take in what they have found.

        Instances that only a source now gone has named belong to nobody then, see
        `Upstreams.drain_disowned`. One that has found nothing usable keeps those that one of its
        name had found.

        Args:
            sources: All there are from now on.
            found: What each has found, see `found_by`.
        """
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()
        old, self._sources = self._sources, {source.name: source for source in sources}
        for name in old.keys() - self._sources.keys():
            self._found.pop(name, None)
            self._problems.pop(name, None)
            self._upstreams.keep_out(name, {})
            self._upstreams.disown(name)
        self._found.update(found)
        for name, source in self._sources.items():
            if name in self._found:
                self._take(name, self._found[name])
            self._keep_on(source)

    def _keep_on(self, source: Source) -> None:
        if self._group is not None:
            self._tasks[source.name] = self._group.create_task(self._keep_asking(source))

    async def _keep_asking(self, source: Source) -> None:
        while True:
            await asyncio.sleep(source.every_s)
            await self._ask(source)

    async def _ask(self, source: Source) -> None:
        """Ask once, and have the upstreams agree with what was found last."""
        found = await self._answer(source)
        if found is not None:
            self._found[source.name] = found
        if source.name in self._found:
            self._take(source.name, self._found[source.name])

    async def _answer(self, source: Source) -> list[InstanceConfig] | None:
        """Ask once; what goes wrong is logged, unless it did so the last time."""
        found, problem = None, ""
        before = self._problems.get(source.name, "")
        try:
            found = await source.find()
        except (ConfigError, UpstreamError) as e:
            problem = str(e)
            if problem != before:
                _logger.error("discovery: %s; its instances stay as they are", e)
        except Exception as e:  # whatever one source says, the others are asked on
            problem = repr(e)
            if problem != before:
                _logger.exception("discovery: %s failed", source.name)
        self._problems[source.name] = problem
        return found

    def _take(self, source: str, found: Iterable[InstanceConfig]) -> None:
        """Have the upstreams agree with what was found, and none of them be a server twice.

        What another source, the file or an operator has given stays as it is.
        """
        wanted = {config.id: config for config in found}
        for upstream in list(self._upstreams):
            if upstream.source == source and upstream.config.id not in wanted:
                self._upstreams.drain(upstream.config.id)
        self._told = {each for each in self._told if each[0] != source or each[1] in wanted}
        kept_out = self._upstreams.keep_out(source, wanted)
        stay = [upstream for upstream in self._upstreams if upstream.stays]
        names = {u.config.server: u.config.id for u in stay if u.source != source}
        # A server that was taken in goes on under its name, whatever else it is found as.
        for config in sorted(wanted.values(), key=self._is_new):
            if config.id in kept_out:
                continue
            there = self._upstreams.get(config.id)
            if there is not None and not there.stays:
                there = None
            if there is not None and there.source != source:
                self._tell_once(source, config, f"{there.url} is there already under that name")
            elif (name := names.setdefault(config.server, config.id)) != config.id:
                self._tell_once(source, config, f"it is there already as {name!r}")
                if there is not None:
                    self._upstreams.drain(config.id)
            elif there is None or there.config != config:
                self._told.discard((source, config.id))
                self._upstreams.add(config, source=source)

    def _is_new(self, config: InstanceConfig) -> bool:
        """Whether nobody of its name and server is there."""
        there = self._upstreams.get(config.id)
        return there is None or not there.stays or there.config.server != config.server

    def _tell_once(self, source: str, config: InstanceConfig, why: str) -> None:
        if (source, config.id) not in self._told:
            self._told.add((source, config.id))
            _logger.warning(
                "discovery: %s: %r, %s, is not taken in: %s", source, config.id, config.url, why
            )


class FileWatch:
    """Reads a file whenever it, or a file that it names, has changed."""

    def __init__(self, config: FileSource) -> None:
        self.config = config
        self.name = config.label
        self.every_s = config.every_s
        self._path = Path(config.path)
        self._seen: dict[Path, tuple[int, int, int] | None] = {}
        """What told each file, as it was when all were read, from other contents."""

    async def find(self) -> list[InstanceConfig] | None:
        return await asyncio.to_thread(self._read)

    def _read(self) -> list[InstanceConfig] | None:
        if self._seen and all(_signature(path) == seen for path, seen in self._seen.items()):
            return None
        self._seen = {}
        # Before anything is read, so that whatever changes meanwhile is read again.
        signatures = {self._path: _signature(self._path)}
        data = read_yaml(self._path)
        if not isinstance(data, list):
            raise ConfigError(f"{self._path}: expected a list of instances, got {data!r:.80}")
        locate(data, INSTANCE_FILES, self._path.parent)
        signatures |= {path: _signature(path) for _, path in paths(data, INSTANCE_FILES)}
        found = [
            validated(InstanceConfig, entry, source=f"{self._path}: {number}")
            for number, entry in enumerate(data)
        ]
        self._seen = signatures
        return found


def _signature(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file is written or replaced; None if there is none."""
    try:
        stat = path.stat()
    except (OSError, ValueError):  # the latter: no file can have such a name
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class DnsLookup:
    """Asks for the addresses of a name."""

    def __init__(self, config: DnsSource, resolve: Resolve | None = None) -> None:
        self.config = config
        self.name = config.label
        self.every_s = config.every_s
        self._resolve = resolve or _addresses

    async def find(self) -> list[InstanceConfig]:
        config = self.config
        try:
            addresses = await self._resolve(config.name, config.port)
        except (OSError, UnicodeError) as e:  # the latter: no name of a host can be such
            raise UpstreamError(f"{self.name}: {e}") from None
        endpoints = [(address, config.port, "") for address in sorted(set(addresses))]
        return await asyncio.to_thread(_instances, config, endpoints)


class EndpointSlices:
    """Asks a Kubernetes API server for the ready endpoints of a service.

    Args:
        config: Of which service.
        session: Asks.
        form: What instances are named, from `pod`, `namespace` and `port`; empty: after address
            and port, as is one whose pod is not told.
    """

    def __init__(
        self, config: KubernetesSource, session: aiohttp.ClientSession, *, form: str = "{pod}"
    ) -> None:
        self.config = config
        self._form = form
        self.name = config.label
        self.every_s = config.every_s
        self._session = session
        self._url = (
            f"{config.api_url.rstrip('/')}/apis/discovery.k8s.io/v1/namespaces/{config.namespace}"
            "/endpointslices"
        )

    async def find(self) -> list[InstanceConfig]:
        config = self.config
        query = {"labelSelector": f"kubernetes.io/service-name={config.service}"}
        try:
            token, context = await asyncio.to_thread(self._credentials)
            headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
            async with self._session.get(
                self._url, params=query, headers=headers, ssl=context, timeout=_TIMEOUT
            ) as response:
                if response.status != 200:
                    raise UpstreamError(f"{self.name}: expected status 200, got {response.status}")
                answer = await response.json()
            endpoints = [each for piece in answer["items"] for each in self._ready(piece)]
            return await asyncio.to_thread(_instances, config, endpoints)
        except ConfigError:
            raise
        except (OSError, aiohttp.ClientError, TimeoutError) as e:
            raise UpstreamError(f"{self.name}: {type(e).__name__}: {e}") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise UpstreamError(f"{self.name}: expected EndpointSlices, got {e!r:.200}") from None

    def _credentials(self) -> tuple[str, ssl.SSLContext | bool]:
        token = Path(self.config.token_file).read_text(encoding="ascii").strip()
        if not self.config.api_url.startswith("https:"):
            return token, True
        tls = upstream_tls(verify=True, ca_file=self.config.ca_file, cert_file="", key_file="")
        return token, tls.context

    def _ready(self, piece: Mapping[str, Any]) -> Iterable[tuple[str, int, str]]:
        """Address, port and name of each endpoint in one slice that is ready."""
        wanted = self.config.port
        ports = [
            port["port"]
            for port in piece.get("ports") or ()
            if wanted in ("", port.get("name"), port["port"])
        ]
        for endpoint in piece.get("endpoints") or ():
            # Not told means ready, says the API.
            is_ready = (endpoint.get("conditions") or {}).get("ready") is not False
            if ports and is_ready and endpoint["addresses"]:
                pod = (endpoint.get("targetRef") or {}).get("name") or ""
                name = self._form.format(pod=pod, namespace=self.config.namespace, port=ports[0])
                yield endpoint["addresses"][0], ports[0], name if pod else ""


def sources(config: DiscoveryConfig | None, session: aiohttp.ClientSession) -> list[Source]:
    """Return the sources of a configuration."""
    if config is None:
        return []
    return [
        *map(FileWatch, config.files),
        *map(DnsLookup, config.dns),
        *(
            EndpointSlices(each, session, form=_form(each, config.kubernetes))
            for each in config.kubernetes
        ),
    ]


def _form(source: KubernetesSource, all_: Iterable[KubernetesSource]) -> str:
    """Return what instances of a source are named, so that none of another one is named so.

    It depends on the configuration alone, never on what is found first: series and learned
    profiles go by the name.
    """
    others = [each for each in all_ if each is not source]
    if any(each.cluster != source.cluster for each in others):
        return ""
    form = "{pod}"
    if any(each.namespace != source.namespace for each in others):
        form += ".{namespace}"
    if any(each.namespace == source.namespace for each in others):
        form += ":{port}"  # any of its services may select the same pods
    return form


def _instances(
    config: DnsSource | KubernetesSource, endpoints: Iterable[tuple[str, int, str]]
) -> list[InstanceConfig]:
    """Return the instances at addresses, ports and names; reads the files of the template.

    Raises:
        ConfigError: One of them cannot be used.
    """
    found = []
    for address, port, name in endpoints:
        host = f"[{address}]" if ":" in address else address
        data = {**config.template, "url": f"{config.scheme}://{host}:{port}"}
        if name:
            data["id"] = name
        found.append(validated(InstanceConfig, data, source=f"discovery: {config.label}"))
    return found


async def _addresses(name: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]
