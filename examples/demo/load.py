"""The demo's load: who asks what, when, and by when; and driving it through a router."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from vllm_workflow.text2sql.agent import Text2SqlAgent
from vllm_workflow.text2sql.runner import Question, load_questions, run_questions

ASK, REPORT = "ask", "report"
"""Tenants: people who wait for one answer, and jobs that ask for a page of them at a time."""
REPORT_SIZE = 8
"""Questions of one report, asked at once."""
REPORT_EVERY = 3
"""One run in so many belongs to a report."""
PROBE_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One run as it will be sent, the same to every system."""

    question: Question
    tenant: str
    slo_s: float
    arrival_s: float
    seed: int


def questions(folder: Path, count: int, seed: int) -> list[Question]:
    """Return questions of the model's own kind and, one in three, in other people's words."""
    rng = random.Random(seed)
    plain = load_questions(folder / "questions.jsonl")
    worded = load_questions(folder / "questions_wording.jsonl")
    chosen = rng.sample(plain, count - count // 3) + rng.sample(worded, count // 3)
    rng.shuffle(chosen)
    return chosen


def plan(
    chosen: Sequence[Question], rate: float, slo_s: dict[str, float], seed: int
) -> list[PlannedRun]:
    """Give each question its tenant, its arrival and its promise.

    Args:
        chosen: What is asked.
        rate: Runs per second, both tenants together. Single questions and whole reports each
            arrive as a Poisson process.
        slo_s: Promise per tenant.
        seed: Of the arrivals and of sampling.
    """
    rng = random.Random(seed)
    num_report = len(chosen) // REPORT_EVERY // REPORT_SIZE * REPORT_SIZE
    num_ask = len(chosen) - num_report
    share = num_ask / len(chosen)
    asks = _poisson(rng, rate * share, num_ask)
    reports = _poisson(rng, rate * (1 - share) / REPORT_SIZE, num_report // REPORT_SIZE)
    end_s = asks[-1]
    arrivals = [(t, ASK) for t in asks]
    # A report that would come after the last single question is moved to where it meets others.
    arrivals += [(t % end_s, REPORT) for t in reports for _ in range(REPORT_SIZE)]
    return [
        PlannedRun(
            question=question,
            tenant=tenant,
            slo_s=slo_s[tenant],
            arrival_s=arrival_s,
            seed=seed * 1000 + index,
        )
        for index, (question, (arrival_s, tenant)) in enumerate(
            zip(chosen, sorted(arrivals), strict=True)
        )
    ]


def sliced(planned: Sequence[PlannedRun], count: int) -> list[list[PlannedRun]]:
    """Cut the load into `count` parts of equal size in time order, each starting at its time 0."""
    ends = [len(planned) * (i + 1) // count for i in range(count)]
    parts = [planned[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    return [
        [replace(run, arrival_s=run.arrival_s - part[0].arrival_s) for run in part]
        for part in parts
        if part
    ]


async def drive(
    agent: Text2SqlAgent, planned: Sequence[PlannedRun], on_done: Callable[[], object]
) -> list[dict[str, Any]]:
    """Send every run at its time; return what became of each, as JSON values, in order."""
    start = time.monotonic()

    async def one(run: PlannedRun) -> dict[str, Any]:
        await asyncio.sleep(max(0.0, start + run.arrival_s - time.monotonic()))
        arrival_s = time.monotonic() - start
        (record,) = await run_questions(
            agent, [run.question], slo_s=run.slo_s, tenant=run.tenant, seed=run.seed
        )
        on_done()
        extra = {"tenant": run.tenant, "slo_s": run.slo_s, "arrival_s": arrival_s}
        return record.as_json() | extra

    return await asyncio.gather(*(one(run) for run in planned))


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a fleet gave in a closed loop."""

    alone_s: float
    """Median latency of a run that has the fleet for itself."""
    runs_per_s: float
    """Runs that end per second while `concurrency` are always in flight."""
    concurrency: int


async def calibrate(
    agent: Text2SqlAgent, chosen: Sequence[Question], *, num_alone: int, concurrency: int
) -> Capacity:
    """Warm a fleet up, its router's predictions too, and measure it in a closed loop."""
    await run_questions(agent, chosen[:2], max_concurrency=1)
    alone = await run_questions(agent, chosen[2 : 2 + num_alone], max_concurrency=1)
    loop = chosen[2 + num_alone :]
    begin = time.monotonic()
    ends: list[float] = []
    await run_questions(
        agent, loop, max_concurrency=concurrency, on_done=lambda _: ends.append(time.monotonic())
    )
    # The last runs have less company than the others; they are left out.
    full = ends[: len(ends) - concurrency // 2]
    return Capacity(
        alone_s=statistics.median(record.latency_s for record in alone),
        runs_per_s=len(full) / (full[-1] - begin),
        concurrency=concurrency,
    )


async def instance_speed(url: str, model: str, width: int) -> dict[str, float]:
    """Ask one instance directly; return its seconds per token alone and its tokens per second.

    Args:
        url: Root of the server.
        model: Name of the model there.
        width: Calls at once for the second number; more than it has seats.
    """
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        words = itertools.count()

        async def one() -> None:
            await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": f"Keywords: order number {next(words)}"}],
                max_tokens=PROBE_TOKENS,
                temperature=0.0,
                extra_body={"ignore_eos": True},
            )

        await one()
        start = time.monotonic()
        await one()
        await one()
        alone_s = (time.monotonic() - start) / 2
        start = time.monotonic()
        await asyncio.gather(*(one() for _ in range(width)))
        wide_s = time.monotonic() - start
    return {
        "token_alone_s": alone_s / PROBE_TOKENS,
        "tokens_per_s": width * PROBE_TOKENS / wide_s,
    }


def _poisson(rng: random.Random, rate: float, count: int) -> list[float]:
    return list(itertools.accumulate(rng.expovariate(rate) for _ in range(count)))
