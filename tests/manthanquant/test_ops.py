"""Which kernels serve, and what is said about it."""

import pytest
import torch
from support.cases import make_case
from support.kernels import cpu_kernels

from manthanquant import cpu_kernels as cpu_module
from manthanquant import ops, selfcheck
from manthanquant.formats import K42V3
from manthanquant.jit import JitError
from manthanquant.transform import default_transform


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    monkeypatch.delenv("MANTHANQUANT_BACKEND", raising=False)
    ops._choose.cache_clear()
    yield
    ops._choose.cache_clear()


@pytest.fixture
def built(monkeypatch):
    """`cpu_kernels.load` finds kernels that were built just now, whatever the cache says."""
    found = cpu_kernels(K42V3, 64)
    report = found.report
    fresh = cpu_module.CpuKernels.__new__(cpu_module.CpuKernels)
    fresh.__dict__.update(found.__dict__, report=type(report)(report.arch, "Built", report.digest))
    monkeypatch.setattr(cpu_module, "load", lambda *_: fresh)
    return fresh


def step(head_size=64):
    case = make_case([20], [2], 16)
    cache = torch.zeros(case.pages, 2, 16, K42V3.token_bytes(head_size), dtype=torch.uint8)
    key = torch.randn(20, 2, head_size)
    transform = default_transform(K42V3, head_size)
    kernels = ops.kernels(K42V3, head_size)
    assert kernels.store(key, key, cache, case.slots(), transform) == 0
    query = torch.randn(2, 4, head_size)
    out = torch.empty(2, 4, head_size, dtype=torch.bfloat16)
    metadata = (case.block_table, case.seq_lens, case.query_start_loc)
    got = kernels.attention(query, cache, *metadata, transform, 0.125, out=out)
    assert got is out
    return cache, got


def test_the_compiled_path_serves(built, caplog):
    _, out = step()
    assert ops.kernels(K42V3, 64) is built
    assert out.isfinite().all() and not caplog.records


def test_torch_can_be_forced(built, monkeypatch, caplog):
    monkeypatch.setenv("MANTHANQUANT_BACKEND", "torch")
    step()
    report = ops.kernels(K42V3, 64).report
    assert (report.arch, report.message) == ("torch", "MANTHANQUANT_BACKEND=torch")
    assert not caplog.records


def test_both_paths_agree(built, monkeypatch):
    torch.manual_seed(0)
    cache, out = step()
    monkeypatch.setenv("MANTHANQUANT_BACKEND", "torch")
    ops._choose.cache_clear()
    torch.manual_seed(0)
    cache_torch, out_torch = step()
    selfcheck.compare_codes(cache, cache_torch, K42V3, 64)
    assert torch.allclose(out.float(), out_torch.float(), atol=2e-2)


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("MANTHANQUANT_BACKEND", "fast")
    with pytest.raises(ValueError, match="MANTHANQUANT_BACKEND='fast': use one of auto, torch"):
        ops.kernels(K42V3, 64)


def test_no_compiler_falls_back_loudly(monkeypatch, caplog):
    def load(*_):
        raise JitError("no C++ compiler (g++, c++ and clang++): install g++")

    monkeypatch.setattr(cpu_module, "load", load)
    report = ops.kernels(K42V3, 64).report
    step()
    assert report.arch == "torch" and report.message == "no C++ compiler (g++, c++ and clang++): install g++"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "install g++" in record.getMessage()


def test_a_fresh_kernel_that_disagrees_does_not_serve(built, monkeypatch, caplog):
    attend = built.attention
    monkeypatch.setattr(built, "attention", lambda *args, **options: attend(*args, **options) * 1.001, raising=False)
    report = ops.kernels(K42V3, 64).report
    assert report.arch == "torch" and "attention: relative error 0.001" in report.message
    assert "attention: relative error" in caplog.text


def test_no_kernel_for_the_device(caplog):
    report = ops.kernels(K42V3, 64, "xpu").report
    assert report.arch == "torch" and "'xpu'" in report.message and "'xpu'" in caplog.text
