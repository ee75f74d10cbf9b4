"""`spec.model.uri`, taken apart."""

from __future__ import annotations

import pytest
from manthanquant_operator import source
from manthanquant_operator.errors import SpecError
from manthanquant_operator.source import Source

ALLOWED = ("/srv/models", "/mnt/weights")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("hf://Qwen/Qwen3-8B", Source("hf")),
        ("pvc://weights/a/b", Source("pvc", "weights")),
        ("pvc://weights", Source("pvc", "weights")),
        ("file:///srv/models", Source("file", "/srv/models")),
        ("file:///mnt/weights/a//b/", Source("file", "/mnt/weights/a/b")),
    ],
)
def test_known_places(uri: str, expected: Source) -> None:
    assert source.parse(uri, ALLOWED) == expected


@pytest.mark.parametrize(
    ("uri", "reason", "words"),
    [
        ("Qwen/Qwen3-8B", "InvalidSpec", "is not a URI"),
        ("hf://", "InvalidSpec", "is not a URI"),
        ("s3://bucket/model", "SchemeUnsupported", "s3:// is not supported"),
        ("file:///etc", "HostPathNotAllowed", "allowed: /srv/models, /mnt/weights"),
        ("file:///srv/models-private/a", "HostPathNotAllowed", "ask the cluster's admin"),
        ("file:///srv/models/../../etc", "InvalidSpec", "holds '..'"),
        ("file://srv/models/a", "HostPathNotAllowed", "is not allowed"),
    ],
)
def test_other_places_name_the_field_and_the_remedy(uri: str, reason: str, words: str) -> None:
    with pytest.raises(SpecError, match=r"^spec\.model\.uri: ") as caught:
        source.parse(uri, ALLOWED)
    assert caught.value.reason == reason
    assert words in str(caught.value)


def test_without_prefixes_no_path_is_allowed() -> None:
    with pytest.raises(SpecError, match="allowed: none"):
        source.parse("file:///srv/models/a", ())
