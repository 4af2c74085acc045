"""The same Text-to-SQL load through two systems on this machine, without a GPU.

Each system is two `vllm serve` processes of different speed and a router: vLLM as it comes
behind round robin, and `--scheduler workflow` behind the deadline-aware router. Every run is 7
to 12 calls of a small model and has a deadline. The load is cut into slices, each sent to one
system and then to the other while the first one idles, so that a machine that is busy with
something else for a while slows both alike. Prints a table; writes report.html, results.json and
the logs.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from load import (
    ASK,
    REPORT,
    Capacity,
    PlannedRun,
    calibrate,
    drive,
    instance_speed,
    plan,
    questions,
    sliced,
)
from openai import AsyncOpenAI
from report import html_report
from table import caution, comparison, speeds
from tqdm import tqdm

from vllm_workflow.cluster.config import ClusterConfig
from vllm_workflow.cluster.supervisor import Cluster
from vllm_workflow.core.errors import WorkflowError
from vllm_workflow.text2sql.agent import AgentOptions, Text2SqlAgent
from vllm_workflow.text2sql.compact import CompactPrompts
from vllm_workflow.text2sql.database import Database
from vllm_workflow.text2sql.runner import Question
from vllm_workflow.text2sql.shop.database import build

HERE = Path(__file__).resolve().parent
TEXT2SQL = HERE.parent / "text2sql"
OUT = HERE.parent.parent / "out" / "demo"
NUM_ALONE, NUM_LOOP, CONCURRENCY = 4, 24, 8
PROBE_WIDTH = 16
NUM_SLICES = 3
OPTIONS = AgentOptions(num_candidates=6, temperature=0.9, max_tokens=160)


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One way to serve the same model on the same CPUs."""

    name: str
    title: str
    policy: str
    command: str | None
    """None for that of cluster.yaml."""


STOCK = System(
    name="stock",
    title="vLLM as it comes, round robin",
    policy="round-robin",
    command="vllm serve {model} --port {port}",
)
WORKFLOW = System(
    name="workflow",
    title="--scheduler workflow, deadline-aware router",
    policy="workflow",
    command=None,
)


def main() -> int:
    """Run the demo; return the exit status."""
    args = parser().parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    try:
        return asyncio.run(_until_told(demo(args)))
    except WorkflowError as e:
        print(f"demo: {e}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_argument(
        "--model",
        type=Path,
        default=TEXT2SQL / "model",
        metavar="DIR",
        help="the small model (default: examples/text2sql/model)",
    )
    cli.add_argument(
        "--num-workflows",
        type=_count,
        default=96,
        metavar="N",
        help="runs per system, 10 to 300 (default: %(default)s)",
    )
    cli.add_argument(
        "--load",
        type=float,
        default=0.8,
        metavar="SHARE",
        help="arrival rate as a share of what vLLM behind round robin serves in a closed loop "
        "(default: %(default)s)",
    )
    cli.add_argument(
        "--seed",
        type=int,
        default=1,
        help="of questions, arrivals and sampling (default: %(default)s)",
    )
    cli.add_argument(
        "--output-dir", type=Path, default=OUT, metavar="DIR", help="default: out/demo"
    )
    return cli


