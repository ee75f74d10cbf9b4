"""Errors that become conditions: each names the field, what was found there, and the remedy."""

from __future__ import annotations


class SpecError(ValueError):
    """The spec cannot be served as written. `field` is a path such as `spec.model.uri`; `reason` is CamelCase."""

    def __init__(self, field: str, problem: str, remedy: str, reason: str = "InvalidSpec") -> None:
        super().__init__(f"{field}: {problem}: {remedy}")
        self.field = field
        self.reason = reason


class SettingsError(ValueError):
    """The operator's own settings are wrong; the text names the setting and the remedy."""


class ConflictError(RuntimeError):
    """An object that we would create exists and belongs to somebody else."""

    def __init__(self, kind: str, name: str, owner: str) -> None:
        super().__init__(
            f"{kind} {name} exists and belongs to {owner}: delete it, or give this QuantizedModel another name"
        )
