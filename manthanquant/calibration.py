"""A calibration as a file: safetensors, with its sha256 beside it.

What it was made from is its key: the model's config and weights, the format, and every setting that changes the
result. The key names the file, so a changed model or setting finds no file rather than a wrong one. A file that does
not match its checksum or its key raises `CalibrationError`; the caller calibrates anew.

Only PyTorch and safetensors are needed to load one: each worker of the engine does.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from manthanquant import formats
from manthanquant.formats import SIDES, Format
from manthanquant.transform import Kind, LayerTransform, SideTransform, gain_transform, hadamard_transform

SCHEMA = 3  # of the file and of the statistics behind it: a change of either makes old files unknown
CHECKSUM_SUFFIX = ".sha256"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
_STORED = ("forward", "inverse")  # of a dense side; a gain side is its order and gain, a Hadamard side nothing


class CalibrationError(ValueError):
    """A calibration that cannot be made or read; the text says what was found."""


@dataclass(frozen=True)
class Calibration:
    """The transforms of every attention layer of one model, for one format.

    Attributes:
        format: the format's name.
        kind: of the key side, `gain` or `dense`.
        layers: by the layer's index in the model.
        key: see `cache_key`.
        notes: what else is worth keeping, e.g. how long it took; text to text.
    """

    format: str
    kind: Kind
    layers: dict[int, LayerTransform]
    key: str
    notes: dict[str, str] = field(default_factory=dict)

    def layer(self, index: int) -> LayerTransform:
        """The transforms of layer `index`. Raises `CalibrationError` where the calibration has no such layer."""
        if index not in self.layers:
            known = f"{min(self.layers)} to {max(self.layers)}" if self.layers else "none"
            raise CalibrationError(f"layer {index} is not in the calibration (it has {known}): calibrate this model")
        return self.layers[index]

    def save(self, path: Path) -> None:
        """Writes `path` and its checksum; readers see the old file or the new one, never a part."""
        tensors: dict[str, Tensor] = {}
        head_sizes = {}
        for index, layer in self.layers.items():
            head_sizes[index] = layer.key.forward.shape[-1]
            for side in SIDES:
                for name, tensor in _stored_tensors(getattr(layer, side)).items():
                    tensors[f"{index}.{side}.{name}"] = tensor.contiguous().cpu()
        kinds = {index: {side: getattr(layer, side).kind for side in SIDES} for index, layer in self.layers.items()}
        header = {
            "schema": SCHEMA,
            "key": self.key,
            "format": self.format,
            "kind": self.kind,
            "head_sizes": head_sizes,
            "kinds": kinds,
            "notes": self.notes,
        }
        data = save_tensors(tensors, {"manthanquant": json.dumps(header)})
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, data)
        _write_whole(checksum_path(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode())


def checksum_path(path: Path) -> Path:
    return path.with_name(path.name + CHECKSUM_SUFFIX)


def load(path: str | Path, key: str | None = None) -> Calibration:
    """The calibration in `path`.

    Raises:
        CalibrationError: the file or its checksum is missing or cannot be read, they do not match, the content is not
            a calibration of this version, or it was made for another `key` (where one is given).
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        expected = checksum_path(path).read_text(encoding="ascii").split()[0]
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise CalibrationError(f"{path}: cannot be read ({error})") from error
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise CalibrationError(f"{path}: sha256 is {found[:16]}, {checksum_path(path).name} says {expected[:16]}")
    try:
        parsed = _parsed(data)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CalibrationError(f"{path}: not a calibration ({type(error).__name__}: {error})") from error
    if key is not None and parsed.key != key:
        raise CalibrationError(f"{path}: made for another model or other settings (key {parsed.key[:16]})")
    return parsed


def _parsed(data: bytes) -> Calibration:
    header = json.loads(_metadata(data)["manthanquant"])
    if header["schema"] != SCHEMA:
        raise ValueError(f"schema {header['schema']}, this version reads {SCHEMA}")
    tensors = load_tensors(data)
    fmt = formats.get_paged(header["format"])
    layers = {
        int(index): LayerTransform(
            *(_restored_side(kinds[side], fmt, side, head_size, _part(tensors, index, side)) for side in SIDES)
        )
        for (index, kinds), head_size in zip(header["kinds"].items(), header["head_sizes"].values())
    }
    return Calibration(fmt.name, header["kind"], layers, header["key"], header["notes"])


def cache_path(cache_dir: str | Path, fmt: Format, key: str) -> Path:
    return Path(cache_dir) / "calibrations" / f"{fmt.name}-{key[:24]}.safetensors"


def cache_key(
    model_path: str | Path,
    fmt: Format,
    max_positions: int,
    *,
    text: str,
    kind: Kind,
    recent_tokens: int,
    sink_tokens: int,
) -> str:
    """sha256, in hex, of all that a calibration depends on. Raises `CalibrationError` where the model has no files."""
    settings = {
        "schema": SCHEMA,
        "model": model_identity(model_path),
        "format": fmt.name,
        "kind": kind,
        "max_positions": max_positions,
        "text": hashlib.sha256(text.encode()).hexdigest(),
        "recent_tokens": recent_tokens,
        "sink_tokens": sink_tokens,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def model_identity(model_path: str | Path) -> str:
    """sha256, in hex, of a model's config and of each weight file's name, size and samples.

    Samples are the first 64 KiB of a file (a safetensors header) and 63 more blocks of 64 KiB, evenly spread: training
    changes nearly every weight, so they tell models apart without reading all of one.
    """
    root = Path(model_path)
    digest = hashlib.sha256()
    try:
        digest.update((root / "config.json").read_bytes())
        weights = sorted(p for p in root.iterdir() if p.suffix in _WEIGHT_SUFFIXES)
        for weight in weights:
            size = weight.stat().st_size
            digest.update(f"{weight.name}\0{size}\0".encode())
            with weight.open("rb") as file:
                for offset in sorted({size * i // _SAMPLES for i in range(_SAMPLES)}):
                    file.seek(offset)
                    digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise CalibrationError(f"model {str(model_path)!r}: {error}; give a downloaded model's directory") from error
    if not weights:
        raise CalibrationError(f"model {str(model_path)!r}: the directory holds no weight file")
    return digest.hexdigest()


def _stored_tensors(side: SideTransform) -> dict[str, Tensor]:
    names = {"gain": ("order", "gain"), "dense": _STORED}.get(side.kind, ())
    found = {name: getattr(side, name) for name in names}
    return found if side.mean is None else {**found, "mean": side.mean}


def _restored_side(
    kind: Kind, fmt: Format, side: formats.Side, head_size: int, tensors: dict[str, Tensor]
) -> SideTransform:
    mean = tensors.get("mean")
    if kind == "gain":
        return gain_transform(fmt, side, tensors["order"], tensors["gain"], mean)
    if kind == "dense":
        return SideTransform("dense", tensors["forward"], tensors["inverse"], mean)
    if kind == "hadamard":
        return hadamard_transform(fmt, side, head_size, mean)
    raise KeyError(f"transform kind {kind!r}")


def _part(tensors: dict[str, Tensor], index: str, side: str) -> dict[str, Tensor]:
    prefix = f"{index}.{side}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of safetensors bytes: 8 bytes of length, then a JSON header."""
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata


def _write_whole(path: Path, data: bytes) -> None:
    """Writes beside `path`, syncs, and renames over it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
