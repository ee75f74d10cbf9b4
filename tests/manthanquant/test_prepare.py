import json
from pathlib import Path
from typing import Any

import pytest

from manthanquant import cli, contract, model_source
from manthanquant.contract import PrepareReport

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_size": 256,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}


class Pod:
    """The paths of an init container, below a temporary directory."""

    def __init__(self, root: Path) -> None:
        self.models, self.link, self.report = root / "models", root / "work" / "model", root / "termination-log"
        self.model = self.add("m", CONFIG)

    def add(self, name: str, config: dict[str, Any]) -> Path:
        path = self.models / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
        (path / "model.safetensors").write_bytes(b"0" * 100)
        return path

    def prepare(self, uri: str, *flags: str) -> tuple[int, PrepareReport]:
        paths = [f"--model-dir={self.models}", f"--link={self.link}", f"--report={self.report}"]
        own = ["--calibration=off", "--kernel-backend=torch"]
        status = cli.main(["prepare", uri, *paths, *own, *flags])
        return status, PrepareReport.from_json(self.report.read_text())


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def test_a_model_on_a_claim(pod: Pod) -> None:
    status, report = pod.prepare("pvc://claim/m", "--kv-cache-memory-bytes=1000000", "--max-num-seqs", "2")
    assert (status, report.error) == (0, None)
    assert (report.model_path, report.model_bytes) == (str(pod.model), 100)
    assert pod.link.resolve() == pod.model
    assert report.kernel is not None and report.kernel.arch == "torch"
    assert report.calibration == contract.CalibrationReport("hadamard", "Off")
    assert report.cache is not None
    assert (report.cache.bytes_per_token, report.cache.capacity_tokens) == (4 * 2 * 52, 1000000 // (4 * 2 * 52))


def test_a_plan_builds_and_calibrates_nothing(pod: Pod) -> None:
    status, report = pod.prepare("pvc://claim/m", "--plan", "--kv-cache-memory-bytes=1000000")
    assert (status, report.kernel, report.calibration) == (0, None, None)
    assert report.model_path == str(pod.model)
    assert report.cache is not None and report.cache.capacity_tokens == 1000000 // (4 * 2 * 52)


def test_it_can_run_again(pod: Pod) -> None:
    other = pod.add("other", CONFIG)
    assert pod.prepare("pvc://claim/m")[0] == 0
    assert pod.prepare("pvc://claim/other")[0] == 0
    assert pod.link.resolve() == other


def test_without_the_caches_size_the_capacity_is_absent(pod: Pod) -> None:
    _, report = pod.prepare("pvc://claim/m")
    assert report.cache is not None
    assert report.cache.capacity_tokens is None and report.cache.compression_ratio == 4.923


def test_the_uri_may_come_from_the_environment(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(contract.ENV_MODEL_URI, "pvc://claim/m")
    monkeypatch.setenv(contract.ENV_FORMAT, "mq4")
    paths = [f"--model-dir={pod.models}", f"--link={pod.link}", f"--report={pod.report}"]
    assert cli.main(["prepare", *paths, "--calibration=off", "--kernel-backend=torch"]) == 0
    report = PrepareReport.from_json(pod.report.read_text())
    assert report.cache is not None and report.cache.format == "k4v4"


def test_off_serves_any_model_and_prepares_no_kernel(pod: Pod) -> None:
    pod.add("mla", {**CONFIG, "kv_lora_rank": 512})
    status, report = pod.prepare("pvc://claim/mla", "--mode=off")
    assert (status, report.kernel, report.cache) == (0, None, None)
    assert report.calibration is not None and report.calibration.source == "NotApplicable"


@pytest.mark.parametrize(
    ("uri", "flags", "reason", "field", "needle"),
    [
        ("pvc://claim/none", [], "ModelNotFound", "spec.model.uri", "check the path"),
        ("pvc://claim", [], "ModelIncomplete", "spec.model.uri", "no config.json"),
        ("s3://bucket/m", [], "SchemeUnsupported", "spec.model.uri", "use hf://"),
        ("pvc://claim/m", ["--kv-format=k9"], "InvalidSettings", "spec.kvCache", "use one of"),
        ("pvc://claim/m", ["--skip-layers=4"], "InvalidSettings", "spec.kvCache.skipLayers", "layers 0 to 3"),
    ],
)
def test_a_failure_is_reported_with_reason_field_and_remedy(
    uri: str, flags: list[str], reason: str, field: str, needle: str, pod: Pod
) -> None:
    status, report = pod.prepare(uri, *flags)
    assert status == 1
    assert report.error is not None
    assert (report.error.reason, report.error.field) == (reason, field)
    assert needle in report.error.message


def test_an_unsupported_model_is_reported(pod: Pod) -> None:
    pod.add("alibi", {**CONFIG, "alibi": True})
    status, report = pod.prepare("pvc://claim/alibi")
    assert status == 1 and report.error is not None
    assert (report.error.reason, report.error.field) == ("UnsupportedModel", "spec.kvCache.mode")


def test_even_a_crash_reaches_the_termination_message(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(uri: str, model_dir: str) -> Path:
        raise RuntimeError("boom " + "x" * 10_000)

    monkeypatch.setattr(model_source, "resolve", crash)
    status, report = pod.prepare("pvc://claim/m")
    assert status == 1 and report.error is not None
    assert report.error.reason == "PrepareCrashed"
    assert "RuntimeError: boom" in report.error.message
    assert len(pod.report.read_bytes()) <= contract.TERMINATION_LIMIT


def test_no_model_at_all(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(contract.ENV_MODEL_URI, raising=False)
    assert cli.main(["prepare", f"--report={pod.report}"]) == 1
    report = PrepareReport.from_json(pod.report.read_text())
    assert report.error is not None and contract.ENV_MODEL_URI in report.error.message
