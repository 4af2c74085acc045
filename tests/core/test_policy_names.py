"""Names of policies."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest

from vllm_workflow.core import policy_names
from vllm_workflow.core.config import DEFAULT_POLICY, DISPATCH_POLICIES, PRESETS, PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.ordering import ORDERING_POLICIES


def test_everything_that_can_be_named_is_described() -> None:
    assert set(policy_names.DISPATCH) == set(DISPATCH_POLICIES)
    assert set(policy_names.ORDERING) == set(ORDERING_POLICIES)
    assert set(policy_names.PRESET) == set(PRESETS)


@pytest.mark.parametrize(
    ("dispatch", "ordering"), list(itertools.product(DISPATCH_POLICIES, ORDERING_POLICIES))
)
def test_any_dispatch_goes_with_any_ordering(dispatch: str, ordering: str) -> None:
    config = policy_names.parse(f"{dispatch}+{ordering}")

    assert (config.dispatch, config.ordering) == (dispatch, ordering)


def test_the_default_binds_late_and_its_long_name_says_so() -> None:
    assert policy_names.parse(DEFAULT_POLICY) == PolicyConfig(late_binding=True, relegate=True)
    assert policy_names.parse("predicted-finish") == PolicyConfig()
    assert policy_names.parse("predicted-finish+slack+late+relegate") == PolicyConfig(
        late_binding=True, relegate=True
    )


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("hexgen+urgency+soon", "expected nothing, +late or +late+relegate after hexgen+urgency"),
        ("hexgen+urgency+relegate", "got 'relegate'"),
        ("round-robin+fcfs+late", "expected false with dispatch: round-robin"),
    ],
)
def test_what_may_follow_a_name_is_known(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        policy_names.parse(name)


def test_a_policy_is_called_by_its_preset_or_by_its_parts() -> None:
    for name, preset in PRESETS.items():
        assert policy_names.name_of(preset) == name
    patient = replace(PRESETS["workflow"], patience_s=5.0)
    assert policy_names.name_of(patient) == "predicted-finish+slack+late+relegate"
    late = policy_names.parse("least-outstanding+fcfs+late")
    assert policy_names.name_of(late) == "least-outstanding+fcfs+late"


def test_a_preset_s_description_is_its_long_name() -> None:
    for name in PRESETS:
        long_name = policy_names.PRESET[name].what.partition(";")[0]
        assert policy_names.parse(long_name) == PRESETS[name]


@pytest.mark.parametrize("name", policy_names.BASELINES)
def test_what_others_do_is_run_as_published_and_takes_no_seats(name: str) -> None:
    assert policy_names.parse(name).preempt is False


@pytest.mark.parametrize("name", policy_names.ALL)
def test_seats_are_taken_in_the_order_by_slack_only(name: str) -> None:
    config = policy_names.parse(name)

    assert config.preempt is (config.ordering == "slack")


def test_no_policy_is_listed_twice_and_every_baseline_is_listed() -> None:
    fingerprints = {policy_names.parse(name).fingerprint for name in policy_names.ALL}

    assert len(fingerprints) == len(policy_names.ALL)
    assert set(policy_names.BASELINES) < set(policy_names.ALL)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fastest", r"^policy: unknown policy 'fastest'; known are \['hexgen', .*DISPATCH\+ORDER"),
        ("", r"^policy: unknown policy ''; known are"),
        ("plas", r"^policy: unknown policy 'plas'; known are"),
        ("plas+fcfs", r"policy 'plas\+fcfs': unknown dispatch 'plas'; known are \['hexgen', "),
        ("hexgen+hexgen", r"unknown ordering 'hexgen'; known are \['atlas', 'deadline', "),
        ("hexgen+", r"unknown ordering ''; known are"),
        ("+fcfs", r"unknown dispatch ''; known are"),
        ("hexgen+fcfs+fcfs", r"expected nothing, \+late or"),
        ("workflow+fcfs", r"expected nothing after the preset 'workflow', or DISPATCH\+ORDERING"),
        ("workflow+late", r"expected nothing after the preset 'workflow', or DISPATCH\+ORDERING"),
        (
            "hexgen+late",
            r"expected an ordering before \+late, e.g. 'predicted-finish\+slack\+late'",
        ),
        ("hexgen + fcfs", r"unknown dispatch 'hexgen '; known are"),
    ],
)
def test_an_unknown_name_is_told_what_is_known(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy_names.parse(name)
    with pytest.raises(ConfigError, match=message):
        policy_names.describe(name)


def test_a_combination_names_its_halves_and_each_source_once() -> None:
    about = policy_names.describe("hexgen+urgency")

    assert about.what.count(";") == 1
    assert about.source == "HexGen-Text2SQL, arXiv 2505.05286"
    assert policy_names.describe("hexgen+plas").source.endswith("; Autellix, arXiv 2502.13965")
