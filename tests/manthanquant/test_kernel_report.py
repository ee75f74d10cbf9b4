import pytest

from manthanquant import kernel_report, ops, selfcheck
from manthanquant.contract import KernelReport
from manthanquant.settings import Settings


def test_several_head_sizes_are_one_report() -> None:
    cached, built = (
        KernelReport("cpu-avx2", "Cached", "a"),
        KernelReport("cpu-avx2", "Built", "b", 12.34, "was corrupt"),
    )
    assert kernel_report.combined([cached]) == cached
    assert kernel_report.combined([cached, built]) == KernelReport("cpu-avx2", "Built", "b", 12.3, "was corrupt")


def test_the_pytorch_path_of_one_is_what_is_reported() -> None:
    fallback = KernelReport("torch", message="no compiler")
    assert kernel_report.combined([KernelReport("cpu-avx2", "Cached", "a"), fallback]) == fallback


def test_formats_without_a_kernel_say_so() -> None:
    report = kernel_report.obtain(Settings("seed3", mode="shadow"), [64])
    assert (report.arch, report.message) == ("torch", "format seed3 has no kernel")


def test_the_pytorch_path_on_request() -> None:
    report = kernel_report.obtain(Settings(backend="torch"), [64])
    assert (report.arch, report.message) == ("torch", "the PyTorch path was asked for")


class Compiled(ops.ReferenceKernels):
    """Says that it is compiled."""

    def __init__(self, fmt: object, size: int) -> None:
        super().__init__(fmt, None)  # type: ignore[arg-type]
        self.report = KernelReport("cpu-avx2", "Cached", str(size))


def test_a_kernel_is_checked_wherever_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr(ops, "kernels", Compiled)
    monkeypatch.setattr(selfcheck, "check", lambda kernels, fmt, size: checked.append(size))
    assert kernel_report.obtain(Settings(), [64, 128]).source == "Cached"
    assert checked == [64, 128]


def test_a_kernel_that_disagrees_may_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def disagree(*args: object) -> None:
        raise selfcheck.KernelMismatch("store: codes differ")

    monkeypatch.setattr(ops, "kernels", Compiled)
    monkeypatch.setattr(selfcheck, "check", disagree)
    with pytest.raises(selfcheck.KernelMismatch):
        kernel_report.obtain(Settings(), [64])
