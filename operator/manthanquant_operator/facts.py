"""What the operator keeps of each object it watches: a few facts, not the object, so that memory stays small."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from . import names

Object = Mapping[str, Any]
Key = tuple[str, str]  # namespace and name of a QuantizedModel


@dataclass(frozen=True, slots=True)
class Termination:
    """How a container ended. `message` is its termination message: what it wrote, or the end of its log."""

    reason: str
    exit_code: int
    message: str


@dataclass(frozen=True, slots=True)
class ContainerFacts:
    """A container: `waiting` holds a reason and message, `terminated` the present end, `last` the one before."""

    name: str
    image: str
    ready: bool
    running: bool
    restarts: int
    waiting_reason: str = ""
    waiting_message: str = ""
    terminated: Termination | None = None
    last: Termination | None = None

    @property
    def latest_end(self) -> Termination | None:
        return self.terminated or self.last


@dataclass(frozen=True, slots=True)
class PodFacts:
    """A pod of a model. `init` and `containers` are in the pod's own order."""

    name: str
    uid: str
    component: str
    created: str
    node: str  # empty until it is scheduled
    ip: str
    phase: str
    reason: str
    message: str
    ready: bool
    terminating: bool
    unschedulable: str
    init: tuple[ContainerFacts, ...]
    containers: tuple[ContainerFacts, ...]

    def container(self, name: str) -> ContainerFacts | None:
        return next((item for item in (*self.init, *self.containers) if item.name == name), None)


@dataclass(frozen=True, slots=True)
class DeploymentFacts:
    """What the Deployment's controller says; `failure` is why it cannot make pods."""

    up_to_date: bool  # the controller has seen the newest spec
    replicas: int
    updated: int
    ready: int
    failure: str


@dataclass(frozen=True, slots=True)
class ChildFacts:
    """Any child: enough to see that somebody changed, deleted or adopted it."""

    kind: str
    name: str
    uid: str
    owner_uid: str
    owned_fields: str  # hash of the fields that are ours
    pending: bool = False  # a claim that waits for its volume
    deployment: DeploymentFacts | None = None


def key_of(body: Object) -> Key | None:
    """The model that an object of ours belongs to, by its label."""
    metadata = body.get("metadata", {})
    model = (metadata.get("labels") or {}).get(names.MODEL_LABEL)
    return (metadata["namespace"], model) if model else None


def owner_uid(body: Object) -> str:
    """UID of the controlling owner, or an empty string."""
    owners = body.get("metadata", {}).get("ownerReferences") or ()
    return next((str(owner["uid"]) for owner in owners if owner.get("controller")), "")


def owned_fields(body: Object) -> str:
    """Hash of the set of fields that our field manager owns.

    Whoever changes one of our fields takes its ownership, so this changes exactly when what we applied was altered,
    whatever the API server does to spell a value its own way.
    """
    for entry in body.get("metadata", {}).get("managedFields") or ():
        ours = entry.get("manager") == names.FIELD_MANAGER and entry.get("operation") == "Apply"
        if ours and not entry.get("subresource"):
            return hashlib.sha256(json.dumps(entry.get("fieldsV1"), sort_keys=True).encode()).hexdigest()[:16]
    return ""


def child(kind: str, body: Object) -> ChildFacts:
    metadata = body["metadata"]
    return ChildFacts(
        kind=kind,
        name=metadata["name"],
        uid=metadata["uid"],
        owner_uid=owner_uid(body),
        owned_fields=owned_fields(body),
        pending=kind == "PersistentVolumeClaim" and body.get("status", {}).get("phase") == "Pending",
        deployment=_deployment(body) if kind == "Deployment" else None,
    )


def _deployment(body: Object) -> DeploymentFacts:
    status = body.get("status") or {}
    failures = (c for c in status.get("conditions") or () if c["type"] == "ReplicaFailure" and c["status"] == "True")
    return DeploymentFacts(
        up_to_date=status.get("observedGeneration", 0) >= body["metadata"].get("generation", 0),
        replicas=status.get("replicas", 0),
        updated=status.get("updatedReplicas", 0),
        ready=status.get("readyReplicas", 0),
        failure=next((c.get("message", "") for c in failures), ""),
    )


def pod(body: Object) -> PodFacts:
    metadata, status = body["metadata"], body.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or ()}
    scheduled = conditions.get("PodScheduled", {})
    return PodFacts(
        name=metadata["name"],
        uid=metadata["uid"],
        component=(metadata.get("labels") or {}).get(names.COMPONENT_LABEL, ""),
        created=metadata.get("creationTimestamp", ""),
        node=(body.get("spec") or {}).get("nodeName", ""),
        ip=status.get("podIP", ""),
        phase=status.get("phase", ""),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        ready=conditions.get("Ready", {}).get("status") == "True",
        terminating=bool(metadata.get("deletionTimestamp")),
        unschedulable=scheduled.get("message", "") if scheduled.get("status") == "False" else "",
        init=_containers(status.get("initContainerStatuses")),
        containers=_containers(status.get("containerStatuses")),
    )


def _containers(statuses: Iterable[Object] | None) -> tuple[ContainerFacts, ...]:
    return tuple(_container(status) for status in statuses or ())


def _container(status: Object) -> ContainerFacts:
    state, last = status.get("state") or {}, status.get("lastState") or {}
    waiting = state.get("waiting") or {}
    return ContainerFacts(
        name=status["name"],
        image=status.get("image", ""),
        ready=bool(status.get("ready")),
        running="running" in state,
        restarts=status.get("restartCount", 0),
        waiting_reason=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        terminated=_termination(state.get("terminated")),
        last=_termination(last.get("terminated")),
    )


def _termination(end: Object | None) -> Termination | None:
    if not end:
        return None
    return Termination(end.get("reason", ""), end.get("exitCode", 0), (end.get("message") or "").strip())
