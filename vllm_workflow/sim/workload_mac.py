"""MAC-SQL: select a schema, decompose the question, refine while the query fails.

Call counts and totals per run are those of the trace of MAC-SQL published with Hexgen-Flow
(arXiv 2505.05286): 3.6 calls (1 to 6), 6,791 prompt tokens, 1,198 output tokens. How the
tokens divide over the three stages was not published and is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm_workflow.sim.distributions import LogNormal, choose
from vllm_workflow.sim.run_builder import Databases, RunBuilder, template
from vllm_workflow.sim.types import TraceRun

WORKFLOW = "mac"

_SELECT_SHARE = 0.95
"""Small schemas are not pruned."""
_REFINEMENTS: Mapping[int, float] = {0: 15, 1: 35, 2: 20, 3: 30}
"""At most three rounds, MAC-SQL's limit; with it, 3.6 calls."""
_DATABASES = Databases(num_databases=11, schema=LogNormal(mean=1000, sd=450, low=250, high=3500))
_QUESTION = LogNormal(mean=90, sd=30, low=50, high=170)
_TEMPLATES: Mapping[str, int] = {"selector": 840, "decomposer": 1180, "refiner": 280}
_OUTPUTS: Mapping[str, LogNormal] = {
    "selector": LogNormal(mean=180, sd=70, low=30, high=600),
    "decomposer": LogNormal(mean=480, sd=220, low=80, high=1600),
    "refiner": LogNormal(mean=330, sd=200, low=40, high=1600),
}
_RESULT = LogNormal(mean=120, sd=80, low=20, high=1000)
"""The error or the rows that a refinement starts from."""
_SQL_S = LogNormal(mean=0.3, sd=1.2, low=0.002, high=30.0)
"""Execution of a query. Assumed."""


def run(index: int, seed: int) -> TraceRun:
    """Return run number `index`, the same whatever other runs are drawn."""
    b = RunBuilder(WORKFLOW, index, seed)
    head, schema = _DATABASES.ask(b, seed)
    question = b.own("question", _QUESTION.draw_tokens(b.rng("question")))
    last: list[str] = []
    num_output_tokens = 0

    def step(stage: str, num_tail_tokens: int = 0, gap_s: float = 0.0) -> None:
        nonlocal last, num_output_tokens
        num_output_tokens = _OUTPUTS[stage].draw_tokens(b.rng(f"{stage} output"))
        call = b.call(
            stage,
            prefix=[template(WORKFLOW, stage, _TEMPLATES[stage]), head, schema, question],
            num_tail_tokens=num_tail_tokens,
            num_output_tokens=num_output_tokens,
            after=last,
            gap_s=gap_s,
        )
        last = [call]

    if b.rng("select").random() < _SELECT_SHARE:
        step("selector")
    step("decomposer")
    for _ in range(choose(_REFINEMENTS, b.rng("refine rounds"))):
        tail = min(num_output_tokens, 300) + _RESULT.draw_tokens(b.rng("refiner prompt"))
        step("refiner", tail, _SQL_S.draw(b.rng("refiner gap")))
    return b.build()
