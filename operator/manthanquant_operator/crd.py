"""Generates the CustomResourceDefinition from the models in `api`.

Pydantic writes JSON Schema (references, titles, `anyOf` with null); Kubernetes wants a structural schema. The
conversion is strict: a construct that it does not know raises, rather than passing something the API server refuses.
"""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel

from manthanquant.contract import API_GROUP, API_VERSION, KIND, PLURAL, SHORT_NAME

from .api import MAX_NAME_LENGTH, QuantizedModelSpec, QuantizedModelStatus, rule

CRD_NAME = f"{PLURAL}.{API_GROUP}"

_KEPT = {
    "type", "description", "default", "enum", "format", "pattern", "minimum", "maximum", "minLength", "maxLength",
    "minItems", "maxItems", "minProperties", "maxProperties", "required",
    "x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-int-or-string",
}  # fmt: skip
_DROPPED = {"title", "additionalProperties", "$defs", "properties", "items", "anyOf", "allOf", "$ref"}

_PRINTER_COLUMNS: list[tuple[str, str, str, int, str]] = [
    ("Model", "string", ".spec.model.uri", 0, "Where the weights come from"),
    ("Format", "string", ".spec.kvCache.format", 0, "Format of the KV cache"),
    ("Ratio", "number", ".status.kvCache.compressionRatio", 0, "Tokens in the same bytes, against the engine's dtype"),
    ("KV-Tokens", "integer", ".status.kvCache.capacityTokens", 0, "Tokens that fit in the KV cache"),
    ("Saved", "string", ".status.kvCache.saved", 0, "Memory that the same tokens would take on top"),
    ("SM", "string", ".status.kernel.smArch", 0, "Architecture of the kernels that serve"),
    ("Ready", "string", ".status.conditions[?(@.type=='Ready')].status", 0, "Whether every server is ready"),
    ("Replicas", "integer", ".status.readyReplicas", 0, "Servers that are ready"),
    ("Age", "date", ".metadata.creationTimestamp", 0, "Age"),
    ("Endpoint", "string", ".status.endpoint", 1, "Base URL of the OpenAI API"),
    ("Message", "string", ".status.conditions[?(@.type=='Ready')].message", 1, "What the Ready condition says"),
]


def structural(model: type[BaseModel]) -> dict[str, Any]:
    """The structural OpenAPI v3 schema of a model. Raises `ValueError` for a construct it does not know."""
    schema = model.model_json_schema(by_alias=True, mode="validation")
    return _convert(schema, schema.get("$defs", {}), model.__name__)


def _convert(node: dict[str, Any], definitions: dict[str, Any], where: str) -> dict[str, Any]:
    if "$ref" in node:
        target = definitions[node["$ref"].rsplit("/", 1)[1]]
        return _convert({**target, **{k: v for k, v in node.items() if k != "$ref"}}, definitions, where)
    if "anyOf" in node and not node.get("x-kubernetes-int-or-string"):
        choices = [choice for choice in node["anyOf"] if choice != {"type": "null"}]
        if len(choices) != 1:
            raise ValueError(f"{where}: a union is not structural: {node['anyOf']}")
        rest = {k: v for k, v in node.items() if k != "anyOf" and (k, v) != ("default", None)}
        return _convert({**choices[0], **rest}, definitions, where)
    unknown = node.keys() - _KEPT - _DROPPED
    if unknown:
        raise ValueError(f"{where}: not structural: {sorted(unknown)}")
    out = {key: value for key, value in node.items() if key in _KEPT}
    if node.get("x-kubernetes-int-or-string"):
        out["anyOf"] = node["anyOf"]
    if "properties" in node:
        out["properties"] = {
            name: _convert(child, definitions, f"{where}.{name}") for name, child in node["properties"].items()
        }
        # A part that may be left out as a whole. Its default is written out in full, because the API server checks
        # the rules against it before it fills in the defaults of its fields.
        for name, child in out["properties"].items():
            if child.get("type") == "object" and "properties" in child and _is_optional(node, name):
                child["default"] = {k: v["default"] for k, v in child["properties"].items() if "default" in v}
    if "items" in node:
        out["items"] = _convert(node["items"], definitions, f"{where}[]")
    if isinstance(node.get("additionalProperties"), dict):
        out["additionalProperties"] = _convert(node["additionalProperties"], definitions, f"{where}.*")
    if "description" in out:
        out["description"] = " ".join(out["description"].split())
    return out


def _is_optional(node: dict[str, Any], name: str) -> bool:
    """Whether a part is optional and not nullable: `Field(default_factory=...)`, rather than `X | None`."""
    return name not in node.get("required", ()) and "anyOf" not in node["properties"][name]


def build() -> dict[str, Any]:
    """The CustomResourceDefinition as an object."""
    schema = {
        "type": "object",
        "description": "QuantizedModel is a model served by vLLM on a compressed KV cache.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": structural(QuantizedModelSpec),
            "status": structural(QuantizedModelStatus),
        },
        "x-kubernetes-validations": [
            rule(
                f"size(self.metadata.name) <= {MAX_NAME_LENGTH}"
                " && self.metadata.name.matches('^[a-z]([a-z0-9-]*[a-z0-9])?$')",
                "metadata.name names a Service: it starts with a letter, holds a-z, 0-9 and -, and has at most"
                f" {MAX_NAME_LENGTH} characters",
            )
        ],
    }
    version = {
        "name": API_VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.replicas",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.selector",
            },
        },
        "additionalPrinterColumns": [
            {"name": name, "type": kind, "jsonPath": path, "priority": priority, "description": description}
            for name, kind, path, priority, description in _PRINTER_COLUMNS
        ],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": CRD_NAME},
        "spec": {
            "group": API_GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": [SHORT_NAME],
                "categories": ["all"],
            },
            "versions": [version],
        },
    }


class _Dumper(yaml.SafeDumper):
    """Writes long strings on one line and no anchors, so that a change shows as one changed line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def render() -> str:
    """The CustomResourceDefinition as YAML, as it lies in `crds/`."""
    header = "# Generated by `python -m manthanquant_operator crd`; do not edit.\n"
    return header + yaml.dump(build(), Dumper=_Dumper, sort_keys=False, width=4096)


CHART_HEAD = """\
{{- /* Generated by `python -m manthanquant_operator crd --chart`; do not edit. */ -}}
{{- if .Values.crds.enabled }}
"""


def render_chart_template() -> str:
    """The same, as the chart's template: behind `crds.enabled`, kept on uninstall with `crds.keep`."""
    body = yaml.dump(build(), Dumper=_Dumper, sort_keys=False, width=4096)
    marker = f"metadata:\n  name: {CRD_NAME}\n"
    metadata = (
        marker
        + '  labels:\n    {{- include "manthanquant.labels" . | nindent 4 }}\n'
        + "  {{- if .Values.crds.keep }}\n  annotations:\n    helm.sh/resource-policy: keep\n  {{- end }}\n"
    )
    if body.count(marker) != 1 or "{{" in body:
        raise ValueError("the CustomResourceDefinition cannot be templated: its metadata moved, or it holds '{{'")
    return CHART_HEAD + body.replace(marker, metadata) + "{{- end }}\n"
