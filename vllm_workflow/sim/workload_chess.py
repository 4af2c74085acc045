"""CHESS: retrieve, generate two candidates, revise, write unit tests, evaluate.

Stage graph, counts and lengths are those of the recordings published with Hexgen-Flow (arXiv
2505.05286) of CHESS with Llama-3.1-70B on BIRD (123 runs on two databases); the prompt
templates those of CHESS (Apache-2.0). What was not published is marked as assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_workflow.sim.distributions import LogNormal, choose
from vllm_workflow.sim.run_builder import Databases, RunBuilder, template
from vllm_workflow.sim.types import PrefixPart, TraceRun

RECORDED_REVISIONS: Mapping[int, float] = {
    0: 87, 1: 16, 2: 5, 3: 3, 4: 2, 5: 2, 6: 3, 7: 1, 8: 2, 9: 1, 10: 1
}  # fmt: skip
"""Revisions -> runs that had so many."""
FLAT_REVISIONS: Mapping[int, float] = dict.fromkeys(range(11), 1)
"""As the published traces were resampled."""

_NUM_CONTROLLER_TOKENS = 210
_CONTROLLERS: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "information_retriever": ((301, 304, 308, 312), (5, 5, 5, 4)),
    "unit_tester": ((271, 275, 278), (6, 4, 4)),
}
"""Agent -> prompt and output tokens of its turns, the same in every run."""
_EXPLAINED_SHARE = 0.4
"""First turns that say more than a tool's name; with it, mean 7.5 over the agent's turns."""
_EXPLAINED_OUTPUT = LogNormal(mean=30, sd=6, low=24, high=43)
_KEYWORDS_SHARE = 0.8
"""Runs with a keyword call; recorded: 67 to 92 %."""
_DISAGREE_SHARE = 0.9
"""Runs whose candidates differ, so that tests are written and evaluated; from the calls per
run, 15.9 and 17.4 on the two databases."""
_EVALUATIONS: Mapping[int, float] = {3: 8, 4: 22, 5: 45, 6: 15, 7: 6, 8: 3, 11: 1}
"""Weight of each number of evaluations, side by side; recorded: 5 ± 1, 3 to 8, 11."""
_DATABASES = Databases(num_databases=11, schema=LogNormal(mean=3500, sd=900, low=2500, high=4700))
"""BIRD's development set has 11; recorded: schemas of 2,500 to 3,000 and 4,500 to 4,700."""

_QUESTION = LogNormal(mean=90, sd=30, low=50, high=170)
"""Tokens of the question with its hint."""
_KEYWORDS_OUTPUT = LogNormal(mean=43, sd=18, low=15, high=119)
_CANDIDATE_OUTPUT = LogNormal(mean=595, sd=205, low=270, high=1026)
"""The upper end is the token limit of the recording."""
_REVISE_OUTPUT = LogNormal(mean=105, sd=60, low=10, high=1000)
_RUNAWAY_SHARE = 0.06
"""Revisions that run into the token limit; with it, mean 160 and sd 229 as recorded."""
_RUNAWAY_OUTPUT = LogNormal(mean=1040, sd=25, low=1009, high=1078)
_REVISE_TAIL = LogNormal(mean=120, sd=80, low=60, high=1000)
"""The query and its result."""
_UNIT_TEST_BODY = LogNormal(mean=740, sd=230, low=430, high=1230)
_UNIT_TEST_OUTPUT = LogNormal(mean=94, sd=35, low=31, high=245)
_EVALUATE_BODY = LogNormal(mean=730, sd=250, low=420, high=1680)
"""The candidates and their results; the unit test of 50 tokens follows."""
_LONG_VERDICT_SHARE = 0.2
"""Evaluations that answer more than the 22 tokens of a plain verdict."""
_LONG_VERDICT_OUTPUT = LogNormal(mean=45, sd=60, high=335)
"""What they add; with it, mean 31 and P95 75 as recorded."""

