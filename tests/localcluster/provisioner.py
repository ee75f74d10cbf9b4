"""A storage provisioner: a hostPath volume for each pending claim of the cluster's class, removed with its claim."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from localcluster import config
from localcluster.api import Api, ApiError

VOLUMES = Path(config.NODE_DIR, "volumes")
POLL_SECONDS = 0.5
PV_PATH = "/api/v1/persistentvolumes"


def volume_for(claim: dict[str, Any]) -> dict[str, Any]:
    """The PersistentVolume for a claim, bound to it by name and uid."""
    meta, spec = claim["metadata"], claim["spec"]
    name = f"pvc-{meta['uid']}"
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": spec["resources"]["requests"],
            "accessModes": spec["accessModes"],
            "storageClassName": config.STORAGE_CLASS,
            "persistentVolumeReclaimPolicy": "Retain",  # this provisioner deletes, not the volume controller
            "hostPath": {"path": str(VOLUMES / name), "type": "Directory"},
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": meta["namespace"],
                "name": meta["name"],
                "uid": meta["uid"],
            },
        },
    }


def is_waiting(claim: dict[str, Any], volumes: dict[str, Any]) -> bool:
    """Whether a claim is of this class, unbound, and without a volume of its own."""
    spec = claim["spec"]
    unbound = claim["status"].get("phase") == "Pending" and not spec.get("volumeName")
    return (
        spec.get("storageClassName") == config.STORAGE_CLASS
        and unbound
        and f"pvc-{claim['metadata']['uid']}" not in volumes
    )


def provision(api: Api) -> None:
    """One pass over all claims and volumes."""
    items = api.get(PV_PATH)["items"]
    volumes = {v["metadata"]["name"]: v for v in items if v["spec"].get("storageClassName") == config.STORAGE_CLASS}
    for claim in api.get("/api/v1/persistentvolumeclaims")["items"]:
        if is_waiting(claim, volumes):
            volume = volume_for(claim)
            folder = Path(volume["spec"]["hostPath"]["path"])
            folder.mkdir(exist_ok=True)
            folder.chmod(0o777)  # pods run as any user
            api.create(PV_PATH, volume)
    for name, volume in volumes.items():
        if volume["status"].get("phase") == "Released":
            shutil.rmtree(VOLUMES / name, ignore_errors=True)
            api.delete(f"{PV_PATH}/{name}")


def main() -> None:
    api = Api(Path(config.kubeconfig_path(config.PROVISIONER)))
    while True:
        try:
            provision(api)
        except (ApiError, OSError) as error:  # rights not there yet, or a restart of the API server: try again
            print(f"provisioner: {error}", flush=True)
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
