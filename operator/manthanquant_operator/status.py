"""Everything observed -> the status. Pure: the same observation gives the same status, whatever came before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from manthanquant.contract import PrepareReport

from . import conditions, diagnosis, fit, names, telemetry
from .api import CPU, ConditionType, KernelStatus, KVCacheStatus, QuantizedModel, QuantizedModelStatus
from .conditions import Status
from .diagnosis import Failure
from .facts import DeploymentFacts, PodFacts
from .plan import Plan
from .telemetry import Sample

Verdict = tuple[Status, str, str]


@dataclass(frozen=True)
class Observed:
    """What the cluster says about one model. `samples`, `scrape_errors` and `events` are by pod UID."""

    pods: Sequence[PodFacts] = ()
    deployment: DeploymentFacts | None = None
    pending_claims: Sequence[str] = ()
    samples: Mapping[str, Sample] = field(default_factory=dict)
    scrape_errors: Mapping[str, str] = field(default_factory=dict)
    events: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # reason and message of a silent pod
    gpu_bytes: int | None = None  # memory of a GPU; only a plan asks

    @property
    def servers(self) -> list[PodFacts]:
        return [pod for pod in self.pods if pod.component == names.SERVER]

    @property
    def ready_servers(self) -> list[PodFacts]:
        return [pod for pod in self.servers if pod.ready and not pod.terminating]


def refused(
    before: QuantizedModelStatus, generation: int, reason: str, message: str, time: str
) -> QuantizedModelStatus:
    """The status of a spec that cannot be carried out. Figures of what still runs stay as they are."""
    waits: Verdict = ("Unknown", reason, "waits for Planned")
    now: dict[ConditionType, Verdict] = {
        "Planned": ("False", reason, message),
        "ModelReady": waits,
        "KernelReady": waits,
        "WorkloadReady": waits,
        "TelemetryAvailable": waits,
        "Ready": ("False", reason, message),
    }
    return before.model_copy(
        update={
            "observed_generation": generation,
            "conditions": conditions.merge(before.conditions or (), now, time, generation),
        }
    )


def build(qm: QuantizedModel, plan: Plan, seen: Observed, time: str) -> QuantizedModelStatus:
    """The status of a model that is being carried out."""
    report = _newest_report(seen.pods)
    samples = [seen.samples[pod.uid] for pod in seen.ready_servers if pod.uid in seen.samples]
    failure = _failure(seen)
    workload = _workload(qm, plan, seen)
    model = _model(report, seen, failure)
    kernel = _kernel_status(report, samples)
    planned = _planned(qm, plan, report, seen)
    now: dict[ConditionType, Verdict] = {
        "Planned": planned,
        "ModelReady": model,
        "KernelReady": _kernel(qm, kernel, report, model),
        "WorkloadReady": workload,
        "TelemetryAvailable": _telemetry(seen, samples),
        "Ready": _ready(qm, planned, workload, failure, report),
    }
    generation = qm.metadata.generation
    deployment = seen.deployment
    return QuantizedModelStatus(
        observed_generation=generation,
        replicas=deployment.replicas if deployment else 0,
        ready_replicas=deployment.ready if deployment else 0,
        selector=names.selector_string(qm),
        endpoint=None if qm.spec.plan_only else names.endpoint(qm),
        conditions=conditions.merge(qm.status.conditions or (), now, time, generation),
        kernel=kernel,
        kv_cache=_kv_cache(qm, plan, report, samples, time),
        load=telemetry.load(samples),
    )


def _newest_report(pods: Sequence[PodFacts]) -> PrepareReport | None:
    """The newest result of an init container: the one that saw the newest spec."""
    found = ((pod.created, pod.name, report) for pod in pods if (report := diagnosis.report(pod)))
    return max(found, default=(None, None, None), key=lambda item: (item[0] or "", item[1] or ""))[2]


def _failure(seen: Observed) -> Failure | None:
    if failure := diagnosis.worst(seen.pods):
        if failure.reason == "Unschedulable" and seen.pending_claims:
            claims = ", ".join(seen.pending_claims)
            return Failure(failure.reason, f"{failure.message}; claims without a volume yet: {claims}")
        return failure
    for pod in seen.pods:
        if pod.uid in seen.events:
            reason, message = seen.events[pod.uid]
            return Failure(reason, f"pod {pod.name}: {message}")
    if seen.deployment and seen.deployment.failure:
        return Failure("ReplicaFailure", f"the Deployment cannot make pods: {seen.deployment.failure}")
    return None


def _planned(qm: QuantizedModel, plan: Plan, report: PrepareReport | None, seen: Observed) -> Verdict:
    cache = report and report.cache
    if not report or not cache or cache.bytes_per_token is None:
        return "True", "Accepted", plan.summary
    fits = f", {cache.capacity_tokens:,} tokens fit a server" if cache.capacity_tokens is not None else ""
    text = f"{plan.summary}; {cache.bytes_per_token:,} bytes a token{fits}"
    if not qm.spec.plan_only or qm.spec.resources.accelerator == CPU:
        return "True", "Estimated", text
    found = fit.check(qm, report, seen.gpu_bytes)
    if found.fits is False:
        return "False", "DoesNotFit", found.message
    return "True", "Estimated", f"{text}; {found.message}"


def _model(report: PrepareReport | None, seen: Observed, failure: Failure | None) -> Verdict:
    if report and report.model_path:
        size = f", {telemetry.human_bytes(report.model_bytes)}" if report.model_bytes is not None else ""
        return "True", "Resolved", f"{report.model_path}{size}"
    if report and report.error and failure:
        return "False", failure.reason, failure.message
    return "Unknown", "Preparing" if seen.pods else "NoPods", "no init container has resolved the model yet"


def _kernel(qm: QuantizedModel, kernel: KernelStatus | None, report: PrepareReport | None, model: Verdict) -> Verdict:
    """About the kernels that serve, where a server runs, else about those that the init container obtained."""
    if kernel:
        seconds = f", built in {kernel.build_seconds:g} s" if kernel.build_seconds is not None else ""
        note = f": {kernel.message}" if kernel.message else ""
        return "True", kernel.source or "PyTorch", f"{kernel.sm_arch}{seconds}{note}"
    if report and report.error and report.model_path:
        return "False", report.error.reason, report.error.message
    if qm.spec.plan_only:
        return "Unknown", "PlanOnly", "spec.planOnly is set: no kernels are built"
    if report and not report.error:
        return "True", "NotNeeded", "this mode runs no kernels of ours"
    return "Unknown", model[1], "waits for ModelReady"


def _workload(qm: QuantizedModel, plan: Plan, seen: Observed) -> Verdict:
    deployment = seen.deployment
    if qm.spec.plan_only:
        return "False", "PlanOnly", "spec.planOnly is set: no server runs"
    if plan.replicas == 0 and (deployment is None or deployment.replicas == 0):
        if qm.spec.suspend:
            return "False", "Suspended", "spec.suspend is set: no server runs"
        return "False", "ScaledToZero", "spec.replicas is 0: no server runs"
    if deployment is None:
        return "False", "Creating", "the Deployment is being made"
    text = f"{deployment.ready} of {plan.replicas} servers ready"
    if deployment.up_to_date and deployment.updated == deployment.ready == deployment.replicas == plan.replicas:
        return "True", "AllReady", text
    doing = diagnosis.progress(seen.servers)
    if deployment.updated < plan.replicas and deployment.ready:
        text += f", {deployment.updated} updated"
    return "False", "Progressing", f"{text}; {doing}" if doing else text


def _telemetry(seen: Observed, samples: Sequence[Sample]) -> Verdict:
    ready = seen.ready_servers
    if not ready:
        return "Unknown", "NoServers", "no server is ready"
    errors = [f"pod {pod.name}: {seen.scrape_errors[pod.uid]}" for pod in ready if pod.uid in seen.scrape_errors]
    if errors:
        return "False", "ScrapeFailed", "; ".join(sorted(errors)[:3])
    if len(samples) < len(ready):
        return "Unknown", "Waiting", "the first statistics are on their way"
    return "True", "Measured", f"statistics of {len(samples)} of {len(ready)} servers"


def _ready(
    qm: QuantizedModel, planned: Verdict, workload: Verdict, failure: Failure | None, report: PrepareReport | None
) -> Verdict:
    if workload[0] == "True":
        return "True", "Serving", workload[2]
    if failure:
        return "False", failure.reason, failure.message
    if planned[0] == "False":
        return planned
    if qm.spec.plan_only and report and not report.error:
        return "False", "PlanOnly", "the plan is made; unset spec.planOnly to serve"
    return "False", workload[1], workload[2]


def _kernel_status(report: PrepareReport | None, samples: Sequence[Sample]) -> KernelStatus | None:
    """The server's own word, with the build time that only the init container knows."""
    prepared = report.kernel if report else None
    if samples:
        stats = samples[0].stats
        serving = telemetry.kernel(stats.kernel, stats.calibration)
        if prepared and prepared.digest == serving.digest:
            before = telemetry.kernel(prepared, None)
            return serving.model_copy(update={"build_seconds": before.build_seconds, "source": before.source})
        return serving
    return telemetry.kernel(prepared, report.calibration if report else None) if prepared else None


def _kv_cache(
    qm: QuantizedModel, plan: Plan, report: PrepareReport | None, samples: Sequence[Sample], time: str
) -> KVCacheStatus | None:
    if samples:
        return telemetry.stamp(telemetry.measured(samples), qm.status.kv_cache, time)
    if report and report.cache:
        return telemetry.stamp(telemetry.estimated(report.cache, max(1, plan.replicas)), None, time)
    return None
