"""The compiled copy of core, simulator and router does what the sources do."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

pytest.importorskip("mypyc")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "compile_core.py"
SIMULATE = """
import dataclasses, hashlib
from vllm_workflow.core import policy_names
from vllm_workflow.core.events import to_json
from vllm_workflow.core.tenants import TenantConfig, TenantsConfig
from vllm_workflow.sim.bounds import with_slo_scale
from vllm_workflow.sim.compiled import is_compiled
from vllm_workflow.sim.declare import declared
from vllm_workflow.sim.fleet import fleet_of
from vllm_workflow.sim.simulator import Outage, simulate
from vllm_workflow.sim.workloads import load

fleet = fleet_of("A100:2,L40S:1", model_shape="llama-3.1-70b", weight_bits=4,
                 gpu_memory_utilization=0.95)
fleet = [dataclasses.replace(f, instance=dataclasses.replace(f.instance, max_num_seqs=6))
         for f in fleet]
print(is_compiled())


def show(name, policy, trace, **others):
    log = []
    runs = with_slo_scale(load(trace, 20, 0).runs, 4.0, fleet)
    runs = [dataclasses.replace(run, tenant=f"t{n % 3}") for n, run in enumerate(runs)]
    result = simulate(runs, fleet, policy_names.parse(policy),
                      arrivals=[2.0 * n for n in range(20)],
                      record=lambda event: log.append(to_json(event)),
                      outages=[Outage(instance_id="a100-0", start_s=30.0, end_s=60.0)], **others)
    text = repr((result.runs, result.calls, log))
    print(name, len(log), hashlib.sha256(text.encode()).hexdigest())


for policy in ("workflow", "predicted-finish+slack+late+relegate", "hexgen+urgency",
               "power-of-two+sjf", "least-outstanding+atlas"):
    show(policy, policy, "builtin:chess")
show("seats and blocks are taken away", "workflow", "builtin:chase")
show("declared", "workflow", "builtin:chess", workflows=declared(load("builtin:chess", 20, 1).runs))
show("tenants", "workflow", "builtin:chess",
     tenants=TenantsConfig(default=TenantConfig(max_concurrent_runs=3)))
"""


def simulated_by(path: Path) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", SIMULATE]
    done = subprocess.run(command, env=environment, cwd=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# What talks to the router as clients do; others look inside it, or replace what is in it.
ROUTER_TESTS = (
    *("failover", "hostile", "last_answers", "limits", "once", "plain", "proxy", "sent_ahead"),
    *("slow_readers", "spelling"),
)
NOT_FOR_IT = (
    # It inherits from a class that is compiled.
    "tests/router/test_once.py::test_a_long_answer_goes_to_nobody_who_has_just_left",
)
"""By name: whatever else fails with the copy is a defect of it, whatever it says."""


@pytest.fixture(scope="module")
def compiled() -> Path:
    """The copy, compiled without optimization, which takes less time than it saves here."""
    out = ROOT / "out" / "compiled_quick"
    script = [sys.executable, str(SCRIPT), "--out", str(out), "--opt-level", "0"]
    built = subprocess.run(script, capture_output=True, text=True)
    if built.stderr.startswith("compiling needs "):  # said before anything is done
        pytest.skip(built.stderr)
    assert built.returncode == 0, built.stderr
    return out


@pytest.mark.slow
def test_the_compiled_copy_decides_and_simulates_the_same_to_the_last_bit(compiled: Path) -> None:
    of_sources, of_copy = simulated_by(ROOT), simulated_by(compiled)

    assert (of_sources[0], of_copy[0]) == ("False", "True")
    assert of_sources[1:] == of_copy[1:]


@pytest.mark.slow
def test_the_compiled_router_passes_the_tests_of_the_router(compiled: Path) -> None:
    tests = [str(ROOT / "tests" / "router" / f"test_{name}.py") for name in ROUTER_TESTS]
    options = ["-o", f"pythonpath={compiled} {ROOT}", "-p", "tests.compiled", "-q", "-x"]
    options += [f"--deselect={name}" for name in NOT_FOR_IT]
    command = [sys.executable, "-P", "-m", "pytest", *options, *tests]
    environment = {**os.environ, "PYTHONPATH": f"{compiled}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def handled(tree: ast.AST) -> Iterator[ast.stmt]:
    """Yield what runs while an exception is handled."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            yield from node.finalbody
            for handler in node.handlers:
                yield from handler.body


def test_nothing_that_is_compiled_waits_while_it_handles_an_exception() -> None:
    """mypyc does not put the exception away meanwhile: all that runs would have it as context."""
    spec = spec_from_file_location("compile_core", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    waits = (ast.Await, ast.Yield, ast.YieldFrom, ast.AsyncFor, ast.AsyncWith)
    found = [
        f"{name}:{each.lineno}"
        for name in script.MODULES
        for statement in handled(ast.parse((ROOT / name).read_bytes()))
        for each in ast.walk(statement)
        if isinstance(each, waits)
    ]

    assert found == []
