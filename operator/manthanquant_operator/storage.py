"""Spec -> the claims that belong to a model. Existing claims are only referred to."""

from __future__ import annotations

from typing import Any

from . import names
from .api import Claim, QuantizedModel


def claims(qm: QuantizedModel) -> list[dict[str, Any]]:
    wanted = (
        (names.model_claim(qm), qm.spec.model.cache),
        (names.kernel_claim(qm), qm.spec.kernel_cache.persistent_volume_claim),
    )
    return [_claim(qm, name, claim) for name, claim in wanted if claim and claim.size]


def _claim(qm: QuantizedModel, name: str, claim: Claim) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "accessModes": [claim.access_mode],
        "resources": {"requests": {"storage": claim.size}},
    }
    if claim.storage_class_name:
        spec["storageClassName"] = claim.storage_class_name
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": names.metadata(qm, name),
        "spec": spec,
    }
