"""The self-check finds what it is there to find."""

import pytest
import torch

from manthanquant import reference, selfcheck
from manthanquant.formats import K3V3
from manthanquant.ops import ReferenceKernels

SIZE = 64


class Broken(ReferenceKernels):
    """The reference with one fault."""

    def __init__(self, fault):
        super().__init__(K3V3, None)
        self.fault = fault

    def store(self, key, value, cache, slot_mapping, transform, hot=None, hot_slots=None):
        bad = super().store(key, value, cache, slot_mapping, transform, hot, hot_slots)
        if self.fault == "codes":
            cache[:, :, 0, 0] ^= 7
        if self.fault == "scales":
            cache[:, 1, -1, -1] ^= 1
        if self.fault == "copies":
            hot.value[3] += 1
        return bad

    def attention(self, *args, **options):
        out = super().attention(*args, **options)
        if self.fault == "window" and options["window"]:
            return reference.attention(*args[:5], K3V3, *args[5:], **(options | {"window": options["window"] + 1}))
        if self.fault == "hot" and options["hot"]:
            return super().attention(*args, **(options | {"hot": None}))
        if self.fault == "nan":
            out[0, 0, 0] = torch.nan
        return out


def test_the_reference_agrees_with_itself():
    assert selfcheck.check(Broken(None), K3V3, SIZE) == 0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "codes",
            r"store: \d+ of \d+ key codes differ, first at page \d, KV head 0, unit 0, token \d, channel \d+: \d",
        ),
        ("scales", "store: .* scales differ"),
        ("copies", "store: the exact value copies differ"),
        ("window", r"attention: relative error .* at token \d, head \d"),
        ("hot", "attention: relative error"),
        ("nan", "attention: relative error nan at token 0, head 0"),
    ],
)
def test_each_fault_is_found(fault, message):
    with pytest.raises(selfcheck.KernelMismatch, match=message):
        selfcheck.check(Broken(fault), K3V3, SIZE)
