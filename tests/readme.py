"""The README's examples, for the tests that run them."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def example(name: str) -> str:
    """Text of the code block that follows the comment `<!-- name -->`."""
    pattern = rf"<!-- {re.escape(name)} -->\n```\w+\n(.*?)```"
    found = re.findall(pattern, README, flags=re.DOTALL)
    assert len(found) == 1, f"README has {len(found)} examples named {name!r}"
    return str(found[0])


def example_names() -> set[str]:
    return set(re.findall(r"<!-- ([^>]+) -->", README))


def commands(name: str) -> list[str]:
    """Lines of a shell example without comments and `&`."""
    lines = (line.split("  #")[0].strip() for line in example(name).splitlines())
    return [line.removesuffix("&").strip() for line in lines if line]


def num_code_blocks() -> int:
    return README.count("```") // 2
