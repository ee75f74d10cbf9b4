"""Spec -> the Service in front of the servers."""

from __future__ import annotations

from typing import Any

from manthanquant.contract import HTTP_PORT_NAME

from . import names
from .api import QuantizedModel


def service(qm: QuantizedModel) -> dict[str, Any]:
    spec = qm.spec.service
    metadata = names.metadata(qm, qm.metadata.name)
    if spec.annotations:
        metadata["annotations"] = spec.annotations
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "type": spec.type,
            "selector": names.selector(qm),
            "ports": [{"name": HTTP_PORT_NAME, "port": spec.port, "targetPort": HTTP_PORT_NAME, "protocol": "TCP"}],
        },
    }
