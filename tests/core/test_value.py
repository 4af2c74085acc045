"""Values that are made per call behave as named tuples do, but for being tuples."""

import copy
import math
import pickle

import pytest

from tests.builders import candidate, stage_request
from vllm_workflow.core.prefix import Segment
from vllm_workflow.core.runs import Attained
from vllm_workflow.core.types import Candidate, Outcome, StageRequest
from vllm_workflow.core.value import Value

VALUES: list[Value] = [
    stage_request(prefix=(Segment(7, 100),)),
    candidate("a", queue_s=1.0),
    Outcome(request_id="r", instance_id="a", ok=True),
    Segment(7, 100),
    Attained(total_s=1.0),
]


def kind(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize("value", VALUES, ids=kind)
def test_a_value_equals_one_with_the_same_fields_and_no_other(value: Value) -> None:
    name, field = next((n, f) for n, f in value._asdict().items() if f)

    assert value == value._replace() is not value
    assert hash(value) == hash(value._replace())
    assert value != value._replace(**{name: field * 2})
    assert value != tuple(value._asdict().values())


def test_a_field_that_is_not_a_number_is_equal_to_itself_only() -> None:
    one, other = stage_request(run_arrival_time=math.nan), stage_request(run_arrival_time=0.0)

    assert one == stage_request(run_arrival_time=float("nan"))
    assert one != other
    assert other != one


@pytest.mark.parametrize("value", VALUES, ids=kind)
def test_a_value_survives_being_copied_and_sent_to_another_process(value: Value) -> None:
    assert copy.deepcopy(value) == value
    assert pickle.loads(pickle.dumps(value)) == value


@pytest.mark.parametrize("cls", [StageRequest, Candidate])
def test_all_fields_of_a_value_are_arguments_in_their_order(cls: type[Value]) -> None:
    arguments = cls.__init__.__code__.co_varnames[1 : 1 + len(cls._fields)]  # type: ignore[attr-defined]

    assert arguments == cls._fields


def test_a_call_with_another_service_differs_in_nothing_else() -> None:
    request = stage_request("r", tenant_id="t", stage="s", deadline=9.0, prefix=(Segment(7, 1),))

    assert request.with_service(3.0) == request._replace(service_s=3.0)


def test_what_is_unknown_of_a_value_cannot_be_set() -> None:
    with pytest.raises(TypeError, match="unheard_of"):
        stage_request()._replace(unheard_of=1)


def test_a_value_shows_its_fields() -> None:
    assert repr(Segment(7, 100)) == "Segment(chain_hash=7, num_tokens=100)"
