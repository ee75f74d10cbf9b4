"""Weights and cache against the memory of GPUs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from manthanquant_operator import fit, plan, status
from manthanquant_operator.facts import ContainerFacts, PodFacts, Termination
from manthanquant_operator.settings import Settings
from manthanquant_operator.status import Observed

from manthanquant.contract import CacheReport, PrepareReport

GI = 1 << 30
CACHE = CacheReport("k42v3", "compressed", bytes_per_token=50_000, hot_pool_bytes=GI)
REPORT = PrepareReport(model_path="/models", model_bytes=15 * GI, cache=CACHE)


def test_the_tokens_that_fit_beside_the_weights(make_model: Any) -> None:
    found = fit.check(make_model(), REPORT, 80 * GI)
    tokens = (int(80 * GI * 0.92) - 16 * GI) // 50_000
    assert found == fit.Fit(
        True,
        f"beside weights of 15.0Gi, about {tokens:,} tokens fit in 73.6Gi of GPU memory (1 x 80.0Gi, of which 92%)",
    )


@pytest.mark.parametrize(
    ("resources", "utilization", "fits"),
    [({}, None, False), ({"count": 2}, None, True), ({"count": 2}, 0.4, False)],
)
def test_count_and_utilization_matter(
    resources: dict[str, Any], utilization: float | None, fits: bool, make_model: Any
) -> None:
    engine = {} if utilization is None else {"gpuMemoryUtilization": utilization}
    model = make_model({"resources": resources, "engine": engine})
    found = fit.check(model, dataclasses.replace(REPORT, model_bytes=20 * GI), 22 * GI)
    assert found.fits is fits
    assert fits or "weights of 20.0Gi leave no KV cache in" in found.message
    assert fits or found.message.endswith("raise spec.resources.count")


@pytest.mark.parametrize(("cache_bytes", "fits"), [(50 * GI, True), (60 * GI, False)])
def test_a_cache_of_a_given_size(cache_bytes: int, fits: bool, make_model: Any) -> None:
    report = dataclasses.replace(REPORT, cache=dataclasses.replace(CACHE, cache_bytes=cache_bytes))
    found = fit.check(make_model({"kvCache": {"memory": str(cache_bytes)}}), report, 80 * GI)
    assert found.fits is fits
    assert ("lower spec.kvCache.memory" in found.message) is not fits


@pytest.mark.parametrize("accelerator", ["nvidia.com/gpu", "nvidia.com/mig-1g.10gb"])
def test_what_is_not_known_is_said(accelerator: str, make_model: Any) -> None:
    found = fit.check(make_model({"resources": {"accelerator": accelerator}}), REPORT, None)
    assert found.fits is None and f"label {accelerator}.memory" in found.message


@pytest.mark.parametrize(
    ("gpu_bytes", "reason", "ready"), [(80 * GI, "Estimated", "PlanOnly"), (12 * GI, "DoesNotFit", "DoesNotFit")]
)
def test_a_plan_says_whether_it_fits(
    gpu_bytes: int, reason: str, ready: str, make_model: Any, settings: Settings
) -> None:
    model = make_model({"planOnly": True})
    end = Termination("Completed", 0, REPORT.to_json())
    prepare = ContainerFacts("prepare", "i", True, False, 0, terminated=end)
    pod = PodFacts("p", "u", "plan", "2026", "n", "", "Succeeded", "", "", False, False, "", (), (prepare,))
    found = status.build(
        model, plan.make(model, settings), Observed([pod], gpu_bytes=gpu_bytes), "2026-01-01T00:00:00Z"
    )
    conditions = {c.type: c for c in found.conditions or ()}
    assert (conditions["Planned"].reason, conditions["Ready"].reason) == (reason, ready)
    assert "GPU memory" in conditions["Planned"].message
    assert (conditions["KernelReady"].status, conditions["KernelReady"].reason) == ("Unknown", "PlanOnly")
