"""How far off a router's belief is of what a vLLM server caches, with and without its KV events.

    vllm-workflow emulated-model llama-3.1-8b llama-8b
    VLLM_SERVER_DEV_MODE=1 vllm serve llama-8b --port 8001 --emulate-gpu A100-80G \
        --emulate-model-shape llama-3.1-8b --emulate-time-scale 20 --num-gpu-blocks-override 2000 \
        --enable-prompt-tokens-details --kv-events-config \
        '{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://127.0.0.1:5557"}'
    python benchmarks/prefix_belief.py --base-url http://127.0.0.1:8001 --kv-events tcp://127.0.0.1:5557

Prompts begin with one of several templates, the popular ones more often, that do not all fit in the
cache, and end with a question of their own. The same calls are made four times, each time from an
empty cache and by a new router: with events and without, and each with a second client whose calls
of other templates the router does not see. Printed is by how many tokens the router was wrong about
what was cached, as the server counted.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from vllm_workflow.core.call_events import Polled, Settled, Submitted
from vllm_workflow.core.metrics import mean, percentile
from vllm_workflow.router.app import serve
from vllm_workflow.router.config import RouterConfig

_WORDS = ("order", "table", "join", "where", "sum", "of", "each", "city", "shop", "name")
_WARM_UP = "vllm_workflow:router_kv_events_total"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Heads that calls share, and how often."""

    heads: tuple[str, ...]
    tail_chars: int

    def draw(self, rng: random.Random) -> str:
        """Return a prompt; the n-th head is n times as rare as the first."""
        weights = [1.0 / (n + 1) for n in range(len(self.heads))]
        (head,) = rng.choices(self.heads, weights)
        return head + _text(rng, self.tail_chars)


def _text(rng: random.Random, num_chars: int) -> str:
    words = (rng.choice(_WORDS) for _ in range(num_chars // 3 + 1))
    return " ".join(words)[:num_chars]


def prompts(seed: int, number: int, head_chars: int, tail_chars: int) -> Prompts:
    rng = random.Random(seed)
    return Prompts(
        heads=tuple(_text(rng, head_chars) for _ in range(number)), tail_chars=tail_chars
    )


async def errors(args: argparse.Namespace, *, events: bool, stranger: bool) -> list[float]:
    """Return believed less actual cached tokens of each call, in order."""
    instance = {"id": "a", "url": args.base_url, "max_num_seqs": args.max_concurrency}
    if events:
        instance["kv_events"] = args.kv_events
    config = RouterConfig.from_mapping({"port": 0, "instances": [instance]}, source="benchmark")
    mine = prompts(args.seed, args.num_heads, args.head_chars, args.tail_chars)
    theirs = prompts(args.seed + 1, args.num_heads, args.head_chars, args.tail_chars)
    believed: dict[str, int] = {}
    found: list[float] = []

    def record(event: object) -> None:
        if isinstance(event, Submitted) and event.decision is not None:
            believed[event.request.request_id] = event.decision.chosen.num_cached_tokens
        elif isinstance(event, Polled):
            for decision in event.decisions:
                believed[decision.request_id] = decision.chosen.num_cached_tokens
        elif isinstance(event, Settled) and event.outcome.num_cached_tokens is not None:
            found.append(
                believed.pop(event.outcome.request_id) - float(event.outcome.num_cached_tokens)
            )

    async with serve(config) as router, aiohttp.ClientSession() as session:
        model = next(iter(router.dispatcher.fleet)).models[0]

        async def call(url: str, prompt: str) -> None:
            body = {"model": model, "prompt": prompt, "max_tokens": args.output_len}
            async with session.post(url + "/v1/completions", json=body) as response:
                answer = await response.read()
                if response.status != 200:
                    raise RuntimeError(f"{url}: HTTP {response.status}: {answer[:500]!r}")

        rng = random.Random(args.seed + 4)
        for _ in range(args.num_warmups):  # tells how many tokens a byte is
            await call(router.url, _text(rng, args.tail_chars))
        if events:  # a subscription takes effect some time after it was made
            labels = {"instance": "a", "kind": "BlockStored"}
            while not router.metrics.registry.get_sample_value(_WARM_UP, labels):
                await call(args.base_url, f"{time.time()}" * 40)
                await asyncio.sleep(0.2)
        async with session.post(args.base_url + "/reset_prefix_cache") as response:
            if response.status != 200:
                raise RuntimeError("expected a server with VLLM_SERVER_DEV_MODE=1")
        router.dispatcher._record = record
        rng, other = random.Random(args.seed + 2), random.Random(args.seed + 3)
        limit = asyncio.Semaphore(args.max_concurrency)

        async def one(url: str, prompt: str) -> None:
            async with limit:
                await call(url, prompt)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(args.num_prompts):
                tasks.create_task(one(router.url, mine.draw(rng)))
                if stranger:
                    tasks.create_task(one(args.base_url, theirs.draw(other)))
        router.dispatcher._record = None
    return found


def line(name: str, values: Sequence[float]) -> str:
    if not values:
        return f"{name:44} none"
    sizes = [abs(v) for v in values]
    wrong = mean([float(v > 500.0 or v < -500.0) for v in values]) or 0.0
    return (
        f"{name:44} {len(values):5} {mean(sizes):10.0f} {mean(values):+10.0f} "
        f"{percentile(sizes, 95.0):10.0f} {wrong:10.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8001")
    parser.add_argument("--kv-events", default="tcp://127.0.0.1:5557")
    parser.add_argument("--num-prompts", type=int, default=200, help="of the router's own")
    parser.add_argument("--num-warmups", type=int, default=40, help="short ones, not counted")
    parser.add_argument("--num-heads", type=int, default=12)
    parser.add_argument("--head-chars", type=int, default=6144)
    parser.add_argument("--tail-chars", type=int, default=800)
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--max-concurrency", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{args}\nin tokens; off: by more than 500, about one piece of a prompt")
    print(f"{'':44} {'calls':>5} {'mean size':>10} {'mean':>10} {'P95 size':>10} {'off':>10}")
    for stranger in (False, True):
        for events in (False, True):
            name = f"{'with' if events else 'without'} events"
            name += ", beside a client of its own" if stranger else ""
            print(line(name, asyncio.run(errors(args, events=events, stranger=stranger))))


if __name__ == "__main__":
    main()
