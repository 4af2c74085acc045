"""The compiled copy of core and simulator does what the sources do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypyc")

ROOT = Path(__file__).parents[2]
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


@pytest.mark.slow
def test_the_compiled_copy_decides_and_simulates_the_same_to_the_last_bit() -> None:
    out = ROOT / "out" / "compiled"
    script = [sys.executable, str(ROOT / "scripts" / "compile_core.py"), "--out", str(out)]
    built = subprocess.run(script, capture_output=True, text=True)
    if "compiling needs" in built.stderr:
        pytest.skip(built.stderr)
    assert built.returncode == 0, built.stderr

    interpreted, compiled = simulated_by(ROOT), simulated_by(out)

    assert (interpreted[0], compiled[0]) == ("False", "True")
    assert interpreted[1:] == compiled[1:]
