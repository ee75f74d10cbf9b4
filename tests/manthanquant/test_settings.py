import argparse

import pytest

from manthanquant import contract, settings


def from_args(*argv: str, environ: dict[str, str] | None = None) -> settings.Settings:
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser)
    return settings.from_args(parser.parse_args(argv), environ or {})


def test_defaults_are_those_of_the_contract() -> None:
    found = settings.from_env({})
    assert found == settings.Settings("k42v3", "compressed", 128, 4, (), "auto", None, None, "auto", None)


def test_flag_wins_over_variable_and_variable_over_default() -> None:
    environ = {contract.ENV_FORMAT: "mq4", contract.ENV_RECENT_TOKENS: "64", contract.ENV_MODE: ""}
    found = from_args("--kv-format", "k3v3", environ=environ)
    assert (found.format, found.recent_tokens, found.mode) == ("k3v3", 64, "compressed")


def test_a_flag_of_zero_wins_over_a_variable() -> None:
    assert from_args("--recent-tokens", "0", environ={contract.ENV_RECENT_TOKENS: "64"}).recent_tokens == 0


def test_round_trip_through_the_environment() -> None:
    found = from_args("--kv-format=k42v42", "--skip-layers=3,1", "--sink-tokens=0", "--calibration-text=/a b")
    assert found.skip_layers == (1, 3)
    assert settings.from_env(found.to_env()) == found


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_engine_formats_are_native(name: str) -> None:
    assert from_args("--kv-format", name).native
    assert from_args("--mode", "off").native
    assert not from_args().native


@pytest.mark.parametrize(
    ("argv", "needle"),
    [
        (["--kv-format", "k9"], "--kv-format (or MANTHANQUANT_KV_FORMAT): 'k9'"),
        (["--mode", "on"], "use one of compressed, shadow, off"),
        (["--recent-tokens", "-1"], "0 or more"),
        (["--sink-tokens", "many"], "give a number of tokens"),
        (["--skip-layers", "1,x"], "give layer indices"),
        (["--skip-layers=-1"], "give layer indices"),
        (["--calibration", "yes"], "use one of auto, gain, dense, off"),
        (["--kernel-backend", "cuda"], "use one of auto, torch"),
        (["--kv-format", "seed3"], "it has no page"),
    ],
)
def test_a_bad_setting_names_flag_value_and_remedy_in_one_line(argv: list[str], needle: str) -> None:
    with pytest.raises(settings.SettingsError) as caught:
        from_args(*argv)
    assert needle in str(caught.value)
    assert "\n" not in str(caught.value)


def test_seed_format_is_for_the_shadow_mode() -> None:
    assert from_args("--kv-format", "seed3", "--mode", "shadow").format == "seed3"


def test_calibration_report_passes_through_the_environment() -> None:
    report = contract.CalibrationReport("gain", "Calibrated", 4.5)
    assert settings.report_from_env({settings.ENV_CALIBRATION_REPORT: settings.report_to_env(report)}) == report
    assert settings.report_from_env({}) is None


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(settings.cache_dir(from_args("--cache-dir", "/c"))) == "/c"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(settings.cache_dir(from_args())) == "/x/manthanquant"
