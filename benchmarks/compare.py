"""Compare policies on the same runs and arrivals, by simulation.

python benchmarks/compare.py --loads 0.85 1.0 --policies workflow baselines --json compare.json
"""

import json
import shlex
import sys

from tqdm import tqdm

from vllm_workflow.bench.compare import compare
from vllm_workflow.bench.compare_flags import options, parser, writable
from vllm_workflow.bench.compare_report import document, page
from vllm_workflow.bench.compare_text import tables
from vllm_workflow.core.errors import ConfigError


def main() -> int:
    flags = parser()
    args = flags.parse_args()
    command = ["python", shlex.join(sys.argv)]
    try:
        wanted = options(args)
        writable(args.json, args.html)
        with tqdm(total=0, file=sys.stderr, unit="sim") as bar:
            comparison = compare(wanted, bar)
    except ConfigError as e:
        flags.error(str(e))
    print(tables(comparison), end="")
    if args.json:
        text = json.dumps(document(comparison, command), indent=1, allow_nan=False)
        args.json.write_text(text + "\n", encoding="utf-8")
        print(f"wrote {args.json}")
    if args.html:
        args.html.write_text(page(comparison, command), encoding="utf-8")
        print(f"wrote {args.html}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
