"""What decode attention prepares on the host; the kernels themselves need a GPU (tests/gpu)."""

from __future__ import annotations

import pytest
import torch

from manthanquant.cuda.decode import rows_at_a_time
from manthanquant.formats import K3V3


@pytest.mark.parametrize(
    ("group", "query_tokens", "rows"),
    [(1, 1, 4), (4, 1, 4), (5, 1, 8), (8, 1, 8), (9, 1, 16), (16, 1, 16), (4, 4, 16), (16, 4, 16)],
)
def test_the_smallest_build_that_reads_the_cache_once(group: int, query_tokens: int, rows: int) -> None:
    assert rows_at_a_time(group, query_tokens) == rows


def test_the_operator_can_be_traced() -> None:
    """Its fake kernel: no GPU, no data, nothing returned."""
    rows, fmt = torch.empty(2, 8, 128, device="meta", dtype=torch.bfloat16), K3V3
    table = torch.empty(2, 4, device="meta", dtype=torch.int32)
    arguments = {
        "query": rows,
        "cache": torch.empty(4, 2, 64, fmt.token_bytes(128), device="meta", dtype=torch.uint8),
        "block_table": table,
        "seq_lens": table[:, 0],
        "query_start_loc": None,
        "key": [table.float(), None, None, None],
        "value": [table.float(), None, None],
        "sink_logits": None,
        "hot": [],
        "scratch": [table.float()] * 5,
        "out": torch.empty_like(rows),
        "fmt_name": fmt.name,
        "rows": 4,
        "limits": [8, 2, 128, 2, 1],
        "exact": False,
        "bulk_copy": None,
        "scale": 1.0,
        "soft_cap": 0.0,
        "window": 0,
        "sink_tokens": 0,
        "recent_tokens": 0,
    }
    assert torch.ops.manthanquant.decode(**arguments) is None
