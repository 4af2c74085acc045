"""Where the dispatcher's events go: the decision log, the store, and what tenants have used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from vllm_workflow.core.call_events import Settled, Submitted, Withdrawn
from vllm_workflow.core.events import Event, Record
from vllm_workflow.router.store import Retention, Store
from vllm_workflow.yaml_config import Strict


class StoreConfig(Strict):
    """The `store` of `router.yaml`: what outlives the router."""

    path: Annotated[str, Field(min_length=1)]
    """SQLite database; made if it is not there."""
    retention_days: Annotated[float, Field(gt=0, le=3650)] = 14.0
    """Older events, tunings and usage are removed."""
    max_events: Annotated[int, Field(ge=0, le=10**9)] = 1_000_000
    """Of the decision log; the oldest go first. 0 keeps none."""

    @property
    def retention(self) -> Retention:
        return Retention(days=self.retention_days, max_events=self.max_events)


class Usage:
    """Counts what tenants use, from the events of a dispatcher."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tenants: dict[str, str] = {}
        """Of the calls that have not ended."""

    def record(self, event: Event) -> None:
        """Take an event; a call counts when it has ended well."""
        match event:
            case Submitted(request=request):
                self._tenants[request.request_id] = request.tenant_id
            case Withdrawn(request_id=request_id):
                self._tenants.pop(request_id, None)
            case Settled(outcome=outcome):
                tenant = self._tenants.pop(outcome.request_id, None)
                if tenant is not None and outcome.ok:
                    self._store.used(
                        tenant,
                        prompt_tokens=outcome.num_prompt_tokens or 0,
                        output_tokens=outcome.num_output_tokens or 0,
                        service_s=outcome.e2el_s,
                    )


def recorder(
    others: Sequence[Record], store: Store | None, config: StoreConfig | None
) -> Record | None:
    """Return what hands an event to all who want it; None if nobody does."""
    wanted = list(others)
    if store is not None and config is not None:
        wanted.append(Usage(store).record)
        if config.max_events:
            wanted.append(store.record)
    if len(wanted) < 2:
        return wanted[0] if wanted else None

    def record(event: Event) -> None:
        for each in wanted:
            each(event)

    return record
