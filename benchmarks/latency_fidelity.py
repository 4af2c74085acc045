"""Check the latency model against measurements of real vLLM servers; print Markdown tables.

    python benchmarks/latency_fidelity.py --shared ../shared

The measurements are not part of the repository; `--shared` names the folder that holds
`measured/` and `latency/`. Everything is deterministic: the same files, the same figures.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from serving_tables import ServingRow, read_pairs, read_serving_rows
from step_replay import Replayed, replay

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.fit import Fit, evaluate, fit
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.core.windows import RequestTiming, decode_windows
from vllm_workflow.profiles import catalogue
from vllm_workflow.profiles.profile import LatencyProfile
from vllm_workflow.profiling.tables import read_table

RUN = "measured/vllm_run_RTXPRO6000_Llama-3.1-8B/requests.jsonl"
SERVING = "measured/inferencex_vllm_llama_h100_h200.csv"
_RUN_COLUMNS = ("input_toks", "output_toks", "queued_ts", "first_token_ts", "last_token_ts")
_RUN_SEATS = 128
_SINGLE_GPUS = ("A100", "A6000", "L40S")


@dataclass(frozen=True, slots=True)
class MeasuredRequest:
    """One request of the real run."""

    queued_time: float
    timing: RequestTiming

    @property
    def replayed(self) -> Replayed:
        return Replayed(
            arrival_time=self.queued_time,
            num_prompt_tokens=self.timing.num_prompt_tokens,
            num_output_tokens=self.timing.num_output_tokens,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shared",
        type=Path,
        default=Path(os.environ.get("VLLM_WORKFLOW_SHARED", "../shared")),
        help="folder of the measurements (default: $VLLM_WORKFLOW_SHARED, else %(default)s)",
    )
    parser.add_argument(
        "--write-profiles",
        type=Path,
        metavar="DIR",
        help="write profiles fitted to all of the data, as vllm_workflow/profiles/measured has",
    )
    args = parser.parse_args()
    try:
        run = _read_run(args.shared / RUN)
        serving = read_serving_rows(args.shared / SERVING)
        print(*_run_report(run), *_serving_report(serving), sep="\n")
        print(*_single_report(args.shared / "latency"), sep="\n")
        if args.write_profiles:
            _write_profiles(args.write_profiles, run, serving)
    except ConfigError as e:
        print(f"latency_fidelity: {e}", file=sys.stderr)
        return 2
    return 0


def _read_run(path: Path) -> list[MeasuredRequest]:
    def build(row: Mapping[str, float]) -> MeasuredRequest:
        return MeasuredRequest(
            queued_time=row["queued_ts"],
            timing=RequestTiming(
                first_token_time=row["first_token_ts"],
                last_token_time=row["last_token_ts"],
                num_prompt_tokens=int(row["input_toks"]),
                num_output_tokens=int(row["output_toks"]),
            ),
        )

    return sorted(read_table(path, _RUN_COLUMNS, build), key=lambda r: r.queued_time)


def _fit_run(run: Sequence[MeasuredRequest], targets: Sequence[MeasuredRequest]) -> Fit:
    """Fit to the decode windows of `targets`, amid everything that `run` did."""
    prior = catalogue.deployment("RTX-PRO-6000", "llama-3.1-8b").latency()
    windows = decode_windows(
        [r.timing for r in run],
        max_num_batched_tokens=prior.max_num_batched_tokens,
        targets=[t.timing for t in targets],
    )
    return fit(windows, prior)


def _run_report(run: Sequence[MeasuredRequest]) -> list[str]:
    """Fit to one part of the requests, replay all, compare the others."""
    prior = catalogue.deployment("RTX-PRO-6000", "llama-3.1-8b").latency()
    done = sorted(run, key=lambda r: r.timing.last_token_time)
    half = len(run) // 2
    parts = {
        "first half to end": (done[:half], done[half:]),
        "last half to end": (done[half:], done[:half]),
        "even arrivals": (run[::2], run[1::2]),
        "odd arrivals": (run[1::2], run[::2]),
        "first 20 to end": (done[:20], done[20:]),
        "first 50 to end": (done[:50], done[50:]),
    }
    lines = [
        f"\n## Real vLLM run, RTX PRO 6000, {len(run)} requests\n",
        "| model | tested on | E2EL mean | E2EL per request | TTFT mean | TPOT per request |",
        "|---|---|---|---|---|---|",
        _run_line("prior, nothing fitted", run, run, prior),
        _run_line("prior without context term", run, run, replace(prior, per_kv_token_s=0.0)),
        _run_line("prior, free below knee", run, run, replace(prior, per_token_below_knee_s=0.0)),
    ]
    for name, (fitted_to, tested_on) in parts.items():
        model = _fit_run(run, fitted_to).latency
        lines.append(_run_line(f"fitted to {name}", run, tested_on, model))
    return lines


def _run_line(
    name: str,
    run: Sequence[MeasuredRequest],
    tested_on: Sequence[MeasuredRequest],
    model: LatencyModel,
) -> str:
    replayed = [r.replayed for r in run]
    replay(replayed, model, max_num_seqs=_RUN_SEATS)
    predicted = {id(r): p for r, p in zip(run, replayed)}
    pairs = [(predicted[id(r)], r) for r in tested_on]
    e2el = [(p.e2el_s, r.timing.last_token_time - r.queued_time) for p, r in pairs]
    ttft = [(p.ttft_s, r.timing.first_token_time - r.queued_time) for p, r in pairs]
    tpot = [(p.tpot_s, r.timing.decode_s / r.timing.num_steps) for p, r in pairs]
    return (
        f"| {name} | {len(pairs)} | {_mean_error(e2el)} | {_each_error(e2el)} "
        f"| {_mean_error(ttft)} | {_each_error(tpot)} |"
    )


def _serving_report(rows: Sequence[ServingRow]) -> list[str]:
    lines = [
        "\n## TPOT of vLLM on H100 and H200\n",
        "| cell | rows | KV-bound, left out | prior | prior bias | left one out | roofline share |",
        "|---|---|---|---|---|---|---|",
    ]
    totals: dict[str, tuple[list[float], list[float]]] = {}
    for cell, inside in _cells(rows).items():
        usable = [r for r in inside if not r.is_kv_bound]
        from_prior = [_ratio(r, r.prior) for r in usable]
        left_out = [
            _ratio(r, fit([o.observation for o in usable if o is not r], r.prior).latency)
            for r in usable
        ]
        shares = [r.roofline_share for r in usable]
        group = totals.setdefault(cell.rsplit(" tp", 1)[0], ([], []))
        group[0].extend(from_prior)
        group[1].extend(left_out)
        lines.append(
            f"| {cell} | {len(usable)} | {len(inside) - len(usable)} | {_mean_abs(from_prior)} "
            f"| {sum(from_prior) / len(from_prior):+.1%} | {_mean_abs(left_out)} "
            f"| {min(shares):.2f} - {max(shares):.2f} |"
        )
    totals["every usable row"] = (
        [x for group in totals.values() for x in group[0]],
        [x for group in totals.values() for x in group[1]],
    )
    for name, (from_prior, left_out) in totals.items():
        bias = sum(from_prior) / len(from_prior)
        lines.append(
            f"| **{name}** | {len(from_prior)} | | {_mean_abs(from_prior)} | {bias:+.1%} "
            f"| {_mean_abs(left_out)} | |"
        )
    bound = [_ratio(r, r.prior) for r in rows if r.is_kv_bound]
    lines.append(f"\nKV-bound rows: {len(bound)}, prior {_mean_abs(bound)}.")
    return lines


def _single_report(folder: Path) -> list[str]:
    lines = [
        "\n## Single requests, Llama-3.1-70B\n",
        "| GPU | fitted to | tested on | mean | per request | p90 | µs per prompt token |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in _SINGLE_GPUS:
        # How many GPUs of which weights is not recorded; the prior only scales the ridge.
        guess = catalogue.deployment(name, "llama-3.1-70b", tp=4)
        prior = guess.latency(max_num_batched_tokens=8192)
        pairs = read_pairs(folder / "requests.txt", folder / f"llama70b_{name}.txt")
        fitted = fit(pairs[::2], prior)
        tested = evaluate(pairs[1::2], fitted.latency, fitted.request_s)
        lines.append(
            f"| {name} | {fitted.num_observations} | {tested.num_observations} "
            f"| {tested.bias:+.1%} | {tested.mean_error:.1%} | {tested.p90_error:.1%} "
            f"| {1e6 * fitted.latency.per_token_s:.0f} |"
        )
    return lines


def _cells(rows: Sequence[ServingRow]) -> dict[str, list[ServingRow]]:
    cells: dict[str, list[ServingRow]] = {}
    for row in sorted(rows, key=lambda r: (r.cell, r.num_seqs)):
        cells.setdefault(row.cell, []).append(row)
    return cells


def _write_profiles(
    folder: Path, run: Sequence[MeasuredRequest], serving: Sequence[ServingRow]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    from_run = _profile(
        catalogue.prior(catalogue.deployment("RTX-PRO-6000", "llama-3.1-8b")),
        _fit_run(run, run),
        source="window regression on a run of vLLM 0.19 published with LLMServingSim",
        conditions={"workload": "300 ShareGPT requests at 10/s", "vllm_version": "0.19.0"},
    )
    profiles = [from_run]
    for inside in _cells([r for r in serving if r.is_credible]).values():
        usable = [r for r in inside if not r.is_kv_bound]
        profiles.append(
            _profile(
                catalogue.prior(usable[0].deployment),
                fit([r.observation for r in usable], usable[0].prior),
                source="TPOT of vLLM published by InferenceX, collected by AIConfigurator",
                conditions={"rows": len(usable), "max_num_batched_tokens": "assumed"},
            )
        )
    for each in profiles:
        name = f"{each.gpu}_{each.model_shape}_tp{each.tp}_{each.weight_bits}bit.json".lower()
        (folder / name).write_text(each.to_json(), encoding="utf-8")
        print(f"wrote {folder / name}", file=sys.stderr)


def _profile(
    base: LatencyProfile, fitted: Fit, *, source: str, conditions: Mapping[str, object]
) -> LatencyProfile:
    return replace(
        base,
        latency=fitted.latency,
        source=f"{source}; KV blocks: predicted from memory and shape",
        conditions=conditions,
        residuals=fitted.residuals,
    )


def _ratio(row: ServingRow, model: LatencyModel) -> float:
    return row.observation.predicted_s(model) / row.observation.seconds - 1.0


def _mean_error(pairs: Sequence[tuple[float, float]]) -> str:
    return f"{math.fsum(p for p, _ in pairs) / math.fsum(m for _, m in pairs) - 1.0:+.1%}"


def _each_error(pairs: Sequence[tuple[float, float]]) -> str:
    return f"{math.fsum(abs(p / m - 1.0) for p, m in pairs) / len(pairs):.1%}"


def _mean_abs(ratios: Sequence[float]) -> str:
    return f"{math.fsum(abs(r) for r in ratios) / len(ratios):.1%}" if ratios else "none"


if __name__ == "__main__":
    sys.exit(main())
