"""What docs/tuning.md says of the tuner's configuration."""

import json
import re
from pathlib import Path

import yaml

from vllm_workflow.cli.main import COMMANDS
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.tuner_config import TunerConfig

PAGE = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text(encoding="utf-8")


def test_the_example_is_valid() -> None:
    block = re.search(r"<!-- tuner -->\n```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert block is not None
    data = {"instances": [{"url": "http://a:1"}], **yaml.safe_load(block.group(1))}

    assert RouterConfig.from_mapping(data, source="page").tuned_log == "decisions.jsonl"


def test_every_field_is_listed_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", PAGE, flags=re.MULTILINE))

    defaults = {name: field.default for name, field in TunerConfig.model_fields.items()}
    assert rows == {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in defaults.items()
    }


def test_the_commands_are_there() -> None:
    assert set(re.findall(r"^vllm-workflow (\w+)", PAGE, flags=re.MULTILINE)) <= COMMANDS.keys()
