"""The typed resource: defaults, spellings, and round trips."""

from __future__ import annotations

from typing import Any

import pytest
from manthanquant_operator import api, plan, workload
from manthanquant_operator.api import QuantizedModelSpec
from pydantic import ValidationError


def test_five_lines_are_enough() -> None:
    spec = QuantizedModelSpec.model_validate({"model": {"uri": "hf://a/b"}})
    assert (spec.kv_cache.format, spec.kv_cache.mode, spec.kv_cache.calibration) == ("mq3", None, "auto")
    assert (spec.resources.accelerator, spec.resources.count, spec.replicas) == ("nvidia.com/gpu", 1, 1)
    assert (spec.service.type, spec.service.port, spec.suspend) == ("ClusterIP", 8000, False)


@pytest.mark.parametrize("value", [2, "2", 0.5, "500m", "1.5Gi"])
def test_quantities_may_be_numbers_or_text(value: Any) -> None:
    assert api.ResourcesSpec.model_validate({"cpu": value}).cpu == str(value)


@pytest.mark.parametrize("value", ["", "Gi", "-1", "1 Gi", "1GiB", "ten"])
def test_what_is_no_quantity_is_refused(value: str) -> None:
    with pytest.raises(ValidationError, match="memory"):
        api.ResourcesSpec.model_validate({"memory": value})


def test_unknown_fields_of_a_newer_version_are_ignored() -> None:
    spec = QuantizedModelSpec.model_validate({"model": {"uri": "hf://a/b"}, "future": {"x": 1}})
    assert "future" not in spec.model_dump(by_alias=True)


def test_every_flag_that_the_operator_sets_is_refused_in_extra_args(make_model: Any, settings: Any) -> None:
    spec = {
        "kvCache": {"memory": "1Gi"},
        "engine": {"maxModelLen": 1, "maxNumSeqs": 1, "gpuMemoryUtilization": 0.5},
        "resources": {"count": 2},
    }
    model = make_model(spec)
    flags = {argument.split("=")[0] for argument in workload.flags(model, plan.make(model, settings))}
    assert flags <= api.OWNED_FLAGS.keys()
