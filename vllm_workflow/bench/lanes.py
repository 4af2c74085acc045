"""Swim-lanes as SVG text: a lane per run, a bar per call, coloured by instance.

Calls side by side stack within their lane. A tick is the run's SLO, red if it was missed. Point
at a lane or a bar for its figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from vllm_workflow.bench.plots import Palette
from vllm_workflow.bench.records import CallRecord, RunRecord

MAX_LANES = 40
_WIDTH = 1000
_LABEL_WIDTH = 130
_RIGHT_WIDTH = 56
_ROW_HEIGHT = 8
_LANE_GAP = 5
_AXIS_HEIGHT = 24
_MAX_LABEL_LENGTH = 20
_MIN_LETTER_WIDTH = 9
_RED, _INK, _QUIET = "#b3261e", "#1c2430", "#5d6776"
_NUM_TICKS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One call of a lane; instants."""

    start_s: float
    end_s: float
    instance: str
    stage: str
    failed: bool = False
    note: str = ""
    """Shown when one points at it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One run; instants."""

    name: str
    arrival_s: float
    end_s: float | None
    """None if it did not end."""
    slo_s: float | None
    bars: tuple[Bar, ...]

    @property
    def last_s(self) -> float:
        return max([self.arrival_s, *(bar.end_s for bar in self.bars), self.end_s or 0.0])

    @property
    def is_late(self) -> bool:
        if self.slo_s is None:
            return self.end_s is None
        return self.end_s is None or self.end_s - self.arrival_s > self.slo_s


def lane_of(run: RunRecord) -> Lane:
    """Return the lane of a run that was replayed."""
    return Lane(
        name=run.run_id,
        arrival_s=run.arrival_s,
        end_s=run.end_s if run.finished else None,
        slo_s=run.slo_s,
        bars=tuple(
            Bar(
                start_s=call.sent_s,
                end_s=call.end_s,
                instance=call.instance or "unknown",
                stage=call.stage,
                failed=bool(call.error),
                note=_note(call),
            )
            for call in run.calls
        ),
    )


def swim_lanes(
    lanes: Sequence[Lane], *, by_clock: bool = False, palette: Palette | None = None
) -> str:
    """Draw lanes in the order given, at most `MAX_LANES`.

    Args:
        lanes: Runs.
        by_clock: Each where it was in time; otherwise all begin together, at their arrival.
        palette: Of the instances; by default of those in `lanes`, by name.
    """
    if not lanes:
        return "<p>none</p>"
    shown = lanes[:MAX_LANES]
    looks = palette or Palette(instance_names(lanes))
    origin_s = min(lane.arrival_s for lane in shown)
    # Deadlines far beyond the longest run would squeeze it; they are drawn as an arrow.
    longest_s = max(lane.last_s - (origin_s if by_clock else lane.arrival_s) for lane in shown)
    scale = _Scale(longest_s * 1.02 or 1.0)
    parts, top = [], _AXIS_HEIGHT
    for lane in shown:
        rows = _rows(lane)
        height = _ROW_HEIGHT * max(2, _num_rows(rows))
        start_s = lane.arrival_s - origin_s if by_clock else 0.0
        parts.append(_lane(lane, rows, start_s, top, height, scale, looks))
        top += height + _LANE_GAP
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{top}' "
        f"viewBox='0 0 {_WIDTH} {top}' role='img' font-family='sans-serif' font-size='10'>"
        f"{_axis(scale, top)}{''.join(parts)}</svg>"
    )


def instance_names(lanes: Iterable[Lane]) -> list[str]:
    """Return the instances that calls ran on, sorted."""
    return sorted({bar.instance for lane in lanes for bar in lane.bars})


def instance_legend(palette: Palette) -> str:
    """Return HTML that names the colours of the instances."""
    keys = "".join(
        f"<span class='key' style='background:{palette[name].colour}'></span>{escape(name)}"
        for name in palette.names
    )
    return f"<p class='legend'>{keys or 'none'}</p>"


@dataclass(frozen=True, slots=True)
class _Scale:
    end_s: float

    def x(self, seconds: float) -> float:
        return _LABEL_WIDTH + seconds * (_WIDTH - _LABEL_WIDTH - _RIGHT_WIDTH) / self.end_s


def _axis(scale: _Scale, bottom: float) -> str:
    step = _tick_step(scale.end_s)
    parts = []
    for n in range(int(scale.end_s / step) + 1):
        x = scale.x(n * step)
        parts.append(
            f"<line x1='{x:.1f}' y1='{_AXIS_HEIGHT - 6}' x2='{x:.1f}' y2='{bottom}' "
            f"stroke='#e6e9ee'/><text x='{x:.1f}' y='13' text-anchor='middle' fill='{_QUIET}'>"
            f"{n * step:g} s</text>"
        )
    return "".join(parts)


