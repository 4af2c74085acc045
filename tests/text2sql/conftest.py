"""A database of shops."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.text2sql.builders import make_database


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("db") / "shops.sqlite")
