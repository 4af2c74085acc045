"""How far a profile measured on an emulated GPU is from what that GPU was told to be.

python benchmarks/profile_error.py measured.json --gpu A100-80G --model-shape llama-3.1-70b \
    --weight-bits 4
"""

import argparse
import sys
from pathlib import Path

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.hardware import WEIGHT_BITS
from vllm_workflow.profiles import catalogue
from vllm_workflow.profiles.profile import LatencyProfile

PROMPTS = (256, 1024, 4096, 8192)
BATCHES = (1, 4, 16, 32)
CONTEXTS = (500, 4000)


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    flags.add_argument("profiles", nargs="+", type=Path, metavar="FILE")
    flags.add_argument("--gpu", required=True)
    flags.add_argument("--model-shape", required=True)
    flags.add_argument("--weight-bits", type=int, choices=WEIGHT_BITS, default=16)
    flags.add_argument("--tp", type=int, default=1)
    args = flags.parse_args()
    try:
        true = catalogue.profile(
            args.gpu, args.model_shape, tp=args.tp, weight_bits=args.weight_bits
        ).latency
        measured = {path: LatencyProfile.from_file(path).latency for path in args.profiles}
    except ConfigError as e:
        flags.error(str(e))
    print("| seconds, measured over true | " + " | ".join(map(str, measured)) + " |")
    print("|---" * (len(measured) + 1) + "|")
    for num_tokens in PROMPTS:
        ratios = [m.prefill_s(num_tokens) / true.prefill_s(num_tokens) for m in measured.values()]
        _line(f"prefill of {num_tokens}", ratios)
    for size in BATCHES:
        for context in CONTEXTS:
            ratios = [
                m.decode_step_s(size, context) / true.decode_step_s(size, context)
                for m in measured.values()
            ]
            _line(f"step of {size} decodes, context {context}", ratios)
    return 0


def _line(what: str, ratios: list[float]) -> None:
    print(f"| {what} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    sys.exit(main())
