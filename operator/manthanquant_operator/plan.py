"""Spec and settings -> what will run: the decisions that need more than the spec's own text."""

from __future__ import annotations

from dataclasses import dataclass

from manthanquant.contract import DEFAULT_MODE
from manthanquant.formats import ENGINE_FORMATS, SEED3

from . import source
from .api import CPU, QuantizedModel
from .errors import SpecError
from .settings import Settings


@dataclass(frozen=True)
class Plan:
    """What a server runs with, every default filled in."""

    source: source.Source
    mode: str
    image: str
    pull_policy: str
    pull_secrets: tuple[str, ...]
    served_name: str
    tensor_parallel_size: int
    replicas: int

    @property
    def summary(self) -> str:
        return f"mode {self.mode}, image {self.image}"


def make(qm: QuantizedModel, settings: Settings) -> Plan:
    """Fills in the defaults. Raises `SpecError` for what the API server let through but cannot be served here."""
    spec = qm.spec
    image = spec.engine.image or settings.images.server(spec.resources.accelerator)
    if not image:
        raise SpecError(
            "spec.engine.image",
            f"the operator has no image for accelerator {spec.resources.accelerator}",
            "set it, or ask the admin to set the chart's value images",
            "NoImage",
        )
    return Plan(
        source=source.parse(spec.model.uri, settings.allowed_host_paths),
        mode=spec.kv_cache.mode or default_mode(spec.kv_cache.format),
        image=image,
        pull_policy=spec.engine.image_pull_policy or settings.images.pull_policy,
        pull_secrets=tuple(dict.fromkeys((*settings.images.pull_secrets, *(spec.engine.image_pull_secrets or ())))),
        served_name=spec.engine.served_model_name or qm.metadata.name,
        tensor_parallel_size=1 if spec.resources.accelerator == CPU else spec.resources.count,
        replicas=0 if spec.suspend or spec.plan_only else spec.replicas,
    )


def default_mode(format_name: str) -> str:
    """What a format can do: the engine's own caches need nothing of ours, and the seed's has no pages."""
    if format_name in ENGINE_FORMATS:
        return "off"
    return "shadow" if format_name == SEED3.name else DEFAULT_MODE
