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
from vllm_workflow.router.discovery_config import (
    DiscoveryConfig,
    DnsSource,
    FileSource,
    KubernetesSource,
)
from vllm_workflow.router.instance_config import InstanceConfig
from vllm_workflow.router.upstreams import Upstreams
from vllm_workflow.yaml_config import read_yaml, validated

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Addresses of a name and port."""
_TIMEOUT = aiohttp.ClientTimeout(total=10, sock_connect=3)
_logger = logging.getLogger(__name__)


class Source(Protocol):
    """Where instances are found."""

    name: str
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
        self._sources = list(sources)
        self._upstreams = upstreams
        self._untaken: dict[str, list[InstanceConfig]] = {}
        """What sources have found and could not be taken in as a whole."""
        self._told: set[tuple[str, str]] = set()
        """Sources and instances of theirs that are there already."""

    async def look(self) -> None:
        """Ask every source once."""
        async with asyncio.TaskGroup() as tasks:
            for source in self._sources:
                tasks.create_task(self._ask(source, ""))

    async def run(self) -> None:
        """Ask until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for source in self._sources:
                tasks.create_task(self._keep_asking(source))

    async def _keep_asking(self, source: Source) -> None:
        problem = ""
        while True:
            await asyncio.sleep(source.every_s)
            problem = await self._ask(source, problem)

    async def _ask(self, source: Source, before: str) -> str:
        """Ask once; returns what went wrong, which is logged unless it was so `before`."""
        try:
            found = await source.find()
            if found is None:
                found = self._untaken.get(source.name)
            if found is not None:
                self._untaken[source.name] = found
                self._take(source.name, found)
                del self._untaken[source.name]
        except (ConfigError, UpstreamError) as e:
            if str(e) != before:
                _logger.error("discovery: %s; its instances stay as they are", e)
            return str(e)
        except Exception as e:  # whatever one source says, the others are asked on
            if repr(e) != before:
                _logger.exception("discovery: %s failed", source.name)
            return repr(e)
        return ""

    def _take(self, source: str, found: Iterable[InstanceConfig]) -> None:
        """Have the upstreams agree with what was found.

        Raises:
            ConfigError: Of an instance that cannot be used now; the others were taken in.
        """
        wanted = {config.id: config for config in found}
        for upstream in list(self._upstreams):
            if upstream.source == source and upstream.config.id not in wanted:
                self._upstreams.drain(upstream.config.id)
        self._told = {each for each in self._told if each[0] != source or each[1] in wanted}
        kept_out = self._upstreams.keep_out(source, wanted)
        problem: ConfigError | None = None
        for config in wanted.values():
            there = self._upstreams.get(config.id)
            if config.id in kept_out:
                continue
            if there is not None and there.source != source and not there.leaving:
                self._tell_once(source, config.id)
            elif there is None or there.leaving or there.config != config:
                try:
                    self._upstreams.add(config, source=source)
                except ConfigError as e:  # a key that is no longer there
                    problem = e
        if problem is not None:
            raise problem

    def _tell_once(self, source: str, instance_id: str) -> None:
        if (source, instance_id) not in self._told:
            self._told.add((source, instance_id))
            _logger.warning("discovery: %s: %r is there already", source, instance_id)


class FileWatch:
    """Reads a file whenever it has changed."""

    def __init__(self, config: FileSource) -> None:
        self.name = f"file {config.path}"
        self.every_s = config.every_s
        self._path = Path(config.path)
        self._seen: tuple[int, int, int] | None = None

    async def find(self) -> list[InstanceConfig] | None:
        return await asyncio.to_thread(self._read)

    def _read(self) -> list[InstanceConfig] | None:
        try:
            stat = self._path.stat()
        except OSError as e:
            raise ConfigError(f"{self._path}: cannot read: {e.strerror}") from None
        signature = stat.st_ino, stat.st_size, stat.st_mtime_ns
        if signature == self._seen:
            return None
        data = read_yaml(self._path)
        if not isinstance(data, list):
            raise ConfigError(f"{self._path}: expected a list of instances, got {data!r:.80}")
        found = [
            validated(InstanceConfig, entry, source=f"{self._path}: {number}")
            for number, entry in enumerate(data)
        ]
        self._seen = signature
        return found


class DnsLookup:
    """Asks for the addresses of a name."""

    def __init__(self, config: DnsSource, resolve: Resolve | None = None) -> None:
        self.name = f"dns {config.name}"
        self.every_s = config.every_s
        self._config = config
        self._resolve = resolve or _addresses

    async def find(self) -> list[InstanceConfig]:
        config = self._config
        try:
            addresses = await self._resolve(config.name, config.port)
        except (OSError, UnicodeError) as e:  # the latter: no name of a host can be such
            raise UpstreamError(f"{self.name}: {e}") from None
        return [_instance(config, address, config.port) for address in sorted(set(addresses))]


class EndpointSlices:
    """Asks a Kubernetes API server for the ready endpoints of a service."""

    def __init__(self, config: KubernetesSource, session: aiohttp.ClientSession) -> None:
        self.name = f"kubernetes {config.namespace}/{config.service}"
        self.every_s = config.every_s
        self._config = config
        self._session = session
        self._url = (
            f"{config.api_url.rstrip('/')}/apis/discovery.k8s.io/v1/namespaces/{config.namespace}"
            "/endpointslices"
        )

    async def find(self) -> list[InstanceConfig]:
        config = self._config
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
            return [
                _instance(config, address, port, name)
                for piece in answer["items"]
                for address, port, name in self._ready(piece)
            ]
        except (OSError, aiohttp.ClientError, TimeoutError) as e:
            raise UpstreamError(f"{self.name}: {type(e).__name__}: {e}") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise UpstreamError(f"{self.name}: expected EndpointSlices, got {e!r:.200}") from None

    def _credentials(self) -> tuple[str, ssl.SSLContext | bool]:
        token = Path(self._config.token_file).read_text(encoding="ascii").strip()
        if not self._config.api_url.startswith("https:"):
            return token, True
        return token, ssl.create_default_context(cafile=self._config.ca_file)

    def _ready(self, piece: Mapping[str, Any]) -> Iterable[tuple[str, int, str]]:
        """Address, port and pod of each endpoint in one slice that is ready."""
        wanted = self._config.port
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
                yield endpoint["addresses"][0], ports[0], pod


def sources(config: DiscoveryConfig, session: aiohttp.ClientSession) -> list[Source]:
    """Return the sources of a configuration."""
    return [
        *map(FileWatch, config.files),
        *map(DnsLookup, config.dns),
        *(EndpointSlices(each, session) for each in config.kubernetes),
    ]


def _instance(
    config: DnsSource | KubernetesSource, address: str, port: int, name: str = ""
) -> InstanceConfig:
    host = f"[{address}]" if ":" in address else address
    data = {**config.template, "url": f"{config.scheme}://{host}:{port}"}
    if name:
        data["id"] = name
    return validated(InstanceConfig, data, source="discovery")


async def _addresses(name: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]
