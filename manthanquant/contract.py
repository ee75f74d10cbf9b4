"""Names, routes and messages that the serving pods and the operator share.

The pods write these messages and the operator reads them; both import this module, so neither can drift. It uses
the standard library only: the operator's image carries no PyTorch.

Two messages cross the boundary:

* `PrepareReport`: the init container's result, written as its termination message (at most 4,096 bytes).
* `Stats`: the server's counters, served as JSON at `STATS_PATH`.

Both are versioned by `SCHEMA_VERSION`. A field that was not measured is `None` and is left out of the JSON: absent
means "not measured", zero means "measured, and it was zero".
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Self

SCHEMA_VERSION = 1

# -- the resource ------------------------------------------------------------------------------------------------
API_GROUP = "manthanquant.io"
API_VERSION = "v1alpha1"
KIND = "QuantizedModel"
PLURAL = "quantizedmodels"
SHORT_NAME = "qm"

# -- containers, ports, routes -----------------------------------------------------------------------------------
PREPARE_CONTAINER = "prepare"
SERVER_CONTAINER = "server"
HTTP_PORT = 8000
HTTP_PORT_NAME = "http"
HEALTH_PATH = "/health"
METRICS_PATH = "/metrics"
STATS_PATH = "/manthanquant/stats"
METRIC_PREFIX = "manthanquant_"

# -- paths inside a pod ------------------------------------------------------------------------------------------
MODEL_DIR = "/models"  # the model cache, or the user's claim, or the node path
KERNEL_CACHE_DIR = "/var/cache/manthanquant"  # compiled kernels, calibrations, vLLM's compile caches
WORK_DIR = "/work"  # writable scratch: HOME, TMPDIR; the root file system is read-only
RESOLVED_MODEL_LINK = f"{WORK_DIR}/model"  # the init container points it at the resolved model
TERMINATION_LOG = "/dev/termination-log"
TERMINATION_LIMIT = 4096  # bytes, Kubernetes' own limit

# -- environment (each is also a launcher flag; the flag wins) -----------------------------------------------------
ENV_MODEL_URI = "MANTHANQUANT_MODEL_URI"
ENV_FORMAT = "MANTHANQUANT_KV_FORMAT"
ENV_MODE = "MANTHANQUANT_MODE"
ENV_RECENT_TOKENS = "MANTHANQUANT_RECENT_TOKENS"
ENV_SINK_TOKENS = "MANTHANQUANT_SINK_TOKENS"
ENV_SKIP_LAYERS = "MANTHANQUANT_SKIP_LAYERS"  # comma-separated layer indices kept in the engine's own format
ENV_CALIBRATION = "MANTHANQUANT_CALIBRATION"  # auto | gain | dense | off
ENV_CALIBRATION_FILE = "MANTHANQUANT_CALIBRATION_FILE"  # a ready calibration; set by the launcher for its workers
ENV_CALIBRATION_TEXT = "MANTHANQUANT_CALIBRATION_TEXT"  # a user's text instead of the built-in one
ENV_CACHE_DIR = "MANTHANQUANT_CACHE_DIR"
ENV_BACKEND = "MANTHANQUANT_BACKEND"  # auto | torch: torch forces the PyTorch path

MODES = ("compressed", "shadow", "off")
DEFAULT_MODE = "compressed"
DEFAULT_RECENT_TOKENS = 128
DEFAULT_SINK_TOKENS = 4
# Requests that run at once on a CPU (`--max-num-seqs`), where nobody said. The exact tier has room for all of them, and
# at vLLM's own 128 takes what a small cache gains: of 1 GiB, 8 requests leave SmolLM2-135M 4.8 times bf16's tokens, and
# 128 leave 3.9. Eight streams are also what is measured against vLLM; more requests wait in its queue.
CPU_MAX_REQUESTS = 8


class ContractError(ValueError):
    """A message that does not follow the contract; the text names the field and what was found there."""


@dataclass(frozen=True)
class _Message:
    """JSON round trip for nested dataclasses: camelCase names, `None` left out, unknown fields ignored.

    Unknown fields are ignored so that an operator may read a newer server's message; a missing required field or a
    value of the wrong type raises `ContractError`.
    """

    schema: int = field(default=SCHEMA_VERSION, kw_only=True)

    def to_json(self) -> str:
        return json.dumps(_encode(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ContractError(f"{cls.__name__}: not JSON ({error}): {text[:80]!r}") from error
        message: Self = _decode(cls, data, cls.__name__)
        if message.schema != SCHEMA_VERSION:
            raise ContractError(f"{cls.__name__}.schema: {message.schema!r}, expected {SCHEMA_VERSION}")
        return message


def _camel(name: str) -> str:
    head, *tail = name.split("_")
    return head + "".join(part.capitalize() for part in tail)


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {_camel(name): _encode(item) for name, item in pairs if item is not None}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    return value


def _decode(kind: Any, data: Any, where: str) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (arg for arg in typing.get_args(kind) if arg is not type(None))
        return None if data is None else _decode(kind, data, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(data, dict):
            raise ContractError(f"{where}: expected an object, got {data!r}")
        hints = typing.get_type_hints(kind)
        values = {}
        for f in dataclasses.fields(kind):
            if _camel(f.name) in data:
                values[f.name] = _decode(hints[f.name], data[_camel(f.name)], f"{where}.{_camel(f.name)}")
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise ContractError(f"{where}.{_camel(f.name)}: missing")
        return kind(**values)  # type: ignore[operator]
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise ContractError(f"{where}: expected {kind.__name__}, got {data!r}")
    return data


@dataclass(frozen=True)
class KernelReport:
    """Which kernels the pod runs. `arch` is e.g. `cpu-avx512`, `sm_90a`, or `torch` for the PyTorch path."""

    arch: str
    source: str | None = None  # Built | Cached | Prebuilt; None for the PyTorch path
    digest: str | None = None  # the cache key
    build_seconds: float | None = None
    message: str | None = None  # why the PyTorch path was taken, when it was


@dataclass(frozen=True)
class CalibrationReport:
    """Which key transform serves. `source` is Calibrated | Cached | Off | Failed | NotApplicable."""

    transform: str  # hadamard | gain | dense | none
    source: str
    seconds: float | None = None
    message: str | None = None


@dataclass(frozen=True)
class CacheReport:
    """Bytes and tokens of the KV cache. One token counts all layers and KV heads, both sides."""

    format: str
    mode: str
    bits_per_element: float | None = None
    bytes_per_token: int | None = None
    bytes_per_token_uncompressed: int | None = None
    compression_ratio: float | None = None
    cache_bytes: int | None = None  # what the allocator holds, the hot pool included
    hot_pool_bytes: int | None = None
    capacity_tokens: int | None = None
    capacity_tokens_uncompressed: int | None = None  # the same bytes in the engine's own dtype
    saved_bytes: int | None = None  # capacity_tokens in the engine's own dtype, less cache_bytes


@dataclass(frozen=True)
class PrepareError:
    """Why the init container failed. `field` is a path into the resource's spec; `reason` is CamelCase."""

    reason: str
    message: str  # what was found, and the remedy
    field: str | None = None


