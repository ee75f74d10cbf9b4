from __future__ import annotations

import pytest
from manthanquant_operator.quantity import bytes_of, quantity_of


@pytest.mark.parametrize(
    ("quantity", "expected"), [("1Gi", 1 << 30), ("1.5Gi", 3 << 29), ("2G", 2_000_000_000), ("123", 123), ("4Ki", 4096)]
)
def test_bytes_of(quantity: str, expected: int) -> None:
    assert bytes_of(quantity) == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(1 << 30, "1Gi"), (3 << 29, "1536Mi"), (3 << 10, "3Ki"), (1000, "1000"), (0, "0")]
)
def test_quantity_of(count: int, expected: str) -> None:
    assert quantity_of(count) == expected
    assert bytes_of(expected) == count
