import pytest

from manthanquant import engine_flags


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--port", "1", "--name", "x"], "x"),
        (["--name=x"], "x"),
        (["--name", "x", "--name=y"], "y"),
        (["--na_me=x"], None),
        (["--name", "--other"], ""),
        (["--name"], ""),
        (["name"], None),
    ],
)
def test_value(flags: list[str], value: str | None) -> None:
    assert engine_flags.value(flags, "--name") == value


def test_underscores_are_dashes_as_in_vllm() -> None:
    assert engine_flags.number(["--max_model_len=4096"], "--max-model-len") == 4096


def test_what_is_no_whole_number_is_left_to_the_engine() -> None:
    assert engine_flags.number(["--max-model-len", "4k"], "--max-model-len") is None
    assert engine_flags.number([], "--max-model-len") is None
