import pytest

from manthanquant.quantity import parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [("512", 512), ("1Ki", 1024), ("1.5Gi", 3 << 29), ("24G", 24 * 10**9), ("2 MiB", 2 << 20), ("2mb", 2_000_000)],
)
def test_parse_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "Gi", "-1Gi", "1Zi", "one"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (1 << 30, "1.00 GiB"), (3 << 50, "3072.00 TiB")],
)
def test_show_bytes(count: int, text: str) -> None:
    assert show_bytes(count) == text
