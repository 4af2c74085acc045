"""Shared by all tests."""

import pytest
from hypothesis import settings

# How long an example takes says something of the machine and its load, not of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
