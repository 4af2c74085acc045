"""docs/policies: each policy has its page, and what a page says of parameters is so."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from vllm_workflow.core.config import PRESETS, PolicyConfig
from vllm_workflow.core.policy_names import DISPATCH, ORDERING

PAGES = Path(__file__).parents[1] / "docs" / "policies"
SHARED_PAGE = {"plas": "attained", "atlas": "attained"}
HEADINGS = (
    *("When to use", "Inputs", "Rule", "Parameters", "Without data", "Trade-offs", "Measured"),
)
DEFAULTS = {field.name: field.default for field in fields(PolicyConfig)}
NAMES = [*DISPATCH, *ORDERING, "workflow"]


def page(name: str) -> str:
    return (PAGES / f"{SHARED_PAGE.get(name, name)}.md").read_text(encoding="utf-8")


def parameters(text: str) -> list[tuple[str, str]]:
    """Field and default of each line of a table of parameters."""
    (section,) = re.findall(r"^## Parameters\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    return [(row[1].strip().strip("`"), row[4].strip()) for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_each_policy_has_a_page_that_answers_the_same_questions(name: str):
    found = re.findall(r"^## (.*)$", page(name), re.MULTILINE)

    assert [heading for heading in found if heading in HEADINGS] == list(HEADINGS)


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_of_a_page_exist_and_have_these_defaults(name: str):
    preset = PRESETS.get(name, PolicyConfig())
    for field, said in parameters(page(name)):
        assert field in DEFAULTS
        value = getattr(preset, field)
        assert said == (str(value).lower() if isinstance(value, bool) else f"{value:g}")


def test_each_page_is_in_the_list():
    listed = set(re.findall(r"\]\(([a-z-]+)\.md\)", (PAGES / "README.md").read_text("utf-8")))

    assert listed == {path.stem for path in PAGES.glob("*.md")} - {"README"}


@pytest.mark.parametrize("path", sorted(PAGES.glob("*.md")), ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path):
    for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link