@dataclass(frozen=True)
class PrepareReport(_Message):
    """The init container's result: the model resolved, the kernels built and checked, the capacity estimated."""

    model_path: str | None = None
    model_bytes: int | None = None
    kernel: KernelReport | None = None
    calibration: CalibrationReport | None = None
    cache: CacheReport | None = None
    error: PrepareError | None = None

    def to_termination_message(self) -> str:
        """The JSON, at most `TERMINATION_LIMIT` bytes: free text is cut where it would not fit."""
        text = self.to_json()
        if len(text.encode()) <= TERMINATION_LIMIT:
            return text
        keep = 400
        cut = dataclasses.replace(
            self,
            kernel=self.kernel and dataclasses.replace(self.kernel, message=(self.kernel.message or "")[:keep] or None),
            calibration=self.calibration
            and dataclasses.replace(self.calibration, message=(self.calibration.message or "")[:keep] or None),
            error=self.error and dataclasses.replace(self.error, message=self.error.message[: 2 * keep]),
        )
        return cut.to_json()


@dataclass(frozen=True)
class WriteStats:
    """Counters of cache writes since the start; one vector is one token's K or V of one head in one layer."""

    calls: int = 0
    vectors: int = 0
    bytes_uncompressed: int = 0
    bytes_compressed: int = 0
    errors: int = 0  # vectors that held NaN or infinity; they are stored as zero
    sampled_vectors: int = 0  # how many vectors the two figures below were measured on
    key_cosine: float | None = None  # mean cosine similarity of the stored key against the exact one
    value_cosine: float | None = None
    relative_mse: float | None = None  # sum of squared errors over sum of squares, keys and values together


@dataclass(frozen=True)
class HotStats:
    """The exact tier. A read falls back to the codes where the copy was evicted inside its window."""

    pages: int = 0
    pages_in_use: int = 0
    evictions_in_window: int = 0


@dataclass(frozen=True)
class LoadStats:
    """The engine's own load, copied from its metrics."""

    requests_running: int | None = None
    requests_waiting: int | None = None
    generated_tokens: int | None = None  # since the start
    kv_usage: float | None = None  # 0 to 1
    preemptions: int | None = None


@dataclass(frozen=True)
class Stats(_Message):
    """One server's statistics, summed over its workers."""

    model: str
    kernel: KernelReport
    calibration: CalibrationReport
    cache: CacheReport
    uptime_seconds: float | None = None
    writes: WriteStats = field(default_factory=WriteStats)
    hot: HotStats | None = None
    load: LoadStats | None = None
