"""Transition times and what is worth telling."""

from __future__ import annotations

from manthanquant_operator import conditions
from manthanquant_operator.api import Condition


def _one(status: str = "False", reason: str = "A", message: str = "m", time: str = "t1") -> list[Condition]:
    return conditions.merge([], {"Ready": (status, reason, message)}, time, 1)  # type: ignore[dict-item]


def test_the_time_moves_only_with_the_status() -> None:
    first = _one()
    same = conditions.merge(first, {"Ready": ("False", "B", "n")}, "t2", 2)
    assert (same[0].last_transition_time, same[0].reason, same[0].observed_generation) == ("t1", "B", 2)
    moved = conditions.merge(same, {"Ready": ("True", "C", "")}, "t3", 2)
    assert moved[0].last_transition_time == "t3"


def test_a_condition_that_is_no_longer_given_goes() -> None:
    assert conditions.merge(_one(), {"Planned": ("True", "A", "")}, "t2", 1)[0].type == "Planned"
    assert len(conditions.merge(_one(), {"Planned": ("True", "A", "")}, "t2", 1)) == 1


def test_a_message_is_bounded() -> None:
    assert len(_one(message="x" * 10_000)[0].message) == conditions.MESSAGE_LIMIT


def test_a_change_of_status_or_reason_is_a_transition_and_of_a_message_is_not() -> None:
    assert conditions.transitions(_one(), _one(message="other")) == []
    for changed in (_one(status="True"), _one(reason="B")):
        assert conditions.transitions(_one(), changed) == changed
    assert conditions.transitions([], _one()) == _one()
