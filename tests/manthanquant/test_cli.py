import json
import subprocess
import sys
from pathlib import Path

import pytest

from manthanquant import cli, formats

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_formats_prints_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["formats"]) == 0
    rows = {line.split()[0].rstrip(","): line.split() for line in capsys.readouterr().out.splitlines()[2:]}
    assert set(rows) == {*formats.PAGED_FORMATS, "seed3", "bf16", "fp8"}
    assert rows["k3v3"][1:4] == ["100", "3.12", "5.12x"]
    assert rows["seed3"][1:4] == ["104", "3.25", "4.92x"]


def test_formats_refuses_a_head_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["formats", "--head-size", "100"]) == 2
    assert "head size 100" in capsys.readouterr().err


def test_plan_prints_what_fits(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(model), "--memory", "1Gi"]) == 0
    out = capsys.readouterr().out
    assert "4,680 (4.923x less than 23,040)" in out
    assert "229,432 in 1.00 GiB of pages; 46,603 in the engine's own format" in out


@pytest.mark.parametrize(
    "argv", [["--kv-format", "k9"], ["--memory", "lots"], ["--kv-format", "seed3", "--mode", "compressed"]]
)
def test_plan_says_in_one_line_what_is_wrong(argv: list[str], model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(model), *argv]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("argv", [["formats", "--bogus"], ["nonsense"], ["plan"]])
def test_bad_arguments_are_one_line_and_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_without_a_command_the_help_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)


def test_formats_and_plan_need_no_torch(model: Path) -> None:
    """As in the operator's image, where there is none."""
    script = (
        "import sys\nsys.modules['torch'] = None\n"
        "from manthanquant.cli import main\n"
        f"sys.exit(main(['formats']) or main(['plan', {str(model)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tokens that fit" in done.stdout
