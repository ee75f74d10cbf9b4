"""The generated CustomResourceDefinition: the files in the repository are up to date, and the schema is structural."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from manthanquant_operator import crd
from manthanquant_operator.api import QuantizedModelSpec
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[2]


def _nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from _nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from _nodes(schema[key], f"{path}[]")


def test_the_file_is_up_to_date() -> None:
    assert (ROOT / "crds/quantizedmodels.manthanquant.io.yaml").read_text() == crd.render(), "run `make crds`"


def test_the_charts_template_is_up_to_date() -> None:
    path = ROOT / "charts/manthanquant/templates/crd-quantizedmodels.yaml"
    assert path.read_text() == crd.render_chart_template(), "run `make crds`"


def test_the_schema_is_structural() -> None:
    schema = crd.structural(QuantizedModelSpec)
    for path, node in _nodes(schema):
        assert not node.keys() & {"$ref", "allOf", "oneOf", "not", "title"}, path
        assert "type" in node or node.get("x-kubernetes-int-or-string"), path


def test_every_string_and_list_with_rules_is_bounded() -> None:
    """CEL's cost estimate needs bounds; without them the API server refuses the whole definition."""
    for path, node in _nodes(crd.structural(QuantizedModelSpec)):
        if "x-kubernetes-validations" in node and node.get("type") == "array":
            assert "maxItems" in node, path
        if "x-kubernetes-validations" in node and node.get("type") == "string":
            assert "maxLength" in node, path


def test_every_rule_has_a_message_of_one_plain_line() -> None:
    found = [
        rule
        for _, node in _nodes(crd.structural(QuantizedModelSpec))
        for rule in node.get("x-kubernetes-validations", ())
    ]
    assert len(found) > 20
    for rule in found:
        assert rule["message"] and "\n" not in rule["message"]


def test_the_default_of_a_part_is_what_its_fields_default_to() -> None:
    schema = yaml.safe_load(crd.render())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    spec = schema["properties"]["spec"]["properties"]
    assert spec["resources"]["default"] == {"accelerator": "nvidia.com/gpu", "count": 1}
    assert spec["kvCache"]["default"]["format"] == "mq3"
    assert "default" not in spec["autoscaling"]


def test_a_union_is_refused() -> None:
    class Bad(BaseModel):
        value: int | str

    with pytest.raises(ValueError, match=r"Bad\.value: a union is not structural"):
        crd.structural(Bad)


def test_an_unknown_keyword_is_refused() -> None:
    class Bad(BaseModel):
        value: tuple[int, int]

    with pytest.raises(ValueError, match="not structural"):
        crd.structural(Bad)