_RETRIEVAL_S = LogNormal(mean=2.0, sd=1.0, low=0.2, high=10.0)
"""Embeddings and approximate matching of keywords. Assumed: seconds, not published."""
_CONTEXT_S = LogNormal(mean=0.4, sd=0.2, low=0.05, high=5.0)
"""The vector database. Assumed."""
_SQL_S = LogNormal(mean=0.3, sd=1.2, low=0.002, high=30.0)
"""Execution of candidates. Assumed: mostly milliseconds, with a long tail to the time-out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chess:
    """How runs of CHESS are distributed."""

    workflow: str
    revisions: Mapping[int, float]
    """Weight of each number of revisions; they follow one another."""

    def run(self, index: int, seed: int) -> TraceRun:
        """Return run number `index`, the same whatever other runs are drawn."""
        b = RunBuilder(self.workflow, index, seed)
        head, schema = _DATABASES.ask(b, seed)
        question = b.own("question", _QUESTION.draw_tokens(b.rng("question")))
        last = self._retrieve(b, question)
        last = self._candidates(b, (head, schema, question), last)
        last = self._revisions(b, (head, schema, question), last)
        self._tests(b, last)
        return b.build()

    def _controller(
        self, b: RunBuilder, stage: str, turn: int, after: list[str], gap_s: float = 0.0
    ) -> list[str]:
        """One turn of an agent that picks its next tool; its prompt never names the question."""
        prompts, outputs = _CONTROLLERS[stage]
        num_output_tokens = outputs[turn]
        if stage == "information_retriever" and turn == 0:
            rng = b.rng("explained")
            if rng.random() < _EXPLAINED_SHARE:
                num_output_tokens = _EXPLAINED_OUTPUT.draw_tokens(rng)
        shared = template(self.workflow, "controller", _NUM_CONTROLLER_TOKENS)
        own = template(self.workflow, stage, prompts[0] - _NUM_CONTROLLER_TOKENS)
        call = b.call(
            stage,
            prefix=[shared, own],
            num_tail_tokens=prompts[turn] - prompts[0],
            num_output_tokens=num_output_tokens,
            after=after,
            gap_s=gap_s,
        )
        return [call]

    def _retrieve(self, b: RunBuilder, question: PrefixPart) -> list[str]:
        stage = "information_retriever"
        last = self._controller(b, stage, 0, [])
        if b.rng("keywords").random() < _KEYWORDS_SHARE:
            keywords = b.call(
                "extract_keywords",
                prefix=[template(self.workflow, "extract_keywords", 583), question],
                num_tail_tokens=0,
                num_output_tokens=_KEYWORDS_OUTPUT.draw_tokens(b.rng("keywords output")),
                after=last,
            )
            last = [keywords]
        gaps = b.rng("retrieval gap")
        last = self._controller(b, stage, 1, last)
        last = self._controller(b, stage, 2, last, _RETRIEVAL_S.draw(gaps))
        return self._controller(b, stage, 3, last, _CONTEXT_S.draw(gaps))

    def _candidates(
        self, b: RunBuilder, body: tuple[PrefixPart, ...], after: list[str]
    ) -> list[str]:
        """Divide and conquer beside query plan: other templates, the same body."""
        return [
            b.call(
                "generate_candidate",
                prefix=[template(self.workflow, name, num_tokens), *body],
                num_tail_tokens=0,
                num_output_tokens=_CANDIDATE_OUTPUT.draw_tokens(b.rng("candidate output")),
                after=after,
            )
            for name, num_tokens in (("divide_and_conquer", 9130), ("query_plan", 5264))
        ]

    def _revisions(
        self, b: RunBuilder, body: tuple[PrefixPart, ...], after: list[str]
    ) -> list[str]:
        outputs, gaps = b.rng("revise output"), b.rng("revise gap")
        for _ in range(choose(self.revisions, b.rng("revise rounds"))):
            runaway = outputs.random() < _RUNAWAY_SHARE
            output = _RUNAWAY_OUTPUT if runaway else _REVISE_OUTPUT
            call = b.call(
                "revise",
                prefix=[template(self.workflow, "revise", 2863), *body],
                num_tail_tokens=_REVISE_TAIL.draw_tokens(b.rng("revise prompt")),
                num_output_tokens=output.draw_tokens(outputs),
                after=after,
                gap_s=_SQL_S.draw(gaps),
            )
            after = [call]
        return after

    def _tests(self, b: RunBuilder, after: list[str]) -> None:
        gaps = b.rng("unit test gap")
        last = self._controller(b, "unit_tester", 0, after, _SQL_S.draw(gaps))
        if b.rng("disagree").random() >= _DISAGREE_SHARE:
            last = self._controller(b, "unit_tester", 1, last)
            self._controller(b, "unit_tester", 2, last)
            return
        body = b.own("unit test", _UNIT_TEST_BODY.draw_tokens(b.rng("unit test prompt")))
        test = b.call(
            "generate_unit_test",
            prefix=[template(self.workflow, "generate_unit_test", 329), body],
            num_tail_tokens=0,
            num_output_tokens=_UNIT_TEST_OUTPUT.draw_tokens(b.rng("unit test output")),
            after=last,
        )
        last = self._controller(b, "unit_tester", 1, [test])
        self._controller(b, "unit_tester", 2, self._evaluations(b, last))

    def _evaluations(self, b: RunBuilder, after: list[str]) -> list[str]:
        """One verdict per unit test, side by side; all but the test itself is the same."""
        body = b.own("candidates", _EVALUATE_BODY.draw_tokens(b.rng("evaluate prompt")))
        outputs = b.rng("evaluate output")
        calls = []
        for _ in range(choose(_EVALUATIONS, b.rng("evaluate width"))):
            is_long = outputs.random() < _LONG_VERDICT_SHARE
            extra = _LONG_VERDICT_OUTPUT.draw_tokens(outputs) if is_long else 0
            calls.append(
                b.call(
                    "evaluate",
                    prefix=[template(self.workflow, "evaluate", 181), body],
                    num_tail_tokens=50,
                    num_output_tokens=22 + extra,
                    after=after,
                )
            )
        return calls
