"""One model, brought to what its spec says: read it, make what is missing, say what was seen.

Level-triggered: `reconcile` looks at the present state only, so it may be called at any time, for any reason, and after
any crash. It writes nothing when nothing differs.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import ValidationError

from . import children, conditions, diagnosis, facts, names, plan, status
from .api import CPU, Condition, ObjectMeta, QuantizedModel, QuantizedModelStatus
from .children import KINDS
from .cluster import ApiError, Cluster
from .errors import ConflictError, SpecError
from .facts import ChildFacts, Key, PodFacts
from .scraper import Scraper
from .settings import Settings
from .status import Observed

logger = logging.getLogger(__name__)

SILENT_POD_SECONDS = 5.0  # how often the events of a pod that waits without a reason are read
CONFLICT_SECONDS = 10.0  # how often to see whether an object in our way is gone: it has no label, so no watch tells
_QUIET_REASONS = {"Progressing", "Creating", "Suspended", "ScaledToZero", "PlanOnly", "Preparing", "NoPods"}
_TOLD = {"Planned", "ModelReady", "KernelReady", "Ready"}


class View(Protocol):
    """What the watches know."""

    def pods(self, key: Key) -> list[PodFacts]: ...

    def children(self, key: Key) -> list[ChildFacts]: ...


@dataclass(frozen=True)
class _Applied:
    """What was applied last, and the fields we owned right after."""

    digest: str
    owned_fields: str
    uid: str


class Reconciler:
    """Reconciles models. Remembers what it applied only to save requests: without memory it applies once more."""

    def __init__(
        self, cluster: Cluster, view: View, scraper: Scraper, settings: Settings, now: Callable[[], str]
    ) -> None:
        self._cluster = cluster
        self._view = view
        self._scraper = scraper
        self._settings = settings
        self._now = now
        self._applied: dict[Key, dict[tuple[str, str], _Applied]] = {}

    def child_changed(self, key: Key, child: ChildFacts, deleted: bool) -> None:
        """Forgets what was applied when somebody else deleted it or changed one of our fields."""
        known = self._applied.get(key, {})
        applied = known.get((child.kind, child.name))
        if applied and (deleted or applied.uid != child.uid or applied.owned_fields != child.owned_fields):
            del known[child.kind, child.name]

    async def reconcile(self, key: Key) -> float | None:
        """Brings one model to its spec. Returns the seconds after which to look again, if no watch will tell.

        Raises `ApiError` where the API server refuses or fails.
        """
        body = await self._cluster.model(key)
        if body is None or body["metadata"].get("deletionTimestamp"):
            self._applied.pop(key, None)  # what it owns is the garbage collector's
            return None
        before = QuantizedModelStatus.model_validate(body.get("status") or {})
        generation = ObjectMeta.model_validate(body["metadata"]).generation

        async def refuse(reason: str, message: str) -> None:
            await self._write(key, body, before, status.refused(before, generation, reason, message, self._now()))

        try:
            qm = _parse(body)
            plans = plan.make(qm, self._settings)
            await self._converge(key, qm, children.desired(qm, plans, self._settings))
        except SpecError as error:
            await refuse(error.reason, str(error))
            return None
        except ConflictError as error:
            await refuse("NameConflict", str(error))
            return CONFLICT_SECONDS
        except ApiError as error:
            if not error.transient and error.status != 409:
                await refuse("ApplyFailed", str(error))
            raise
        seen = await self._observe(key, qm)
        await self._write(key, body, before, status.build(qm, plans, seen, self._now()))
        return SILENT_POD_SECONDS if any(diagnosis.is_silent(pod) for pod in seen.pods) else None

    async def _converge(self, key: Key, qm: QuantizedModel, wanted: Iterable[Mapping[str, Any]]) -> None:
        """Applies what is wanted and deletes what is not."""
        kept = set()
        for obj in wanted:
            kept.add((obj["kind"], obj["metadata"]["name"]))
            await self._ensure(key, qm.metadata.uid, obj)
        for child in self._view.children(key):
            kind = KINDS[child.kind]
            if kind.prune and child.owner_uid == qm.metadata.uid and (child.kind, child.name) not in kept:
                await self._cluster.delete(kind, qm.metadata.namespace, child.name, child.uid)
                self._applied.get(key, {}).pop((child.kind, child.name), None)

    async def _ensure(self, key: Key, owner: str, obj: Mapping[str, Any]) -> None:
        """Applies one object, unless it is what was applied before. Raises `ConflictError` for somebody else's."""
        kind, name, namespace = obj["kind"], obj["metadata"]["name"], obj["metadata"]["namespace"]
        digest = hashlib.sha256(json.dumps(obj, sort_keys=True).encode()).hexdigest()
        known = self._applied.setdefault(key, {})
        applied = known.get((kind, name))
        if applied and applied.digest == digest:
            return
        if not applied:
            existing = await self._cluster.child(KINDS[kind], namespace, name)
            if existing and facts.owner_uid(existing) != owner:
                raise ConflictError(kind, name, _owner(existing))
        result = await self._cluster.apply(obj)
        known[kind, name] = _Applied(digest, facts.owned_fields(result), result["metadata"]["uid"])

    async def _observe(self, key: Key, qm: QuantizedModel) -> Observed:
        pods, owned = self._view.pods(key), self._view.children(key)
        events = {
            pod.uid: warning
            for pod in pods
            if diagnosis.is_silent(pod) and (warning := await self._cluster.pod_warning(key[0], pod.uid))
        }
        return Observed(
            pods=pods,
            deployment=next((child.deployment for child in owned if child.deployment), None),
            pending_claims=sorted(child.name for child in owned if child.pending),
            samples=self._scraper.samples,
            scrape_errors=self._scraper.errors,
            events=events,
            gpu_bytes=await self._gpu_bytes(qm),
        )

    async def _gpu_bytes(self, qm: QuantizedModel) -> int | None:
        """Memory of the largest GPU that a plan may count on, where the nodes' labels show it."""
        wanted = qm.spec.resources
        if not qm.spec.plan_only or wanted.accelerator == CPU or self._settings.watch_namespaces:
            return None  # an operator of some namespaces has no rights on nodes
        mebibytes = await self._cluster.largest_label(names.gpu_memory_label(qm), wanted.node_selector or {})
        return None if mebibytes is None else mebibytes << 20

    async def _write(
        self, key: Key, body: Mapping[str, Any], before: QuantizedModelStatus, after: QuantizedModelStatus
    ) -> None:
        """Writes the status if it differs, then tells what changed."""
        if _dump(after) == _dump(before):
            return
        try:
            await self._cluster.apply_status(key, body["metadata"]["uid"], _dump(after))
        except ApiError as error:
            if error.status in (404, 409):  # deleted meanwhile: the watch says the rest
                return
            raise
        for condition in conditions.transitions(before.conditions or (), after.conditions or ()):
            if condition.type in _TOLD and condition.status != "Unknown":
                await self._tell(body, condition)

    async def _tell(self, body: Mapping[str, Any], condition: Condition) -> None:
        bad = condition.status == "False" and condition.reason not in _QUIET_REASONS
        if bad and condition.type != "Ready":
            return  # Ready carries the same failure
        message = f"{condition.type} is {condition.status}: {condition.message}"
        await self._cluster.event(body, "Warning" if bad else "Normal", condition.reason, message, self._now())


def _parse(body: Mapping[str, Any]) -> QuantizedModel:
    """The typed resource. Raises `SpecError` for what an older or a missing schema let through."""
    try:
        return QuantizedModel.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise SpecError(field, f"{first['input']!r}: {first['msg']}", "see `kubectl explain quantizedmodel`") from error


def _owner(existing: Mapping[str, Any]) -> str:
    owners = existing["metadata"].get("ownerReferences") or ()
    if existing["metadata"].get("deletionTimestamp"):
        return "an earlier model, and is being deleted"
    return " and ".join(f"{owner['kind']} {owner['name']}" for owner in owners) or "nobody"


def _dump(value: QuantizedModelStatus) -> dict[str, Any]:
    return value.model_dump(by_alias=True, exclude_none=True, mode="json")
