"""Answers as plain text: the rows as a table, the calls as a Gantt chart."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_workflow.text2sql.answer import Answer, StageCall
from vllm_workflow.text2sql.types import Execution

_MAX_CELL_WIDTH = 40
_BAR_WIDTH = 48


def rows_table(execution: Execution, *, max_rows: int = 20) -> str:
    """Return the rows as an aligned table, or one line that says why there are none."""
    if not execution.ran:
        return f"{execution.status.value}: {execution.message}"
    shown = [[_cell(value) for value in row] for row in execution.rows[:max_rows]]
    table = [[_cell(name) for name in execution.columns], *shown]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    lines.insert(1, "-+-".join("-" * width for width in widths))
    count = len(execution.rows)
    more = " or more" if execution.truncated else ""
    hidden = f", the first {max_rows} shown" if count > max_rows else ""
    lines.append(f"({count}{more} {'row' if count == 1 else 'rows'}{hidden})")
    return "\n".join(lines)


def timeline_chart(answer: Answer) -> str:
    """Return one line per call: when it ran, on which instance, tokens, slack; then a sum."""
    end_s = max([answer.latency_s, *(call.end_s for call in answer.calls)])
    scale = _BAR_WIDTH / end_s if end_s > 0 else 0.0
    name_width = max([len(call.stage) for call in answer.calls] or [0])
    lines = [
        f"{call.stage.ljust(name_width)} |{_bar(call, scale)}| "
        f"{call.start_s:7.2f} to {call.end_s:6.2f} s{_details(call)}"
        for call in answer.calls
    ]
    lines.append(
        f"{len(answer.calls)} calls, {len(answer.candidates)} candidates in "
        f"{len(answer.clusters)} clusters, {answer.num_revise_rounds} rounds of correction, "
        f"{len(answer.tests)} unit tests"
    )
    lines.append(_verdict(answer))
    return "\n".join(lines)


def _verdict(answer: Answer) -> str:
    if answer.slo_s is None:
        return f"{answer.latency_s:.2f} s; no deadline was given"
    met = "deadline met" if answer.deadline_met else "DEADLINE MISSED"
    return f"{answer.latency_s:.2f} s of {answer.slo_s:g} s: {met}"


def _bar(call: StageCall, scale: float) -> str:
    start = min(int(call.start_s * scale), _BAR_WIDTH - 1)
    end = max(start + 1, min(round(call.end_s * scale), _BAR_WIDTH))
    mark = "x" if call.error else "#"
    return (" " * start + mark * (end - start)).ljust(_BAR_WIDTH)


def _details(call: StageCall) -> str:
    parts = []
    if call.num_prompt_tokens is not None and call.num_output_tokens is not None:
        parts.append(f"{call.num_prompt_tokens}+{call.num_output_tokens} tokens")
    if call.instance:
        parts.append(f"on {call.instance}")
    if call.slack_ms is not None:
        parts.append(f"slack {call.slack_ms / 1000:.1f} s")
    if call.num_attempts > 1:
        parts.append(f"{call.num_attempts} attempts")
    if call.error:
        parts.append(f"failed: {_cell(call.error, 100)}")
    return "".join(f", {part}" for part in parts)


def _cell(value: object, width: int = _MAX_CELL_WIDTH) -> str:
    """Return a value on one line, without control characters, cut to `width`."""
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    text = "".join(char if char.isprintable() else " " for char in str(value))
    return text if len(text) <= width else text[: width - 1] + "…"


def summary_lines(values: dict[str, object], names: Sequence[str] | None = None) -> str:
    """Return `name: value` lines; a value without a sample is printed as `none`."""
    chosen = names or list(values)
    width = max(map(len, chosen), default=0)
    return "\n".join(f"{name.ljust(width)}  {_plain(values[name])}" for name in chosen)


def _plain(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
