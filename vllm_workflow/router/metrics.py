"""What the router tells Prometheus, under names in vLLM's style."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.policy_names import name_of
from vllm_workflow.core.tenant_ledger import TenantLedger
from vllm_workflow.core.types import Decision, Outcome
from vllm_workflow.router.decision_log import DecisionLog
from vllm_workflow.router.runs import Run
from vllm_workflow.router.series import Distributions, SeriesCollector, Values
from vllm_workflow.router.store import Store
from vllm_workflow.router.tenants import TenantMetrics

_PREFIX = "vllm_workflow:router_"
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_SLACK = (-300.0, -60.0, -30.0, -10.0, -5.0, -1.0, 0.0, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0)
MAX_LABEL_VALUES = 64
OTHER = "other"


class Capped:
    """Lets the first `MAX_LABEL_VALUES` names of clients be label values, the rest be `other`."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def __call__(self, name: str) -> str:
        if name in self._names:
            return name
        if len(self._names) >= MAX_LABEL_VALUES:
            return OTHER
        self._names.add(name)
        return name


class _StoreCollector(Collector):
    """Counters that the store keeps itself."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        for name, text, value in (
            ("written", "Items written to the store.", self._store.num_written),
            (
                "dropped",
                "Items lost to the store: its queue was full, or its disk failed.",
                self._store.num_dropped,
            ),
        ):
            yield CounterMetricFamily(f"{_PREFIX}store_{name}", text, value)


class _DecisionLogCollector(Collector):
    """A counter that the decision log keeps itself."""

    def __init__(self, log: DecisionLog) -> None:
        self._log = log

    def collect(self) -> Iterator[Metric]:
        text = "Events lost to the decision log: its disk was too slow, or failed."
        yield CounterMetricFamily(f"{_PREFIX}decision_log_dropped", text, self._log.num_dropped)


class _PredictionCollector(Collector):
    """What predictions were made from."""

    def __init__(self, num_predicted: Mapping[tuple[str, str], int]) -> None:
        self._num_predicted = num_predicted

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            f"{_PREFIX}predictions",
            "Calls whose length and remaining run were predicted, by where each came from: prior "
            "(a guess), declared (router.yaml), learned (earlier calls), client (its last call).",
            labels=("length", "rest"),
        )
        for (length, rest), number in sorted(self._num_predicted.items()):
            family.add_metric((length, rest), number)
        yield family


_PER_INSTANCE = ("instance",)
_COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "condemned": (
        "Times that an instance was taken out because it fell silent: hung if the process "
        "did not answer, stuck if its engine gave nothing.",
        ("instance", "reason"),
    ),
    "failovers": (
        "Attempts that failed before the first byte of an answer, by reason.",
        ("instance", "reason"),
    ),
    "broken_answers": (
        "Answers that the instance broke off after their first byte.",
        _PER_INSTANCE,
    ),
    "client_disconnects": ("Calls whose client left.", ()),
    "runs": (
        "Runs with a deadline that ended: met if the last answer was good and in time. A run "
        "ends with the call marked final, else when it is idle too long, and then its last "
        "call counts as its end, whether or not the client was done.",
        ("workflow", "outcome"),
    ),
    "runs_refused": (
        "Runs refused at their first call because they would have begun too late.",
        ("workflow",),
    ),
    "unknown_names": (
        "Fields of calls whose names look like ours and are none, so that they have no effect, by "
        "where they stood: header, metadata or vllm_xargs.",
        ("where", "field"),
    ),
    "policy_swaps": ("Policies taken over while running.", ()),
    "tunings": ("Tunings by verdict: swap, keep or failed.", ("verdict",)),
}
"""Name -> what it counts, and its labels."""
_GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "instance_healthy": ("1 if calls are sent to the instance.", _PER_INSTANCE),
    "policy_info": (
        "1 for the policy that decides now.",
        ("fingerprint", "policy", "dispatch", "ordering"),
    ),
}


def _requests() -> Values:
    return Values(
        "counter",
        f"{_PREFIX}requests",
        "Calls answered, by the HTTP status the client got; 499: the client left. "
        "instance is empty where none was reached.",
        ("instance", "stage", "status"),
    )


def _in_flight() -> Values:
    text = "Calls forwarded and not yet answered."
    return Values("gauge", f"{_PREFIX}requests_in_flight", text, _PER_INSTANCE)


def _seconds(
    name: str, text: str, bounds: tuple[float, ...] = _SECONDS, label: str = "instance"
) -> Distributions:
    return Distributions(f"{_PREFIX}{name}_seconds", text, bounds, label)


class Metrics:
    """The series of one router, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._stage, self._workflow = Capped(), Capped()
        self._counters = {
            name: Counter(_PREFIX + name, text, labels, registry=registry)
            for name, (text, labels) in _COUNTERS.items()
        }
        self._gauges = {
            name: Gauge(_PREFIX + name, text, labels, registry=registry)
            for name, (text, labels) in _GAUGES.items()
        }
        self._requests, self._in_flight = _requests(), _in_flight()
        self._queue_s = _seconds(
            "queue",
            "From the arrival of a call to its forwarding, failed attempts included.",
            label="",
        )
        self._slack_s = _seconds(
            "slack",
            "Predicted seconds to spare when a call with a deadline was dispatched.",
            _SLACK,
            label="",
        )
        self._predicted_s = _seconds(
            "predicted",
            "Predicted duration of calls that ended well, from forwarding to the last byte.",
        )
        self._actual_s = _seconds(
            "actual",
            "Measured duration of calls that ended well, from forwarding to the last byte.",
        )
        of_calls = (self._requests, self._in_flight, self._queue_s, self._slack_s)
        registry.register(SeriesCollector([*of_calls, self._predicted_s, self._actual_s]))
        self._of_instances = [
            *(
                self._counters[name]
                for name, (_, labels) in _COUNTERS.items()
                if "instance" in labels
            ),
            *(self._gauges[name] for name, (_, labels) in _GAUGES.items() if "instance" in labels),
        ]
        self.tenants: TenantMetrics | None = None
        """Set where tenants are told apart, see `follow_tenants`."""
        self._of_tenants: TenantMetrics | None = None
        """Once they were: series cannot be made twice."""

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    def healthy(self, instance_id: str, healthy: bool) -> None:
        self._gauges["instance_healthy"].labels(instance_id).set(healthy)

    def forget(self, instance_id: str) -> None:
        """Drop every series of an instance that has left: where pods come and go, names do too."""
        for series in self._of_instances:
            series.remove_by_labels({"instance": instance_id})
        for values in (self._requests, self._in_flight):
            values.forget("instance", instance_id)
        for distributions in (self._predicted_s, self._actual_s):
            distributions.forget(instance_id)

    def follow_tenants(self, ledger: TenantLedger | None) -> None:
        """Tell tenants apart as a ledger does, or from now on no more.

        Args:
            ledger: As it is now, whether or not it was followed before; None: of no use any more.
        """
        if self._of_tenants is None and ledger is not None:
            self._of_tenants = TenantMetrics(self.registry)
        if self._of_tenants is not None:
            self._of_tenants.follow(ledger)
        self.tenants = None if ledger is None else self._of_tenants

    def policy(self, policy: PolicyConfig) -> None:
        """Show which policy decides from here on."""
        self._gauges["policy_info"].clear()
        self._gauges["policy_info"].labels(
            policy.fingerprint, name_of(policy), policy.dispatch, policy.ordering
        ).set(1)

    def policy_swapped(self) -> None:
        self._counters["policy_swaps"].inc()

    def tuned(self, verdict: str) -> None:
        """Count a tuning that ended: `swap`, `keep` or `failed`."""
        self._counters["tunings"].labels(verdict).inc()

    def run_refused(self, workflow: str) -> None:
        self._counters["runs_refused"].labels(self._workflow(workflow)).inc()

    def count_held(self, num_held: Callable[[], int], num_relegated: Callable[[], int]) -> None:
        """Show how overload is dealt with, asked whenever somebody looks."""
        Gauge(
            f"{_PREFIX}requests_held",
            "First calls of runs that have not begun because they would make runs late.",
            registry=self.registry,
        ).set_function(num_held)
        Gauge(
            f"{_PREFIX}runs_relegated",
            "Runs begun, under the policy that decides now, although they could not be on time.",
            registry=self.registry,
        ).set_function(num_relegated)

    def count_waiting(self, num_waiting: Callable[[], int]) -> None:
        """Show how many calls wait in the router, asked whenever somebody looks."""
        Gauge(
            f"{_PREFIX}requests_waiting",
            "Calls that wait in the router until an instance has room for them or comes back.",
            registry=self.registry,
        ).set_function(num_waiting)

    def count_store(self, store: Store) -> None:
        """Show how the store keeps up, asked whenever somebody looks."""
        self.registry.register(_StoreCollector(store))

    def count_decision_log(self, log: DecisionLog) -> None:
        """Show how the decision log keeps up, asked whenever somebody looks."""
        self.registry.register(_DecisionLogCollector(log))

    def count_predictions(self, num_predicted: Mapping[tuple[str, str], int]) -> None:
        """Show what predictions were made from, looked at whenever somebody asks.

        Args:
            num_predicted: Calls by source of their length and of their remaining run.
        """
        self.registry.register(_PredictionCollector(num_predicted))

    def dispatched(self, decision: Decision, queue_s: float) -> None:
        self._in_flight.add((decision.chosen.instance_id,), 1)
        self._queue_s.of("").observe(queue_s)
        if math.isfinite(decision.slack_s):
            self._slack_s.of("").observe(decision.slack_s)

    def settled(self, decision: Decision, outcome: Outcome) -> None:
        instance_id = outcome.instance_id
        self._in_flight.add((instance_id,), -1)
        if outcome.ok:
            self._predicted_s.of(instance_id).observe(decision.chosen.finish_s)
            self._actual_s.of(instance_id).observe(outcome.e2el_s)

    def condemned(self, instance_id: str, reason: str) -> None:
        self._counters["condemned"].labels(instance_id, reason).inc()

    def failed_over(self, instance_id: str, reason: str) -> None:
        self._counters["failovers"].labels(instance_id, reason).inc()

    def answered(self, instance_id: str, stage: str, status: int) -> None:
        self._requests.add((instance_id, self._stage(stage), str(status)), 1)

    def broken(self, instance_id: str) -> None:
        self._counters["broken_answers"].labels(instance_id).inc()

    def unknown_name(self, where: str, name: str) -> None:
        """Count a field that was probably meant for us; there may be only so many names."""
        self._counters["unknown_names"].labels(where, name).inc()

    def client_left(self) -> None:
        self._counters["client_disconnects"].inc()

    def run_ended(self, run: Run) -> None:
        if self.tenants is not None:
            self.tenants.run_ended(run)
        if math.isfinite(run.deadline):
            outcome = "met" if run.met else "missed"
            self._counters["runs"].labels(self._workflow(run.workflow), outcome).inc()
