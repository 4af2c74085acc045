"""Shared by all tests."""

import os
import signal

import pytest
from hypothesis import settings

# How long an example takes says something of the machine and its load, not of the code.
# The same examples each time, so that a red run says something of the change;
# HYPOTHESIS_PROFILE=random looks for new ones, fuzz for many of them (`make fuzz`).
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None)
settings.register_profile(
    "fuzz", deadline=None, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "1500"))
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# A shell lets what it starts in the background ignore ctrl-C, and the children of that inherit it:
# tests that send it to a process of theirs would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
