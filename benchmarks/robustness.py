"""How policies bear what the router is wrong about, and workloads other than one: a table.

python benchmarks/robustness.py --seeds 10 --json robustness.json

Level 1. Each line is one comparison of `benchmarks/compare.py` with that `--disturb` or `--trace`.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from vllm_workflow.bench.compare import Comparison, Options, column_mean, compare
from vllm_workflow.bench.compare_flags import writable
from vllm_workflow.bench.compare_jobs import find_capacity
from vllm_workflow.bench.disturbance import parse
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.metrics import mean
from vllm_workflow.sim.workloads import builtin_names

AGAINST = "least-outstanding+fcfs"
CASES = (
    *("none", "cold", "lengths:0.6", "profiles:0.6"),
    *("slow:a100-0:2", "slow:a6000-0:2", "slow:l40s-0:2"),
)


def main() -> int:
    flags = _parser()
    args = flags.parse_args()
    cases = [("builtin:chess", disturb) for disturb in CASES]
    cases += [(name, "none") for name in (*builtin_names(), *args.trace) if name != "builtin:chess"]
    rows = []
    try:
        writable(args.json)
        with tqdm(total=0, file=sys.stderr, unit="run") as bar:
            for trace, disturb in cases:
                found = compare(_options(args, trace, disturb), bar)
                rows += _rows(found, disturb, args.load)
    except ConfigError as e:
        flags.error(str(e))
    print(_table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"wrote {args.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    made.add_argument("--policies", nargs="+", default=["workflow"], metavar="POLICY")
    made.add_argument("--trace", nargs="+", default=[], metavar="TRACE", help="further workloads")
    made.add_argument("--load", type=float, default=0.85, help="of the capacity (%(default)s)")
    made.add_argument("--runs", type=int, default=150, help="per simulation (%(default)s)")
    made.add_argument("--seeds", type=int, default=10, help="(%(default)s)")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all rows")
    return made


@lru_cache
def _capacity(trace: str) -> float:
    return find_capacity(Options().setup, trace).rate


def _options(args: argparse.Namespace, trace: str, disturb: str) -> Options:
    return Options(
        traces=(trace,),
        setup=replace(Options().setup, num_runs=args.runs, disturbance=parse(disturb)),
        rates=(args.load * _capacity(trace),),
        policies=(*args.policies, AGAINST),
        against=AGAINST,
        num_seeds=args.seeds,
        num_jobs=args.jobs,
    )


def _rows(found: Comparison, disturb: str, load: float) -> list[dict[str, object]]:
    """One row per policy: attainment, and the ratio of P95 to the policy it is held against."""
    rows: list[dict[str, object]] = []
    (setting,) = found.settings
    ratios = {pair["policy"]: pair for pair in found.pairs if pair["metric"] == "p95_s"}
    for entry in found.entries:
        of_it = found.rows_of(setting, entry.name)
        pair = ratios.get(entry.name, {})
        rows.append(
            {
                "trace": setting.trace,
                "disturbance": disturb,
                "policy": entry.name,
                "load": load,
                "rate": setting.rate,
                "attainment": mean([row["attainment"] for row in of_it]),
                "worst_attainment": min(row["attainment"] for row in of_it),
                "p95_s": column_mean(of_it, "p95_s"),
                "p95_ratio": pair.get("ratio"),
                "p95_ratio_low": pair.get("ci_low"),
                "p95_ratio_high": pair.get("ci_high"),
                "seeds": len(of_it),
            }
        )
    return rows


def _table(rows: list[dict[str, object]]) -> str:
    lines = [
        f"| workload | wrong | policy | within SLO (worst seed) | P95, s | P95 over {AGAINST} |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = (
            "{p95_ratio:.2f} [{p95_ratio_low:.2f}, {p95_ratio_high:.2f}]".format(**row)
            if row["p95_ratio"] is not None
            else "1"
        )
        lines.append(
            "| {trace} | {disturbance} | {policy} | {attainment:.1%} ({worst_attainment:.1%}) | "
            "{p95_s:.0f} | ".format(**row)
            + f"{ratio} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
