"""The worker's side of the statistics."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig

from manthanquant.vllm_plugin import compat, runtime


class WorkerExtension:
    """Mixed into vLLM's worker (`--worker-extension-cls`); called through the engine's `collective_rpc`."""

    vllm_config: VllmConfig  # the worker's own

    def manthanquant_snapshot(self) -> dict[str, Any]:
        """This worker's counters, as `stats.WorkerSnapshot.to_wire` gives them."""
        return runtime.current().snapshot(compat.page_bytes(self.vllm_config)).to_wire()
