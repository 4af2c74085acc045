"""Takes over a changed `router.yaml` while calls run."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.router.auth import Access
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.limits import Bodies
from vllm_workflow.router.protocol import Listener
from vllm_workflow.router.proxy import Proxy
from vllm_workflow.router.upstreams import Upstreams

RELOADED = frozenset({"instances", "auth", "limits", "max_body_mb", "log_prompts"})
"""Fields whose change takes effect; a change of any other one wants a restart."""
_logger = logging.getLogger(__name__)


class Reloader:
    """Reads the configuration anew, and changes what it says all at once or not at all.

    Args:
        config: As in force.
        read: Reads and checks the file; None if there is none.
        access: Gets the keys.
        bodies: Gets the limits.
        proxy: Is told whether to log prompts.
        upstreams: Gets the instances.
        tls: Reads its certificate again; None without TLS.
    """

    def __init__(
        self,
        config: RouterConfig,
        read: Callable[[], RouterConfig] | None,
        *,
        access: Access,
        bodies: Bodies,
        proxy: Proxy,
        upstreams: Upstreams,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._config = config
        self._read = read
        self._access = access
        self._bodies = bodies
        self._proxy = proxy
        self._upstreams = upstreams
        self._tls = tls
        self._lock = asyncio.Lock()
        self.listeners: list[Listener] = []
        """Get the limits of connections."""

    async def __call__(self) -> list[str]:
        """Read and take over; returns the names of the fields that changed.

        Calls under way go on as they began. Instances that are no longer there leave when
        their calls have ended. Certificates are read again whether or not their names changed.

        Raises:
            ConfigError: There is no file, it cannot be used, or it changes what needs a
                restart. Nothing has changed then.
        """
        async with self._lock:
            if self._read is None:
                raise ConfigError("reload: the router was started without a file (--config)")
            config = await asyncio.to_thread(self._read)
            changed = self._changes(config)
            self._take(config)
            _logger.info("configuration read again; changed: %s", ", ".join(changed) or "nothing")
            return changed

    def _changes(self, config: RouterConfig) -> list[str]:
        old = self._config
        names = [n for n in type(old).model_fields if getattr(config, n) != getattr(old, n)]
        if fixed := [name for name in names if name not in RELOADED]:
            raise ConfigError(
                f"{', '.join(fixed)}: changed, which needs a restart of the router; "
                "nothing was changed"
            )
        return names

    def _take(self, config: RouterConfig) -> None:
        if self._tls is not None and config.tls is not None:
            config.tls.load(self._tls)
        self._access.replace(config.auth)
        self._bodies.replace(config.max_body_mb, config.limits)
        for listener in self.listeners:
            listener.limits = config.limits
        self._proxy.log_prompts = config.log_prompts
        wanted = {instance.id: instance for instance in config.instances}
        for upstream in list(self._upstreams):
            if not upstream.source and upstream.config.id not in wanted:
                self._upstreams.drain(upstream.config.id)
        for instance in wanted.values():
            there = self._upstreams.get(instance.id)
            if there is None or there.leaving or there.config != instance or instance.has_files:
                self._upstreams.add(instance)
        self._config = config
