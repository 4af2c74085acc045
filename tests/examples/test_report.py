"""The demo's table and report from recorded runs."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from examples.demo.report import html_report
from examples.demo.table import caution, comparison, speeds

VOID = {"meta", "br", "input"}


def call(stage: str = "generate", **fields: Any) -> dict[str, Any]:
    return {
        "stage": stage,
        "start_s": 0.1,
        "end_s": 0.4,
        "instance": "fast",
        "slack_ms": 1500.0,
        "queue_ms": 0.2,
        "num_prompt_tokens": 40,
        "num_cached_tokens": 16,
        "num_output_tokens": 20,
        "error": None,
    } | fields


def run(**fields: Any) -> dict[str, Any]:
    return {
        "id": "q",
        "question": "How many?",
        "sql": "SELECT 1",
        "status": "ok",
        "correct": True,
        "error": None,
        "tenant": "ask",
        "arrival_s": 1.0,
        "latency_s": 0.5,
        "slo_s": 2.0,
        "deadline_met": True,
        "timeline": [call("keywords", end_s=0.1, start_s=0.0), call(), call()],
    } | fields


def system(title: str = "one system", runs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"system": "one", "title": title, "runs": [run()] if runs is None else runs}


def report(*systems: dict[str, Any]) -> str:
    return html_report({"conditions": {"seed": 1}, "systems": list(systems)})


def lanes(html: str, view: str = "together") -> list[ElementTree.Element]:
    """Every lane of a view, from the parsed drawings."""
    found = []
    drawings = html.split(f"<div class='panels {view}'>")[1].split("</div>")[0]
    for part in drawings.split("<svg")[1:]:
        root = ElementTree.fromstring("<svg" + part.partition("</svg>")[0] + "</svg>")
        found += [g for g in root.iter() if g.get("class") == "lane"]
    return found


def texts(element: ElementTree.Element) -> list[str]:
    return [found.text or "" for found in element.iter() if found.tag.endswith("title")]


def edged(element: ElementTree.Element) -> int:
    return sum(found.get("class") == "late" for found in element.iter())


class Balance(HTMLParser):
    """Collects the open elements; a wrong end tag is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        """Open nothing: it closes itself."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_element_of_the_page_is_closed() -> None:
    parser = Balance()

    parser.feed(report(system("a"), system("b")))

    assert parser.open == []


@pytest.mark.parametrize("view", ["together", "clock"])
def test_each_run_has_a_lane_in_each_system(view: str) -> None:
    runs = [run(), run(tenant="report")]

    found = lanes(report(system("a", runs), system("b", runs)), view)

    assert len(found) == 4


@pytest.mark.parametrize(("view", "apart"), [("together", False), ("clock", True)])
def test_lanes_begin_together_or_by_the_clock(view: str, apart: bool) -> None:
    runs = [run(arrival_s=1.0), run(arrival_s=5.0)]

    shades = [lane.find("{*}rect") for lane in lanes(report(system(runs=runs)), view)]

    xs = [float(shade.get("x", "nan")) for shade in shades if shade is not None]
    assert (xs[1] > xs[0]) is apart


def test_a_lane_tells_stage_instance_tokens_and_slack_of_each_call() -> None:
    (lane,) = lanes(report(system()))

    told = "\n".join(texts(lane))

    assert "keywords on fast" in told
    assert "40 + 20 tokens, 16 cached" in told
    assert "slack at dispatch 1.50 s" in told


def test_what_people_and_servers_wrote_is_escaped() -> None:
    nasty = '<script>alert("x")</script>&'
    html = report(
        system(
            nasty,
            [
                run(
                    question=nasty,
                    tenant=nasty,
                    timeline=[call(nasty, instance=nasty, error=nasty)],
                )
            ],
        )
    )

    assert "<script>" not in html
    assert nasty in "\n".join(texts(lanes(html)[0]))


def test_the_page_asks_nothing_of_the_network() -> None:
    html = report(system()).replace("http://www.w3.org/2000/svg", "")

    assert "http" not in html
    assert "src=" not in html
    assert "@import" not in html


def test_a_call_sent_too_late_and_a_missed_deadline_are_marked() -> None:
    late = run(deadline_met=False, latency_s=3.0, timeline=[call(slack_ms=-1.0)])

    fine_lane, late_lane = lanes(report(system(runs=[run(), late])))

    assert edged(fine_lane) == 0
    assert edged(late_lane) == 1
    assert "DEADLINE MISSED" in texts(late_lane)[0]
    assert "in time" in texts(fine_lane)[0]


def test_calls_side_by_side_do_not_cover_each_other() -> None:
    (lane,) = lanes(report(system(runs=[run(timeline=[call(), call(), call(start_s=0.5)])])))
    bars = [g for g in lane if g.tag.endswith("g")]

    ys = [next(found for found in bar if found.tag.endswith("rect")).get("y") for bar in bars]

    assert ys[0] != ys[1]
    assert ys[2] == ys[0]


def test_a_run_without_any_call_or_server_detail_is_drawn() -> None:
    bare = call(
        **dict.fromkeys(
            ("instance", "slack_ms", "queue_ms", "num_prompt_tokens", "num_output_tokens")
        )
    )
    failed = run(sql=None, deadline_met=False, timeline=[], error="refused")

    assert len(lanes(report(system(runs=[failed, run(timeline=[bare])])))) == 2


def test_the_table_has_a_column_per_system_and_says_none_for_no_sample() -> None:
    table = comparison([system("stock"), system("ours", [run(sql=None, correct=None)])])

    lines = {line.split("  ")[0]: line for line in table.splitlines()}

    assert table.splitlines()[0].split() == ["stock", "ours"]
    assert "1 of 1 (100%)" in lines["answered"]
    assert "0 of 1 (0%)" in lines["answered"]
    assert lines["correct"].endswith("none")
    assert lines["run latency P95"].endswith("none")


def test_percentiles_leave_out_runs_without_an_answer() -> None:
    runs = [run(latency_s=1.0), run(latency_s=9.0, sql=None)]

    table = comparison([system(runs=runs)])

    assert "9.00 s" not in table


@pytest.mark.parametrize("rate", [100.0, 400.0])
def test_speeds_are_told_with_their_ratio(rate: float) -> None:
    line = speeds(
        {
            "fast": {"token_alone_s": 0.008, "tokens_per_s": 400.0},
            "slow": {"token_alone_s": 0.010, "tokens_per_s": rate},
        }
    )

    assert "fast 8.0 ms per token alone, 400 tokens/s full" in line
    assert line.endswith(f"{400.0 / rate:.1f}x")


@pytest.mark.parametrize(("rate", "warned"), [(1000.0, False), (1900.0, True)])
def test_a_machine_that_changed_its_speed_meanwhile_is_told(rate: float, warned: bool) -> None:
    results = [
        {"instances": {"fast": {"tokens_per_s": 5000.0}, "slow": {"tokens_per_s": each}}}
        for each in (1000.0, rate)
    ]

    assert bool(caution(results)) is warned
