"""What a router is made of, put together from its configuration."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import aiohttp

from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.fleet import Fleet
from vllm_workflow.router.auth import Access, KeyCheck
from vllm_workflow.router.binder import Binder
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.discovery import Discovery, sources
from vllm_workflow.router.keeper import Keeper
from vllm_workflow.router.kv_events import KvEvents
from vllm_workflow.router.limits import Bodies
from vllm_workflow.router.metrics import Metrics
from vllm_workflow.router.names import Names
from vllm_workflow.router.proxy import Proxy
from vllm_workflow.router.records import Records
from vllm_workflow.router.tuner import Tuner
from vllm_workflow.router.tuning import PolicySwitch
from vllm_workflow.router.upstreams import Upstreams

_EXPIRE_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Parts:
    """The same objects from start to stop, whatever a reload changes in them."""

    records: Records
    dispatcher: Dispatcher
    binder: Binder
    metrics: Metrics
    upstreams: Upstreams
    discovery: Discovery
    session: aiohttp.ClientSession
    """For whatever is not a call."""
    access: Access
    operator: KeyCheck | None
    """Knows the operators' key; None if there is none."""
    bodies: Bodies
    proxy: Proxy
    switch: PolicySwitch
    tuner: Tuner
    kv_events: KvEvents
    keeper: Keeper | None
    """If there is a store."""

    async def begin(self) -> None:
        """Find and probe the instances, and take up what an earlier router has learned."""
        await self.discovery.look()
        if self.keeper:
            self.keeper.restore()
        await self.upstreams.probe_all()

    def watchers(self) -> list[Coroutine[Any, Any, None]]:
        """Return what is to run beside calls."""
        watchers = [
            self.upstreams.run(),
            self.discovery.run(),
            self.tuner.run(),
            self.kv_events.run(),
            self._expire_runs(),
        ]
        return watchers + [each.run() for each in (self.records.log, self.keeper) if each]

    async def _expire_runs(self) -> None:
        """End idle runs now and then until cancelled."""
        while True:
            await asyncio.sleep(_EXPIRE_EVERY_S)
            self.proxy.runs.expire(time.monotonic())


def build(
    config: RouterConfig, records: Records, session: aiohttp.ClientSession, names: Names
) -> Parts:
    """Put a router together.

    Args:
        config: Checked.
        records: Told of everything.
        session: Asks instances how they are.
        names: Where they are.
    """
    dispatcher = Dispatcher(
        Fleet(),
        config.policy_config(),
        [workflow.build() for workflow in config.workflows],
        record=records.record,
        tenants=config.tenants_config(),
    )
    binder = Binder(dispatcher, records.board.waits if records.board else None)
    metrics = _metrics(dispatcher, binder, records)
    upstreams = Upstreams(
        config.instances,
        dispatcher,
        session,
        metrics,
        binder.instances_changed,
        reads_load=config.read_load,
        names=names,
    )
    kv_events = KvEvents(dispatcher, upstreams, metrics.registry)
    access = Access(config.auth)
    bodies = Bodies(config.max_body_mb, config.limits)
    proxy = Proxy(
        dispatcher,
        binder,
        upstreams,
        metrics,
        access=access,
        bodies=bodies,
        max_wait_s=config.max_wait_s,
        set_priority=config.set_priority,
        log_prompts=config.log_prompts,
        tracing=records.tracing,
        kv_events=kv_events,
        board=records.board,
    )
    switch = PolicySwitch(dispatcher, binder, metrics)
    return Parts(
        records=records,
        dispatcher=dispatcher,
        binder=binder,
        metrics=metrics,
        upstreams=upstreams,
        discovery=Discovery(sources(config.discovery, session), upstreams),
        session=session,
        access=access,
        operator=KeyCheck(config.admin.hashed) if config.admin else None,
        bodies=bodies,
        proxy=proxy,
        switch=switch,
        tuner=Tuner(config, switch, records.store),
        kv_events=kv_events,
        keeper=Keeper(dispatcher, records.store) if records.store else None,
    )


def _metrics(dispatcher: Dispatcher, binder: Binder, records: Records) -> Metrics:
    metrics = Metrics()
    metrics.follow_tenants(dispatcher.tenants)
    if records.store:
        metrics.count_store(records.store)
    if records.log:
        metrics.count_decision_log(records.log)
    metrics.count_held(
        lambda: dispatcher.waiting.num_held, lambda: dispatcher.waiting.num_relegated
    )
    metrics.count_waiting(lambda: len(dispatcher.waiting) + binder.num_stranded)
    metrics.count_predictions(dispatcher.predictor.num_predicted)
    return metrics
