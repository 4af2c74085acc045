from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import matplotlib
import pytest

from tests.bench.builders import call_record, run_record
from vllm_workflow.bench import plots, report
from vllm_workflow.bench.lanes import MAX_LANES, Bar, Lane, lane_of, swim_lanes

POLICIES = ("workflow", "hexgen", "round-robin")


def row(**fields: Any) -> dict[str, Any]:
    defaults = {"policy": "workflow", "rate": 0.1, "seed": 1, "attainment": 0.9}
    return {**defaults, **fields}


def lane(name: str = "r", **fields: Any) -> Lane:
    bars = (Bar(start_s=1.0, end_s=2.0, instance="one", stage="generate"),)
    defaults: dict[str, Any] = {"arrival_s": 1.0, "end_s": 2.0, "slo_s": 5.0, "bars": bars}
    return Lane(name=name, **{**defaults, **fields})


class Page(HTMLParser):
    """What of a page would be fetched, and which tags are left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [v for k, v in attrs if k in {"src", "href"} and v and v[0] != "#"]
        if tag not in {"meta", "link", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_report_has_every_section_and_needs_nothing_else() -> None:
    html = report.render(
        "Policies <compared>",
        [
            report.figure_section("Attainment", plots.attainment_by_rate([row()])),
            report.table_section("Rows", [row(policy="<b>")], report.COMPARISON_COLUMNS),
            report.conditions_section({"trace": "a&b", "seed": None}),
        ],
        cautions=["Invalid: late."],
    )
    page = Page(html)

    assert page.open == []
    assert page.fetched == []
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["Attainment", "Rows", "Conditions"]
    assert "Policies &lt;compared&gt;" in html
    assert "&lt;b&gt;" in html
    assert "a&amp;b" in html
    assert "seed: none" in html
    assert "Invalid: late." in html


def test_lines_are_means_over_seeds_with_a_band_from_least_to_most() -> None:
    rows = [row(seed=n, attainment=a) for n, a in enumerate((0.8, 1.0))]
    rows += [row(rate=0.2, attainment=None), row(policy="hexgen", rate=0.05)]

    first, second = plots.series_of(rows, x="rate", y="attainment")

    assert (first.name, second.name) == ("workflow", "hexgen")
    assert list(first.x) == [0.1, 0.2]
    assert list(first.y) == [pytest.approx(0.9), None]
    assert (list(first.low or ()), list(first.high or ())) == ([0.8, None], [1.0, None])


def test_a_name_looks_the_same_in_every_chart_of_a_palette() -> None:
    palette = plots.Palette(POLICIES)
    chart = plots.attainment_by_rate([row(policy="hexgen")], palette=palette)

    assert palette["hexgen"].colour in chart
    assert palette["workflow"].colour not in chart


def test_no_two_of_twenty_names_look_the_same() -> None:
    names = [f"policy {n}" for n in range(20)]
    palette = plots.Palette(names)

    # Lines without markers too.
    assert len({(palette[name].colour, palette[name].dashes) for name in names}) == 20


@pytest.mark.parametrize(
    "chart",
    [
        plots.attainment_by_rate([]),
        plots.attainment_by_rate([row(attainment=None)]),
        plots.attainment_by_scale({"workflow": ([], [])}),
        plots.latency_cdf({"workflow": []}),
        plots.latency_cdf({"workflow": [math.inf]}),
        swim_lanes([]),
        report.table_section("t", []).body,
    ],
)
def test_where_there_is_no_sample_it_says_none(chart: str) -> None:
    assert ">none<" in chart


def test_charts_name_their_lines_and_axes() -> None:
    samples = {name: [1.0, 2.0, math.inf] for name in POLICIES}
    chart = plots.latency_cdf(samples, slo_s=1.5)

    for text in (*POLICIES, "run latency (s)", "runs that have ended", "SLO 1.5 s"):
        assert f">{text}<" in chart


def test_charts_are_the_same_every_time_and_leave_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    charts = {plots.attainment_by_scale({"w": ([1.0, 4.0], [1.0, 2.0])}) for _ in range(2)}

    assert len(charts) == 1
    assert dict(matplotlib.rcParams) == before


def test_a_lane_is_red_when_its_run_was_late_or_did_not_end() -> None:
    for late in (lane(slo_s=0.5), lane(end_s=None), lane(end_s=None, slo_s=None)):
        assert late.is_late
    assert not lane().is_late
    assert "#fbe4e2" in swim_lanes([lane(slo_s=0.5)])
    assert "#fbe4e2" not in swim_lanes([lane()])


def test_calls_side_by_side_stack_within_their_lane() -> None:
    calls = [call_record("a"), call_record("b"), call_record("c", sent_s=1.0, end_s=2.0)]
    drawn = swim_lanes([lane_of(run_record(*calls))])
    tops = [
        float(y)
        for y in re.findall(r"<rect x='[\d.]+' y='([\d.]+)' width='[\d.]+' height='7'", drawn)
    ]

    assert len(tops) == 3
    assert tops[0] != tops[1]
    assert tops[2] in tops[:2]


def test_of_many_runs_the_first_lanes_are_drawn() -> None:
    drawn = swim_lanes([lane(f"run-{n}.") for n in range(MAX_LANES + 5)])

    assert f">run-{MAX_LANES - 1}.<" in drawn
    assert f">run-{MAX_LANES}.<" not in drawn


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (0, "0"),
        (1234567, "1 234 567"),
        (0.123456, "0.123"),
        (123.456, "123.5"),
        (math.inf, "∞"),
        (True, "yes"),
        ([], "none"),
        ({"a": 1}, "a 1"),
    ],
)
def test_values_are_printed_for_people(value: Any, text: str) -> None:
    assert report.plain(value) == text
