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
        operations: floating-point operations of a call that the matrix units bound; 0: memory bounds it.
    """

    suite: str
    case: str
    subject: str
    milliseconds: float
    bytes: int
    note: str = ""
    operations: int = 0

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.milliseconds / 1e6

    @property
    def teraflops(self) -> float:
        return self.operations / self.milliseconds / 1e9

    @property
    def is_ours(self) -> bool:
        return self.subject.startswith(OURS)
