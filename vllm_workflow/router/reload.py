"""Takes over a changed `router.yaml` while calls run."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.tenants import TenantsConfig
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.discovery import Source, sources
from vllm_workflow.router.instance_config import InstanceConfig
from vllm_workflow.router.listener import Listener
from vllm_workflow.router.logs import configure
from vllm_workflow.router.parts import Parts
from vllm_workflow.router.tls import RenewableTls

_logger = logging.getLogger(__name__)


class RestartNeededError(ConfigError):
    """A file that could be used, but not without a restart.

    Args:
        fields: Paths to those that changed.
    """

    def __init__(self, fields: Sequence[str]) -> None:
        super().__init__(
            f"{', '.join(fields)}: changed, which needs a restart of the router; "
            "nothing was changed"
        )
        self.fields = tuple(fields)


@dataclass(frozen=True, slots=True)
class _Plan:
    """All that a reload changes; nothing of it can fail any more."""

    config: RouterConfig
    policy: PolicyConfig
    tenants: TenantsConfig | None
    changed: frozenset[str]
    """Names of fields."""
    sources: list[Source]
    found: dict[str, list[InstanceConfig]]
    """By source."""
    tls: ssl.SSLContext | None
    """What clients' connections are taken with from now on; None: as before."""
    distrusts: bool
    """Whether clients that were let in before may no longer be."""


