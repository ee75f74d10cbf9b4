from pathlib import Path

import pytest

from manthanquant import gguf


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no GGUF file at"):
        gguf.convert(tmp_path / "none.gguf", tmp_path / "out")


def test_a_complete_model_is_kept(tmp_path: Path) -> None:
    source, out = tmp_path / "m.gguf", tmp_path / "out"
    source.write_bytes(b"not read")
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert gguf.convert(source, out) == out


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = tmp_path / "m.gguf"
    source.write_bytes(b"no GGUF at all")
    with pytest.raises((OSError, ValueError)):
        gguf.convert(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert gguf.main(["one"]) == 2
    assert "python -m manthanquant.gguf" in capsys.readouterr().err
