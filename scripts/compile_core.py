"""Compile dispatcher, engines of level 1 and a call's way through the router to machine code.

    python scripts/compile_core.py
    PYTHONPATH=out/compiled python benchmarks/sim_speed.py

The package is copied to `out/compiled` and compiled there by mypyc, unchanged. It is used by
whoever puts that folder on PYTHONPATH and by nobody else, so an edited source is never shadowed by
an old binary; run this again after an edit. Needs mypy, a C compiler and Python's headers.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from setuptools import Extension

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "vllm_workflow"
CORE = (
    *("account", "admission", "admissions", "backlog", "call_events", "choice", "deadline"),
    *("dispatch", "dispatcher", "fleet", "handover", "histogram", "holders", "instances"),
    *("latency", "learned", "lengths", "pace", "predictor", "preemption", "prefix", "remaining"),
    *("rooms", "run_path", "runs", "tenant_account", "tenant_admission", "tenant_ledger"),
    *("tenant_queue", "tenant_room", "transitions", "types", "value", "waiting_room"),
)
SIM = (
    *("batch", "decode_batch", "engine", "kernel", "live", "prefix_cache", "results"),
    *("run_state", "seats", "simulator", "step_series", "types"),
)
# What each call passes; what inherits from a class of another library is left as it is.
ROUTER = (
    *("answer", "attempt", "auth", "binder", "board", "body", "call", "connection", "dialects"),
    *(
        "exchange",
        "forward",
        "head",
        "headers",
        "limits",
        "metrics",
        "once",
        "plain",
        "plain_connection",
    ),
    *("pool", "prefixes", "proxy", "runs", "series", "spelling", "tries", "usage", "watch", "wire"),
)
MODULES = [
    *(f"{PACKAGE}/core/{name}.py" for name in CORE),
    *(f"{PACKAGE}/sim/{name}.py" for name in SIM),
    *(f"{PACKAGE}/router/{name}.py" for name in ROUTER),
]
STAMP = "compiled_from"
OPT_LEVEL = "3"
_BUILD = """
import sys
from compile_core import extensions
from setuptools import setup

opt_level, *command = sys.argv[1:]
setup(name="compiled", packages=[], ext_modules=extensions(opt_level), script_args=command)
"""


def extensions(opt_level: str = OPT_LEVEL) -> list[Extension]:
    """Return what `setup` compiles, for the package in the current folder."""
    from mypyc.build import mypycify

    flags = ["--ignore-missing-imports", "--follow-imports=silent"]
    made: list[Extension] = mypycify([*flags, *MODULES], opt_level=opt_level, debug_level="0")
    return made


def main() -> None:
    """Copy what has changed; compile, unless what is compiled has not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "compiled", metavar="DIR")
    parser.add_argument(
        "--opt-level",
        default=OPT_LEVEL,
        choices=["0", "1", "2", "3"],
        help="of the C compiler; less compiles faster (%(default)s)",
    )
    args = parser.parse_args()
    out: Path = args.out.resolve()
    stamp = _stamp(args.opt_level)
    is_current = (out / STAMP).is_file() and (out / STAMP).read_text(encoding="utf-8") == stamp
    if not is_current:
        _require_tools()
        if out.exists() and not (out / PACKAGE).is_dir() and any(out.iterdir()):
            sys.exit(f"{out}: expected an empty folder or an earlier one of this script")
        shutil.rmtree(out, ignore_errors=True)
    left_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / PACKAGE, out / PACKAGE, ignore=left_out, dirs_exist_ok=True)
    if is_current:
        print(f"{out} is up to date")
        return
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", _BUILD, args.opt_level, "-q", "build_ext", "--inplace"]
    if subprocess.run(command, cwd=out, env=environment, check=False).returncode:
        sys.exit(f"mypyc could not compile the package, see above; {out} is of no use")
    shutil.rmtree(out / "build")
    (out / STAMP).write_text(stamp, encoding="utf-8")
    print(f"compiled; use it with PYTHONPATH={out}")


def _stamp(opt_level: str) -> str:
    """Return what tells one compilation from another."""
    digest = hashlib.sha256(f"{sys.version} {opt_level}".encode() + Path(__file__).read_bytes())
    for module in MODULES:
        digest.update((ROOT / module).read_bytes())
    return digest.hexdigest()


def _require_tools() -> None:
    try:
        import mypyc.build  # noqa: F401
        import setuptools  # noqa: F401
    except ModuleNotFoundError as e:
        sys.exit(f"compiling needs mypy and setuptools in this environment: {e}")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        sys.exit(f"compiling needs Python's headers (python3-dev): {header} is not there")
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(f"compiling needs a C compiler: {compiler} is not on the PATH; CC names another")


if __name__ == "__main__":
    main()
