"""The process of one online tuning: a job on stdin, a verdict on stdout.

    python -m vllm_workflow.sim.tuner_process NICE TIMEOUT_S < job.json

Started by a router, see `router.tuning`, which also says what a job has in it. Writes
`policy_file` only if there is a better policy. Exits with status 2 and one line on stderr if the
job or the log cannot be used. Ends itself when it takes too long, should nobody else do so.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys

_GRACE_S = 5.0


def main() -> int:
    """Do the job on stdin; return the exit status."""
    os.nice(int(sys.argv[1]))
    if hasattr(signal, "SIGALRM"):  # not on Windows
        signal.alarm(math.ceil(float(sys.argv[2]) + _GRACE_S))
    # Importing takes longer than all before: it too is done when nothing else wants to run.
    from vllm_workflow.core.errors import WorkflowError
    from vllm_workflow.sim.tuner_job import tuned

    try:
        verdict = tuned(json.load(sys.stdin))
    except WorkflowError as e:
        sys.stderr.write(f"{e}\n")
        return 2
    sys.stdout.write(json.dumps(verdict, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
