"""What spec and settings decide together."""

from __future__ import annotations

from typing import Any

import pytest
from manthanquant_operator import plan
from manthanquant_operator.errors import SpecError
from manthanquant_operator.settings import Images, Settings


@pytest.mark.parametrize(
    ("name", "mode"),
    [("mq3", "compressed"), ("k4v4", "compressed"), ("seed3", "shadow"), ("bf16", "off"), ("fp8", "off")],
)
def test_the_mode_follows_the_format(name: str, mode: str, make_model: Any, settings: Settings) -> None:
    assert plan.make(make_model({"kvCache": {"format": name}}), settings).mode == mode


def test_a_given_mode_wins(make_model: Any, settings: Settings) -> None:
    assert plan.make(make_model({"kvCache": {"mode": "shadow"}}), settings).mode == "shadow"


def test_the_image_follows_the_accelerator(make_model: Any, settings: Settings) -> None:
    images = {
        kind: plan.make(make_model({"resources": {"accelerator": kind}}), settings).image
        for kind in ("cpu", "nvidia.com/gpu", "nvidia.com/mig-1g.10gb")
    }
    assert images == {
        "cpu": "registry/server-cpu:1",
        "nvidia.com/gpu": "registry/server-gpu:1",
        "nvidia.com/mig-1g.10gb": "registry/server-gpu:1",
    }


def test_a_missing_image_names_the_field_and_the_value(make_model: Any) -> None:
    with pytest.raises(SpecError, match=r"spec\.engine\.image: .*the chart's value images"):
        plan.make(make_model(), Settings(images=Images(nvidia="")))


def test_tensor_parallelism_follows_the_count(make_model: Any, settings: Settings) -> None:
    assert plan.make(make_model({"resources": {"count": 4}}), settings).tensor_parallel_size == 4
    assert plan.make(make_model({"resources": {"accelerator": "cpu"}}), settings).tensor_parallel_size == 1


@pytest.mark.parametrize(("spec", "replicas"), [({"replicas": 3}, 3), ({"suspend": True}, 0), ({"planOnly": True}, 0)])
def test_suspend_and_plan_only_stop_the_servers(
    spec: dict[str, Any], replicas: int, make_model: Any, settings: Settings
) -> None:
    assert plan.make(make_model(spec), settings).replicas == replicas
