"""Where a model's weights are: `hf://`, `pvc://`, `file://`, or what the launcher takes besides (a path, a hub name).

`resolve` ends with a directory that can be read, or a `ModelError` that says what to do. Only `hf://` downloads.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from manthanquant import contract

URI_FIELD = "spec.model.uri"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ModelError(Exception):
    """A model that cannot be had. `reason` is CamelCase; `field` is a path into the resource's spec."""

    def __init__(self, reason: str, message: str, field: str = URI_FIELD) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field


@dataclass(frozen=True)
class Source:
    """A parsed URI. `place` is `org/name`, `claim/path` or a path; `revision` is for the hub only.

    `file` is a path on a node, which a pod may see elsewhere; `path` is one on this machine.
    """

    scheme: Literal["hf", "pvc", "file", "path"]
    place: str
    revision: str | None = None


def parse(uri: str) -> Source:
    """Takes a URI apart; a bare `org/name` is the hub's and any other bare text a path. Raises `ModelError`."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        is_hub = _HUB_NAME.fullmatch(uri.partition("@")[0]) and not Path(uri).exists()
        if not is_hub:
            return Source("path", uri)
        scheme, rest = "hf", uri
    if scheme == "hf":
        place, _, revision = rest.partition("@")
        if not _HUB_NAME.fullmatch(place):
            raise ModelError("InvalidUri", f"{uri!r}: a hub model is hf://org/name or hf://org/name@revision")
        return Source("hf", place, revision or None)
    if scheme == "pvc":
        claim, _, path = rest.partition("/")
        if not claim or ".." in Path(path).parts:
            raise ModelError("InvalidUri", f"{uri!r}: a model on a claim is pvc://claim/path, without '..'")
        return Source("pvc", rest)
    if scheme == "file":
        if not rest.startswith("/"):
            raise ModelError("InvalidUri", f"{uri!r}: a file:// model is an absolute path, file:///path/to/model")
        return Source("file", rest)
    raise ModelError("SchemeUnsupported", f"{uri!r}: {scheme}:// is not supported: use hf://, pvc:// or file://")


def resolve(uri: str, model_dir: str | Path = contract.MODEL_DIR) -> Path:
    """The directory of a model, downloaded if it has to be.

    Args:
        uri: as `parse` takes it.
        model_dir: where a pod has the model cache (hf), the claim's root (pvc) or the node's path itself (file).

    Raises:
        ModelError: it is not there, cannot be downloaded, or is no model.
    """
    source = parse(uri)
    if source.scheme == "hf":
        return _checked(_download(source), uri)
    root = Path(model_dir)
    if source.scheme == "pvc":
        return _checked(root / source.place.partition("/")[2], uri)
    given = Path(source.place)
    return _checked(given if source.scheme == "path" or given.exists() else root, uri)


def size_bytes(model: Path) -> int:
    """Bytes of a model's weights."""
    return sum(file.stat().st_size for file in model.rglob("*") if file.suffix in (".safetensors", ".bin", ".gguf"))


def _checked(path: Path, uri: str) -> Path:
    if not path.is_dir():
        raise ModelError("ModelNotFound", f"{uri}: no directory at {path}: check the path and what is mounted there")
    if not (path / "config.json").is_file():
        names = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise ModelError(
            "ModelIncomplete",
            f"{uri}: {path} holds {names} but no config.json: give a directory in Hugging Face's layout",
        )
    return path


def _download(source: Source) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    name = f"hf://{source.place}" + (f"@{source.revision}" if source.revision else "")
    try:
        # PyTorch's old pickled weights are left out where safetensors are there: the engine reads the latter.
        found = snapshot_download(source.place, revision=source.revision, ignore_patterns=["*.pth", "original/*"])
        return Path(found)
    except errors.GatedRepoError:
        raise ModelError(
            "ModelGated",
            f"{name}: the model is gated: accept its terms on the hub and give a token that may read it",
            "spec.model.tokenSecretRef",
        ) from None
    except errors.RepositoryNotFoundError:
        hint = (
            "check its name, or the token's rights" if os.environ.get("HF_TOKEN") else "if it is private, give a token"
        )
        raise ModelError("ModelNotFound", f"{name}: the hub has no such model: {hint}") from None
    except errors.RevisionNotFoundError:
        raise ModelError("RevisionNotFound", f"{name}: the hub has no revision {source.revision!r}") from None
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            "HubUnreachable",
            f"{name}: not in the cache at {constants.HF_HUB_CACHE}, and the hub at {constants.ENDPOINT} was not "
            f"reached ({_last_line(error)}): check the network or use pvc://",
        ) from None
    except OSError as error:
        raise ModelError("DownloadFailed", f"{name}: {_last_line(error)}: check the network, disk and quota") from error


def _last_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return str(cause).strip().splitlines()[-1][:200] if str(cause).strip() else type(cause).__name__
