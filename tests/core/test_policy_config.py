import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.builders import stage_request
from vllm_workflow.core.config import DISPATCH_POLICIES, PRESETS, PolicyConfig
from vllm_workflow.core.dispatch import build
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.ordering import ORDERING_POLICIES


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    config = PolicyConfig(dispatch="hexgen", alpha=0.7, ordering="urgency", preempt=False)
    path = tmp_path / "policy.json"
    path.write_text(config.to_json())

    assert PolicyConfig.from_file(path) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"alfa": 0.5}, r"p: unknown field 'alfa'; known fields are \['admission', 'alpha', "),
        ({"alpha": "0.5"}, "p: alpha: expected a number, got '0.5'"),
        ({"alpha": True}, "p: alpha: expected a number, got True"),
        ({"alpha": 1.5}, "p: alpha: expected a number from 0 to 1, got 1.5"),
        ({"alpha": float("nan")}, "p: alpha: expected a number from 0 to 1, got nan"),
        ({"risk_quantile": 1.0}, "p: risk_quantile: expected a number from 0 to below 1, got 1.0"),
        ({"risk_quantile": -0.1}, "p: risk_quantile: expected a number from 0 to below 1"),
        ({"patience_s": 0}, "p: patience_s: expected a positive, finite number of seconds"),
        ({"patience_s": float("inf")}, "p: patience_s: expected a positive, finite number"),
        ({"patience_s": 10**400}, "p: patience_s: expected a number, got 1000"),
        ({"urgent_slack_s": -1.0}, "p: urgent_slack_s: expected a finite number of seconds from 0"),
        ({"preempt": 1}, "p: preempt: expected true or false, got 1"),
        ({"prefill_chunk_cap": -1}, "p: prefill_chunk_cap: expected an integer from 0, got -1"),
        ({"dispatch": "random"}, r"p: dispatch: expected one of \('hexgen', .*got 'random'"),
        ({"starvation_ratio": -1}, "p: starvation_ratio: expected a number from 0 to 1e6, got -1"),
        ({"starvation_ratio": float("nan")}, "p: starvation_ratio: expected a number from 0"),
        (
            {"admission": "drop"},
            r"p: admission: expected one of \('accept', 'reject'\), got 'drop'",
        ),
        ({"max_hold_share": 1.5}, "p: max_hold_share: expected a number from 0 to 1, got 1.5"),
        ({"seed": -1}, "p: seed: expected an integer from 0, got -1"),
        ({"seed": 1.0}, "p: seed: expected an integer, got 1.0"),
        ({"ordering": "random"}, r"p: ordering: expected one of \('atlas', .*got 'random'"),
        ({"relegate": True}, "p: relegate: expected late_binding: true beside it, got late_b"),
        ({"admission": "reject"}, "p: admission: reject expected relegate: true and late_bindin"),
        (
            {"admission": "reject", "late_binding": True},
            "p: admission: reject expected .*got relegate: false; .* with `preset: workflow`",
        ),
        ({"preset": "fast"}, "p: unknown policy 'fast'"),
        ({"preset": 3}, "p: preset: expected a name, got 3"),
        ({"preset": "workflow", "late_binding": False}, "p: relegate: expected late_binding: true"),
        ("fastest", r"p: unknown policy 'fastest'; known are \['hexgen', "),
        ([], r"p: expected a mapping of fields, got \[\]"),
    ],
)
def test_a_mistake_is_told_with_its_place(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig.from_mapping(data, source="p")


def test_a_mapping_starts_from_predicted_finish_or_from_the_preset_that_it_names() -> None:
    bare = PolicyConfig.from_mapping({"patience_s": 5}, source="p")
    whole = PolicyConfig.from_mapping({"admission": "reject", "preset": "workflow"}, source="p")

    assert bare == replace(PRESETS["predicted-finish"], patience_s=5.0)
    assert whole == replace(PRESETS["workflow"], admission="reject")


@pytest.mark.parametrize("text", ["{", "\xff", '{"alpha": 2}'])
def test_a_file_that_does_not_fit_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "policy.json"
    path.write_bytes(text.encode("latin-1"))

    with pytest.raises(ConfigError, match=r"policy\.json: "):
        PolicyConfig.from_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: cannot read policy"):
        PolicyConfig.from_file(tmp_path / "none.json")


def test_the_fingerprint_names_the_values() -> None:
    assert PolicyConfig().fingerprint == PolicyConfig(alpha=0.3).fingerprint
    assert PolicyConfig().fingerprint != PolicyConfig(alpha=0.4).fingerprint
    assert len({p.fingerprint for p in PRESETS.values()}) == len(PRESETS)


def test_every_name_builds_its_policy() -> None:
    dispatch = {type(build(PolicyConfig(dispatch=name))) for name in DISPATCH_POLICIES}
    ordering = {type(PolicyConfig(ordering=name).build_ordering()) for name in ORDERING_POLICIES}

    assert (len(dispatch), len(ordering)) == (len(DISPATCH_POLICIES), len(ORDERING_POLICIES))


def test_presets_can_be_written_and_read() -> None:
    for preset in PRESETS.values():
        assert PolicyConfig.from_mapping(json.loads(preset.to_json()), source="p") == preset


def test_values_can_be_replaced_but_not_by_wrong_ones() -> None:
    assert replace(PolicyConfig(), alpha=0.9).alpha == 0.9
    with pytest.raises(ConfigError, match="alpha"):
        replace(PolicyConfig(), alpha=9.0)


def test_the_numbers_of_a_policy_reach_its_ordering() -> None:
    call = stage_request(arrival_time=100.0, attained_s=5.0, attained_path_s=3.0)

    def key(ordering: str) -> float:
        config = PolicyConfig(ordering=ordering, patience_s=7.0, starvation_ratio=4.0)
        return config.build_ordering().key(call)

    assert (key("plas"), key("atlas")) == (120.0, 112.0)
    assert (key("deadline"), key("slack"), key("sjf")) == (107.0, 107.0, 7.0)
