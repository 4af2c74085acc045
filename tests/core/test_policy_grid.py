from dataclasses import replace

import pytest

from vllm_workflow.core.config import PRESETS, PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.policy_grid import MAX_POINTS, changes, default_grid, points

HEXGEN = PRESETS["hexgen"]
DEFAULT = PRESETS["workflow"]


def test_the_default_policy_is_tried_on_twenty_points_the_present_one_first() -> None:
    found = points(DEFAULT, default_grid(DEFAULT))

    assert len(found) == 20
    assert found[0] == DEFAULT


def test_hexgen_is_tried_on_its_alpha_alone() -> None:
    found = points(HEXGEN, default_grid(HEXGEN))

    assert sorted(point.alpha for point in found) == [step / 20 for step in range(21)]
    assert len({(point.dispatch, point.ordering) for point in found}) == 1


def test_no_two_points_decide_alike() -> None:
    found = points(DEFAULT, {"alpha": [0.1, 0.2], "ordering": ["slack", "fcfs"]})

    assert [changes(DEFAULT, point) for point in found] == [{}, {"ordering": "fcfs"}]


def test_a_policy_that_refuses_runs_is_tried_beside_such_as_refuse_runs_alone() -> None:
    refusing = replace(DEFAULT, admission="reject")

    found = points(refusing, default_grid(refusing))

    assert len(found) > 1
    assert {(point.admission, point.relegate) for point in found} == {("reject", True)}


def test_what_a_point_changes_is_named() -> None:
    other = PolicyConfig(
        late_binding=True, relegate=True, relegation_margin=1.0, ordering="deadline"
    )

    assert changes(DEFAULT, other) == {"ordering": "deadline", "relegation_margin": 1.0}


def test_round_robin_does_not_wait_and_so_stands_beside_late_binding() -> None:
    found = points(DEFAULT, {"dispatch": ["round-robin", "predicted-finish"]})

    assert [(point.dispatch, point.late_binding) for point in found] == [
        ("predicted-finish", True),
        ("round-robin", False),
    ]


@pytest.mark.parametrize(
    ("grid", "error"),
    [
        ({"color": ["red"]}, "tuner.grid: unknown field 'color'"),
        ({"alpha": [2.0]}, "tuner.grid: alpha: expected a number from 0 to 1, got 2.0"),
        ({"ordering": "fcfs"}, "tuner.grid: ordering: expected a list of values, got 'fcfs'"),
        ({"ordering": []}, "tuner.grid: ordering: expected a list of values"),
        ({"alpha": [0.1]}, "tuner.grid: expected a policy that decides otherwise"),
        (
            {"patience_s": [float(i + 1) for i in range(MAX_POINTS + 1)]},
            "tuner.grid: expected at most 200 points, got more",
        ),
    ],
)
def test_a_grid_that_cannot_be_used_is_explained(grid: dict[str, list[object]], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        points(DEFAULT, grid, source="tuner.grid")
