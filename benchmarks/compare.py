"""Compare policies on the same runs and arrivals: by simulation, or as real servers and routers.

python benchmarks/compare.py --loads 0.85 1.0 --policies workflow baselines --json compare.json
python benchmarks/compare.py --level 3 --runs 50 --loads 0.85 --seeds 1 --policies workflow peers
"""

import argparse
import json
import shlex
import sys

from tqdm import tqdm

from vllm_workflow.bench import compare_report, system_report
from vllm_workflow.bench.compare import compare
from vllm_workflow.bench.compare_flags import options, parser, system_options, writable
from vllm_workflow.bench.compare_text import tables
from vllm_workflow.bench.system_compare import compare_systems
from vllm_workflow.core.errors import ConfigError, WorkflowError


def main() -> int:
    flags = parser()
    args = flags.parse_args()
    command = ["python", shlex.join(sys.argv)]
    try:
        wanted = options(args)
        writable(args.json, args.html)
        with tqdm(total=0, file=sys.stderr, unit="run") as bar:
            if wanted.level == 3:
                systems = compare_systems(wanted, system_options(args), bar)
            else:
                comparison = compare(wanted, bar)
    except ConfigError as e:
        flags.error(str(e))
    except WorkflowError as e:  # servers that do not start, for one
        print(f"{flags.prog}: {e}", file=sys.stderr)
        return 1
    if wanted.level == 3:
        print(system_report.text(systems), end="")
        _write(args, system_report.document(systems, command), system_report.page(systems, command))
    else:
        print(tables(comparison), end="")
        page = compare_report.page(comparison, command)
        _write(args, compare_report.document(comparison, command), page)
    return 0


def _write(args: argparse.Namespace, document: dict[str, object], page: str | None) -> None:
    if args.json:
        text = json.dumps(document, indent=1, allow_nan=False)
        args.json.write_text(text + "\n", encoding="utf-8")
        print(f"wrote {args.json}")
    if args.html and page is not None:
        args.html.write_text(page, encoding="utf-8")
        print(f"wrote {args.html}")


if __name__ == "__main__":
    sys.exit(main())
