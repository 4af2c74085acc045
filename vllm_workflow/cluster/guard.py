"""Stands between `up` and one command, so that nothing of the command outlives `up`.

Run as a script with the standard library only: `guard.py SETTINGS COMMAND...`, where SETTINGS
is JSON `{"parent", "grace_s", "cpus", "nice"}`. The command gets a process group of its own.
When SIGTERM comes, or the parent is gone however it ended, the group is asked to end, and
killed after the grace; so is every process that left the group, because on Linux orphans of
the command become children of the guard. Ends with the command's exit status.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.1
_ORPHAN_GRACE_S = 2.0
"""Grace where the parent is gone and nobody waits for a clean end."""
_LINUX = sys.platform.startswith("linux")


def main(argv: Sequence[str]) -> int:
    """Run the command until it ends or must end; return its exit status as a shell does."""
    settings, command = json.loads(argv[0]), list(argv[1:])
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: stop.append(number))
    if _LINUX:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if settings.get("cpus") and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, settings["cpus"])
    os.nice(settings.get("nice", 0))
    try:
        child = subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_guard)
    except OSError as e:
        sys.stderr.write(f"error: cannot start {command[0]}: {e.strerror}\n")
        return 127
    orphaned = False
    while child.poll() is None and not stop and not orphaned:
        orphaned = os.getppid() != settings["parent"]
        time.sleep(_POLL_S)
    if child.returncode is None:
        _end(child, min(settings["grace_s"], _ORPHAN_GRACE_S if orphaned else 1e9))
    _kill_rest(child.pid)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _die_with_guard() -> None:
    """Make the kernel kill the command if the guard is killed. Runs in the child."""
    if _LINUX:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end(child: subprocess.Popen[bytes], grace_s: float) -> None:
    _signal_group(child.pid, signal.SIGTERM)
    try:
        child.wait(timeout=grace_s)
    except subprocess.TimeoutExpired:
        _signal_group(child.pid, signal.SIGKILL)
        child.wait()


def _kill_rest(group: int) -> None:
    """Kill what is left of the command's group, and orphans that had left it."""
    _signal_group(group, signal.SIGKILL)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while True:
        with contextlib.suppress(OSError, ProcessLookupError):
            for pid in children.read_text(encoding="ascii").split():
                os.kill(int(pid), signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(_POLL_S / 10)
        except ChildProcessError:
            return


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
