"""The vLLM plug-in: a KV cache whose pages hold codes, or a shadow that measures the codes beside vLLM's own cache.

Loaded through entry points (`vllm.general_plugins`, `vllm.endpoint_plugins`); nothing of vLLM is patched or copied.
`register` runs in every process of the server, so it imports as little as it can: vLLM resolves the backend's name to
a class only where it is needed.
"""

from __future__ import annotations

import os

from manthanquant import contract

PLUGIN = "manthanquant"  # entry point names, as pyproject.toml has them and VLLM_PLUGINS must list them
ENDPOINT_PLUGIN = "manthanquant_stats"
WORKER_EXTENSION = "manthanquant.vllm_plugin.worker.WorkerExtension"


def register() -> None:
    """Entry point: registers the backend of the mode in the environment.

    Only where the mode is set: a vLLM that merely has the package installed must serve as if it had not.
    """
    if not os.environ.get(contract.ENV_MODE):
        return
    from manthanquant import settings
    from manthanquant.vllm_plugin import compat

    wanted = settings.from_env()
    if wanted.native:
        return
    compat.check_version()
    name = "CompressedBackend" if wanted.mode == "compressed" else "ShadowBackend"
    compat.register_cpu_backend(f"manthanquant.vllm_plugin.backend.{name}")
