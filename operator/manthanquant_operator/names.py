"""Names, labels and owner references of everything that the operator makes."""

from __future__ import annotations

from typing import Any

from manthanquant.contract import API_GROUP, API_VERSION, KIND

from .api import QuantizedModel

FIELD_MANAGER = "manthanquant-operator"
MODEL_LABEL = f"{API_GROUP}/model"  # on every object of ours; the watches select by it
COMPONENT_LABEL = "app.kubernetes.io/component"
SERVER = "server"
PLAN = "plan"


def labels(qm: QuantizedModel, component: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "manthanquant",
        "app.kubernetes.io/instance": qm.metadata.name,
        "app.kubernetes.io/managed-by": FIELD_MANAGER,
        COMPONENT_LABEL: component,
        MODEL_LABEL: qm.metadata.name,
    }


def selector(qm: QuantizedModel) -> dict[str, str]:
    """Selects the servers. A Deployment's selector cannot be changed: never add to it."""
    return {COMPONENT_LABEL: SERVER, MODEL_LABEL: qm.metadata.name}


def selector_string(qm: QuantizedModel) -> str:
    return ",".join(f"{key}={value}" for key, value in selector(qm).items())


def metadata(qm: QuantizedModel, name: str, component: str = SERVER) -> dict[str, Any]:
    """Metadata of a child: labels, and the owner reference by which the cluster deletes it with its model."""
    return {
        "name": name,
        "namespace": qm.metadata.namespace,
        "labels": labels(qm, component),
        "ownerReferences": [
            {
                "apiVersion": f"{API_GROUP}/{API_VERSION}",
                "kind": KIND,
                "name": qm.metadata.name,
                "uid": qm.metadata.uid,
                "controller": True,
            }
        ],
    }


def model_claim(qm: QuantizedModel) -> str:
    return f"{qm.metadata.name}-models"


def kernel_claim(qm: QuantizedModel) -> str:
    return f"{qm.metadata.name}-kernels"


def gpu_memory_label(qm: QuantizedModel) -> str:
    """The node label in which GPU feature discovery shows the memory of the accelerator, in MiB."""
    return f"{qm.spec.resources.accelerator}.memory"


def endpoint(qm: QuantizedModel) -> str:
    """Base URL of the OpenAI API inside the cluster."""
    return f"http://{qm.metadata.name}.{qm.metadata.namespace}.svc:{qm.spec.service.port}/v1"
