"""Stands for `vllm serve`: a real process, with children that ignore SIGTERM as an engine may.

`fake_server.py PORT FACTS.json [--die-with LINE] [--hang]` writes what it was given to
FACTS.json. Standard library only, so that it starts in milliseconds.
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        models = {"object": "list", "data": [{"id": "m", "object": "model"}]}
        body = json.dumps(models if self.path == "/v1/models" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("facts", type=Path)
    parser.add_argument("--die-with")
    parser.add_argument("--hang", action="store_true")
    parser.add_argument("--max-num-seqs", type=int)
    args = parser.parse_args()
    # One child stays in the group, one leaves it.
    children = [
        subprocess.Popen([sys.executable, "-c", STUBBORN], start_new_session=own)
        for own in (False, True)
    ]
    facts = {
        "pids": [os.getpid(), *(child.pid for child in children)],
        "cpus": sorted(os.sched_getaffinity(0)),
        "nice": os.nice(0),
        "env": dict(os.environ),
        "max_num_seqs": args.max_num_seqs,
    }
    args.facts.with_suffix(".tmp").write_text(json.dumps(facts), encoding="utf-8")
    args.facts.with_suffix(".tmp").replace(args.facts)
    if args.die_with:
        print("INFO loading", args.die_with, "INFO bye", sep="\n", flush=True)
        sys.exit(3)
    if args.hang:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    http.server.ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
