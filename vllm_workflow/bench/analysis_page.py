"""An analysis as one HTML page that needs no other file."""

from __future__ import annotations

from jinja2 import Environment

from vllm_workflow.bench.analysis import Analysis
from vllm_workflow.bench.analysis_plots import plots
from vllm_workflow.bench.analysis_text import summary, tables

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Analysis of {{ source }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em;
  color: #1c1f23; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 .4em; }
ul { padding-left: 1.2em; } svg { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #e3e5e8;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
p { color: #555b63; margin: .4em 0; }
</style>
<h1>Analysis of {{ source }}</h1>
<ul>{% for line in summary %}<li>{{ line }}</li>{% endfor %}</ul>
{% for plot in plots %}
<h2>{{ plot.title }}</h2>
{{ plot.svg | safe }}
{% endfor %}
{% for table in tables %}
<h2>{{ table.title }}</h2>
<div class="wide"><table>
<tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows -%}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<p>{{ table.reading }}</p>
{% endfor %}
</html>
"""


def page(analysis: Analysis) -> str:
    """Return the HTML; names from the trace are escaped."""
    template = Environment(autoescape=True).from_string(_PAGE)
    return template.render(
        source=analysis.source,
        summary=summary(analysis),
        plots=plots(analysis),
        tables=tables(analysis),
    )
