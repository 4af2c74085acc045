"""What was learned of workflows, as a value that survives the process and one to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.histogram import Histogram
from vllm_workflow.core.lengths import Lengths, StageLengths
from vllm_workflow.core.remaining import RemainingTime
from vllm_workflow.core.transitions import END, Flow, Transitions

VERSION: Final = 1
_SHARES: Final = (0.5, 0.95)


class Learned:
    """Everything that is learned per tenant, workflow and stage."""

    __slots__ = ("lengths", "remaining", "transitions")

    def __init__(self) -> None:
        self.lengths = Lengths()
        self.transitions = Transitions()
        self.remaining = RemainingTime(self.transitions.learn)

    def to_mapping(self) -> dict[str, Any]:
        """Return all of it as plain values; runs under way are left out."""
        return {
            "version": VERSION,
            "tokens_per_byte": self.lengths.tokens_per_byte(),
            "lengths": [[*key, stage.to_mapping()] for key, stage in self.lengths.items()],
            "rests": self.remaining.to_rows(),
            "flows": [[*key, flow.to_mapping()] for key, flow in self.transitions.items()],
        }

    def take_changed(self) -> Iterator[tuple[str, list[Any]]]:
        """Yield the parts of `to_mapping` that have changed since this was last asked: the name of
        the list, or of the only value, and a row of it. Begin with them all by `mark_changed`.

        What is not changed is not looked at, so that a large memory costs no more than a small
        one. A part is read when it is yielded; others may change in between.
        """
        lengths, rests, flows = self.lengths, self.remaining, self.transitions
        of_lengths, lengths.changed = lengths.changed, set()
        of_rests, rests.changed = rests.changed, set()
        of_flows, flows.changed = flows.changed, set()
        if of_lengths:
            yield "tokens_per_byte", lengths.tokens_per_byte()
        for key in of_lengths:
            stage = lengths.get(key)
            if stage is not None:
                yield "lengths", [*key, stage.to_mapping()]
        for state in of_rests:
            row = rests.row(state)
            if row is not None:
                yield "rests", row
        for of_run in of_flows:
            flow = flows.get(of_run)
            if flow is not None:
                yield "flows", [*of_run, flow.to_mapping()]

    def mark_changed(self) -> None:
        """Have `take_changed` yield everything."""
        self.lengths.mark_changed()
        self.remaining.mark_changed()
        self.transitions.mark_changed()

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], *, source: str) -> Learned:
        """Read back what was written.

        Args:
            data: From `to_mapping`, through JSON or not.
            source: Where it comes from, for error texts.

        Raises:
            ConfigError: It is of another version, or something else.
        """
        version = data.get("version") if isinstance(data, Mapping) else None
        if version != VERSION:
            raise ConfigError(f"{source}: version: expected {VERSION}, got {version!r}")
        made = cls()
        try:
            made.lengths.set_tokens_per_byte(*data["tokens_per_byte"])
            for tenant, workflow, stage, lengths in data["lengths"]:
                key = (str(tenant), str(workflow), str(stage))
                made.lengths.restore(key, StageLengths.from_mapping(lengths))
            for tenant, workflow, stage, number, values in data["rests"]:
                state = (str(tenant), str(workflow), str(stage), int(number))
                made.remaining.restore(state, values)
            for tenant, workflow, flow in data["flows"]:
                made.transitions.restore((str(tenant), str(workflow)), Flow.from_mapping(flow))
        except (KeyError, TypeError, ValueError, ArithmeticError) as e:
            raise ConfigError(f"{source}: cannot read what was learned: {e!r}") from None
        return made

    def summary(self, most: int = 256) -> list[dict[str, Any]]:
        """Tell what is known of the stages that were seen last, one entry each.

        Args:
            most: Entries at most.
        """
        latest = list(self.lengths.items())[-most:]
        rests: dict[tuple[str, str, str], dict[str, Any]] = {}
        for (tenant, workflow, stage, number), values in self.remaining.items():
            of_stage = rests.setdefault((tenant, workflow, stage), {})
            of_stage[str(number)] = _distribution(values)
        entries = []
        for key, lengths in reversed(latest):
            tenant, workflow, stage = key
            flow = self.transitions.get((tenant, workflow))
            entries.append(
                {
                    "tenant": tenant,
                    "workflow": workflow,
                    "stage": stage,
                    "prompt_tokens": _distribution(lengths.prompts),
                    "output_tokens": _distribution(lengths.outputs),
                    "rest_s": rests.get(key, {}),
                    **(flow.stage(stage) if flow and stage != END and stage in flow.stages else {}),
                }
            )
        return entries


def _distribution(values: Histogram) -> dict[str, Any]:
    known: dict[str, Any] = {"num_values": values.num_values}
    if values.mean is not None:
        known["mean"] = round(values.mean, 3)
        for share in _SHARES:
            known[f"p{100 * share:g}"] = round(values.quantile(share) or 0.0, 3)
    return known
