import math

import pytest

from tests.builders import candidate, stage_request


@pytest.mark.parametrize(("deadline", "has"), [(math.inf, False), (5.0, True), (-5.0, True)])
def test_any_finite_instant_is_a_deadline(deadline: float, has: bool) -> None:
    assert stage_request(deadline=deadline).has_deadline is has


def test_a_candidate_finishes_after_queue_prefill_and_decode() -> None:
    each = candidate("a", queue_s=1.0, prefill_s=2.0, decode_s=4.0, harm_s=8.0)

    assert (each.service_s, each.finish_s) == (6.0, 7.0)
