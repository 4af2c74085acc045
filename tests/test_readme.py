"""What the README says without a server; `tests/integration/test_readme_runs.py` has the rest."""

import re

import yaml

from tests.readme import README, ROOT, example, example_names, num_code_blocks
from vllm_workflow.core.config import DEFAULT_POLICY, PRESETS
from vllm_workflow.core.ordering import ORDERING_POLICIES
from vllm_workflow.engine import metadata
from vllm_workflow.router import wire
from vllm_workflow.router.config import RouterConfig

RUN_ELSEWHERE = {"quick start", "client", "shop", "up", "ask", "router"}
NOT_EXAMPLES = 3
"""Code blocks that are no example: the two make commands, the picture, the folder tree."""


def first_column(title: str) -> list[str]:
    table = README.split(f"\n| {title} |")[1].split("\n\n")[0]
    return re.findall(r"^\| `([\w-]+)`", table, flags=re.MULTILINE)


def test_every_example_is_run_by_a_test() -> None:
    assert example_names() == RUN_ELSEWHERE | {"router.yaml"}
    assert num_code_blocks() == len(example_names()) + NOT_EXAMPLES


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    block = re.search(r"```console\n(.*?)```", README, flags=re.DOTALL)
    assert block is not None
    targets = [line.removeprefix("make ") for line in block.group(1).splitlines()]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_router_yaml_is_valid_and_builds_what_it_says() -> None:
    config = RouterConfig.from_mapping(yaml.safe_load(example("router.yaml")), source="README")
    assert [i.id for i in config.instances] == ["fast", "slow"]
    assert config.policy_config() == PRESETS["workflow"]
    assert [s.name for s in config.workflows[0].build().stages] == [
        "keywords",
        "generate",
        "revise",
        "unit_tests",
        "evaluate",
    ]


def test_the_wire_format_table_names_every_field_the_router_reads() -> None:
    rows = re.findall(r"^\| `(X-[\w-]+)[^`]*` \| `(\w+)` \| `(\w+)` \|", README, flags=re.MULTILINE)
    fields = {(f.header, f.metadata, f.xarg) for f in (*wire._FIELDS, wire._TENANT)}
    assert set(rows) == fields


def test_the_wire_format_table_names_every_key_the_engine_reads() -> None:
    named = set(re.findall(r"^\|(?: [^|]*\|){2} `(wf_\w+)` \|", README, flags=re.MULTILINE))
    read = set(re.findall(r"^\| `(wf_\w+)` +\|", str(metadata.__doc__), flags=re.MULTILINE))
    assert named == read | {"wf_slo_ms"}  # which the router turns into a budget


def test_the_policy_table_names_every_preset_and_every_ordering() -> None:
    assert set(first_column("preset")) == set(PRESETS)
    assert set(first_column("ordering")) == set(ORDERING_POLICIES)


def test_the_policy_table_says_which_preset_is_the_default() -> None:
    assert f"| `{DEFAULT_POLICY}` (default) |" in README
    assert PRESETS[DEFAULT_POLICY].late_binding


def test_every_folder_in_the_tree_exists() -> None:
    tree = README.split("## Where things are")[1].split("```")[1]
    parent = ROOT
    for line in tree.strip("\n").splitlines():
        name = line.split()[0]
        parent = parent if line.startswith(" ") else ROOT
        assert (parent / name).exists(), line
        if line == "vllm_workflow/":
            parent = ROOT / name