def _tick_step(end_s: float) -> float:
    """Return 1, 2 or 5 times a power of ten that gives at most `_NUM_TICKS` ticks."""
    power = 10.0 ** math.floor(math.log10(end_s / _NUM_TICKS))
    return next(m * power for m in (1, 2, 5, 10) if end_s / (m * power) <= _NUM_TICKS)


def _lane(
    lane: Lane,
    rows: Sequence[tuple[Bar, int]],
    start_s: float,
    top: float,
    height: int,
    scale: _Scale,
    looks: Palette,
) -> str:
    shift_s = start_s - lane.arrival_s
    left, right = scale.x(start_s), scale.x(lane.last_s + shift_s)
    middle = top + height / 2 + 3.5
    first = top + (height - _ROW_HEIGHT * _num_rows(rows)) / 2
    bars = "".join(_bar(bar, row, shift_s, first, scale, looks) for bar, row in rows)
    colour = _RED if lane.is_late else _QUIET
    name = lane.name if len(lane.name) <= _MAX_LABEL_LENGTH else lane.name[:19] + "…"
    return (
        f"<g><title>{escape(_verdict(lane))}</title>"
        f"<text x='0' y='{middle:.1f}' fill='{colour}'>{escape(name)}</text>"
        f"<rect x='{left:.1f}' y='{top}' width='{max(1.0, right - left):.1f}' height='{height}' "
        f"fill='{'#fbe4e2' if lane.is_late else '#eef1f4'}'/>{bars}"
        f"{_slo_mark(lane, start_s, top, height, scale)}</g>"
    )


def _slo_mark(lane: Lane, start_s: float, top: float, height: int, scale: _Scale) -> str:
    if lane.slo_s is None:
        return ""
    due_s = start_s + lane.slo_s
    if due_s > scale.end_s:
        return (
            f"<text x='{_WIDTH}' y='{top + height / 2 + 3.5:.1f}' text-anchor='end' "
            f"fill='{_QUIET}'>{lane.slo_s:.3g} s →</text>"
        )
    x = scale.x(due_s)
    return (
        f"<line x1='{x:.1f}' y1='{top - 1}' x2='{x:.1f}' y2='{top + height + 1}' "
        f"stroke='{_RED if lane.is_late else _INK}' stroke-width='2'/>"
    )


def _bar(bar: Bar, row: int, shift_s: float, top: float, scale: _Scale, looks: Palette) -> str:
    x = scale.x(bar.start_s + shift_s)
    width = max(1.0, scale.x(bar.end_s + shift_s) - x - 0.5)
    y = top + row * _ROW_HEIGHT
    edge = f" stroke='{_RED}' stroke-width='1.4'" if bar.failed else ""
    letter = (
        f"<text x='{x + width / 2:.1f}' y='{y + 6.6:.1f}' font-size='7' fill='#fff' "
        f"text-anchor='middle' pointer-events='none'>{escape(bar.stage[:1].upper())}</text>"
        if width >= _MIN_LETTER_WIDTH
        else ""
    )
    title = f"{bar.stage} on {bar.instance}, {bar.end_s - bar.start_s:.3g} s\n{bar.note}".strip()
    return (
        f"<g><title>{escape(title)}</title>"
        f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{_ROW_HEIGHT - 1}' "
        f"fill='{looks[bar.instance].colour}'{edge}/>{letter}</g>"
    )


def _rows(lane: Lane) -> list[tuple[Bar, int]]:
    """Give each call the first row of its lane that is free when it starts."""
    free_at: list[float] = []
    placed = []
    for bar in sorted(lane.bars, key=lambda bar: (bar.start_s, bar.end_s)):
        row = next((n for n, time in enumerate(free_at) if time <= bar.start_s), len(free_at))
        if row == len(free_at):
            free_at.append(0.0)
        free_at[row] = bar.end_s
        placed.append((bar, row))
    return placed


def _num_rows(rows: Sequence[tuple[Bar, int]]) -> int:
    return 1 + max((row for _, row in rows), default=0)


def _verdict(lane: Lane) -> str:
    took = "did not end" if lane.end_s is None else f"took {lane.end_s - lane.arrival_s:.3g} s"
    promised = "" if lane.slo_s is None else f" of {lane.slo_s:.3g} s"
    return f"{lane.name}: arrived at {lane.arrival_s:.3g} s, {took}{promised}"


def _note(call: CallRecord) -> str:
    lines = []
    if call.num_prompt_tokens is not None:
        cached = f" ({call.num_cached_tokens} cached)" if call.num_cached_tokens else ""
        lines.append(f"{call.num_prompt_tokens}{cached} + {call.num_output_tokens} tokens")
    if call.ttft_s is not None:
        lines.append(f"first token after {call.ttft_s:.3g} s")
    if call.error:
        lines.append(f"failed: {call.error}")
    return "\n".join(lines)
