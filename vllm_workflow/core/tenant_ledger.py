"""What each tenant has had of the fleet: virtual time, quotas, runs under way.

Virtual time is start-time fair queueing (Goyal et al. 1996) with service in seconds as its unit,
as VTC (arXiv 2401.00588) has tokens: a tenant's grows by work / weight when a call of it is sent,
as predicted, and is corrected when the call has ended. No clock: `now` comes in, and nothing
depends on how often it was asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from vllm_workflow.core.errors import QuotaExceededError
from vllm_workflow.core.tenant_account import (
    ROUNDING,
    RUN_IDLE_S,
    RunInFlight,
    TenantAccount,
    num_tokens,
    run_key,
)
from vllm_workflow.core.tenants import TenantConfig, TenantsConfig
from vllm_workflow.core.types import Outcome, StageRequest

GUEST_RATIO: Final = 2.0
"""Work that a tenant wants, waiting and in flight, over what the others want, per weight, from
which on it is taken to flood the fleet."""
STAY_GUEST_RATIO: Final = 1.5
"""The same for one whose calls wait: once held back it is so until the flood has passed."""
GUEST_MARGIN: Final = 0.5
"""What others on an instance must have to spare for a call of such a tenant to join them, as a
share of what they are predicted to need: later calls come on top, and wrong predictions."""
MAX_TENANTS: Final = 1000
"""Accounts beyond which a tenant that is not named gets none of its own: a client may make up
names, and each costs memory and time."""
SHARED_TENANT: Final = ""
"""Whose account such tenants share: that of the calls that name none."""

OnDelay = Callable[[str, str, float], None]
"""Called with tenant, quota and the seconds that it held a call back."""


@dataclass(frozen=True, slots=True)
class _Sent:
    tenant_id: str
    run_id: str
    work_s: float
    """Predicted service, see `shared_out`."""
    tokens: float
    time: float


class Shares(NamedTuple):
    """Sums over all active tenants."""

    least: float
    """Virtual time of the one that has had least."""
    weight: float
    demand_s: float


class TenantLedger:
    """Keeps account of tenants, from their first call until it no longer matters.

    Args:
        config: All tenants.
    """

    def __init__(self, config: TenantsConfig) -> None:
        self.config = config
        self.on_delay: OnDelay | None = None
        self._configs = {tenant.name: tenant for tenant in config.named}
        self._accounts: dict[str, TenantAccount] = {}
        self._active: dict[str, TenantAccount] = {}
        self._shares: Shares | None = None
        """None after a change of any active account."""
        self._sent: dict[str, _Sent] = {}
        self._waiting: dict[str, float] = {}
        self._in_flight_s = 0.0
        self._held: dict[str, tuple[str, float]] = {}
        self._now = -math.inf
        """Latest instant heard of."""

    def __len__(self) -> int:
        """Tenants whose past still matters."""
        return len(self._accounts)

    def __iter__(self) -> Iterator[tuple[str, TenantAccount]]:
        return iter(self._accounts.items())

    def billed(self, tenant_id: str) -> str:
        """Return whose account a tenant's next call goes to, its own if there is room for it."""
        if (
            len(self._accounts) < MAX_TENANTS
            or tenant_id in self._accounts
            or tenant_id in self._configs
        ):
            return tenant_id
        return SHARED_TENANT

    def config_of(self, tenant_id: str) -> TenantConfig:
        """Return what goes for a tenant."""
        return self._configs.get(tenant_id, self.config.default)

    def account(self, tenant_id: str) -> TenantAccount:
        """Return a tenant's account; a new one begins level with the tenant furthest behind."""
        account = self._accounts.get(tenant_id)
        if account is None:
            account = self._accounts[tenant_id] = TenantAccount(self.config_of(tenant_id))
        return account

    def virtual_time(self, tenant_id: str) -> float:
        """Seconds of service per weight; only differences between tenants mean anything."""
        account = self._accounts.get(tenant_id)
        return 0.0 if account is None else account.virtual_time

    def change(self, config: TenantsConfig, now: float) -> None:
        """Go by another configuration from now on; what tenants have had and used stays.

        Args:
            config: All tenants.
            now: Instant.
        """
        self._now = max(self._now, now)
        self.config = config
        self._configs = {tenant.name: tenant for tenant in config.named}
        for tenant_id, account in self._accounts.items():
            account.spend(0.0, now)  # by the old rate up to here
            followed = account.config.max_concurrent_runs is not None
            account.config = self.config_of(tenant_id)
            if account.config.max_concurrent_runs is None:
                account.runs.clear()
            elif not followed:
                self._follow_runs(tenant_id, account)
        self._forget_idle()

    def _follow_runs(self, tenant_id: str, account: TenantAccount) -> None:
        """Count the runs of a tenant that have a call in flight."""
        for sent in self._sent.values():
            if sent.tenant_id == tenant_id:
                run = account.runs.setdefault(sent.run_id, RunInFlight())
                run.num_in_flight += 1

    def take_over(
        self,
        sent: Iterable[tuple[StageRequest, float, float]],
        waiting: Iterable[tuple[StageRequest, float]],
    ) -> None:
        """Begin while calls are under way; they are charged as if they had come just now.

        Args:
            sent: Calls in flight, each with its work, see `began`, and when it was sent.
            waiting: Calls that wait, each with its work.
        """
        for request, work_s, time in sent:
            self.began(request, work_s, time)
        for request, work_s in waiting:
            self.entered(request, work_s)

    # Quotas.

    def require(self, request: StageRequest, now: float) -> None:
        """Check that waiting can bring a call within its tenant's tokens before its deadline.

        Raises:
            QuotaExceededError: It cannot.
        """
        config = self.config_of(request.tenant_id)
        rate, burst = config.token_rate, config.token_burst
        if rate is None:
            return
        whose = f"tenant {request.tenant_id!r}"
        if request.num_prompt_tokens > burst:
            raise QuotaExceededError(
                f"{whose}: a prompt of about {request.num_prompt_tokens} tokens is more than its "
                f"{burst:.0f} at once"
            )
        account = self._accounts.get(request.tenant_id)
        if account is None:
            return
        missing = account.missing_tokens(now) + account.waiting_tokens
        wait_s = (missing + min(num_tokens(request), burst) - burst) / rate
        if wait_s > 0.0 and now + wait_s > request.deadline:
            raise QuotaExceededError(
                f"{whose}: used its {config.tokens_per_minute:.0f} tokens per minute, and this "
                f"call's deadline is before there are more",
                retry_after_s=wait_s,
            )

    def hold(self, request: StageRequest, quota: str, now: float) -> None:
        """Note that a quota keeps a call from being sent."""
        if self.on_delay is not None:
            self._held.setdefault(request.request_id, (quota, now))

    # Calls come and go.

    def entered(self, request: StageRequest, work_s: float) -> None:
        """Note that a call waits.

        Args:
            request: The call.
            work_s: See `began`.
        """
        account = self._activate(request.tenant_id)
        self._waiting[request.request_id] = work_s
        account.demand_s += work_s
        if not account.num_waiting:
            most = max([a.virtual_time for a in self._active.values()], default=-math.inf)
            floor = most - self.config.credit * self._unit_s()
            account.virtual_time = max(account.virtual_time, floor)
        account.num_waiting += 1
        account.waiting_tokens += num_tokens(request)
        self._changed(request.tenant_id, account)

    def left(self, request: StageRequest) -> None:
        """Note that a call no longer waits; of one that is sent, `began` comes first, so that
        its tenant does not look idle in between."""
        account = self._accounts[request.tenant_id]
        account.num_waiting -= 1
        account.demand_s -= self._waiting.pop(request.request_id)
        self._shares = None
        account.waiting_tokens -= num_tokens(request)
        if not account.num_waiting:
            account.waiting_tokens = 0.0
        self._held.pop(request.request_id, None)
        self._forget(request.tenant_id)

    def began(self, request: StageRequest, work_s: float, now: float) -> None:
        """Charge a call that is sent; `ended` must follow.

        Args:
            request: The call.
            work_s: Its predicted service alone, `shared_out` over the instances that it could
                run on: it costs a tenant the same wherever and beside whatever it runs.
            now: Instant.
        """
        self._now = max(self._now, now)
        account = self._activate(request.tenant_id)
        run_id = run_key(request)
        sent = _Sent(request.tenant_id, run_id, work_s, num_tokens(request), now)
        self._sent[request.request_id] = sent
        account.num_in_flight += 1
        account.demand_s += work_s
        account.virtual_time += work_s / account.config.weight
        self._in_flight_s += work_s
        self._changed(request.tenant_id, account)
        if account.config.max_concurrent_runs is not None:
            run = account.runs.setdefault(run_id, RunInFlight())
            run.num_in_flight += 1
            run.over_at = math.inf
            account.end_idle_runs(now)
        if account.config.token_rate is not None:
            account.spend(sent.tokens, now)
        held = self._held.pop(request.request_id, None)
        if held is not None and self.on_delay is not None:
            self.on_delay(request.tenant_id, held[0], now - held[1])

    def ended(self, request: StageRequest, outcome: Outcome, work_ratio: float) -> None:
        """Correct what a call was charged by what it turned out to be.

        A call that failed keeps the work that was predicted: whoever leaves early has still
        kept others waiting. Its tokens are given back unless an answer had begun.

        Args:
            request: The call.
            outcome: How it ended.
            work_ratio: Actual over predicted service; used if it ended well.
        """
        sent = self._sent.pop(request.request_id, None)
        if sent is None:
            return
        account = self._accounts[sent.tenant_id]
        account.num_in_flight -= 1
        account.demand_s -= sent.work_s
        self._shares = None
        self._in_flight_s = max(0.0, self._in_flight_s - sent.work_s) if self._sent else 0.0
        if outcome.ok and math.isfinite(work_ratio):
            account.virtual_time += sent.work_s * (work_ratio - 1.0) / account.config.weight
        end_time = sent.time if math.isnan(outcome.e2el_s) else sent.time + outcome.e2el_s
        self._now = max(self._now, end_time)
        run = account.runs.get(sent.run_id)
        if run is not None:
            run.num_in_flight -= 1
            run.is_final |= not request.workflow_id or (request.final and outcome.ok)
            if run.num_in_flight <= 0:
                run.over_at = end_time + RUN_IDLE_S
                if run.is_final:
                    del account.runs[sent.run_id]
        if account.config.token_rate is not None:
            account.spend(_actual_tokens(outcome, sent.tokens) - sent.tokens, end_time)
        self._forget(sent.tenant_id)

    def work_s(self, request_id: str) -> float:
        """Predicted service of a call that waits."""
        return self._waiting[request_id]

    # Shares.

    @property
    def lag_s(self) -> float:
        """Virtual time that a tenant may be ahead of another one that waits."""
        return self.config.lag * self._unit_s()

    def is_guest(self, tenant_id: str, shares: Shares | None = None) -> bool:
        """Whether a tenant has had more than another active one, and wants far more than others.

        What it gets then is what the others leave: it may not make their runs late. Without
        the second condition, being ahead is chance.

        Args:
            tenant_id: The tenant.
            shares: Those to compare it with; by default those of now.
        """
        account = self._accounts.get(tenant_id)
        if account is None or not account.is_active:
            return False
        shares = shares or self.shares()
        if account.virtual_time <= shares.least:
            return False
        own = account.config.weight
        ratio = STAY_GUEST_RATIO if account.num_waiting else GUEST_RATIO
        others_s = ratio * (shares.demand_s - account.demand_s) * own
        # A tie is none, however the sums were rounded.
        return account.demand_s * (shares.weight - own) > others_s * (1.0 + ROUNDING)

    def shares(self) -> Shares:
        """Return what the active tenants have had and want now."""
        if self._shares is None:
            active = self._active.values()
            self._shares = Shares(
                min([a.virtual_time for a in active], default=math.inf),
                sum(a.config.weight for a in active),
                sum(a.demand_s for a in active),
            )
        return self._shares

    def _unit_s(self) -> float:
        """The work in flight per weight: it grows with the fleet, and so do its fluctuations."""
        weight = self.shares().weight
        return self._in_flight_s / weight if weight else 0.0

    def _changed(self, tenant_id: str, account: TenantAccount) -> None:
        self._active[tenant_id] = account
        self._shares = None

    def _activate(self, tenant_id: str) -> TenantAccount:
        """Nobody saves up service by being idle."""
        account = self.account(tenant_id)
        if not account.is_active:
            least = min([a.virtual_time for a in self._active.values()], default=-math.inf)
            account.virtual_time = max(account.virtual_time, least)
        return account

    def _forget(self, tenant_id: str) -> None:
        """Note that a tenant may be idle now, see `_forget_idle`."""
        account = self._accounts[tenant_id]
        if account.is_active:
            return
        account.demand_s = 0.0  # but for rounding
        self._active.pop(tenant_id, None)
        self._forget_idle()

    def _forget_idle(self) -> None:
        """Drop idle accounts that a new one would be equal to."""
        self._shares = None
        least = min([a.virtual_time for a in self._active.values()], default=math.inf)
        for name, account in list(self._accounts.items()):
            if account.is_active or account.virtual_time > least:
                continue
            if least == math.inf:
                account.virtual_time = 0.0
            account.end_idle_runs(self._now)
            if not account.missing_tokens(self._now) and not account.runs:
                del self._accounts[name]


def _actual_tokens(outcome: Outcome, predicted: float) -> float:
    if outcome.num_prompt_tokens is not None and outcome.num_output_tokens is not None:
        return outcome.num_prompt_tokens + outcome.num_output_tokens
    return predicted if outcome.ok or not math.isnan(outcome.ttft_s) else 0.0
