"""The instances of a dispatcher: whatever is heard of them, and what a replay must know of that."""

from __future__ import annotations

from dataclasses import asdict

from vllm_workflow.core.events import (
    Added,
    Cleared,
    Evicted,
    Marked,
    Record,
    Removed,
    Reported,
    Restored,
)
from vllm_workflow.core.fleet import Fleet, Instance
from vllm_workflow.core.predictor import Predictor


class Instances:
    """Changes a fleet, and records each change.

    Args:
        fleet: The ledger.
        predictor: Told when what it computed for the fleet is out of date.
        record: Called with every change; None if nobody wants to know.
    """

    def __init__(self, fleet: Fleet, predictor: Predictor, record: Record | None) -> None:
        self.fleet = fleet
        self.predictor = predictor
        self._record = record

    def add(self, instance: Instance) -> None:
        """Add or replace an instance; a new one counts as healthy."""
        self.fleet.add(instance)
        self.predictor.fleet_changed()
        if self._record is not None:
            self._record(Added(instance=instance))

    def remove(self, instance_id: str) -> None:
        """Send no more calls to an instance, and forget it when those in flight have ended."""
        self.fleet.remove(instance_id)
        self.predictor.fleet_changed()
        if self._record is not None:
            self._record(Removed(instance_id=instance_id))

    def mark(self, instance_id: str, *, healthy: bool) -> None:
        """Note whether calls may be sent to an instance; one that was removed gets none."""
        if instance_id in self.fleet and self.fleet.is_healthy(instance_id) != healthy:
            self.fleet.mark(instance_id, healthy=healthy)
            self.predictor.fleet_changed()
            if self._record is not None:
                self._record(Marked(instance_id=instance_id, healthy=healthy))

    def report(self, instance_id: str, *, num_others: int, kv_share: float) -> None:
        """Note what an instance tells of others' calls; see `Fleet.report`."""
        self.fleet.report(instance_id, num_others=num_others, kv_share=kv_share)
        if self._record is not None:
            self._record(
                Reported(instance_id=instance_id, num_others=num_others, kv_share=kv_share)
            )

    def evict(self, instance_id: str, chain_hashes: tuple[int, ...]) -> None:
        """Note pieces of prompts that an instance caches no more; see `KvLedger.forget`."""
        if self.fleet.evict(instance_id, chain_hashes) and self._record is not None:
            self._record(Evicted(instance_id=instance_id, chain_hashes=chain_hashes))

    def clear(self, instance_id: str) -> None:
        """Note that an instance's prefix cache is empty."""
        if self.fleet.evict(instance_id, None) and self._record is not None:
            self._record(Cleared(instance_id=instance_id))

    def restore_speed(
        self, instance_id: str, *, latency: str, drift: float, num_observed: int, hit_share: float
    ) -> None:
        """Begin with what was learned of an instance earlier; see `Fleet.restore_speed`."""
        restored = Restored(
            instance_id=instance_id,
            latency=latency,
            drift=drift,
            num_observed=num_observed,
            hit_share=hit_share,
        )
        if self.fleet.restore_speed(**asdict(restored)):
            self.predictor.fleet_changed()
            if self._record is not None:
                self._record(restored)
