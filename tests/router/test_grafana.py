"""docs/grafana.json: what it asks Prometheus for exists, with these labels."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes import FakeEngine
from tests.router.conftest import Routing
from vllm_workflow.engine.stats import HELP_TEXTS

pytestmark = pytest.mark.anyio
PAGE = Path(__file__).parents[2] / "docs" / "grafana.json"
ROUTER = "vllm_workflow:router_"


def expressions() -> list[str]:
    panels = json.loads(PAGE.read_text(encoding="utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def series(expression: str) -> list[tuple[str, set[str]]]:
    """Names of the series in an expression, with the labels that it picks or sums by."""
    by = {name for group in re.findall(r"by \(([^)]*)\)", expression) for name in group.split(", ")}
    found = re.findall(r"(vllm_workflow:\w+)(?:\{([^}]*)\})?", expression)
    return [(name, by | set(re.findall(r"(\w+)=", picked))) for name, picked in found]


async def test_every_series_of_the_router_is_there_with_its_labels(
    routing: Routing, tmp_path: Path
) -> None:
    broken = FakeEngine(dies_after=1)
    async with (
        FakeEngine().serving() as engine,
        broken.serving(),
        routing(broken, engine, store={"path": str(tmp_path / "state.db")}) as client,
    ):
        headers = {"X-Workflow-Id": "r", "X-Workflow-Final": "true", "X-Workflow-Slo-Ms": "60000"}
        while broken.received == []:
            async with client.post(headers=headers) as response:
                await response.read()
        async with client.get("/metrics") as response:
            text = await response.text()
    exposed: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        exposed.setdefault(family.name, set())
        exposed.setdefault(f"{family.name}_total", set())
        for sample in family.samples:
            exposed.setdefault(sample.name, set()).update(sample.labels)

    for expression in expressions():
        for name, labels in series(expression):
            if name.startswith(ROUTER):
                assert name in exposed, expression
                # A series that nothing has happened to yet shows no labels.
                assert not exposed[name] or labels <= exposed[name], expression


def test_every_series_of_the_engine_is_one_that_it_publishes() -> None:
    names = {
        name
        for expression in expressions()
        for name, _ in series(expression)
        if not name.startswith(ROUTER)
    }

    assert names
    for name in names:
        bare = name.removeprefix("vllm_workflow:")
        assert {bare, bare.removesuffix("_total")} & set(HELP_TEXTS), name


def test_panels_do_not_overlap() -> None:
    panels = json.loads(PAGE.read_text(encoding="utf-8"))["panels"]
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert 0 <= x < 24
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]
