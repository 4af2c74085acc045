"""Reports: one HTML file that needs nothing else, made of sections.

sections = [
    figure_section("Attainment", plots.attainment_by_rate(rows)),
    table_section("Results", rows, COMPARISON_COLUMNS),
    conditions_section({"trace": "builtin:chess", "seed": 1}),
]
Path("report.html").write_text(render("Policies compared", sections))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

NONE = "none"
"""Printed where there is no sample; never 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a report."""

    title: str
    body: Markup
    note: str = ""
    """What one must know to read it."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    key: str
    """Of the rows."""
    title: str
    show: Callable[[Any], str]
    """Turns a value into text."""


def plain(value: Any) -> str:
    """Return a value as people read it: thousands apart, three or four digits that count."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if isinstance(value, float):
        return _real(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items()) or NONE
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value) or NONE
    return str(value)


def percent(value: Any) -> str:
    """Return a share as a percentage."""
    return NONE if value is None else f"{100 * value:.1f} %"


def _exact(value: Any) -> str:
    """Return a value as it can be typed again; lists and mappings on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_exact(v)}" for k, v in value.items()) or NONE
    if isinstance(value, list | tuple):
        return ", ".join(_exact(v) for v in value) or NONE
    return NONE if value is None else "''" if value == "" else str(value)


def _real(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


COMPARISON_COLUMNS: tuple[Column, ...] = (
    Column("policy", "policy", plain),
    Column("trace", "trace", plain),
    Column("fleet", "fleet", plain),
    Column("level", "level", plain),
    Column("rate", "runs/s", plain),
    Column("load", "load", plain),
    Column("seed", "seed", plain),
    Column("slo_s", "SLO (s)", plain),
    Column("arrived", "arrived", plain),
    Column("finished", "finished", plain),
    Column("failed", "failed", plain),
    Column("attainment", "within SLO", percent),
    Column("goodput", "goodput (runs/s)", plain),
    Column("throughput", "throughput (runs/s)", plain),
    Column("mean_s", "mean (s)", plain),
    Column("p50_s", "P50 (s)", plain),
    Column("p95_s", "P95 (s)", plain),
    Column("p99_s", "P99 (s)", plain),
    Column("slo_scale_at_95", "SLO scale for 95 %", plain),
    Column("slo_scale_at_99", "SLO scale for 99 %", plain),
    Column("decision_us", "decision (µs)", plain),
)
"""Of a comparison of policies: one row per policy, trace, fleet, rate and seed."""


def table_section(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Iterable[Column] | None = None,
    *,
    note: str = "",
) -> Section:
    """Return a table; columns that no row has are left out.

    Args:
        title: Heading.
        rows: One mapping per line.
        columns: Which of their keys, in which order; by default all, as they come.
        note: See `Section`.
    """
    keys = dict.fromkeys(key for row in rows for key in row)
    if columns is None:
        columns = [Column(key, key.replace("_", " "), plain) for key in keys]
    columns = [column for column in columns if column.key in keys]
    is_number = [all(_is_number(row.get(c.key)) for row in rows) for c in columns]
    html = _template("table.html").render(
        heads=list(zip([c.title for c in columns], is_number)),
        rows=[list(zip([c.show(row.get(c.key)) for c in columns], is_number)) for row in rows],
        nothing=NONE,
    )
    return Section(title=title, body=Markup(html), note=note)


def figure_section(title: str, *figures: str, note: str = "") -> Section:
    """Return charts, as `plots` and `lanes` make them, one below the other."""
    body = Markup("").join(Markup("<figure>{}</figure>").format(Markup(each)) for each in figures)
    return Section(title=title, body=body, note=note)


def text_section(title: str, text: str) -> Section:
    """Return text as it is laid out, such as a console table."""
    return Section(title=title, body=Markup("<pre>{}</pre>").format(text))


def conditions_section(conditions: Mapping[str, Any], title: str = "Conditions") -> Section:
    """Return what the figures were made with, one line each."""
    lines = "\n".join(f"{name}: {_exact(value)}" for name, value in conditions.items())
    return text_section(title, lines or NONE)


def render(
    title: str, sections: Sequence[Section], *, lead: str = "", cautions: Sequence[str] = ()
) -> str:
    """Return the page.

    Args:
        title: Heading.
        sections: In order.
        lead: A sentence below the heading.
        cautions: What speaks against the figures; shown first, in red.
    """
    return _template("report.html").render(
        title=title, sections=sections, lead=lead, cautions=cautions
    )


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("vllm_workflow.bench"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
