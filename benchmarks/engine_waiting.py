"""How long calls wait at an engine once they are sent: all that stealing them back could save.

python benchmarks/engine_waiting.py --loads 0.85 1.0 --seeds 5

Level 1. Waiting is the time from sending to the first token, less the call's own prefill alone
on that instance; sharing its steps with other prefills counts as waiting too, so this is too much
rather than too little.
"""

import argparse
import statistics
import sys

from vllm_workflow.bench.compare import Options
from vllm_workflow.bench.compare_jobs import Setting, find_capacity, inputs_of
from vllm_workflow.core import policy_names
from vllm_workflow.core.metrics import percentile
from vllm_workflow.sim.simulator import simulate


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    flags.add_argument("--policies", nargs="+", default=["workflow", "predicted-finish"])
    flags.add_argument("--trace", default="builtin:chess")
    flags.add_argument("--loads", nargs="+", type=float, default=[0.85, 1.0])
    flags.add_argument("--seeds", type=int, default=5)
    args = flags.parse_args()
    setup = Options().setup
    fleet = setup.build_fleet()
    latencies = {each.instance.instance_id: each.latency for each in fleet}
    rate = find_capacity(setup, args.trace).rate
    print("| policy | load | waits over 1 s | P50 | P95 | share of the time of calls |")
    print("|---|---|---|---|---|---|")
    for name in args.policies:
        for load in args.loads:
            setting = Setting(
                trace=args.trace, rate=load * rate, load=load, slo_scale=5.0, slo_s=None
            )
            waits, shares = [], []
            for seed in range(args.seeds):
                inputs = inputs_of(setup, setting, seed)
                result = simulate(
                    inputs.runs,
                    fleet,
                    policy_names.parse(name),
                    arrivals=inputs.arrivals,
                    workflows=inputs.workflows,
                )
                of_seed = [
                    call.first_token_time
                    - call.sent_time
                    - latencies[call.instance_id].prefill_s(
                        call.num_prompt_tokens - call.num_cached_tokens,
                        num_cached_tokens=call.num_cached_tokens,
                    )
                    for call in result.calls
                ]
                whole = sum(call.end_time - call.submit_time for call in result.calls)
                shares.append(sum(of_seed) / whole)
                waits += of_seed
            spread = f"{min(shares):.1%} to {max(shares):.1%}"
            print(
                f"| {name} | {load} | {sum(w > 1.0 for w in waits) / len(waits):.1%} | "
                f"{percentile(waits, 50.0):.2f} s | {percentile(waits, 95.0):.2f} s | "
                f"{statistics.mean(shares):.1%} ({spread}) |"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
