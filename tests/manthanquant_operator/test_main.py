"""The command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from manthanquant_operator import __main__ as main


def test_crd_prints_the_definition(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["crd"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["kind"] == "CustomResourceDefinition"


def test_crd_for_the_chart_is_a_template(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["crd", "--chart"]) == 0
    out = capsys.readouterr().out
    assert "{{- if .Values.crds.enabled }}" in out and out.endswith("{{- end }}\n")


def test_bad_settings_end_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("worker: 3\n")
    assert main.main(["run", "--settings", str(path)]) == 1
    assert "worker: Extra inputs are not permitted" in caplog.text


def test_printing_the_definition_needs_neither_kopf_nor_the_api_client() -> None:
    code = (
        "import sys; sys.modules['kopf'] = sys.modules['kubernetes'] = None;"
        "from manthanquant_operator.__main__ import main; sys.exit(main(['crd']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 0, done.stderr.decode()
