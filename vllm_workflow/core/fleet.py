"""What the router knows of its instances: the ledger of the work in flight.

Owned by a single event loop (or a single simulation). Methods are synchronous, so no lock
is needed and no decision can interleave with another.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, Final

from vllm_workflow.core.account import Account, Instance, Need, Reserved, max_stretch
from vllm_workflow.core.holders import Holders
from vllm_workflow.core.latency import shared_out
from vllm_workflow.core.rooms import Rooms
from vllm_workflow.core.types import Candidate, StageRequest

_INF: Final = math.inf

__all__ = ["Fleet", "Instance", "max_stretch"]

LARGE_FLEET: Final = 16
"""Instances of a fleet up to which every decision looks at all of them."""


class Fleet:
    """Predicts candidates and keeps account of the calls in flight."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._leaving: set[str] = set()
        """Those of them that were removed, but for the calls in flight there."""
        self._rooms = Rooms()
        self._holders = Holders()
        """Of a large fleet."""
        self._capacities: list[tuple[tuple[str, ...], float]] = []
        """(models, KV tokens), each once."""
        self.version = 0
        """Grows with whatever may have made room for a further call."""
        self._listed: list[Account] | None = None
        """All accounts, until the instances change."""
        self._need: Need | None = None
        """Of the call that was looked at last, until the instances change."""

    def add(self, instance: Instance) -> None:
        """Add or replace an instance; calls in flight on it stay counted."""
        self.version += 1
        instance = self._sharing_latency(instance)
        account = self._accounts.get(instance.instance_id)
        if account is None:
            account = self._accounts[instance.instance_id] = Account(instance)
            self._listed = None
        else:
            account.replace(instance)
        self._leaving.discard(instance.instance_id)
        self._rooms.note(account)
        self._note_capacities()

    def remove(self, instance_id: str) -> None:
        """Take an instance out: it gets no more calls, those in flight on it stay counted.

        It comes back with `add`, and is forgotten by `forget` when its last call has ended.
        """
        account = self._accounts[instance_id]
        account.healthy = False
        self._leaving.add(instance_id)
        self.version += 1
        self._rooms.note(account)
        self._note_capacities()
        self.forget(instance_id)

    def forget(self, instance_id: str) -> None:
        """Drop an instance that was removed and has no call in flight; else do nothing."""
        if instance_id in self._leaving and not self._accounts[instance_id].reserved:
            self._leaving.discard(instance_id)
            del self._accounts[instance_id]
            self._listed = None

    def __contains__(self, instance_id: object) -> bool:
        """Whether an instance is there and was not removed."""
        return instance_id in self._accounts and instance_id not in self._leaving

    def _note_capacities(self) -> None:
        each = [a for i, a in self._accounts.items() if i not in self._leaving]
        self._need = None
        self._capacities = list(dict.fromkeys([(a.instance.models, a.kv.num_tokens) for a in each]))

    def _sharing_latency(self, instance: Instance) -> Instance:
        """Equal latency models become one object, so that each is asked once per call."""
        for other in self._accounts.values():
            if other.instance.latency == instance.latency:
                return replace(instance, latency=other.instance.latency)
        return instance

    def mark(self, instance_id: str, *, healthy: bool) -> None:
        """Note whether calls may be sent to an instance that was not removed."""
        account = self._accounts[instance_id]
        if healthy and not account.healthy:
            account.kv.clear()  # it may have been restarted
        account.num_others, account.kv.num_other_tokens = 0, 0.0
        account.healthy = healthy
        self.version += 1
        self._rooms.note(account)

    def report(self, instance_id: str, *, num_others: int, kv_share: float) -> None:
        """Note what an instance tells of calls that this ledger has not sent; until the next one.

        Args:
            instance_id: Which; one that was forgotten is ignored.
            num_others: Such calls, running and waiting.
            kv_share: Of its KV cache that they hold; nothing where its size is unknown.
        """
        account = self._accounts.get(instance_id)
        if account is None:
            return
        account.num_others = num_others
        num_tokens = account.kv.num_tokens
        account.kv.num_other_tokens = kv_share * num_tokens if num_tokens < _INF else 0.0
        self.version += 1
        self._rooms.note(account)

    def evict(self, instance_id: str, chain_hashes: Iterable[int] | None) -> int:
        """Believe an instance that it caches some pieces of prompts no more; None: none at all.

        Returns:
            How many of them were believed to be there.
        """
        account = self._accounts.get(instance_id)
        if account is None:
            return 0
        if chain_hashes is not None:
            return account.kv.forget(chain_hashes)
        num_before = len(account.kv)
        account.kv.clear()
        return num_before - len(account.kv)

    def is_healthy(self, instance_id: str) -> bool:
        account = self._accounts.get(instance_id)
        return account is not None and account.healthy

    def instance(self, instance_id: str) -> Instance:
        """Return an instance as configured."""
        return self._accounts[instance_id].instance

    def __iter__(self) -> Iterator[Instance]:
        return iter([a.instance for i, a in self._accounts.items() if i not in self._leaving])

    def serves(self, model: str) -> bool:
        """Whether any instance, healthy or not, serves `model`."""
        for instance_id, account in self._accounts.items():
            if account.instance.serves(model) and instance_id not in self._leaving:
                return True
        return False

    def candidates(
        self,
        request: StageRequest,
        *,
        now: float = 0.0,
        exclude: Collection[str] = (),
        shortlist: bool = False,
    ) -> tuple[Candidate, ...]:
        """Predict `request` on every healthy instance that serves its model and can hold it.

        Args:
            request: The call.
            now: Instant.
            exclude: Instances that are left out.
            shortlist: Of more than `LARGE_FLEET` instances, predict it on some of those that can
                start it, spread over the fleet, and on those that got its prompt's head last.
        """
        need = self._need_of(request)
        accounts: Iterable[Account] = self._accounts.values()
        if shortlist and self.is_large:
            accounts = self._shortlist(need, exclude)
        return tuple([a.predict(need, now) for a in accounts if a.is_eligible(need, exclude)])

    def _need_of(self, request: StageRequest) -> Need:
        """What a call asks of any instance; several questions in turn are about the same one."""
        need = self._need
        if need is None or need.request is not request:
            need = self._need = Need(request, self._num_at_most(request))
        return need

    def renamed(self, request: StageRequest, service_s: float) -> StageRequest:
        """Return a call with another `service_s`, which nothing here depends on."""
        made = request.with_service(service_s)
        if self._need is not None and self._need.request is request:
            self._need.request = made
        return made

    @property
    def is_large(self) -> bool:
        """Whether decisions look at a part of it."""
        return len(self._accounts) > LARGE_FLEET

    def mean_alone_s(self, request: StageRequest, exclude: Collection[str] = ()) -> float | None:
        """Service of a call alone on an instance, `shared_out` over some spread over the fleet.

        None if no healthy instance outside `exclude` serves its model and can hold it.
        """
        need, everyone = self._need_of(request), self._everyone()
        each = [a.alone_s(need) for a in _spread(everyone) if a.is_eligible(need, exclude)]
        if not each:
            each = [a.alone_s(need) for a in everyone if a.is_eligible(need, exclude)]
        return shared_out(each) if each else None

    def _everyone(self) -> list[Account]:
        if self._listed is None:
            self._listed = list(self._accounts.values())
        return self._listed

    def _shortlist(self, need: Need, exclude: Collection[str]) -> Iterable[Account]:
        """Instances of a large fleet to look at: all that can start a call, if they are few."""

        def able(accounts: Iterable[Account]) -> list[Account]:
            return [a for a in accounts if a.can_start(need) and a.is_eligible(need, exclude)]

        groups = self._rooms.at_least(need.num_own_tokens)
        fitting = [account for group in groups for account in group.values()]
        found = able(_spread(fitting)) or able(fitting)[:LARGE_FLEET]
        if not found:
            everyone = self._everyone()
            found = [a for a in _spread(everyone) if a.is_eligible(need, exclude)]
            return found or everyone
        chosen = {account.instance.instance_id: account for account in found}
        for segment in need.request.prefix:
            instance_id = self._holders.last(segment)
            account = self._accounts.get(instance_id)
            if account is not None and account.has_room and account.can_start(need):
                chosen[instance_id] = account
        return chosen.values()

    def has_room(self, model: str = "", exclude: Collection[str] = ()) -> bool:
        """Whether a healthy instance of a model can start a further call, if it is a small one."""
        if not model and not exclude:
            return len(self._rooms) > 0
        for group in self._rooms.at_least(0.0):
            for account in group.values():
                if account.instance.serves(model) and account.instance.instance_id not in exclude:
                    return True
        return False

    def serves_now(self, model: str, exclude: Collection[str] = ()) -> bool:
        """Whether any healthy instance outside `exclude` serves `model`."""
        return any(
            account.healthy
            and account.instance.instance_id not in exclude
            and account.instance.serves(model)
            for account in self._accounts.values()
        )

    def can_start(self, request: StageRequest, exclude: Collection[str] = ()) -> bool:
        """Whether any healthy instance has a seat and KV blocks for `request` now."""
        need = self._need_of(request)
        for group in self._rooms.at_least(need.num_own_tokens):
            for account in group.values():
                if account.can_start(need) and account.is_eligible(need, exclude):
                    return True
        return False

    def own_wait_s(self, request: StageRequest, candidate: Candidate, now: float) -> float:
        """Seconds until a call can start on an instance if nobody else's calls end there.

        `inf` if it then never can: nobody knows when others' calls end.
        """
        account = self._accounts[candidate.instance_id]
        if not account.num_others or candidate.queue_s <= 0.0:
            return candidate.queue_s
        return account.own_wait_s(self._need_of(request), now)

    def _num_at_most(self, request: StageRequest) -> int:
        """Tokens that an instance must be able to hold; 0 if none can hold what is guessed.

        A prompt's tokens are guessed from its bytes, which may be an image: then it is for an
        engine to refuse the call.
        """
        num_tokens, model = request.num_tokens_at_most, request.model
        for models, num_kv_tokens in self._capacities:
            if num_tokens <= num_kv_tokens and (not models or not model or model in models):
                return num_tokens
        return 0

    def bears(self, candidate: Candidate, *, margin: float) -> bool:
        """Whether the calls on an instance can bear one more without being made late by it.

        Args:
            candidate: With its `stretch`.
            margin: Kept in reserve, as a share of what is predicted: prompts of later calls
                and wrong guesses of lengths come on top.
        """
        reserved = self._accounts[candidate.instance_id].reserved.values()
        limit = min((r.max_stretch for r in reserved), default=_INF)
        return candidate.stretch * (1.0 + margin) <= limit

    def observe_cached(self, instance_id: str, *, predicted: int, actual: int) -> None:
        """Learn how far an instance's prefix cache holds what it is believed to hold.

        Args:
            instance_id: Where a call ran.
            predicted: `num_cached_tokens` of its candidate; 0 says nothing.
            actual: As the engine counted.
        """
        self._accounts[instance_id].observe_cached(predicted, actual)

    @property
    def num_instances(self) -> int:
        return len(self._accounts)

    def mean_service_s(self, model: str, num_prompt_tokens: int, num_output_tokens: float) -> float:
        """Service of one such call on an idle instance, `shared_out` over those that serve `model`.

        Unhealthy ones count only if all are, so that a prediction does not jump to 0.
        """
        serving = [a for a in self._accounts.values() if a.instance.serves(model)]
        serving = [a for a in serving if a.healthy] or serving
        each = [a.instance.latency.alone_s(num_prompt_tokens, num_output_tokens) for a in serving]
        return shared_out(each) if each else 0.0

    def reserve(
        self,
        request_id: str,
        candidate: Candidate,
        *,
        now: float = 0.0,
        request: StageRequest | None = None,
    ) -> None:
        """Count a call against its instance until `release`.

        Args:
            request_id: Of the call.
            candidate: The instance, and the prediction that led to it.
            now: Instant at which it is sent.
            request: Says what it takes of the KV cache; None: nothing.

        Raises:
            ValueError: The request is already reserved there.
        """
        account = self._accounts[candidate.instance_id]
        if request_id in account.reserved:
            raise ValueError(
                f"request {request_id!r} is already reserved on instance {candidate.instance_id!r}"
            )
        num_tokens = 0.0
        if request is not None:
            num_own = self._need_of(request).num_own_tokens
            num_tokens = account.kv.admit(request_id, request.prefix, num_own)
            if self.is_large:
                self._holders.note(request.prefix, candidate.instance_id)
        account.reserved[request_id] = Reserved(
            candidate.service_s,
            now,
            now + candidate.finish_s,
            num_tokens,
            _INF if request is None else max_stretch(request, candidate, now),
        )
        account.outstanding_s += candidate.service_s
        self._rooms.note(account)

    def release(self, request_id: str, instance_id: str, *, ran: bool = True) -> None:
        """Stop counting a call, however it ended. Safe to call twice.

        Args:
            request_id: Of the call.
            instance_id: Where it was reserved.
            ran: Its prompt was computed, so the instance now holds it.
        """
        account = self._accounts[instance_id]
        reserved = account.reserved.pop(request_id, None)
        if reserved is not None:
            self.version += 1
            account.kv.release(request_id, keep=ran)
            left_s = account.outstanding_s - reserved.service_s
            account.outstanding_s = max(0.0, left_s) if account.reserved else 0.0
            self._rooms.note(account)

    def observe(self, instance_id: str, *, predicted_s: float, actual_s: float) -> None:
        """Correct an instance's speed by one finished call.

        Args:
            instance_id: Where it ran.
            predicted_s: From dispatch to end, for the tokens it turned out to have: a wrong
                guess of a length says nothing about speed.
            actual_s: The same as measured; `nan` is ignored.
        """
        self._accounts[instance_id].observe(predicted_s, actual_s)

    def speeds(self) -> dict[str, dict[str, Any]]:
        """Return what was learned of each instance, as plain values that `restore_speed` takes."""
        return {instance_id: each.speed() for instance_id, each in self._accounts.items()}

    def restore_speed(
        self, instance_id: str, *, latency: str, drift: float, num_observed: int, hit_share: float
    ) -> bool:
        """Begin with what an earlier process had learned; returns whether it fits.

        Args:
            instance_id: Of whom; one that is not there is ignored.
            latency: Fingerprint of the latency model that `drift` corrects: of another one it
                says nothing.
            drift: As `drift` returns.
            num_observed: Calls that it was learned from.
            hit_share: As `observe_cached` learns.

        Raises:
            ValueError: A number that cannot be.
        """
        account = self._accounts.get(instance_id)
        if account is None:
            return False
        if not account.restore_speed(latency, drift, num_observed, hit_share):
            return False
        self.version += 1
        return True

    def drift(self, instance_id: str) -> float:
        """Actual over predicted service of the latest calls; 1 is as predicted."""
        return self._accounts[instance_id].drift

    def num_outstanding(self, instance_id: str | None = None) -> int:
        """Calls in flight on one instance, or on all."""
        if instance_id is not None:
            account = self._accounts.get(instance_id)
            return 0 if account is None else len(account.reserved)
        return sum(len(a.reserved) for a in self._accounts.values())

    def is_idle(self, model: str) -> bool:
        """Whether no call is in flight on any instance that serves a model."""
        for account in self._accounts.values():
            if account.reserved and account.instance.serves(model):
                return False
        return True

    def kv_used(self, instance_id: str) -> float | None:
        """Share of an instance's KV cache that its calls hold; None where its size is unknown."""
        kv = self._accounts[instance_id].kv
        return kv.num_used_tokens / kv.num_tokens if math.isfinite(kv.num_tokens) else None

    def outstanding_s(self, instance_id: str) -> float:
        """Predicted service of the calls in flight on an instance, summed."""
        return self._accounts[instance_id].outstanding_s


def _spread(accounts: list[Account]) -> list[Account]:
    """At most `LARGE_FLEET` of them, evenly spread."""
    step = -(-len(accounts) // LARGE_FLEET) or 1
    return list(islice(accounts, 0, None, step))
