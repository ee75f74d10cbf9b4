"""Pods' facts -> what fails, in words that name the pod, the container, its exit code and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from manthanquant.contract import PREPARE_CONTAINER, ContractError, PrepareReport

from .facts import ContainerFacts, PodFacts, Termination

MESSAGE_LIMIT = 1500  # of a container's own words: a condition should still be read
_PULL_REASONS = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
_CREATE_REASONS = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError"}
_QUIET_REASONS = {"", "ContainerCreating", "PodInitializing"}


@dataclass(frozen=True)
class Failure:
    """Why a pod does not serve. `reason` is a condition's reason; without a `container` the whole pod fails."""

    reason: str
    message: str
    container: str = ""


def report(pod: PodFacts) -> PrepareReport | None:
    """The init container's result, once it has written one. A message that breaks the contract is no result."""
    container = pod.container(PREPARE_CONTAINER)
    end = container and container.latest_end
    if not end or not end.message:
        return None
    try:
        return PrepareReport.from_json(end.message)
    except ContractError:
        return None


def diagnose(pod: PodFacts) -> Failure | None:
    """The first thing that keeps a pod from serving, or `None` while it is healthy or simply under way."""
    if pod.terminating:
        return None
    for container in (*pod.init, *pod.containers):
        if failure := _container_failure(pod, container):
            return failure
    if pod.unschedulable and pod.phase == "Pending":
        return Failure("Unschedulable", f"pod {pod.name} cannot be scheduled: {pod.unschedulable}")
    if pod.phase == "Failed":
        why = pod.message or pod.reason or "no reason given"
        return Failure(pod.reason or "PodFailed", f"pod {pod.name} failed: {why}")
    return None


def worst(pods: Iterable[PodFacts]) -> Failure | None:
    """The failure of the newest pod that fails: it carries the newest spec."""
    failures = ((pod.created, pod.name, failure) for pod in pods if (failure := diagnose(pod)))
    return max(failures, default=(None, None, None), key=lambda item: (item[0] or "", item[1] or ""))[2]


def progress(pods: Sequence[PodFacts]) -> str:
    """What the pods that are not ready are doing; empty when there are none."""
    steps = [f"pod {pod.name}: {_step(pod)}" for pod in sorted(pods, key=lambda p: p.name) if not pod.ready]
    return "; ".join(steps[:3]) + (f"; and {len(steps) - 3} more" if len(steps) > 3 else "")


def is_silent(pod: PodFacts) -> bool:
    """Whether a pod waits without its status saying why: only the pod's events tell, e.g. of a volume."""
    containers = (*pod.init, *pod.containers)
    return (
        pod.phase == "Pending"
        and bool(pod.node)
        and not pod.terminating
        and not any(c.running or c.latest_end for c in containers)
        and all(c.waiting_reason in _QUIET_REASONS for c in containers)
    )


def _step(pod: PodFacts) -> str:
    if pod.terminating:
        return "stopping"
    for container in (*pod.init, *pod.containers):
        if container.running:
            return f"container {container.name} is {'starting' if container in pod.containers else 'running'}"
        if container.terminated is None:
            return f"container {container.name} waits ({container.waiting_reason or 'to be created'})"
    return "waiting for the kubelet" if pod.node else "waiting for the scheduler"


def _container_failure(pod: PodFacts, container: ContainerFacts) -> Failure | None:
    where = f"pod {pod.name}, container {container.name}"
    reason = container.waiting_reason
    if reason in _PULL_REASONS:
        # The kubelet alternates between two reasons with one cause; one reason keeps the condition still.
        text = container.waiting_message or reason
        return Failure("ImagePullFailed", f"{where}: cannot pull {container.image}: {text}", container.name)
    if reason in _CREATE_REASONS:
        return Failure(reason, f"{where}: {container.waiting_message or reason}", container.name)
    end = container.latest_end
    if container.ready or end is None or (end.exit_code == 0 and reason != "CrashLoopBackOff"):
        return None
    return _end_failure(where, container, end)


def _end_failure(where: str, container: ContainerFacts, end: Termination) -> Failure:
    restarts = f", {container.restarts} restarts" if container.restarts else ""
    ended = f"{where} ended with exit code {end.exit_code} ({end.reason}{restarts})"
    if end.reason == "OOMKilled":
        return Failure("OOMKilled", f"{ended}: out of memory: raise spec.resources.memory", container.name)
    if container.name == PREPARE_CONTAINER and end.message:
        try:
            error = PrepareReport.from_json(end.message).error
        except ContractError:
            error = None
        if error:
            field = f"spec.{error.field.removeprefix('spec.')}: " if error.field else ""
            return Failure(error.reason, f"{ended}: {field}{error.message}", container.name)
    words = end.message[-MESSAGE_LIMIT:] or "it left no message; see its log"
    return Failure("ContainerFailed", f"{ended}: {words}", container.name)
