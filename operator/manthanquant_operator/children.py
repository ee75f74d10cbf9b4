"""Everything that a model owns, in the order in which it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import policy, service, storage, workload
from .api import QuantizedModel
from .plan import Plan
from .settings import Settings


@dataclass(frozen=True)
class Kind:
    """A kind of child. `prune`: delete one that is no longer wanted. Accounts are always wanted, and claims hold data:
    only the end of their model ends them.
    """

    name: str
    group_version: str
    plural: str
    prune: bool = True

    @property
    def group(self) -> str:
        return self.group_version.rpartition("/")[0]

    @property
    def version(self) -> str:
        return self.group_version.rpartition("/")[2]


POD = Kind("Pod", "v1", "pods", prune=False)  # made by the Deployment or the Job, and watched like the rest
KINDS = {
    kind.name: kind
    for kind in (
        Kind("ServiceAccount", "v1", "serviceaccounts", prune=False),
        Kind("PersistentVolumeClaim", "v1", "persistentvolumeclaims", prune=False),
        Kind("Service", "v1", "services"),
        Kind("NetworkPolicy", "networking.k8s.io/v1", "networkpolicies"),
        Kind("PodDisruptionBudget", "policy/v1", "poddisruptionbudgets"),
        Kind("HorizontalPodAutoscaler", "autoscaling/v2", "horizontalpodautoscalers"),
        Kind("Deployment", "apps/v1", "deployments"),
        Kind("Job", "batch/v1", "jobs"),
    )
}


def desired(qm: QuantizedModel, plan: Plan, settings: Settings) -> list[dict[str, Any]]:
    """The objects that should exist for a model. The pods' needs come before the pods."""
    needs = [policy.service_account(qm), *storage.claims(qm)]
    if qm.spec.plan_only:
        return [*needs, workload.plan_job(qm, plan)]
    optional = (policy.network_policy(qm, settings.operator_namespace), policy.autoscaler(qm))
    return [
        *needs,
        service.service(qm),
        *(item for item in optional if item),
        policy.disruption_budget(qm),
        workload.deployment(qm, plan),
    ]
