"""CHASE-SQL: 21 candidates side by side, each fixed on its own, then a tournament.

Structure as the paper describes it (arXiv 2410.01943): keywords, three generators with seven
samples each, a fixer of at most three rounds per candidate, pairwise selection. Lengths per
stage were not published: those of CHESS, which grew from the same prompts, are assumed, and so
are failure rates.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm_workflow.sim.distributions import LogNormal, choose
from vllm_workflow.sim.run_builder import Databases, RunBuilder, template
from vllm_workflow.sim.types import PrefixPart, TraceRun

WORKFLOW = "chase"
NUM_SAMPLES = 7
"""Of each of the three generators: 21 candidates."""

_GENERATORS: Mapping[str, int] = {"divide_and_conquer": 9130, "query_plan": 5264, "examples": 600}
"""Generator -> tokens of its template; the third one writes examples before its query."""
_DATABASES = Databases(num_databases=11, schema=LogNormal(mean=3500, sd=900, low=2500, high=4700))
_QUESTION = LogNormal(mean=90, sd=30, low=50, high=170)
_KEYWORDS_OUTPUT = LogNormal(mean=43, sd=18, low=15, high=119)
_EXAMPLES_OUTPUT = LogNormal(mean=1500, sd=500, low=500, high=3000)
_CANDIDATE_OUTPUT = LogNormal(mean=595, sd=205, low=100, high=2048)
_FAILURE_SHARE = 0.2
"""Candidates whose execution fails or is empty; of a fixed one, again so many."""
_MAX_FIXES = 3
_FIX_TAIL = LogNormal(mean=120, sd=80, low=60, high=1000)
_FIX_OUTPUT = LogNormal(mean=160, sd=120, low=10, high=1078)
_CLUSTERS: Mapping[int, float] = {1: 30, 2: 25, 3: 18, 4: 12, 5: 8, 6: 5, 8: 2}
"""Different results among the candidates; each pair is compared."""
_PAIR_TAIL = LogNormal(mean=600, sd=200, low=200, high=2000)
"""Two candidates with their results."""
_VERDICT_OUTPUT = LogNormal(mean=30, sd=32, low=2, high=357)
_RETRIEVAL_S = LogNormal(mean=2.0, sd=1.0, low=0.2, high=10.0)
_SQL_S = LogNormal(mean=0.3, sd=1.2, low=0.002, high=30.0)


def run(index: int, seed: int) -> TraceRun:
    """Return run number `index`, the same whatever other runs are drawn."""
    b = RunBuilder(WORKFLOW, index, seed)
    head, schema = _DATABASES.ask(b, seed)
    body = (head, schema, b.own("question", _QUESTION.draw_tokens(b.rng("question"))))
    keywords = b.call(
        "extract_keywords",
        prefix=[template(WORKFLOW, "extract_keywords", 583), body[-1]],
        num_tail_tokens=0,
        num_output_tokens=_KEYWORDS_OUTPUT.draw_tokens(b.rng("keywords output")),
    )
    candidates = _candidates(b, body, keywords)
    _select(b, body, [_fixed(b, body, candidate) for candidate in candidates])
    return b.build()


def _candidates(b: RunBuilder, body: tuple[PrefixPart, ...], keywords: str) -> list[str]:
    """All wait for retrieval, none for another one."""
    retrieval_s = _RETRIEVAL_S.draw(b.rng("retrieval gap"))
    candidates = []
    for name, num_tokens in _GENERATORS.items():
        outputs = b.rng(f"{name} output")
        for _ in range(NUM_SAMPLES):
            num_examples = _EXAMPLES_OUTPUT.draw_tokens(outputs) if name == "examples" else 0
            call = b.call(
                "generate_candidate",
                prefix=[template(WORKFLOW, name, num_tokens), *body],
                num_tail_tokens=0,
                num_output_tokens=num_examples + _CANDIDATE_OUTPUT.draw_tokens(outputs),
                after=[keywords],
                gap_s=retrieval_s,
            )
            candidates.append(call)
    return candidates


def _fixed(b: RunBuilder, body: tuple[PrefixPart, ...], candidate: str) -> str:
    """Fix one candidate while it fails; return the last call of its chain."""
    rng = b.rng("fix rounds")
    for _ in range(_MAX_FIXES):
        if rng.random() >= _FAILURE_SHARE:
            break
        candidate = b.call(
            "fix_query",
            prefix=[template(WORKFLOW, "fix_query", 2863), *body],
            num_tail_tokens=_FIX_TAIL.draw_tokens(b.rng("fix prompt")),
            num_output_tokens=_FIX_OUTPUT.draw_tokens(b.rng("fix output")),
            after=[candidate],
            gap_s=_SQL_S.draw(b.rng("fix gap")),
        )
    return candidate


def _select(b: RunBuilder, body: tuple[PrefixPart, ...], candidates: list[str]) -> None:
    num_clusters = choose(_CLUSTERS, b.rng("clusters"))
    gap_s = max(_SQL_S.draw(b.rng("select gap")) for _ in candidates)
    for _ in range(num_clusters * (num_clusters - 1) // 2):
        b.call(
            "select",
            prefix=[template(WORKFLOW, "select", 500), *body],
            num_tail_tokens=_PAIR_TAIL.draw_tokens(b.rng("select prompt")),
            num_output_tokens=_VERDICT_OUTPUT.draw_tokens(b.rng("select output")),
            after=candidates,
            gap_s=gap_s,
        )
