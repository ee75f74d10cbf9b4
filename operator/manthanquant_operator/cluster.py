"""The Kubernetes API: reads, server-side applies, deletes and events, over the official asynchronous client.

Every request is retried a few times where a retry can help (429, 5xx, a broken connection), honouring `Retry-After`;
what still fails is raised, and the work queue comes back later.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
from kubernetes.aio.client import ApiClient
from kubernetes.aio.client.exceptions import ApiException

from manthanquant.contract import API_GROUP, API_VERSION, KIND, PLURAL

from . import names
from .children import KINDS, Kind
from .facts import Key

logger = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_BACKOFF_SECONDS = 0.25
MAX_BACKOFF_SECONDS = 10.0
REQUEST_TIMEOUT_SECONDS = 30.0
_MODELS = f"/apis/{API_GROUP}/{API_VERSION}"
_LEASES = "/apis/coordination.k8s.io/v1"
_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_APPLY = "application/apply-patch+yaml"


class ApiError(Exception):
    """The API server refused a request, or could not be reached (`status` 0)."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after

    @property
    def transient(self) -> bool:
        """Whether the same request may succeed later without anybody changing anything."""
        return self.status in (0, 408, 429) or self.status >= 500


class Cluster:
    """The requests that the operator makes, and no others: the chart's RBAC lists exactly these."""

    def __init__(self, client: ApiClient, instance: str) -> None:
        self._client = client
        self._instance = instance  # who reports events

    async def model(self, key: Key) -> dict[str, Any] | None:
        """A QuantizedModel, or `None` when it is gone."""
        namespace, name = key
        return await self._find(f"{_MODELS}/namespaces/{namespace}/{PLURAL}/{name}")

    async def model_keys(self, namespaces: Sequence[str]) -> list[Key]:
        """Every QuantizedModel in the namespaces, or everywhere without any."""
        paths = [f"{_MODELS}/namespaces/{namespace}/{PLURAL}" for namespace in namespaces] or [f"{_MODELS}/{PLURAL}"]
        lists = [await self._request("GET", path) for path in paths]
        return [(o["metadata"]["namespace"], o["metadata"]["name"]) for found in lists for o in found["items"]]

    async def child(self, kind: Kind, namespace: str, name: str) -> dict[str, Any] | None:
        return await self._find(_path(kind, namespace, name))

    async def uids(self, kind: Kind, namespaces: Sequence[str]) -> set[str]:
        """UIDs of every object of a kind that belongs to a model, in the namespaces, or everywhere without any."""
        paths = [_collection(kind, namespace) for namespace in namespaces] or [_collection(kind, None)]
        query = {"labelSelector": names.MODEL_LABEL}
        lists = [await self._request("GET", path, query=query, accept=_METADATA_ONLY) for path in paths]
        return {item["metadata"]["uid"] for found in lists for item in found["items"] or ()}  # null when empty

    async def apply(self, obj: Mapping[str, Any]) -> dict[str, Any]:
        """Server-side apply; our values win over other managers'. Returns the object as the server has it."""
        metadata = obj["metadata"]
        path = _path(KINDS[obj["kind"]], metadata["namespace"], metadata["name"])
        return await self._request("PATCH", path, obj, _APPLY, {"fieldManager": names.FIELD_MANAGER, "force": "true"})

    async def apply_status(self, key: Key, uid: str, status: Mapping[str, Any]) -> None:
        """Replaces our part of the status: what is absent from `status` is removed.

        The UID makes the request fail (409) when the resource was deleted and made again meanwhile.
        """
        namespace, name = key
        body = {
            "apiVersion": f"{API_GROUP}/{API_VERSION}",
            "kind": KIND,
            "metadata": {"name": name, "namespace": namespace, "uid": uid},
            "status": status,
        }
        path = f"{_MODELS}/namespaces/{namespace}/{PLURAL}/{name}/status"
        await self._request("PATCH", path, body, _APPLY, {"fieldManager": names.FIELD_MANAGER, "force": "true"})

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str) -> None:
        """Deletes exactly this object, and what it owns in the background; one that is gone is fine."""
        body = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        try:
            await self._request("DELETE", _path(kind, namespace, name), body)
        except ApiError as error:
            if error.status not in (404, 409):  # 409: another object has that name now
                raise

    async def pod_warning(self, namespace: str, uid: str) -> tuple[str, str] | None:
        """Reason and message of a pod's newest warning event."""
        selector = f"involvedObject.uid={uid},type=Warning"
        found = await self._request(
            "GET", f"/api/v1/namespaces/{namespace}/events", query={"fieldSelector": selector, "limit": "50"}
        )
        newest = max(found["items"], default=None, key=_event_time)
        return (newest.get("reason", "Warning"), newest.get("message", "")) if newest else None

    async def event(self, model: Mapping[str, Any], kind: str, reason: str, message: str, time: str) -> None:
        """Posts an event about a QuantizedModel. Events are news, not state: a failure is logged and no more."""
        metadata = model["metadata"]
        body = {
            "metadata": {"generateName": f"{metadata['name']}-", "namespace": metadata["namespace"]},
            "involvedObject": {
                "apiVersion": f"{API_GROUP}/{API_VERSION}",
                "kind": KIND,
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "uid": metadata["uid"],
            },
            "type": kind,
            "reason": reason,
            "message": message[:1024],
            "firstTimestamp": time,
            "lastTimestamp": time,
            "count": 1,
            "source": {"component": names.FIELD_MANAGER},
            "reportingComponent": names.FIELD_MANAGER,
            "reportingInstance": self._instance,
        }
        try:
            await self._request("POST", f"/api/v1/namespaces/{metadata['namespace']}/events", body)
        except ApiError as error:
            logger.warning(
                "event %s about %s/%s not posted: %s", reason, metadata["namespace"], metadata["name"], error
            )

    async def largest_label(self, label: str, node_selector: Mapping[str, str]) -> int | None:
        """The largest number in a label of the nodes that the selector matches; `None` where none has the label."""
        selector = ",".join([label, *(f"{key}={value}" for key, value in node_selector.items())])
        query = {"labelSelector": selector}
        found = await self._request("GET", "/api/v1/nodes", query=query, accept=_METADATA_ONLY)
        values = (item["metadata"]["labels"][label] for item in found["items"] or ())
        return max((int(value) for value in values if value.isdecimal()), default=None)

    async def lease(self, namespace: str, name: str) -> dict[str, Any] | None:
        return await self._find(f"{_LEASES}/namespaces/{namespace}/leases/{name}")

    async def put_lease(self, lease: Mapping[str, Any]) -> None:
        """Creates a Lease, or replaces it if nobody changed it since it was read (else 409)."""
        metadata = lease["metadata"]
        path = f"{_LEASES}/namespaces/{metadata['namespace']}/leases"
        if "resourceVersion" in metadata:
            await self._request("PUT", f"{path}/{metadata['name']}", lease)
        else:
            await self._request("POST", path, lease)

    async def serves_models(self) -> bool:
        """Whether the CustomResourceDefinition is installed."""
        found = await self._find(_MODELS)
        return found is not None and any(item["name"] == PLURAL for item in found["resources"])

    async def _find(self, path: str) -> dict[str, Any] | None:
        try:
            return await self._request("GET", path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def _request(
        self,
        method: str,
        path: str,
        body: Any = None,
        content_type: str = "application/json",
        query: Mapping[str, str] | None = None,
        accept: str = "application/json",
    ) -> dict[str, Any]:
        backoff = FIRST_BACKOFF_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._request_once(method, path, body, content_type, query or {}, accept)
            except ApiError as error:
                # A create whose answer was lost must not be repeated; every other request of ours is idempotent.
                if attempt == ATTEMPTS or not error.transient or (method == "POST" and error.status != 429):
                    raise
                wait = max(backoff * random.uniform(0.5, 1.0), error.retry_after or 0)
                logger.debug("%s %s: %s; again in %.1f s", method, path, error, wait)
                await asyncio.sleep(min(wait, MAX_BACKOFF_SECONDS))
                backoff *= 2
        raise AssertionError("unreachable")

    async def _request_once(
        self, method: str, path: str, body: Any, content_type: str, query: Mapping[str, str], accept: str
    ) -> dict[str, Any]:
        serialized = await self._client.param_serialize(
            method=method,
            resource_path=path,
            query_params=list(query.items()),
            header_params={"Accept": accept, "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            response = await self._client.call_api(*serialized, _request_timeout=REQUEST_TIMEOUT_SECONDS)
            text = (await response.read()).decode()
        except ApiException as error:
            raise ApiError(error.status or 0, error.reason or "", f"{method} {path}: {error.reason}") from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ApiError(0, "Unreachable", f"{method} {path}: {error or type(error).__name__}") from error
        if response.status >= 400:
            raise _refusal(response.status, text, response.headers.get("Retry-After"), f"{method} {path}")
        found: dict[str, Any] = json.loads(text)
        return found


def _collection(kind: Kind, namespace: str | None) -> str:
    base = f"/apis/{kind.group_version}" if kind.group else f"/api/{kind.version}"
    return f"{base}/namespaces/{namespace}/{kind.plural}" if namespace else f"{base}/{kind.plural}"


def _path(kind: Kind, namespace: str, name: str) -> str:
    return f"{_collection(kind, namespace)}/{name}"


def _refusal(status: int, text: str, retry_after: str | None, request: str) -> ApiError:
    """The error that the API server describes in its answer (metav1.Status), or its bare text."""
    try:
        answer = json.loads(text)
        reason, message = str(answer.get("reason", "")), str(answer.get("message", text))
    except (ValueError, AttributeError):
        reason, message = "", text[:200]
    wait = float(retry_after) if retry_after and retry_after.isdigit() else None
    return ApiError(status, reason, f"{request}: {status} {message}", wait)


def _event_time(event: Mapping[str, Any]) -> str:
    return event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or ""
