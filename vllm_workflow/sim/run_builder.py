"""What all workload generators need: calls of a run, streams per stage, databases."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_workflow.sim.distributions import LogNormal, zipf
from vllm_workflow.sim.rng import stream
from vllm_workflow.sim.types import PrefixPart, TraceCall, TraceRun


class RunBuilder:
    """Collects the calls of one run.

    Args:
        workflow: Its kind.
        index: Of the run in its trace, from 0.
        seed: Of the trace.
    """

    def __init__(self, workflow: str, index: int, seed: int) -> None:
        self.workflow = workflow
        self.run_id = f"{workflow}-{index + 1}"
        self._index = index
        self._seed = seed
        self._streams: dict[str, random.Random] = {}
        self._calls: list[TraceCall] = []
        self._num_calls: dict[str, int] = {}

    def rng(self, subsystem: str) -> random.Random:
        """Return the stream of one subsystem of this run, e.g. `evaluate output`."""
        if subsystem not in self._streams:
            self._streams[subsystem] = stream(self._seed, self.workflow, self._index, subsystem)
        return self._streams[subsystem]

    def own(self, name: str, num_tokens: int) -> PrefixPart:
        """Return a part that only prompts of this run can share."""
        return PrefixPart(part_id=f"{self.run_id}/{name}", num_tokens=num_tokens)

    def call(
        self,
        stage: str,
        *,
        prefix: Sequence[PrefixPart],
        num_tail_tokens: int,
        num_output_tokens: int,
        after: Sequence[str] = (),
        gap_s: float = 0.0,
    ) -> str:
        """Append a call and return its id.

        Args:
            stage: Its name.
            prefix: Head of its prompt; parts without tokens are left out.
            num_tail_tokens: What follows.
            num_output_tokens: Of its answer.
            after: Ids of the calls that reveal it.
            gap_s: From their end until it is made.
        """
        number = self._num_calls[stage] = self._num_calls.get(stage, 0) + 1
        call_id = f"{stage}-{number}"
        parts = tuple(part for part in prefix if part.num_tokens)
        num_prompt_tokens = sum(part.num_tokens for part in parts) + num_tail_tokens
        self._calls.append(
            TraceCall(
                call_id=call_id,
                stage=stage,
                num_prompt_tokens=max(1, num_prompt_tokens),
                num_output_tokens=num_output_tokens,
                after=tuple(after),
                gap_s=gap_s,
                prefix=parts,
            )
        )
        return call_id

    def build(self) -> TraceRun:
        """Return the run."""
        return TraceRun(run_id=self.run_id, workflow=self.workflow, calls=tuple(self._calls))


def template(workflow: str, name: str, num_tokens: int) -> PrefixPart:
    """Return a part that all runs of a workflow share."""
    return PrefixPart(part_id=f"{workflow}/template/{name}", num_tokens=num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Databases:
    """The databases that questions are asked about."""

    num_databases: int
    schema: LogNormal
    """Tokens of a schema, one draw per database."""
    exponent: float = 1.0
    """Zipf exponent of how often each is asked about."""
    head_share: float = 0.5
    """Share of the schema's text that does not depend on the question: what follows the first
    example value chosen for it does."""

    def ask(self, builder: RunBuilder, seed: int) -> tuple[PrefixPart, PrefixPart]:
        """Draw the database of a run.

        Returns:
            The head of its schema, shared by all runs on it, and the rest, the run's own.
        """
        rank = zipf(self.num_databases, self.exponent, builder.rng("database"))
        num_tokens = self.schema.draw_tokens(stream(seed, builder.workflow, "schema", rank))
        num_head = round(num_tokens * self.head_share)
        head = PrefixPart(part_id=f"{builder.workflow}/database/{rank}", num_tokens=num_head)
        return head, builder.own("schema", num_tokens - num_head)
