"""What decode attention prepares on the host; the kernels themselves need a GPU (tests/gpu)."""

from __future__ import annotations

import pytest
import torch

from manthanquant.cuda.decode import dense_fragments, rows_at_a_time
from manthanquant.formats import K3V3, LANES, SUPPORTED_HEAD_SIZES


@pytest.mark.parametrize("size", SUPPORTED_HEAD_SIZES)
def test_fragments_of_a_dense_matrix_hold_it_to_sixteen_bits(size: int) -> None:
    """Dealt back as the matrix instruction takes its A operand: rows lane / 4 and 8 more, four k a lane."""
    matrix = torch.randn(3, size, size)
    # [H, tile out, step in, lane, register, element]
    high, low = dense_fragments(matrix).float().unflatten(-1, (4, 2)).unbind(3)
    back = torch.zeros_like(matrix)
    for lane in range(LANES):
        for register in range(4):
            for element in range(2):
                blocks = torch.arange(size // 16) * 16
                channel_in = blocks + 4 * (lane % 4) + 2 * (register // 2) + element
                channel_out = blocks + lane // 4 + 8 * (register % 2)
                back[:, channel_in[None, :], channel_out[:, None]] = (high + low)[:, :, :, lane, register, element]
    torch.testing.assert_close(back, matrix, rtol=2**-16, atol=0)


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
        "scratch": [table.float()] * 3,
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
