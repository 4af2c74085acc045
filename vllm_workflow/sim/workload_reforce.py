"""ReFoRCE: independent threads that explore a large database and refine in a growing dialogue.

Structure as in its code for Spider 2.0: schema linking, then threads that each explore columns
(a dozen probe queries, corrected up to three times), write a query and refine it until two
results agree, five times at most; a vote, and a model's vote at a tie; 10 to 60 calls.
Lengths were not published and are assumed.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm_workflow.sim.distributions import LogNormal, choose
from vllm_workflow.sim.run_builder import Databases, RunBuilder, template
from vllm_workflow.sim.types import PrefixPart, TraceRun

WORKFLOW = "reforce"

_THREADS: Mapping[int, float] = {3: 1, 4: 2, 8: 1}
"""Independent attempts that vote."""
_CORRECTIONS: Mapping[int, float] = {0: 35, 1: 30, 2: 20, 3: 15}
"""Rounds in which failed probes are corrected."""
_REFINEMENTS: Mapping[int, float] = {1: 40, 2: 25, 3: 15, 4: 8, 5: 12}
"""Refinements after the first query: one more run with the same result ends them."""
_TIE_SHARE = 0.2
_DATABASES = Databases(
    num_databases=60, schema=LogNormal(mean=9000, sd=6000, low=1500, high=32000), head_share=1.0
)
"""Compressed schemas; they hold nothing of the question."""
_QUESTION = LogNormal(mean=250, sd=200, low=60, high=1500)
"""With external knowledge."""
_OUTPUTS: Mapping[str, LogNormal] = {
    "link_schema": LogNormal(mean=500, sd=300, low=50, high=4096),
    "format": LogNormal(mean=120, sd=60, low=20, high=600),
    "explore": LogNormal(mean=900, sd=450, low=150, high=4096),
    "correct_probe": LogNormal(mean=250, sd=200, low=30, high=4096),
    "generate": LogNormal(mean=600, sd=450, low=80, high=4096),
    "refine": LogNormal(mean=450, sd=400, low=60, high=4096),
    "vote": LogNormal(mean=200, sd=120, low=20, high=1000),
}
_NUM_ASK_TOKENS = 80
"""What a turn asks, beside the history."""
_RESULT = LogNormal(mean=700, sd=900, low=20, high=6000)
"""Rows or errors that the next turn is told."""
_WAREHOUSE_S = LogNormal(mean=3.0, sd=8.0, low=0.1, high=120.0)
"""Queries against a cloud warehouse."""


class _Dialogue:
    """One thread: every turn's prompt is the whole of the turn before, its answer, and news."""

    def __init__(
        self, b: RunBuilder, thread: int, opening: tuple[PrefixPart, ...], last: str
    ) -> None:
        self._b = b
        self._thread = thread
        self._history = list(opening)
        self._num_turns = 0
        self.last = last

    def turn(self, stage: str) -> None:
        """Append one call; its answer and what its query returns become history."""
        b, name = self._b, f"thread {self._thread} {stage}"
        turn = f"thread-{self._thread}/turn-{self._num_turns}"
        self._history.append(b.own(turn, _NUM_ASK_TOKENS))
        num_output_tokens = _OUTPUTS[stage].draw_tokens(b.rng(f"{name} output"))
        self.last = b.call(
            stage,
            prefix=self._history,
            num_tail_tokens=0,
            num_output_tokens=num_output_tokens,
            after=[self.last],
            gap_s=_WAREHOUSE_S.draw(b.rng(f"{name} gap")) if self._num_turns else 0.0,
        )
        num_result_tokens = _RESULT.draw_tokens(b.rng(f"{name} result"))
        self._history.append(b.own(f"{turn}/answer", num_output_tokens + num_result_tokens))
        self._num_turns += 1


def run(index: int, seed: int) -> TraceRun:
    """Return run number `index`, the same whatever other runs are drawn."""
    b = RunBuilder(WORKFLOW, index, seed)
    head, _ = _DATABASES.ask(b, seed)
    question = b.own("question", _QUESTION.draw_tokens(b.rng("question")))
    linked = _prologue(b, "link_schema", (head, question), [])
    formatted = _prologue(b, "format", (question,), [linked])
    opening = (template(WORKFLOW, "solve", 700), head, question)
    ends = []
    for thread in range(choose(_THREADS, b.rng("threads"))):
        dialogue = _Dialogue(b, thread, opening, formatted)
        dialogue.turn("explore")
        for _ in range(choose(_CORRECTIONS, b.rng(f"thread {thread} corrections"))):
            dialogue.turn("correct_probe")
        dialogue.turn("generate")
        for _ in range(choose(_REFINEMENTS, b.rng(f"thread {thread} refinements"))):
            dialogue.turn("refine")
        ends.append(dialogue.last)
    if b.rng("tie").random() < _TIE_SHARE:
        results = sum(_RESULT.draw_tokens(b.rng("vote prompt")) for _ in ends)
        b.call(
            "vote",
            prefix=[template(WORKFLOW, "vote", 300), head, question],
            num_tail_tokens=results,
            num_output_tokens=_OUTPUTS["vote"].draw_tokens(b.rng("vote output")),
            after=ends,
            gap_s=_WAREHOUSE_S.draw(b.rng("vote gap")),
        )
    return b.build()


def _prologue(b: RunBuilder, stage: str, body: tuple[PrefixPart, ...], after: list[str]) -> str:
    return b.call(
        stage,
        prefix=[template(WORKFLOW, stage, 400), *body],
        num_tail_tokens=0,
        num_output_tokens=_OUTPUTS[stage].draw_tokens(b.rng(f"{stage} output")),
        after=after,
    )
