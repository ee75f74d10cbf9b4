"""The conditions' bookkeeping: one place that decides when a transition time moves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from .api import Condition, ConditionType

Status = Literal["True", "False", "Unknown"]
MESSAGE_LIMIT = 4096


def merge(
    before: Iterable[Condition],
    now: Mapping[ConditionType, tuple[Status, str, str]],
    time: str,
    generation: int,
) -> list[Condition]:
    """The new conditions, in the order of `now`. A transition time moves only when the status changes."""
    known = {condition.type: condition for condition in before}

    def one(kind: ConditionType, status: Status, reason: str, message: str) -> Condition:
        old = known.get(kind)
        return Condition(
            type=kind,
            status=status,
            reason=reason,
            message=message[:MESSAGE_LIMIT],
            last_transition_time=old.last_transition_time if old and old.status == status else time,
            observed_generation=generation,
        )

    return [one(kind, *value) for kind, value in now.items()]


def transitions(before: Iterable[Condition], after: Iterable[Condition]) -> list[Condition]:
    """The conditions whose status or reason changed: each is worth an event."""
    known = {condition.type: (condition.status, condition.reason) for condition in before}
    return [c for c in after if known.get(c.type) != (c.status, c.reason)]
