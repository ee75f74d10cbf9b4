"""The admin's settings: a YAML file that the chart writes from its values."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.alias_generators import to_camel

from .api import CPU
from .errors import SettingsError


class _Section(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


class Images(_Section):
    """Server images by accelerator, and how they are pulled."""

    cpu: str = "ghcr.io/manthanquant/server-cpu:latest"
    nvidia: str = "ghcr.io/manthanquant/server-gpu:latest"
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()

    def server(self, accelerator: str) -> str:
        return self.cpu if accelerator == CPU else self.nvidia


class Telemetry(_Section):
    """How the servers' statistics are read."""

    interval_seconds: Annotated[float, Field(ge=1, le=3600)] = 15
    timeout_seconds: Annotated[float, Field(ge=0.5, le=60)] = 5
    concurrency: Annotated[int, Field(ge=1, le=256)] = 32


class LeaderElection(_Section):
    """The Lease by which one operator acts at a time. A dead leader is replaced after `lease_seconds`."""

    enabled: bool = True
    namespace: str = "default"
    name: str = "manthanquant-operator"
    lease_seconds: Annotated[int, Field(ge=3, le=600)] = 15


class Settings(_Section):
    """Everything that the admin decides."""

    images: Images = Field(default_factory=Images)
    watch_namespaces: tuple[str, ...] = ()  # empty: every namespace
    allowed_host_paths: tuple[str, ...] = ()  # file:// models may lie below these and nowhere else
    telemetry: Telemetry = Field(default_factory=Telemetry)
    leader_election: LeaderElection = Field(default_factory=LeaderElection)
    workers: Annotated[int, Field(ge=1, le=64)] = 4
    resync_seconds: Annotated[float, Field(ge=10, le=86400)] = 300
    health_port: Annotated[int, Field(ge=1, le=65535)] = 8080
    operator_namespace: str = "default"

    @field_validator("allowed_host_paths")
    @classmethod
    def _absolute(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            parts = PurePosixPath(path).parts
            if not path.startswith("/") or ".." in parts or len(parts) < 2:
                raise ValueError(f"{path!r}: give absolute paths below the root, without '..', such as /srv/models")
        return paths


def load(path: Path | None) -> Settings:
    """Reads the file, or the defaults without one. Raises `SettingsError` with the setting's name."""
    if path is None:
        return Settings()
    try:
        data = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"settings file {path}: {error}") from error
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise SettingsError(f"settings file {path}: " + "; ".join(lines)) from error
