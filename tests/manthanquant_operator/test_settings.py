"""The admin's settings file."""

from __future__ import annotations

from pathlib import Path

import pytest
from manthanquant_operator import settings
from manthanquant_operator.errors import SettingsError


def _load(tmp_path: Path, text: str) -> settings.Settings:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return settings.load(path)


def test_defaults_without_a_file_and_with_an_empty_one(tmp_path: Path) -> None:
    assert settings.load(None) == _load(tmp_path, "") == settings.Settings()


def test_values_are_read(tmp_path: Path) -> None:
    loaded = _load(tmp_path, "images: {cpu: a:1}\nallowedHostPaths: [/srv/models]\ntelemetry: {intervalSeconds: 3}\n")
    assert (loaded.images.cpu, loaded.allowed_host_paths, loaded.telemetry.interval_seconds) == (
        "a:1",
        ("/srv/models",),
        3,
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("telemetry: {intervalSeconds: 0}", "telemetry.intervalSeconds: "),
        ("image: {}", "image: Extra inputs"),
        ("allowedHostPaths: [srv]", "allowedHostPaths: .*absolute paths"),
        ("allowedHostPaths: [/]", "absolute paths below the root"),
        ("allowedHostPaths: [/a/../b]", "without '..'"),
        ("workers: many", "workers: "),
        ("a: [", "settings file"),
    ],
)
def test_a_bad_file_names_the_setting(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        _load(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml"):
        settings.load(tmp_path / "none.yaml")
