"""Every object of a few specs, whole, against YAML that a person can read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from manthanquant_operator import children, plan
from manthanquant_operator.settings import Settings

GOLDEN = Path(__file__).parent / "golden"
INPUTS: dict[str, Any] = yaml.safe_load((GOLDEN / "inputs.yaml").read_text())


@pytest.mark.parametrize("name", INPUTS)
def test_children_equal_the_golden_ones(name: str, make_model: Any, settings: Settings) -> None:
    model = make_model(INPUTS[name])
    made = children.desired(model, plan.make(model, settings), settings)
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("MANTHANQUANT_UPDATE_GOLDEN"):
        plain = json.loads(json.dumps(made))  # parts that two objects share would become YAML anchors
        path.write_text(yaml.safe_dump_all(plain, sort_keys=False))
    assert made == list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("name", INPUTS)
def test_children_are_ours_and_of_known_kinds(name: str, make_model: Any, settings: Settings) -> None:
    model = make_model(INPUTS[name])
    for obj in children.desired(model, plan.make(model, settings), settings):
        kind = children.KINDS[obj["kind"]]
        assert obj["apiVersion"] == kind.group_version
        assert obj["metadata"]["ownerReferences"][0]["uid"] == model.metadata.uid
        assert obj["metadata"]["labels"]["manthanquant.io/model"] == model.metadata.name


def test_pods_come_after_what_they_need(make_model: Any, settings: Settings) -> None:
    model = make_model(INPUTS["everything"])
    kinds = [obj["kind"] for obj in children.desired(model, plan.make(model, settings), settings)]
    assert kinds[-1] == "Deployment"
    assert kinds.index("ServiceAccount") < kinds.index("PersistentVolumeClaim") < kinds.index("Deployment")
