"""What the layers of one worker share: settings, calibration, counters, and where they stand in memory."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manthanquant import contract, formats, kernel_report, ops, settings
from manthanquant.stats import WorkerSnapshot, WriteCounters
from manthanquant.transform import LayerTransform, default_transform
from manthanquant.vllm_plugin import compat, sharding

if TYPE_CHECKING:
    from manthanquant.calibration import Calibration
    from manthanquant.hot import HotTable

logger = logging.getLogger("vllm.manthanquant")  # under vLLM's logger, whose handlers and format it shares


class Runtime:
    """One worker's state.

    Attributes:
        settings: as the launcher set them in the environment.
        writes: the counters of all layers.
        pool_bytes: bytes of the exact tier, all layers.
        tables: the exact tier's tables, one a cache group.
    """

    def __init__(self, wanted: settings.Settings) -> None:
        self.settings = wanted
        self.writes = WriteCounters()
        self._kernels: dict[int, ops.Kernels] = {}
        self.pool_bytes = 0
        self.tables: list[HotTable] = []
        self.bytes_per_token = 0
        self.bytes_per_token_uncompressed = 0
        self.calibration, self.calibration_report = _load_calibration(wanted)

    @property
    def format(self) -> formats.Format:
        return formats.get_paged(self.settings.format)

    def kernels(self, head_size: int) -> ops.Kernels:
        """What stores and attends for this head size, chosen (and built, if need be) at its first layer."""
        if head_size not in self._kernels:
            self._kernels[head_size] = ops.kernels(self.format, head_size)
        return self._kernels[head_size]

    def kernel_report(self) -> contract.KernelReport:
        if not self._kernels:
            return contract.KernelReport(kernel_report.TORCH, message="no layer asked for a kernel")
        return kernel_report.combined([kernels.report for kernels in self._kernels.values()])

    def transform(self, index: int, head_size: int, kv_heads: int) -> LayerTransform:
        """The transform of layer `index` for this rank's `kv_heads` heads: calibrated, or Hadamard."""
        if self.calibration is None:
            return default_transform(self.format, head_size)
        rank, world = compat.tensor_parallel_rank()
        return sharding.heads_of_rank(self.calibration.layer(index), kv_heads, rank, world)

    def count_layer(self, kv_heads: int, head_size: int, element_bytes: int, token_bytes: int | None) -> None:
        """Adds a layer's bytes a token. `token_bytes`: of one KV head's pair; None where the engine's cache serves."""
        exact = 2 * head_size * element_bytes
        self.bytes_per_token_uncompressed += kv_heads * exact
        self.bytes_per_token += kv_heads * (exact if token_bytes is None else token_bytes)

    def hot_stats(self) -> contract.HotStats | None:
        if not self.tables:
            return None
        return contract.HotStats(
            pages=sum(table.slots for table in self.tables),
            pages_in_use=sum(int((table.owner[:-1] >= 0).sum()) for table in self.tables),
            evictions_in_window=sum(int(table.evictions_in_window) for table in self.tables),
        )

    def snapshot(self, page_bytes: int) -> WorkerSnapshot:
        """All counters; `page_bytes` is what the worker's pages take."""
        return WorkerSnapshot(
            writes=self.writes,
            hot=self.hot_stats(),
            kernel=self.kernel_report(),
            calibration=self.calibration_report,
            page_bytes=page_bytes,
            hot_pool_bytes=self.pool_bytes,
            bytes_per_token=self.bytes_per_token,
            bytes_per_token_uncompressed=self.bytes_per_token_uncompressed,
        )


@cache
def current() -> Runtime:
    """This process' runtime, made from the environment at first use."""
    return Runtime(settings.from_env())


def _load_calibration(wanted: settings.Settings) -> tuple[Calibration | None, contract.CalibrationReport]:
    """The calibration the launcher named, and what to say of it. A named file that cannot be read stops the start."""
    if wanted.format == formats.SEED3.name:
        return None, contract.CalibrationReport("none", "NotApplicable")
    if wanted.calibration_file is None:
        logger.info("no calibration: the Hadamard transform serves")
        return None, settings.report_from_env() or contract.CalibrationReport("hadamard", "Off")
    from manthanquant import calibration

    loaded = calibration.load(wanted.calibration_file)
    if loaded.format != wanted.format:
        raise settings.SettingsError(
            f"--calibration-file: {wanted.calibration_file} was made for format {loaded.format}, "
            f"not {wanted.format}: calibrate again"
        )
    logger.info("key transform %s from %s", loaded.kind, wanted.calibration_file)
    return loaded, settings.report_from_env() or contract.CalibrationReport(loaded.kind, "Cached")


def hot_copies(slots: int, kv_heads: int, head_size: int) -> tuple[Tensor, Tensor]:
    """Exact copies of K and V, bf16 `[slots, KV heads, 16, D]`, touched so that the engine's accounting sees them."""
    shape = (slots, kv_heads, formats.UNIT_TOKENS, head_size)
    return torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16)
