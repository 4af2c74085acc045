"""The demo's report: one HTML file without anything from outside.

Every run is a lane, at the same height for every system. A bar is one call: its colour is the
instance, its letter the stage. A tick is the deadline. Lanes begin together, or by the clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

COLOURS = ("#2f6fb2", "#e08a2c", "#4b9a5f", "#8b62b5", "#b5534f", "#5c8a8a")
LETTERS = {
    "keywords": "K",
    "select_schema": "S",
    "generate": "G",
    "revise": "R",
    "unit_tests": "U",
    "evaluate": "E",
}
PANEL_WIDTH = 712
LABEL_WIDTH = 64
ROW_HEIGHT = 7
LANE_GAP = 5
AXIS_HEIGHT = 22
LETTER_WIDTH = 8
"""Bars narrower than this, in pixels, have no letter."""

_STYLE = """
:root { color-scheme: light; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 24px auto; max-width: 1480px;
  padding: 0 16px; color: #1c2430; background: #fff; }
h1 { font-size: 22px; margin: 0 0 4px; } h2 { font-size: 15px; margin: 0 0 6px; }
p { margin: 4px 0 12px; max-width: 90ch; } .quiet { color: #5d6776; }
table { border-collapse: collapse; margin: 12px 0 20px; }
th, td { padding: 3px 14px 3px 0; text-align: left; border-bottom: 1px solid #e3e7ec; }
td + td, th + th { text-align: right; font-variant-numeric: tabular-nums; }
.caution { border-left: 3px solid #b3261e; padding-left: 10px; }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin: 0 4px 0 14px;
  vertical-align: -1px; }
.panels { display: none; gap: 24px; align-items: flex-start; overflow-x: auto;
  margin-top: 10px; }
#together:checked ~ .together, #clock:checked ~ .clock { display: flex; }
input { margin: 0 4px 0 0; } label { margin-right: 18px; }
svg { display: block; } svg text { font: 10px system-ui, sans-serif; fill: #5d6776; }
svg .letter { font-size: 7px; fill: #fff; pointer-events: none; }
svg .late-label { fill: #b3261e; font-weight: 600; }
.late { stroke: #b3261e; stroke-width: 1.4; }
pre { background: #f5f7f9; padding: 10px 12px; overflow-x: auto; font-size: 12px; }
"""


def html_report(document: Mapping[str, Any]) -> str:
    """Return the page for `{"conditions", "systems"}` as results.json holds it."""
    systems: Sequence[Mapping[str, Any]] = document["systems"]
    instances = sorted(
        {
            call["instance"] or "none"
            for system in systems
            for run in system["runs"]
            for call in run["timeline"]
        }
    )
    colours = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(instances)}
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<title>vllm-workflow demo</title>"
        f"<style>{_STYLE}</style></head><body>"
        "<h1>The same runs through two systems</h1>"
        f"{_introduction(systems)}{_caution(document['conditions'])}"
        f"{_table(systems)}{_legend(colours)}"
        "<input type='radio' name='view' id='together' checked>"
        "<label for='together'>seconds since the run arrived</label>"
        "<input type='radio' name='view' id='clock'><label for='clock'>by the clock</label>"
        f"{_panels(systems, colours, 'together')}{_panels(systems, colours, 'clock')}"
        f"<h2 style='margin-top:24px'>Conditions</h2>{_conditions(document['conditions'])}"
        "</body></html>\n"
    )


def _introduction(systems: Sequence[Mapping[str, Any]]) -> str:
    met = "; ".join(f"{escape(s['title'])}: {_met(s['runs'])}" for s in systems)
    return (
        "<p>Deadlines met, " + met + ".</p>"
        "<p class='quiet'>One lane is one run: a question that a small model answers by some ten "
        "calls. A run has the same height on both sides and arrives at the same time. Point at a "
        "lane for its question, at a bar for its tokens and its slack: the seconds to spare that "
        "the router predicted when it sent the call.</p>"
    )


def _caution(conditions: Mapping[str, Any]) -> str:
    text = conditions.get("caution")
    return f"<p class='caution'>{escape(text)}</p>" if text else ""


def _table(systems: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{escape(system['title'])}</th>" for system in systems)
    tenants = sorted({run["tenant"] for system in systems for run in system["runs"]})
    rows = [("deadline met", [_met(system["runs"]) for system in systems])]
    for tenant in tenants:
        own = [[r for r in system["runs"] if r["tenant"] == tenant] for system in systems]
        rows.append((f"deadline met, {tenant}", [_met(runs) for runs in own]))
        rows.append((f"slowest run, {tenant}", [_slowest(runs) for runs in own]))
    body = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>"
        for name, cells in rows
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _legend(colours: Mapping[str, str]) -> str:
    keys = "".join(
        f"<span class='key' style='background:{colour}'></span>{escape(name)}"
        for name, colour in colours.items()
    )
    letters = ", ".join(f"{letter} {stage}" for stage, letter in LETTERS.items())
    return (
        f"<p><b>Instance</b>{keys}<br><b>Stage</b> {letters}<br>"
        "<b>│</b> deadline; red: missed. A bar with a red edge was sent with its slack already "
        "negative.</p>"
    )


def _panels(systems: Sequence[Mapping[str, Any]], colours: Mapping[str, str], view: str) -> str:
    """Return the lanes of every system, side by side and on one scale."""
    systems = [
        {**system, "runs": [_shown(run, view) for run in system["runs"]]} for system in systems
    ]
    heights = _heights([system["runs"] for system in systems])
    end_s = _end_s(systems)
    panels = "".join(
        f"<section><h2>{escape(system['title'])}</h2>"
        f"{_panel(system['runs'], heights, end_s, colours)}</section>"
        for system in systems
    )
    return f"<div class='panels {view}'>{panels}</div>"


def _shown(run: Mapping[str, Any], view: str) -> Mapping[str, Any]:
    """Return the run with the instant that its lane begins at."""
    return {**run, "lane_start_s": run["arrival_s"] if view == "clock" else 0.0}


def _panel(
    runs: Sequence[Mapping[str, Any]],
    heights: Sequence[int],
    end_s: float,
    colours: Mapping[str, str],
) -> str:
    """Return one system's lanes as SVG."""
    scale = (PANEL_WIDTH - LABEL_WIDTH) / end_s
    parts, top = [], AXIS_HEIGHT
    for index, (run, height) in enumerate(zip(runs, heights, strict=True)):
        parts.append(_lane(run, index, top, height, scale, colours))
        top += height + LANE_GAP
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{PANEL_WIDTH}' height='{top}' "
        f"viewBox='0 0 {PANEL_WIDTH} {top}' role='img'>"
        f"{_axis(end_s, scale, top)}{''.join(parts)}</svg>"
    )


def _axis(end_s: float, scale: float, bottom: float) -> str:
    step = next(s for s in (1, 2, 5, 10, 20, 60, 120, 300, 600, 3600) if end_s / s <= 12)
    parts = []
    for second in range(0, int(end_s) + 1, step):
        x = LABEL_WIDTH + second * scale
        parts.append(
            f"<line x1='{x:.1f}' y1='{AXIS_HEIGHT - 6}' x2='{x:.1f}' y2='{bottom}' "
            f"stroke='#edf0f3'/><text x='{x:.1f}' y='12' text-anchor='middle'>{second} s</text>"
        )
    return "".join(parts)


def _lane(
    run: Mapping[str, Any],
    index: int,
    top: float,
    height: int,
    scale: float,
    colours: Mapping[str, str],
) -> str:
    """Return one run: shade from arrival to end, its calls, its deadline."""
    late = run["deadline_met"] is False
    start = LABEL_WIDTH + run["lane_start_s"] * scale
    width = max(1.0, run["latency_s"] * scale)
    deadline = start + run["slo_s"] * scale
    bars = "".join(
        _bar(call, start, top + row * ROW_HEIGHT, scale, colours) for call, row in _rows(run)
    )
    tick = _deadline(deadline, top, height, "#b3261e" if late else "#1c2430", run["slo_s"])
    said = f"{run['tenant']} {index + 1}"
    verdict = "DEADLINE MISSED" if late else "in time"
    title = (
        f"{run['question']}\narrived at {run['arrival_s']:.2f} s, "
        f"took {run['latency_s']:.2f} s of {run['slo_s']:g} s: {verdict}"
    )
    return (
        f"<g class='lane'><title>{escape(title)}</title>"
        f"<text x='0' y='{top + height / 2 + 3:.1f}' class='{'late-label' if late else ''}'>"
        f"{escape(said)}</text>"
        f"<rect x='{start:.1f}' y='{top}' width='{width:.1f}' height='{height}' rx='1.5' "
        f"fill='{'#fbe4e2' if late else '#eef1f4'}'/>{bars}{tick}</g>"
    )


def _deadline(x: float, top: float, height: int, colour: str, slo_s: float) -> str:
    """Return the tick, or an arrow to where it would be."""
    if x > PANEL_WIDTH:
        return (
            f"<text x='{PANEL_WIDTH}' y='{top + height / 2 + 3:.1f}' text-anchor='end'>"
            f"{slo_s:g} s →</text>"
        )
    return (
        f"<line x1='{x:.1f}' y1='{top - 1}' x2='{x:.1f}' y2='{top + height + 1}' "
        f"stroke='{colour}' stroke-width='1.6'/>"
    )


def _bar(
    call: Mapping[str, Any], start: float, y: float, scale: float, colours: Mapping[str, str]
) -> str:
    x = start + call["start_s"] * scale
    width = max(1.0, (call["end_s"] - call["start_s"]) * scale - 0.5)
    slack_ms = call["slack_ms"]
    edge = " class='late'" if slack_ms is not None and slack_ms < 0 else ""
    colour = colours[call["instance"] or "none"]
    letter = LETTERS.get(call["stage"], call["stage"][:1].upper())
    text = (
        f"<text class='letter' x='{x + width / 2:.1f}' y='{y + ROW_HEIGHT - 0.8:.1f}' "
        f"text-anchor='middle'>{escape(letter)}</text>"
        if width >= LETTER_WIDTH
        else ""
    )
    return (
        f"<g><title>{escape(_told(call))}</title><rect x='{x:.1f}' y='{y:.1f}' "
        f"width='{width:.1f}' height='{ROW_HEIGHT - 0.8}' rx='1' fill='{colour}'{edge}/>{text}</g>"
    )


def _told(call: Mapping[str, Any]) -> str:
    """Return everything known of a call, a line each."""
    lines = [
        f"{call['stage']} on {call['instance'] or 'no instance'}",
        f"{call['start_s']:.2f} to {call['end_s']:.2f} s of the run",
    ]
    if call["num_prompt_tokens"] is not None:
        cached = f", {call['num_cached_tokens']} cached" if call["num_cached_tokens"] else ""
        lines.append(f"{call['num_prompt_tokens']} + {call['num_output_tokens']} tokens{cached}")
    if call["slack_ms"] is not None:
        lines.append(f"slack at dispatch {call['slack_ms'] / 1000:.2f} s")
    if call["queue_ms"] is not None:
        lines.append(f"{call['queue_ms']:.0f} ms in the router")
    if call["error"]:
        lines.append(f"failed: {call['error']}")
    return "\n".join(lines)


def _rows(run: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], int]]:
    """Give each call the first row of its lane that is free when it starts."""
    free_at: list[float] = []
    placed = []
    for call in run["timeline"]:
        row = next((n for n, t in enumerate(free_at) if t <= call["start_s"]), len(free_at))
        if row == len(free_at):
            free_at.append(0.0)
        free_at[row] = call["end_s"]
        placed.append((call, row))
    return placed


def _heights(systems: Sequence[Sequence[Mapping[str, Any]]]) -> list[int]:
    """Return the height of each lane, enough for the system that needs most rows."""
    return [
        ROW_HEIGHT * max(2, *(1 + max((row for _, row in _rows(run)), default=0) for run in same))
        for same in zip(*systems, strict=True)
    ]


def _end_s(systems: Sequence[Mapping[str, Any]]) -> float:
    ends = [run["lane_start_s"] + run["latency_s"] for system in systems for run in system["runs"]]
    return 1.02 * max(ends, default=1.0)


def _met(runs: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(bool(run['deadline_met']) for run in runs)} of {len(runs)}"


def _slowest(runs: Sequence[Mapping[str, Any]]) -> str:
    return f"{max(run['latency_s'] for run in runs):.2f} s" if runs else "none"


def _conditions(conditions: Mapping[str, Any]) -> str:
    lines = "\n".join(f"{name}: {value}" for name, value in conditions.items())
    return f"<pre>{escape(lines)}</pre>"