class Reloader:
    """Reads the configuration anew, and changes what it says all at once or not at all.

    Args:
        config: As in force.
        read: Reads and checks the file; None if there is none.
        parts: Of the router.
        tls: What clients' connections are taken with; None: in plain text.
    """

    def __init__(
        self,
        config: RouterConfig,
        read: Callable[[], RouterConfig] | None,
        parts: Parts,
        tls: RenewableTls | None,
    ) -> None:
        self._config = config
        self._policy = parts.switch.current
        """As the file says, whatever a tuner has made of it since."""
        self._read = read
        self._parts = parts
        self._tls = tls
        self._lock = asyncio.Lock()
        self._reloading: set[asyncio.Task[list[str]]] = set()
        self._is_over = False
        self.listeners: list[Listener] = []
        """Get the limits of connections."""

    @property
    def config(self) -> RouterConfig:
        """As in force."""
        return self._config

    async def __call__(self) -> list[str]:
        """Read and take over; returns the names of the fields that changed.

        Calls under way go on as they began. Instances that are no longer there leave when
        their calls have ended. Files that the configuration names are read again, too. It is
        brought to its end even if whoever asked for it goes away.

        Raises:
            ConfigError: There is no file, it cannot be used, or the router stops. Nothing has
                changed then.
            RestartNeededError: It changes what cannot change. Nothing has changed then.
        """
        if self._is_over:
            raise ConfigError("reload: the router is stopping")
        reloading = asyncio.create_task(self._reload())
        self._reloading.add(reloading)
        reloading.add_done_callback(self._reloading.discard)
        return await asyncio.shield(reloading)

    async def end(self) -> None:
        """Give up a reload under way, and take over nothing from now on.

        To be called before what a reload starts tasks in has ended.
        """
        self._is_over = True
        reloading = tuple(self._reloading)
        for task in reloading:
            task.cancel()
        await asyncio.gather(*reloading, return_exceptions=True)

    async def _reload(self) -> list[str]:
        if self._read is None:
            raise ConfigError("reload: the router was started without a file (--config)")
        async with self._lock:
            plan = await self._planned(self._read)
            self._take(plan)
        changed = sorted(plan.changed)
        _logger.info("configuration read again; changed: %s", ", ".join(changed) or "nothing")
        return changed

    async def _planned(self, read: Callable[[], RouterConfig]) -> _Plan:
        """Read, check, and make ready all that may fail or take long."""

        def checked() -> tuple[RouterConfig, PolicyConfig, TenantsConfig | None]:
            config = read()
            return config, config.policy_config(), config.tenants_config()

        config, policy, tenants = await asyncio.to_thread(checked)
        old = self._config
        if fixed := needing_restart(old, config):
            raise RestartNeededError(fixed)
        changed = {n for n in type(old).model_fields if getattr(config, n) != getattr(old, n)}
        if policy != self._policy:
            changed.add("policy")
        wanted = sources(config.discovery, self._parts.session)
        found = await self._parts.discovery.found_by(wanted)
        tls, distrusts = None, False
        if config.tls is not None and old.tls is not None and "tls" in changed:
            tls = await asyncio.to_thread(config.tls.context)
            distrusts = not config.tls.trusts_as(old.tls)
        self._check_servers(config)  # nothing may come between this and the change
        return _Plan(config, policy, tenants, frozenset(changed), wanted, found, tls, distrusts)

    def _check_servers(self, config: RouterConfig) -> None:
        """Have no server twice, where the other one is an operator's.

        Raises:
            ConfigError: It would be.
        """
        upstreams = self._parts.upstreams
        replaced = {i.id for i in config.instances if not self._is_overruled(i)}
        posted = {
            u.config.server: u.config.id
            for u in upstreams
            if u.is_posted and u.config.id not in replaced
        }
        for instance in config.instances:
            twin = posted.get(instance.server, instance.id)
            if twin != instance.id and not self._is_overruled(instance):
                raise ConfigError(
                    f"instances: {instance.url}, {instance.id!r} here, was added by an operator as "
                    f"{twin!r}; drain that first"
                )

    def _is_overruled(self, instance: InstanceConfig) -> bool:
        """Whether an operator has drained or replaced what the file says as it did before."""
        before = {each.id: each for each in self._config.instances}.get(instance.id)
        return (
            before is not None
            and before.model_dump() == instance.model_dump()
            and self._parts.upstreams.wishes(instance.id)
        )

    def _take(self, plan: _Plan) -> None:
        config, changed, parts = plan.config, plan.changed, self._parts
        self._take_access(plan)
        parts.proxy.max_wait_s = config.max_wait_s
        parts.proxy.set_priority = config.set_priority
        parts.proxy.log_prompts = config.log_prompts
        self._take_decisions(plan)
        self._take_instances(plan)
        if changed & {"tuner", "workflows"}:
            parts.tuner.configure(config)
        if parts.records.store and config.store:
            parts.records.store.retention = config.store.retention
        if changed & {"log_level", "log_format", "log_calls"}:
            configure(config.log_level, config.log_format, log_calls=config.log_calls)
        self._config, self._policy = config, plan.policy

    def _take_access(self, plan: _Plan) -> None:
        """Change who is let in, and how much of the router each may take."""
        config, parts = plan.config, self._parts
        if self._tls is not None and plan.tls is not None:
            self._tls.current = plan.tls
        parts.access.replace(config.auth)
        if parts.operator and config.admin:
            parts.operator.key = config.admin.hashed
        parts.bodies.replace(config.max_body_mb, config.limits)
        for listener in self.listeners:
            listener.limits = config.limits
            listener.grace_s = config.shutdown_grace_s
            listener.num_trusts += plan.distrusts

    def _take_decisions(self, plan: _Plan) -> None:
        """Change what decides, between two decisions."""
        changed, parts = plan.changed, self._parts
        if "tenants" in changed:
            parts.dispatcher.apportion(plan.tenants, now=time.monotonic())
            parts.metrics.follow_tenants(parts.dispatcher.tenants)
        if "workflows" in changed:
            parts.dispatcher.declare(workflow.build() for workflow in plan.config.workflows)
        if plan.policy != self._policy:
            parts.switch.swap(plan.policy)
        parts.binder.poll()

    def _take_instances(self, plan: _Plan) -> None:
        """Change who may be sent calls; one that only changes hands is sent calls throughout.

        What an operator has drained or added stays as it is until its entry changes.
        """
        upstreams = self._parts.upstreams
        if "read_load" in plan.changed:
            upstreams.read_load(plan.config.read_load)
        wanted = {instance.id: instance for instance in plan.config.instances}
        upstreams.disown("", but=wanted)
        overruled = {i for i, instance in wanted.items() if self._is_overruled(instance)}
        upstreams.keep_out("", wanted)
        for instance in wanted.values():
            if instance.id in overruled:
                continue
            there = upstreams.get(instance.id)
            if there is None or there.leaving or there.source or there.config != instance:
                upstreams.add(instance)
        self._parts.discovery.replace(plan.sources, plan.found)
        upstreams.drain_disowned()


def needing_restart(old: RouterConfig, new: RouterConfig) -> list[str]:
    """Return the paths of the fields that differ and cannot be changed in a router that runs."""
    names = ("host", "port", "decision_log", "dashboard", "tracing")
    paths = [name for name in names if getattr(old, name) != getattr(new, name)]
    for section, fields in (("tls", ()), ("admin", ("host", "port")), ("store", ("path",))):
        before, after = getattr(old, section), getattr(new, section)
        if (before is None) != (after is None):
            paths.append(section)
        elif before is not None:
            paths += [
                f"{section}.{field}"
                for field in fields
                if getattr(before, field) != getattr(after, field)
            ]
    if old.store and new.store and bool(old.store.max_events) != bool(new.store.max_events):
        paths.append("store.max_events")
    return paths
