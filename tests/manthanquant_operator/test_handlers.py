"""What is asked of kopf: watches only, so that no model gets a finalizer, an annotation or a write from it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import kopf
import pytest
from manthanquant_operator import handlers
from manthanquant_operator.children import KINDS
from manthanquant_operator.handlers import Watches

KEY = ("ml", "qwen")


@pytest.fixture
def registry() -> kopf.OperatorRegistry:
    nothing: Any = lambda *_: None
    return handlers.registry(Watches(), nothing, nothing, nothing, dict, nothing)


def _selectors(found: Any) -> set[tuple[str | None, str | None]]:
    return {(handler.selector.group, handler.selector.any_name or handler.selector.plural) for handler in found}


def test_no_handler_needs_a_finalizer_or_keeps_its_progress(registry: kopf.OperatorRegistry) -> None:
    assert not registry._changing.get_all_handlers()
    assert not registry._spawning.get_all_handlers()
    assert not registry._webhooks.get_all_handlers()


def test_models_pods_and_every_kind_of_child_are_watched(registry: kopf.OperatorRegistry) -> None:
    watched = {handler.selector.any_name for handler in registry._watching.get_all_handlers()}
    indexed = {handler.selector.any_name for handler in registry._indexing.get_all_handlers()}
    children = {kind.plural for kind in KINDS.values()}
    assert watched == {"quantizedmodels", "pods", *children}
    assert indexed == {"pods", *children}


def test_only_what_is_ours_is_watched() -> None:
    settings = kopf.OperatorSettings()
    handlers.configure(settings)
    assert set(settings.watching.label_selectors.values()) == {"manthanquant.io/model"}
    assert len(settings.watching.label_selectors) == 1 + len(KINDS)
    assert settings.scanning.disabled and not settings.posting.enabled


def test_the_view_is_what_the_indices_hold_less_what_is_gone() -> None:
    watches = Watches()
    assert list(watches.all_pods()) == []
    pod, other, service = (SimpleNamespace(uid=uid) for uid in ("p", "q", "s"))
    indices: dict[str, Any] = {f"{kind.plural}_of_models": {} for kind in KINDS.values()}
    watches.bind({**indices, "pods": {KEY: [pod, other]}, "services_of_models": {KEY: [service]}, "logger": None})
    assert watches.pods(KEY) == [pod, other] and watches.pods(("ml", "other")) == []
    assert watches.children(KEY) == [service]
    assert list(watches.all_pods()) == [(KEY, pod), (KEY, other)]
    watches.drop(["q", "s"])
    assert watches.pods(KEY) == [pod] and watches.children(KEY) == [] and list(watches.all_pods()) == [(KEY, pod)]
    assert [item.uid for _, item in watches.known()] == ["p", "q", "s"]
