import json
import os
from pathlib import Path
from typing import Any

import pytest

from manthanquant import capacity, contract, serve, settings
from manthanquant.serve import LaunchError, engine_arguments, limit_requests
from manthanquant.settings import Settings

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 64,
    "hidden_size": 256,
    "dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m", CONFIG)


def write_model(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def value(flags: list[str], name: str) -> str:
    return flags[flags.index(name) + 1]


def test_the_engines_flags_are_the_users_after_ours(model: Path) -> None:
    flags = engine_arguments("org/name", model, Settings(), ["--port", "9", "--enforce-eager"])
    assert flags[-3:] == ["--port", "9", "--enforce-eager"]
    assert value(flags, "--model") == str(model)
    assert value(flags, "--served-model-name") == "org/name"
    assert value(flags, "--shutdown-timeout") == "30"
    assert "--kv-cache-dtype" not in flags


def test_the_users_own_value_stands(model: Path) -> None:
    flags = engine_arguments("m", model, Settings(), ["--served-model-name=x", "--shutdown-timeout=5"])
    assert "--served-model-name" not in flags and "--shutdown-timeout" not in flags


def test_a_cpu_serves_few_requests_at_once_unless_told_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert value(limit_requests([], Settings()), "--max-num-seqs") == str(contract.CPU_MAX_REQUESTS)
    assert f"--max-num-seqs {contract.CPU_MAX_REQUESTS}" in caplog.text
    assert limit_requests(["--max-num-seqs=99"], Settings()) == ["--max-num-seqs=99"]
    for without_exact_tier in (Settings("bf16"), Settings(mode="off"), Settings(mode="shadow")):
        assert limit_requests([], without_exact_tier) == []


def test_fp8_is_the_engines(model: Path) -> None:
    assert value(engine_arguments("m", model, Settings("fp8"), []), "--kv-cache-dtype") == "fp8"
    assert "--kv-cache-dtype" not in engine_arguments("m", model, Settings("bf16"), [])
    assert "--kv-cache-dtype" not in engine_arguments("m", model, Settings("fp8"), ["--kv-cache-dtype=fp8_e5m2"])[:-1]


@pytest.mark.parametrize(
    ("flags", "needle"),
    [
        (["--model", "x"], "--model"),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype fp8"),
        (["--block-size=24"], "multiple of 16"),
        (["--worker-extension-cls", "x.Y"], "--worker-extension-cls x.Y"),
    ],
)
def test_a_contradiction_is_one_line(flags: list[str], needle: str, model: Path) -> None:
    with pytest.raises(LaunchError) as caught:
        engine_arguments("m", model, Settings(), flags)
    assert needle in str(caught.value) and "\n" not in str(caught.value)


def test_a_layer_that_does_not_exist(model: Path) -> None:
    with pytest.raises(LaunchError, match="no layer 7"):
        engine_arguments("m", model, Settings(skip_layers=(0, 7)), [])


def test_an_unsupported_model_is_refused_unless_the_engine_serves_it_alone(tmp_path: Path) -> None:
    mla = write_model(tmp_path / "mla", {**CONFIG, "kv_lora_rank": 512})
    with pytest.raises(capacity.UnsupportedModel, match="MLA"):
        engine_arguments("m", mla, Settings(), [])
    assert engine_arguments("m", mla, Settings(mode="off"), [])


@pytest.mark.parametrize(
    ("argv", "needle"),
    [
        (["serve", "/nowhere"], "no directory at /nowhere"),
        (["serve", "{model}", "--kv-format", "k9"], "'k9'"),
        (["serve", "{model}", "--skip-layers", "9"], "no layer 9"),
        (["serve", "{model}", "--kv-cache-dtype", "fp8"], "--kv-cache-dtype"),
        (["serve", "s3://x/y"], "s3:// is not supported"),
    ],
)
def test_main_refuses_in_one_line(
    argv: list[str], needle: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main([item.format(model=model) for item in argv]) == 2
    err = capsys.readouterr().err
    assert needle in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("argv", [[], ["m"], ["serve"]])
def test_main_without_serve_or_model(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        serve.main(argv)
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_environment_for_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"VLLM_PLUGINS": "theirs"})
    serve.set_environment(Settings("k3v3", skip_layers=(1, 2)))
    serve.set_environment(Settings("k3v3", skip_layers=(1, 2)))
    assert os.environ["VLLM_PLUGINS"] == "theirs,manthanquant,manthanquant_stats"
    assert os.environ[contract.ENV_SKIP_LAYERS] == "1,2"
    assert settings.from_env() == Settings("k3v3", skip_layers=(1, 2))
