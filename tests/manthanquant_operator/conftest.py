"""A model to build from, and objects as the cluster would show them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from manthanquant_operator.api import QuantizedModel
from manthanquant_operator.settings import Images, Settings

MakeModel = Callable[..., QuantizedModel]


@pytest.fixture
def settings() -> Settings:
    images = Images(cpu="registry/server-cpu:1", nvidia="registry/server-gpu:1", pull_secrets=("registry",))
    return Settings(images=images, allowed_host_paths=("/srv/models",), operator_namespace="manthanquant-system")


@pytest.fixture
def make_model() -> MakeModel:
    """A model with the given spec; the five-line one without any."""

    def make(spec: dict[str, Any] | None = None, **metadata: Any) -> QuantizedModel:
        return QuantizedModel.model_validate(
            {
                "metadata": {"name": "qwen", "namespace": "ml", "uid": "uid-1", "generation": 3, **metadata},
                "spec": {"model": {"uri": "hf://Qwen/Qwen3-8B"}, **(spec or {})},
            }
        )

    return make
