"""`vllm-workflow bench serve` as a script, beside vLLM's own `benchmark_serving.py`."""

import sys

from vllm_workflow.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", "serve", *sys.argv[1:]]))
