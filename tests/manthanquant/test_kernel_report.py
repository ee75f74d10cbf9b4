import pytest

from manthanquant import formats, kernel_report, ops
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


def test_what_ops_chose_is_what_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled(ops.ReferenceKernels):
        def __init__(self, fmt: formats.Format, size: int) -> None:
            super().__init__(fmt, None)
            self.report = KernelReport("cpu-avx2", "Cached", str(size))

    monkeypatch.setattr(ops, "kernels", Compiled)
    assert kernel_report.obtain(Settings(), [64, 128]) == KernelReport("cpu-avx2", "Cached", "64")
