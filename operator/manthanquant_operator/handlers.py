"""The watches: kopf keeps them alive and feeds the indices; every event ends in one key on the work queue.

Only event handlers and indices are used. kopf would give a resource with timers, daemons or change handlers a
finalizer and annotations: then a model could not be deleted while the operator is down, and each change would cost a
write. State is in the cluster and nowhere else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import kopf

from manthanquant.contract import API_GROUP, API_VERSION, PLURAL

from . import facts, names
from .children import KINDS, Kind
from .facts import ChildFacts, Key, PodFacts

Index = Mapping[Key, Any]


class Watches:
    """What the watches know (a `reconcile.View`).

    When a watch has been away for too long, kopf lists anew, and what was deleted meanwhile stays in its indices:
    `drop` takes note of such objects. A UID is never used again, so whatever was gone once stays gone.
    """

    def __init__(self) -> None:
        self.synced = asyncio.Event()  # the indices hold everything that existed at the start
        self._indices: dict[str, Index] = {}
        self._gone: frozenset[str] = frozenset()

    def bind(self, indices: Mapping[str, Index]) -> None:
        self._indices = {name: indices[name] for name in (_PODS, *map(_index, KINDS.values()))}

    def pods(self, key: Key) -> list[PodFacts]:
        return [pod for pod in self._indices[_PODS].get(key, ()) if pod.uid not in self._gone]

    def all_pods(self) -> Iterator[tuple[Key, PodFacts]]:
        return ((key, pod) for key in list(self._indices.get(_PODS, ())) for pod in self.pods(key))

    def children(self, key: Key) -> list[ChildFacts]:
        found = (child for kind in KINDS.values() for child in self._indices[_index(kind)].get(key, ()))
        return [child for child in found if child.uid not in self._gone]

    def known(self) -> list[tuple[Key, PodFacts | ChildFacts]]:
        """Every object in the indices."""
        return [(key, item) for index in self._indices.values() for key in index for item in index[key]]

    def drop(self, uids: Iterable[str]) -> None:
        """Takes note of everything in the indices that no longer exists."""
        self._gone = frozenset(uids)


_PODS = "pods"


def _index(kind: Kind) -> str:
    return f"{kind.plural}_of_models"


def registry(
    watches: Watches,
    on_model: Callable[[Key], None],
    on_child: Callable[[Key, ChildFacts, bool], None],
    on_pod: Callable[[Key, PodFacts], None],
    probe: Callable[[], Mapping[str, float]],
    login: Callable[..., kopf.ConnectionInfo | None],
) -> kopf.OperatorRegistry:
    """kopf's handlers. `probe` raises when the operator is stuck; its figures are the body of `/healthz`."""
    made = kopf.OperatorRegistry()

    @kopf.on.startup(registry=made)
    async def startup(settings: kopf.OperatorSettings, **kwargs: Any) -> None:
        configure(settings)
        watches.bind(kwargs)

    @kopf.on.login(registry=made)
    async def authenticate(**kwargs: Any) -> kopf.ConnectionInfo | None:
        return login(**kwargs)

    @kopf.on.probe(registry=made, id="seconds")
    async def healthy(**_: Any) -> dict[str, float]:
        return dict(probe())

    @kopf.on.event(API_GROUP, API_VERSION, PLURAL, registry=made)
    async def model_event(namespace: str | None, name: str | None, **_: Any) -> None:
        watches.synced.set()
        if namespace and name:
            on_model((namespace, name))

    @kopf.index("", "v1", "pods", registry=made, id=_PODS, labels={names.MODEL_LABEL: kopf.PRESENT})
    async def index_pod(body: kopf.Body, **_: Any) -> dict[Key | None, PodFacts]:
        return {facts.key_of(body): facts.pod(body)}

    @kopf.on.event("", "v1", "pods", registry=made, labels={names.MODEL_LABEL: kopf.PRESENT})
    async def pod_event(body: kopf.Body, **_: Any) -> None:
        if key := facts.key_of(body):
            on_pod(key, facts.pod(body))

    for kind in KINDS.values():
        _watch_children(made, kind, on_child)
    return made


def _watch_children(made: kopf.OperatorRegistry, kind: Kind, on_child: Callable[[Key, ChildFacts, bool], None]) -> None:
    where: dict[str, Any] = {"registry": made, "labels": {names.MODEL_LABEL: kopf.PRESENT}}

    @kopf.index(kind.group, kind.version, kind.plural, id=_index(kind), **where)
    async def index_child(body: kopf.Body, **_: Any) -> dict[Key | None, ChildFacts]:
        return {facts.key_of(body): facts.child(kind.name, body)}

    @kopf.on.event(kind.group, kind.version, kind.plural, id=f"{kind.plural}_event", **where)
    async def child_event(body: kopf.Body, type: str | None, **_: Any) -> None:
        if key := facts.key_of(body):
            on_child(key, facts.child(kind.name, body), type == "DELETED")


def configure(settings: kopf.OperatorSettings) -> None:
    """kopf's own settings: watch only what is ours, wait for nothing too long, write nothing."""
    settings.scanning.disabled = True  # no rights on namespaces and CustomResourceDefinitions
    settings.posting.enabled = False  # events are posted by `cluster.Cluster.event`, where a condition changes
    settings.networking.request_timeout = 60
    settings.networking.connect_timeout = 10
    settings.queueing.worker_limit = 100
    settings.watching.label_selectors["", "v1", "pods"] = names.MODEL_LABEL
    for kind in KINDS.values():
        settings.watching.label_selectors[kind.group, kind.version, kind.plural] = names.MODEL_LABEL
