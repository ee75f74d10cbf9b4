"""Everything observed -> the status."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from manthanquant_operator import plan, status
from manthanquant_operator.api import QuantizedModel, QuantizedModelStatus
from manthanquant_operator.facts import ContainerFacts, DeploymentFacts, PodFacts, Termination
from manthanquant_operator.settings import Settings
from manthanquant_operator.status import Observed
from manthanquant_operator.telemetry import Sample

from manthanquant.contract import CacheReport, CalibrationReport, KernelReport, PrepareError, PrepareReport, Stats

REPORT = PrepareReport(
    model_path="/models",
    kernel=KernelReport("sm_90a", "Built", "d", 27.7),
    calibration=CalibrationReport("gain", "Calibrated"),
    cache=CacheReport("k42v3", "compressed", bytes_per_token=100, compression_ratio=5.12),
)
STATS = Stats("m", KernelReport("sm_90a", "Cached", "d"), CalibrationReport("gain", "Cached"), REPORT.cache)  # type: ignore[arg-type]
READY = DeploymentFacts(True, 1, 1, 1, "")


def _pod(report: PrepareReport | None = REPORT, ready: bool = True, uid: str = "u", exit_code: int = 0) -> PodFacts:
    message = report.to_json() if report else ""
    prepare = ContainerFacts("prepare", "i", True, False, 0, terminated=Termination("", exit_code, message))
    server = ContainerFacts("server", "i", ready, True, 0)
    return PodFacts(
        f"pod-{uid}", uid, "server", "2026", "n", "10.0.0.1", "Running", "", "", ready, False, "", (prepare,), (server,)
    )


@pytest.fixture
def build(make_model: Any, settings: Settings) -> Any:
    def build(seen: Observed, spec: dict[str, Any] | None = None, before: Any = None) -> QuantizedModelStatus:
        model: QuantizedModel = make_model(spec)
        if before:
            model = model.model_copy(update={"status": before})
        return status.build(model, plan.make(model, settings), seen, "2026-01-01T00:00:00Z")

    return build


def _conditions(found: QuantizedModelStatus) -> dict[str, tuple[str, str]]:
    return {c.type: (c.status, c.reason) for c in found.conditions or ()}


def test_a_serving_model(build: Any) -> None:
    found = build(Observed([_pod()], READY, samples={"u": Sample("pod-u", STATS, 0.0)}))
    assert _conditions(found) == {
        "Planned": ("True", "Estimated"),
        "ModelReady": ("True", "Resolved"),
        "KernelReady": ("True", "Built"),
        "WorkloadReady": ("True", "AllReady"),
        "TelemetryAvailable": ("True", "Measured"),
        "Ready": ("True", "Serving"),
    }
    assert (found.replicas, found.ready_replicas, found.observed_generation) == (1, 1, 3)
    assert found.endpoint == "http://qwen.ml.svc:8000/v1"
    assert found.selector == "app.kubernetes.io/component=server,manthanquant.io/model=qwen"
    assert found.kernel and (found.kernel.source, found.kernel.build_seconds) == ("Built", 28.0)
    assert found.kv_cache and found.kv_cache.source == "Measured"


def test_the_same_observation_gives_the_same_status(build: Any) -> None:
    seen = Observed([_pod()], READY, samples={"u": Sample("pod-u", STATS, 0.0)})
    first = build(seen)
    assert build(seen, before=first) == first


def test_nothing_yet(build: Any) -> None:
    found = build(Observed())
    assert _conditions(found) == {
        "Planned": ("True", "Accepted"),
        "ModelReady": ("Unknown", "NoPods"),
        "KernelReady": ("Unknown", "NoPods"),
        "WorkloadReady": ("False", "Creating"),
        "TelemetryAvailable": ("Unknown", "NoServers"),
        "Ready": ("False", "Creating"),
    }
    assert found.kernel is None and found.kv_cache is None and found.load is None


def test_a_mode_without_kernels(build: Any) -> None:
    report = dataclasses.replace(REPORT, kernel=None)
    assert _conditions(build(Observed([_pod(report)], READY), {"kvCache": {"mode": "off"}}))["KernelReady"] == (
        "True", "NotNeeded",
    )  # fmt: skip


def test_a_server_that_fell_back_is_told_though_the_kernels_were_built(build: Any) -> None:
    stats = dataclasses.replace(STATS, kernel=KernelReport("torch", message="no such file"))
    found = build(Observed([_pod()], READY, samples={"u": Sample("pod-u", stats, 0.0)}))
    (kernel,) = (c for c in found.conditions if c.type == "KernelReady")
    assert (kernel.status, kernel.reason, kernel.message) == ("True", "PyTorch", "torch: no such file")


def test_kernels_of_another_digest_do_not_lend_their_build_time(build: Any) -> None:
    stats = dataclasses.replace(STATS, kernel=KernelReport("sm_90a", "Cached", "other"))
    found = build(Observed([_pod()], READY, samples={"u": Sample("pod-u", stats, 0.0)}))
    assert (found.kernel.digest, found.kernel.source, found.kernel.build_seconds) == ("other", "Cached", None)


def test_a_failing_pod_beside_enough_ready_ones_does_not_unready_the_model(build: Any) -> None:
    error = dataclasses.replace(REPORT, model_path=None, error=PrepareError("ModelNotFound", "gone"))
    seen = Observed([_pod(), _pod(error, False, "v", 1)], READY)
    assert _conditions(build(seen))["Ready"] == ("True", "Serving")


@pytest.mark.parametrize(
    "deployment",
    [
        dataclasses.replace(READY, up_to_date=False),
        dataclasses.replace(READY, updated=0),
        dataclasses.replace(READY, ready=0),
        dataclasses.replace(READY, replicas=2),
    ],
)
def test_a_rollout_that_is_not_done_is_not_ready(deployment: DeploymentFacts, build: Any) -> None:
    assert _conditions(build(Observed([_pod()], deployment)))["Ready"] == ("False", "Progressing")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [({"suspend": True}, "Suspended"), ({"replicas": 0}, "ScaledToZero"), ({"planOnly": True}, "PlanOnly")],
)
def test_what_is_stopped_says_why(spec: dict[str, Any], reason: str, build: Any) -> None:
    found = build(Observed(deployment=DeploymentFacts(True, 0, 0, 0, "")), spec)
    assert _conditions(found)["Ready"] == ("False", reason)
    assert (found.endpoint is None) == (reason == "PlanOnly")


def test_a_lost_reading_keeps_the_figures_and_says_so(build: Any) -> None:
    samples = {"u": Sample("pod-u", STATS, 0.0)}
    found = build(Observed([_pod()], READY, samples=samples, scrape_errors={"u": "timed out"}))
    assert _conditions(found)["TelemetryAvailable"] == ("False", "ScrapeFailed")
    assert found.kv_cache.source == "Measured"
    waiting = build(Observed([_pod()], READY))
    assert _conditions(waiting)["TelemetryAvailable"] == ("Unknown", "Waiting")
    assert waiting.kv_cache.source == "Estimated"


def test_a_silent_pods_event_and_a_deployments_failure_are_reasons(build: Any) -> None:
    pod = dataclasses.replace(_pod(None, False), init=(), containers=(), phase="Pending")
    deployment = dataclasses.replace(READY, ready=0)
    mount = build(Observed([pod], deployment, events={"u": ("FailedMount", "no such directory")}))
    assert _conditions(mount)["Ready"] == ("False", "FailedMount")
    quota = build(Observed([], dataclasses.replace(deployment, failure="exceeded quota")))
    assert _conditions(quota)["Ready"] == ("False", "ReplicaFailure")


def test_a_refused_spec_keeps_the_figures_of_what_still_runs(build: Any) -> None:
    before = build(Observed([_pod()], READY, samples={"u": Sample("pod-u", STATS, 0.0)}))
    after = status.refused(before, 4, "HostPathNotAllowed", "spec.model.uri: no", "2026-01-02T00:00:00Z")
    assert _conditions(after)["Planned"] == _conditions(after)["Ready"] == ("False", "HostPathNotAllowed")
    assert (after.observed_generation, after.kv_cache, after.ready_replicas) == (4, before.kv_cache, 1)
