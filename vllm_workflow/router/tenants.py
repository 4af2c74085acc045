"""Tenants at the router's edges: what they get told at their quotas, and their metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from vllm_workflow.core.errors import QuotaExceededError
from vllm_workflow.core.tenant_ledger import TenantLedger
from vllm_workflow.core.types import Outcome
from vllm_workflow.router.errors import RequestError
from vllm_workflow.router.runs import Run

MAX_UNNAMED = 64
OTHER = "other"
_PREFIX = "vllm_workflow:router_tenant_"
_SECONDS = (0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


def quota_error(error: QuotaExceededError) -> RequestError:
    """Return the answer to a call that its tenant's quota rules out: 429 in OpenAI's form.

    OpenAI's clients try again after `Retry-After`, and not at all if told so: a call that is
    larger than the quota will be next time too.
    """
    if error.retry_after_s is None:
        headers = {"x-should-retry": "false"}
    else:
        headers = {"Retry-After": str(math.ceil(error.retry_after_s))}
    return RequestError(str(error), status=429, code="rate_limit_exceeded", headers=headers)


class TenantMetrics:
    """Series per tenant: those of `router.yaml`, and of others so many as come first.

    Args:
        registry: That of the router.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.ledger: TenantLedger | None = None
        """Asked for what waits and what is in flight whenever somebody looks."""
        self._labels: set[str] = set()
        self._num_unnamed_left = MAX_UNNAMED
        self._runs = Counter(
            f"{_PREFIX}runs",
            "Runs with a deadline that ended, as in vllm_workflow:router_runs, by tenant.",
            ("tenant", "outcome"),
            registry=registry,
        )
        self._tokens = Counter(
            f"{_PREFIX}tokens",
            "Tokens of prompts and answers, as counted by the instances.",
            ("tenant", "kind"),
            registry=registry,
        )
        self._delays = Histogram(
            f"{_PREFIX}quota_delay_seconds",
            "How long a quota (calls, runs, tokens) held a call back that was next of its "
            "tenant, for calls that were sent.",
            ("tenant", "quota"),
            registry=registry,
            buckets=_SECONDS,
        )
        self._refusals = Counter(
            f"{_PREFIX}refusals",
            "Calls answered with 429: too large for the quota, or due before it allows them.",
            ("tenant",),
            registry=registry,
        )
        registry.register(_Occupancy(self))

    def follow(self, ledger: TenantLedger | None) -> None:
        """Show a ledger from now on; its tenants have labels of their own.

        Args:
            ledger: None if nobody asks any more whose a call is.
        """
        self.ledger = ledger
        if ledger is not None:
            self._labels.update(tenant.name for tenant in ledger.config.named)
            ledger.on_delay = self._delayed

    def label(self, tenant_id: str) -> str:
        """Return the label's value for a tenant."""
        if tenant_id in self._labels:
            return tenant_id
        if self._num_unnamed_left == 0:
            return OTHER
        self._num_unnamed_left -= 1
        self._labels.add(tenant_id)
        return tenant_id

    def run_ended(self, run: Run) -> None:
        if math.isfinite(run.deadline):
            outcome = "met" if run.met else "missed"
            self._runs.labels(self.label(run.tenant_id), outcome).inc()

    def used(self, tenant_id: str, outcome: Outcome) -> None:
        label = self.label(tenant_id)
        self._tokens.labels(label, "prompt").inc(outcome.num_prompt_tokens or 0)
        self._tokens.labels(label, "output").inc(outcome.num_output_tokens or 0)

    def refused(self, tenant_id: str) -> None:
        self._refusals.labels(self.label(tenant_id)).inc()

    def _delayed(self, tenant_id: str, quota: str, delay_s: float) -> None:
        self._delays.labels(self.label(tenant_id), quota).observe(delay_s)


class _Occupancy(Collector):
    """Calls that wait and calls in flight, as the ledger has them at the time."""

    def __init__(self, metrics: TenantMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[GaugeMetricFamily]:
        counts: dict[str, list[int]] = {}
        for tenant_id, account in self._metrics.ledger or ():
            count = counts.setdefault(self._metrics.label(tenant_id), [0, 0])
            count[0] += account.num_waiting
            count[1] += account.num_in_flight
        for index, (name, text) in enumerate(
            (
                ("requests_waiting", "Calls that wait in the router."),
                ("requests_in_flight", "Calls forwarded and not yet answered."),
            )
        ):
            family = GaugeMetricFamily(f"{_PREFIX}{name}", text, labels=["tenant"])
            for label, count in counts.items():
                family.add_metric([label], count[index])
            yield family
