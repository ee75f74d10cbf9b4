"""What a suite yields: one measurement."""

from __future__ import annotations

from dataclasses import dataclass

OURS = "manthanquant"


@dataclass(frozen=True)
class Result:
    """One measurement.

    Attributes:
        suite: e.g. `store`.
        case: the shapes, the same text for all subjects of a case.
        subject: `manthanquant` with what of it, or the name of a peer.
        milliseconds: of one call.
        bytes: device memory that the call must move at least, each input once and each output once.
        note: what else to know; empty for nothing.
    """

    suite: str
    case: str
    subject: str
    milliseconds: float
    bytes: int
    note: str = ""

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.milliseconds / 1e6

    @property
    def is_ours(self) -> bool:
        return self.subject.startswith(OURS)
