"""Any sequence of faults, under load: no run is lost, and in the end nothing is held."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.conftest import holds_nothing, is_healthy, routed, until
from tests.faults.load import Load, running
from tests.faults.processes import EngineProcess, engines
from tests.faults.test_clients_leave import connect
from vllm_workflow.router.app import Router

NUM_RUNS = 16


async def restart(engine: EngineProcess) -> None:
    engine.go_on()
    await engine.kill()
    await engine.start()


async def stop_for_a_while(engine: EngineProcess) -> None:
    engine.stop()
    await asyncio.sleep(0.4)
    engine.go_on()


async def fail_for_a_while(engine: EngineProcess) -> None:
    await engine.control(status=503)
    await asyncio.sleep(0.1)
    await engine.control(status=200)


async def cut(engine: EngineProcess) -> None:
    await engine.control(cut_at=400, cut_by="reset", num_cuts=3)


async def be_told_to_stop(engine: EngineProcess, closing: str) -> None:
    await engine.control(closing=closing)
    await asyncio.sleep(0.2)
    await restart(engine)


async def be_slow_for_a_while(engine: EngineProcess) -> None:
    await engine.control(slowness=10.0)
    await asyncio.sleep(0.2)
    await engine.control(slowness=1.0)


FAULTS: dict[str, Callable[[EngineProcess], Awaitable[None]]] = {
    "restart": restart,
    "stop": stop_for_a_while,
    "fail": fail_for_a_while,
    "cut": cut,
    "slow": be_slow_for_a_while,
    "end answers": partial(be_told_to_stop, closing="abort"),
    "keep connections": partial(be_told_to_stop, closing="hang"),
}
STEPS = st.tuples(
    st.sampled_from([*FAULTS, "leave"]), st.integers(0, 2), st.sampled_from([0.0, 0.05, 0.15])
)


@given(st.lists(STEPS, min_size=3, max_size=8), st.sampled_from([2, 256]))
@settings(max_examples=5, suppress_health_check=list(HealthCheck))
def test_after_any_storm_no_run_is_lost_and_nothing_is_held(
    steps: list[tuple[str, int, float]], seats: int
) -> None:
    asyncio.run(storm(steps, seats))


async def storm(steps: list[tuple[str, int, float]], seats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with (
            asyncio.timeout(40),
            engines(Path(folder), 3) as found,
            routed(found, seats=seats) as router,
        ):
            async with running(Load(url=router.url, num_calls=4, budget_s=30.0), NUM_RUNS) as load:
                for fault, index, pause_s in steps:
                    await asyncio.sleep(pause_s)
                    if fault == "leave":
                        await come_and_leave(router, pause_s)
                    else:
                        await FAULTS[fault](found[index])
            assert load.tally.num_lost_runs == load.tally.num_truncated == 0
            await until(lambda: all(is_healthy(router, i) for i in "abc"))
            await until(lambda: holds_nothing(router))


async def come_and_leave(router: Router, after_s: float) -> None:
    calls = [await connect(router, f"leaving-{i}", stream=i % 2 == 0) for i in range(8)]
    await asyncio.sleep(after_s)
    for _, writer in calls:
        writer.close()
