"""The instances as HTTP servers: where they are, whether they live, what they serve."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import aiohttp

from vllm_workflow.core.account import Instance
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.router.instance_config import InstanceConfig, Server
from vllm_workflow.router.metrics import Metrics
from vllm_workflow.router.names import Names
from vllm_workflow.router.reports import Others, read_report
from vllm_workflow.router.upstream import POSTED, Upstream, is_moving, read_body
from vllm_workflow.router.watch import WatchClock, watch

PROBE_EVERY_S = 1.0
PROBE_SICK_EVERY_S = 0.5
"""An instance that is out; it is to be back soon after it is ready."""
PROBE_TIMEOUT_S = 5.0
"""One that is stopped answers the same probe when it goes on; new ones would only pile up."""
_PROBE_CONNECT_TIMEOUT_S = 2.5
"""A host that is away does not answer at all, and is asked anew; one lost packet costs 1 s."""
REPORT_EVERY = 2
"""Probes between two looks at how busy an instance is."""
MODELS_EVERY = 15
"""Probes between two looks at `/v1/models`, which adapters may change."""
_logger = logging.getLogger(__name__)


class Upstreams:
    """Watches every instance and tells the dispatcher which may be sent calls.

    An instance counts as dead at once when it refuses a connection or says that it is ill, as
    hung when it and its calls are silent, see `watch`, and as alive with the first good probe.
    How it answers calls does not matter: a client with bad requests, or a full queue, must
    not take an instance away from everybody else.
    """

    def __init__(
        self,
        configs: Iterable[InstanceConfig],
        dispatcher: Dispatcher,
        session: aiohttp.ClientSession,
        metrics: Metrics,
        changed: Callable[[], None],
        *,
        reads_load: bool = True,
        names: Names | None = None,
    ) -> None:
        self._names = Names() if names is None else names
        self._dispatcher = dispatcher
        self._changed = changed
        self._reads_load = reads_load
        self._session = session
        self._metrics = metrics
        self._clock = WatchClock()
        self._upstreams: dict[str, Upstream] = {}
        self._drained: dict[str, tuple[str, Server]] = {}
        """Instances that operators have drained: who had found each, and its server."""
        self._watchers: asyncio.TaskGroup | None = None
        for config in configs:
            self.add(config)

    def add(self, config: InstanceConfig, *, source: str = "") -> None:
        """Take in an instance, or take one that is there for what `config` says now.

        It is sent calls from its next good probe on; those under way on it go on. One that was
        leaving stays.
        """
        upstream = self._upstreams.get(config.id)
        moved = upstream is None or upstream.leaving or upstream.url != config.url
        if upstream is None:
            upstream = self._upstreams[config.id] = Upstream(config, self._clock, self._names)
        else:
            upstream.reconfigure(config)
        upstream.leaving = False
        upstream.source, upstream.is_disowned = source, False
        overruled = self._drained.pop(config.id, None)
        upstream.overrules = overruled[0] if overruled and source == POSTED else None
        if moved:
            upstream.num_moves += 1
            upstream.num_kv_tokens = None
            upstream.others = Others()  # as the fleet forgets them
        self._dispatcher.add(self._built(upstream))
        if moved:
            self._dispatcher.mark(config.id, healthy=False)
            self._metrics.healthy(config.id, False)
            if self._watchers is not None and upstream.watcher is None:
                upstream.watcher = self._watchers.create_task(self._watch(upstream))
        upstream.num_probes_to_models = 0
        if self._watchers is not None:
            upstream.probe_now.set()
            self._changed()

    def drain(self, instance_id: str) -> None:
        """Send no more calls to an instance, and forget it when those under way have ended.

        Raises:
            KeyError: There is none of that name.
        """
        upstream = self._upstreams[instance_id]
        if upstream.leaving:
            return
        upstream.leaving = True
        self._dispatcher.remove(instance_id)
        _logger.info("instance %s is leaving", instance_id)
        upstream.probe_now.set()
        self._changed()

    def disown(self, source: str, but: Container[str] = ()) -> None:
        """Let the instances that a source had found belong to nobody, until another one adds them.

        Args:
            source: That is gone; empty: what was configured.
            but: Those of them that stay as they are.
        """
        for upstream in self:
            if upstream.source == source and upstream.config.id not in but:
                upstream.is_disowned = True

    def drain_disowned(self) -> None:
        """Drain what still belongs to nobody."""
        for upstream in list(self):
            if upstream.is_disowned:
                self.drain(upstream.config.id)

    def drain_for_good(self, instance_id: str) -> None:
        """Drain an instance, and have no source bring it back, see `keep_out`.

        Raises:
            KeyError: There is none of that name.
        """
        upstream = self._upstreams[instance_id]
        source = upstream.overrules if upstream.source == POSTED else upstream.source
        self.drain(instance_id)
        if source is not None:
            self._drained[instance_id] = source, upstream.config.server

    def keep_out(self, source: str, found: Mapping[str, InstanceConfig]) -> set[str]:
        """Return which instances a source may not bring: operators have drained them.

        Nor may it bring their servers under other names. That ends when the source that had found
        one names it no more, and when an operator adds it.
        """
        self._drained = {
            i: (of, server)
            for i, (of, server) in self._drained.items()
            if of != source or i in found
        }
        servers = {server for _, server in self._drained.values()}
        return {i for i, config in found.items() if i in self._drained or config.server in servers}

    def wishes(self, instance_id: str) -> bool:
        """Whether an operator has drained or added an instance, and nobody has undone it."""
        upstream = self._upstreams.get(instance_id)
        return instance_id in self._drained or (upstream is not None and upstream.is_posted)

    def twin(self, config: InstanceConfig) -> str | None:
        """Return another instance that stays and is the same server; None if there is none."""
        for upstream in self:
            if (
                upstream.stays
                and upstream.config.id != config.id
                and upstream.config.server == config.server
            ):
                return upstream.config.id
        return None

    def _forget(self, upstream: Upstream) -> None:
        del self._upstreams[upstream.config.id]
        upstream.close()
        self._metrics.forget(upstream.config.id)
        _logger.info("instance %s is gone", upstream.config.id)

    def num_in_flight(self, instance_id: str) -> int:
        """Calls under way on an instance."""
        return self._dispatcher.fleet.num_outstanding(instance_id)

    def __getitem__(self, instance_id: str) -> Upstream:
        return self._upstreams[instance_id]

    def get(self, instance_id: str) -> Upstream | None:
        return self._upstreams.get(instance_id)

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self._upstreams

    def __iter__(self) -> Iterator[Upstream]:
        return iter(self._upstreams.values())

    def is_healthy(self, upstream: Upstream) -> bool:
        return self._dispatcher.fleet.is_healthy(upstream.config.id)

    def generation(self, instance_id: str) -> int:
        """How often an instance has come back."""
        upstream = self._upstreams.get(instance_id)
        return upstream.generation if upstream else -1

    def refused(self, instance_id: str) -> None:
        """Note that a connection for a call could not be made."""
        upstream = self._upstreams[instance_id]
        self._mark(upstream, False, "connection refused")
        self.suspect(instance_id)

    def suspect(self, instance_id: str) -> None:
        """Have an instance looked at now: a call failed on it in a way that may mean more."""
        upstream = self._upstreams[instance_id]
        upstream.num_probes_to_models = 0  # it may have been restarted with another one
        upstream.probe_now.set()

    def close(self) -> None:
        """End the connections that are kept for calls."""
        for upstream in self:
            upstream.close()

    async def probe_all(self) -> None:
        """Probe each instance once."""
        async with asyncio.TaskGroup() as tasks:
            for upstream in self:
                tasks.create_task(self._look(upstream))

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as self._watchers:
            for upstream in self:
                upstream.watcher = self._watchers.create_task(self._watch(upstream))
            self._watchers.create_task(
                watch(
                    self._clock,
                    lambda: [(u.config.id, u.silence) for u in self],
                    self._dispatcher.fleet,
                    probe=lambda instance_id: self._upstreams[instance_id].probe_now.set(),
                    condemn=self._condemn,
                )
            )

    def _condemn(self, instance_id: str, reason: str) -> None:
        upstream = self._upstreams[instance_id]
        upstream.is_stuck |= reason == "stuck"
        if not upstream.leaving and self.is_healthy(upstream):
            self._metrics.condemned(instance_id, reason)
        self._mark(upstream, False, reason)
        upstream.silence.abandon(begun=reason == "stuck" or upstream.silence.is_lost)

    async def _watch(self, upstream: Upstream) -> None:
        while True:
            is_sick = not upstream.leaving and not self.is_healthy(upstream)
            pause_s = PROBE_SICK_EVERY_S if is_sick else PROBE_EVERY_S
            try:
                async with asyncio.timeout(pause_s):
                    await upstream.probe_now.wait()
            except TimeoutError:
                pass
            upstream.probe_now.clear()
            if upstream.leaving and not self.num_in_flight(upstream.config.id):
                self._forget(upstream)
                return
            await self._look(upstream)

    async def _look(self, upstream: Upstream) -> None:
        """Probe once. Whatever one instance brings about, the others are watched on."""
        try:
            await self._probe(upstream)
        except Exception:
            upstream.silence.probe_failed()
            _logger.exception("instance %s could not be probed", upstream.config.id)

    async def _probe(self, upstream: Upstream) -> None:
        healthy, reason, is_silent = False, "no answer to /health", False
        num_moves, silence = upstream.num_moves, upstream.silence
        silence.probe_sent()
        try:
            async with self._get(upstream, "/health") as response:
                silence.probe_ended(answered=True)
                healthy, reason = response.status == 200, f"/health answered {response.status}"
        except TimeoutError:
            is_silent = silence.probe_ended(answered=False)
        except (aiohttp.ClientError, OSError) as e:
            silence.probe_failed()
            reason = str(e) or type(e).__name__
        if upstream.num_moves != num_moves:
            return
        if healthy and upstream.is_stuck:
            healthy = await is_moving(self._session, upstream)
        if healthy:
            if not upstream.leaving and not self.is_healthy(upstream):
                upstream.num_probes_to_models = 0
            await self._refresh_models(upstream)
            if upstream.refuses_key:
                healthy, reason = False, "it refuses the router's key (api_key_env, api_key_file)"
        if upstream.num_moves != num_moves:
            return
        self._mark(upstream, healthy, reason)
        if is_silent:
            upstream.silence.abandon(begun=True)
        if not healthy or not self._reads_load:
            return
        if self._watchers is None:
            await self._ask_load(upstream)
        elif upstream.asking is None or upstream.asking.done():
            # Beside the probes, which must go on if this is not answered.
            upstream.asking = self._watchers.create_task(self._ask_load(upstream))

    async def _refresh_models(self, upstream: Upstream) -> None:
        """Ask what the instance serves, before it counts as healthy and now and then later."""
        if upstream.num_probes_to_models > 0:
            upstream.num_probes_to_models -= 1
            return
        upstream.num_probes_to_models = MODELS_EVERY
        num_moves, refuses_key = upstream.num_moves, upstream.refuses_key
        try:
            async with self._get(upstream, "/v1/models") as response:
                refuses_key = bool(upstream.own_headers) and response.status in {401, 403}
                cards = (
                    json.loads(await read_body(response))["data"] if response.status == 200 else []
                )
            cards = [card for card in cards if isinstance(card["id"], str)]
        except (aiohttp.ClientError, OSError, TimeoutError):
            cards = []
        except (ValueError, KeyError, TypeError, RecursionError):  # no JSON, or not this one
            cards = []
        if upstream.num_moves != num_moves:
            return
        upstream.refuses_key = refuses_key
        if cards and cards != upstream.cards:
            upstream.cards = cards
            if not upstream.leaving:
                self._dispatcher.add(self._built(upstream))
                self._changed()
        elif not (cards or upstream.model_cards() or upstream.refuses_key):
            _logger.warning(
                "instance %s does not tell what it serves; it is sent calls for any model "
                "(`models` in its configuration says which)",
                upstream.config.id,
            )

    async def _ask_load(self, upstream: Upstream) -> None:
        """Ask now and then for calls that others have sent; an answer that is none means none."""
        try:
            await self._ask_load_now(upstream)
        except Exception:
            _logger.exception("instance %s could not be asked for its load", upstream.config.id)

    async def _ask_load_now(self, upstream: Upstream) -> None:
        if upstream.leaving:
            return
        upstream.num_probes_to_report -= 1
        if upstream.num_probes_to_report > 0:
            return
        upstream.num_probes_to_report = REPORT_EVERY
        instance_id, fleet = upstream.config.id, self._dispatcher.fleet
        num_before, num_moves = self.num_in_flight(instance_id), upstream.num_moves
        try:
            async with self._get(upstream, "/metrics") as response:
                report = read_report(await read_body(response)) if response.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            report = None
        if upstream.leaving or instance_id not in fleet or upstream.num_moves != num_moves:
            return
        if not self._reads_load:
            return
        if report is None:
            changed = upstream.others.forget()
        else:
            self._take_size(upstream, report.num_kv_tokens)
            changed = upstream.others.take(
                report,
                num_own_calls=max(num_before, self.num_in_flight(instance_id)),
                own_kv_share=fleet.kv_used(instance_id) or 0.0,
            )
        if changed:
            self._report(upstream)
            self._changed()

    def read_load(self, reads_load: bool) -> None:
        """Ask instances for calls that others have sent, or forget what they have told."""
        self._reads_load = reads_load
        if not reads_load:
            for upstream in self:
                if upstream.others.forget() and upstream.config.id in self._dispatcher.fleet:
                    self._report(upstream)
            self._changed()

    def _report(self, upstream: Upstream) -> None:
        others = upstream.others
        self._dispatcher.report(
            upstream.config.id, num_others=others.num_calls, kv_share=others.kv_share
        )

    def _take_size(self, upstream: Upstream, num_kv_tokens: int | None) -> None:
        """Believe what an instance says of its KV cache, unless the configuration says."""
        if num_kv_tokens is None or num_kv_tokens == upstream.num_kv_tokens:
            return
        upstream.num_kv_tokens = num_kv_tokens
        if upstream.config.num_kv_tokens is None:
            self._dispatcher.add(self._built(upstream))
            self._changed()

    def _built(self, upstream: Upstream) -> Instance:
        """Return the core's value, with what the instance has told of itself."""
        built = upstream.config.build([card["id"] for card in upstream.cards])
        if upstream.config.num_kv_tokens is None and upstream.num_kv_tokens is not None:
            built = replace(built, num_kv_tokens=upstream.num_kv_tokens)
        return built

    def _get(self, upstream: Upstream, path: str) -> Any:
        timeout = aiohttp.ClientTimeout(
            total=PROBE_TIMEOUT_S, sock_connect=_PROBE_CONNECT_TIMEOUT_S
        )
        # The session leaves bodies as they come, for clients; these are read here.
        headers = {**upstream.own_headers, "Accept-Encoding": "identity"}
        return self._session.get(
            upstream.url + path, timeout=timeout, headers=headers, ssl=upstream.ssl
        )

    def _mark(self, upstream: Upstream, healthy: bool, reason: str) -> None:
        if upstream.leaving or self.is_healthy(upstream) == healthy:
            return
        upstream.generation += healthy
        self._dispatcher.mark(upstream.config.id, healthy=healthy)
        upstream.others = Others()  # as the fleet forgets them
        self._metrics.healthy(upstream.config.id, healthy)
        self._changed()
        if healthy:
            _logger.info("instance %s is healthy", upstream.config.id)
        else:
            _logger.warning("instance %s is not healthy: %s", upstream.config.id, reason)
