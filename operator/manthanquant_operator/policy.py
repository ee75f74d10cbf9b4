"""Spec -> who the servers are, who may reach them, how many may go at once, and how many there are."""

from __future__ import annotations

from typing import Any

from manthanquant.contract import API_GROUP, API_VERSION, HTTP_PORT_NAME, KIND

from . import names
from .api import QuantizedModel


def service_account(qm: QuantizedModel) -> dict[str, Any]:
    """An identity with no rights and no token: it only tells the servers from other pods."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": names.metadata(qm, qm.metadata.name),
        "automountServiceAccountToken": False,
    }


def disruption_budget(qm: QuantizedModel) -> dict[str, Any]:
    """One server at a time by default, so that a single server does not block a node's drain for ever."""
    wanted = qm.spec.disruption
    limit = (
        {"minAvailable": wanted.min_available}
        if wanted.min_available is not None
        else {"maxUnavailable": 1 if wanted.max_unavailable is None else wanted.max_unavailable}
    )
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": names.metadata(qm, qm.metadata.name),
        "spec": {**limit, "selector": {"matchLabels": names.selector(qm)}, "unhealthyPodEvictionPolicy": "AlwaysAllow"},
    }


def network_policy(qm: QuantizedModel, operator_namespace: str) -> dict[str, Any] | None:
    """Ingress to the API's port from this namespace, the listed ones, and the operator. Egress stays open."""
    wanted = qm.spec.network_policy
    if not wanted.enabled:
        return None
    namespaces = sorted({operator_namespace, *(wanted.allowed_namespaces or ())})
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": names.metadata(qm, qm.metadata.name),
        "spec": {
            "podSelector": {"matchLabels": names.selector(qm)},
            "policyTypes": ["Ingress"],
            "ingress": [
                {
                    "from": [
                        {"podSelector": {}},
                        {
                            "namespaceSelector": {
                                "matchExpressions": [
                                    {"key": "kubernetes.io/metadata.name", "operator": "In", "values": namespaces}
                                ]
                            }
                        },
                    ],
                    "ports": [{"port": HTTP_PORT_NAME, "protocol": "TCP"}],
                }
            ],
        },
    }


def autoscaler(qm: QuantizedModel) -> dict[str, Any] | None:
    """Scales the QuantizedModel itself, so that `spec.replicas` stays the one number of servers."""
    wanted = qm.spec.autoscaling
    if wanted is None:
        return None
    metric: dict[str, Any]
    if wanted.metric == "cpu":
        target = {"type": "Utilization", "averageUtilization": int(wanted.target)}
        metric = {"type": "Resource", "resource": {"name": "cpu", "target": target}}
    else:
        target = {"type": "AverageValue", "averageValue": wanted.target}
        metric = {"type": "Pods", "pods": {"metric": {"name": wanted.metric}, "target": target}}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": names.metadata(qm, qm.metadata.name),
        "spec": {
            "scaleTargetRef": {"apiVersion": f"{API_GROUP}/{API_VERSION}", "kind": KIND, "name": qm.metadata.name},
            "minReplicas": wanted.min_replicas,
            "maxReplicas": wanted.max_replicas,
            "metrics": [metric],
        },
    }
