"""What spec and settings decide together."""

from __future__ import annotations

from typing import Any

import pytest
from manthanquant_operator import plan
from manthanquant_operator.errors import SpecError
from manthanquant_operator.settings import Images, Settings

from manthanquant.contract import CPU_MAX_REQUESTS


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


CPU = {"accelerator": "cpu"}


@pytest.mark.parametrize(
    ("spec", "cache_bytes"),
    [
        ({}, None),  # a GPU's cache is what the engine finds free
        ({"kvCache": {"memory": "2Gi"}}, 2 << 30),
        ({"resources": CPU}, 4 << 30),
        ({"resources": {**CPU, "memory": "64Gi"}}, 4 << 30),
        ({"resources": {**CPU, "memory": "6Gi"}}, 3 << 30),
        ({"resources": CPU, "kvCache": {"memory": "16Gi", "format": "bf16"}}, 16 << 30),
        ({"resources": CPU, "kvCache": {"format": "bf16"}}, 4 << 30),
    ],
)
def test_a_cpu_servers_cache_is_bounded_by_default(
    spec: dict[str, Any], cache_bytes: int | None, make_model: Any, settings: Settings
) -> None:
    assert plan.make(make_model(spec), settings).cache_bytes == cache_bytes


@pytest.mark.parametrize(
    ("spec", "requests"),
    [
        ({}, None),
        ({"resources": CPU}, CPU_MAX_REQUESTS),
        ({"resources": CPU, "engine": {"maxNumSeqs": 100}}, 100),
        ({"resources": CPU, "kvCache": {"format": "bf16"}}, None),  # no exact tier to size by it
        ({"resources": CPU, "kvCache": {"mode": "shadow"}}, None),
        ({"engine": {"maxNumSeqs": 100}}, 100),
    ],
)
def test_a_cpu_serves_few_requests_at_once_by_default(
    spec: dict[str, Any], requests: int | None, make_model: Any, settings: Settings
) -> None:
    assert plan.make(make_model(spec), settings).max_requests == requests


@pytest.mark.parametrize(("spec", "replicas"), [({"replicas": 3}, 3), ({"suspend": True}, 0), ({"planOnly": True}, 0)])
def test_suspend_and_plan_only_stop_the_servers(
    spec: dict[str, Any], replicas: int, make_model: Any, settings: Settings
) -> None:
    assert plan.make(make_model(spec), settings).replicas == replicas