async def demo(args: argparse.Namespace) -> int:
    """Run both systems; print and write what came out."""
    begin = time.monotonic()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    chosen = questions(TEXT2SQL, args.num_workflows + 2 + NUM_ALONE + NUM_LOOP, args.seed)
    print(
        "The model has a few million parameters and speaks the controlled English of one shop "
        "database.\nAny instruct model takes the same workflow with the full prompts:\n"
        "  vllm-workflow text2sql ask 'How many orders are pending?' --db shop.sqlite "
        "--base-url http://HOST:PORT/v1\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        db = Path(folder) / "shop.sqlite"
        build(db).close()
        async with AsyncExitStack() as stack:
            clusters: list[tuple[System, Cluster]] = []
            for system in (STOCK, WORKFLOW):
                print(f"== {system.title}")
                cluster = Cluster(cluster_config(args, system), report=print)
                clusters.append((system, await stack.enter_async_context(cluster)))
            results = [await measure(c, system, db, chosen) for system, c in clusters]
            planned = planned_load(args, results[0], chosen)
            await compare(clusters, results, db, planned)
    return finish(args, results, planned, time.monotonic() - begin)


async def compare(
    clusters: list[tuple[System, Cluster]],
    results: list[dict[str, Any]],
    db: Path,
    planned: list[PlannedRun],
) -> None:
    """Send each slice to both systems, in alternating order; add the runs to `results`."""
    spent_s = [0.0] * len(clusters)
    turns = list(range(len(clusters)))
    with tqdm(total=len(clusters) * len(planned), unit="run") as bar:
        for part in sliced(planned, NUM_SLICES):
            for turn in turns:
                bar.set_description(clusters[turn][0].name)
                begin = time.monotonic()
                agent = agent_for(clusters[turn][1], db)
                async with agent.client:
                    runs = await drive(agent, part, bar.update)
                for run in runs:
                    run["arrival_s"] += spent_s[turn]
                spent_s[turn] += time.monotonic() - begin
                results[turn]["runs"].extend(runs)
            turns.reverse()


def cluster_config(args: argparse.Namespace, system: System) -> ClusterConfig:
    """Return cluster.yaml with what the demo decides itself: ports, logs, CPUs that exist."""
    path = HERE / "cluster.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    data["model"] = str(args.model.resolve())
    data["log_dir"] = args.output_dir.resolve() / "logs" / system.name
    data["router"] |= {"port": 0, "policy": system.policy}
    data["stop_grace_s"] = 5.0
    if system.command:
        data["command"] = system.command
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for instance in data["instances"]:
        bound = instance.pop("cpus")
        if len(cpus) > 1:
            instance["cpus"] = [cpus[cpu % len(cpus)] for cpu in bound]
    return ClusterConfig.from_mapping(data, source=str(path), folder=HERE)


def agent_for(cluster: Cluster, db: Path) -> Text2SqlAgent:
    """Return an agent that sends its calls to the cluster's router."""
    client = AsyncOpenAI(base_url=f"{cluster.router_url}/v1", api_key="none", timeout=300.0)
    return Text2SqlAgent(client, Database(db), CompactPrompts(), model="shop-sql", options=OPTIONS)


async def measure(
    cluster: Cluster, system: System, db: Path, chosen: list[Question]
) -> dict[str, Any]:
    """Measure the instances one by one, then the fleet in a closed loop."""
    print(f"== {system.title}")
    speed = {
        name: await instance_speed(process.url, "shop-sql", PROBE_WIDTH)
        for name, process in cluster.instances.items()
    }
    print(speeds(speed))
    agent = agent_for(cluster, db)
    async with agent.client:
        capacity = await calibrate(
            agent,
            chosen[: 2 + NUM_ALONE + NUM_LOOP],
            num_alone=NUM_ALONE,
            concurrency=CONCURRENCY,
        )
    print(
        f"closed loop: a run alone takes {capacity.alone_s:.2f} s; with {CONCURRENCY} in flight "
        f"{capacity.runs_per_s:.2f} runs/s"
    )
    return {
        "system": system.name,
        "title": system.title,
        "policy": system.policy,
        "instances": speed,
        "capacity": asdict(capacity),
        "runs": [],
    }


def planned_load(
    args: argparse.Namespace, result: dict[str, Any], chosen: list[Question]
) -> list[PlannedRun]:
    """Choose rate and promises from what the first system showed."""
    capacity = Capacity(**result["capacity"])
    rate = args.load * capacity.runs_per_s
    slo_s = {
        ASK: round(max(0.5, 4 * capacity.alone_s), 1),
        REPORT: round(max(4.0, 30 * capacity.alone_s), 1),
    }
    print(
        f"load for both systems: {args.num_workflows} runs, {rate:.2f} per second "
        f"({args.load:.0%} of that closed loop), seed {args.seed}; "
        f"deadlines: {ASK} {slo_s[ASK]:g} s, {REPORT} {slo_s[REPORT]:g} s"
    )
    return plan(chosen[-args.num_workflows :], rate, slo_s, args.seed)


def finish(
    args: argparse.Namespace,
    results: list[dict[str, Any]],
    planned: list[PlannedRun],
    wall_s: float,
) -> int:
    """Print the table, write the files; return the exit status."""
    measured = {
        f"{result['system']}, before the load": f"{speeds(result['instances'])}; closed loop: "
        + ", ".join(f"{name} {value:.2f}" for name, value in result["capacity"].items())
        for result in results
    }
    document = {
        "conditions": conditions(args, results, planned, wall_s) | measured,
        "systems": results,
    }
    (args.output_dir / "results.json").write_text(
        json.dumps(document, indent=1) + "\n", encoding="utf-8"
    )
    (args.output_dir / "report.html").write_text(html_report(document), encoding="utf-8")
    print(f"\n{comparison(results)}\n")
    if warning := caution(results):
        print(f"{warning}\n")
    errors = [
        f"{result['system']}: {run['id']}: {run['error'] or run['status']}"
        for result in results
        for run in result["runs"]
        if run["sql"] is None
    ]
    for error in errors:
        print(f"not answered: {error}", file=sys.stderr)
    shown = os.path.relpath(args.output_dir)
    print(
        f"{wall_s:.0f} s in all. Every run and call: {shown}/report.html, {shown}/results.json; "
        f"logs: {shown}/logs/"
    )
    return 1 if errors else 0


def conditions(
    args: argparse.Namespace,
    results: list[dict[str, Any]],
    planned: list[PlannedRun],
    wall_s: float,
) -> dict[str, Any]:
    """Return what the numbers were made under."""
    return {
        "fidelity": "level 4: real vLLM servers, a real small model, CPUs",
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, load average "
        f"{os.getloadavg()[0]:.1f} at the end",
        "vllm": _version("vllm"),
        "model": args.model.name,
        "num_workflows": len(planned),
        "load": args.load,
        "seed": args.seed,
        "slo_s": {run.tenant: run.slo_s for run in planned},
        "last_arrival_s": max(run.arrival_s for run in planned),
        "num_slices": NUM_SLICES,
        "agent": asdict(OPTIONS),
        "wall_s": wall_s,
        "caution": caution(results),
    }


def _count(text: str) -> int:
    number = int(text)
    if not 10 <= number <= 300:
        raise argparse.ArgumentTypeError(f"wanted 10 to 300, got {text}")
    return number


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


async def _until_told(body: Coroutine[Any, Any, int]) -> int:
    """Run `body`; SIGTERM cancels it as Ctrl-C does, so that its processes end."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await body


if __name__ == "__main__":
    sys.exit(main())
