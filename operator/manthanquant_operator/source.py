"""Where a model's weights come from: `spec.model.uri`, taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from .errors import SpecError

FIELD = "spec.model.uri"
_FORMS = "use hf://org/name, pvc://claim/path or file:///path"
Scheme = Literal["hf", "pvc", "file"]


@dataclass(frozen=True)
class Source:
    """A model's place. `volume` is the claim of pvc:// or the node's path of file://."""

    scheme: Scheme
    volume: str | None = None

    @property
    def is_remote(self) -> bool:
        return self.scheme == "hf"


def parse(uri: str, allowed_host_paths: tuple[str, ...]) -> Source:
    """Takes a URI apart. Raises `SpecError` where this cluster does not serve it."""
    scheme, separator, rest = uri.partition("://")
    if not separator or not rest:
        raise SpecError(FIELD, f"{uri!r} is not a URI", _FORMS)
    if scheme == "hf":
        return Source("hf")
    if scheme == "pvc":
        return Source("pvc", rest.partition("/")[0])
    if scheme == "file":
        return Source("file", _allowed(rest, allowed_host_paths))
    raise SpecError(FIELD, f"{scheme}:// is not supported", _FORMS, "SchemeUnsupported")


def _allowed(path: str, prefixes: tuple[str, ...]) -> str:
    """The path, if it lies below a prefix that the admin allowed."""
    pure = PurePosixPath(path)
    if ".." in pure.parts:
        raise SpecError(FIELD, f"{path!r} holds '..'", "write the path without it")
    if not any(pure.is_relative_to(prefix) for prefix in prefixes):
        allowed = ", ".join(prefixes) or "none"
        raise SpecError(
            FIELD,
            f"the path {path!r} is not allowed (allowed: {allowed})",
            "ask the cluster's admin to add it to the chart's value allowedHostPaths, or use pvc://",
            "HostPathNotAllowed",
        )
    return str(pure)
