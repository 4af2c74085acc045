"""Schemathesis against the document that the router gives of itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.fuzz.conftest import FUZZ_S, Target

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
)
MIN_CASES = 300
"""Fewer, and it has tested nothing."""


def test_the_router_does_what_its_document_says(target: Target, tmp_path: Path) -> None:
    repeatable = os.environ.get("HYPOTHESIS_PROFILE", "repeatable") == "repeatable"
    extent = ["--seed", "1", "--max-examples", "10"]
    if not repeatable:
        extent = ["--max-time", str(max(60, round(0.3 * FUZZ_S)))]
    result = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")),
            "run",
            target.url + "/openapi.json",
            *("--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing", *extent),
            *("--header", f"Authorization: Bearer {target.key}"),
            *("--generation-database", "none", "--no-color", "--warnings", "off"),
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=FUZZ_S + 300,
        check=False,
    )
    report = result.stdout.replace(target.key, "KEY")[-6000:]
    assert result.returncode == 0, report
    found = re.search(r"(\d+) generated", report)
    assert found, report
    assert int(found[1]) >= MIN_CASES, report
    assert target.serves()
