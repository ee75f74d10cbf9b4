"""One layer's store and attention on this CPU, beside vLLM's own operator and PyTorch's.

Every contender gets the same shapes and the same machine state: rounds are interleaved, the caches are flushed before
each call (in an engine, a layer's weights come between), and the median of the rounds is shown, in microseconds a call,
with the fastest round in brackets. Peers attend to an uncompressed bf16 cache.

`manthanquant bench cpu`, or with options `python -m manthanquant.bench.cpu --help`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from manthanquant import ops, reference
from manthanquant.capacity import slots_needed
from manthanquant.formats import DEFAULT_FORMAT, UNIT_TOKENS, Format, get_paged
from manthanquant.hot import HotTable
from manthanquant.reference import HotPool
from manthanquant.transform import LayerTransform, hadamard_transform

PAGE_TOKENS = 128  # what vLLM chooses on CPUs
SINKS, RECENT = 4, 128
FLUSH_BYTES = 64 << 20
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CASES = (
    (1, 1000, 1),
    (8, 1000, 1),
    (1, 8192, 1),
    (1, 512, 512),
    (1, 2048, 512),
)  # requests, length, new tokens of each

Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """One layer."""

    heads: int
    kv_heads: int
    head_size: int


class Step:
    """One step of `requests` requests of `length` tokens, `new` of them new, and the calls that serve it."""

    def __init__(self, fmt: Format, shape: Shape, requests: int, length: int, new: int) -> None:
        torch.manual_seed(0)
        self.fmt, self.shape, self.requests, self.length, self.new = fmt, shape, requests, length, new
        heads, kv_heads, size = shape.heads, shape.kv_heads, shape.head_size
        per_request = -(-length // PAGE_TOKENS)
        self.pages = per_request * requests
        self.block_table = torch.randperm(self.pages).int().view(requests, per_request)
        position = torch.arange(length)
        pages = self.block_table[:, position // PAGE_TOKENS].long()
        self.slots = pages * PAGE_TOKENS + position % PAGE_TOKENS  # [requests, length]
        self.seq_lens = torch.full((requests,), length, dtype=torch.int32)
        self.starts = torch.arange(0, requests * new + 1, new, dtype=torch.int32)
        mean = torch.randn(kv_heads, size)
        self.transform = LayerTransform(
            hadamard_transform(fmt, "key", size, mean), hadamard_transform(fmt, "value", size)
        )
        self.qkv = torch.randn(requests * new, heads + 2 * kv_heads, size).bfloat16()
        self.query = self.qkv[:, :heads]
        self.out = torch.empty(requests * new, heads, size, dtype=torch.bfloat16)
        self.key, self.value = (torch.randn(requests * length, kv_heads, size).bfloat16() for _ in range(2))
        self.kernels = ops.kernels(fmt, size)
        self.cache = torch.zeros(self.pages, kv_heads, PAGE_TOKENS, fmt.token_bytes(size), dtype=torch.uint8)
        table = HotTable(
            self.pages * PAGE_TOKENS // UNIT_TOKENS, slots_needed(requests, RECENT, SINKS), PAGE_TOKENS, RECENT, SINKS
        )
        whole = torch.arange(0, requests * length + 1, length, dtype=torch.int32)
        self.hot_slots = table.update(self.slots.reshape(-1), self.block_table, self.seq_lens, whole)
        shape_of_pool = (table.slots, kv_heads, UNIT_TOKENS, size)
        key, value = (torch.zeros(shape_of_pool, dtype=torch.bfloat16) for _ in range(2))
        self.hot = HotPool(key, value, table.slot)
        self.kernels.store(
            self.key, self.value, self.cache, self.slots.reshape(-1), self.transform, self.hot, self.hot_slots
        )
        self.new_slots = self.slots[:, -new:].reshape(-1).contiguous()
        self.new_hot_slots = self.hot_slots.view(requests, length)[:, -new:].reshape(-1).contiguous()

    @property
    def name(self) -> str:
        return f"{self.requests} x {self.length:,}, {self.new} new"

    def attention(self, hot: HotPool | None, own_exact: bool = False) -> Call:
        """The product's attention; with `own_exact`, the new tokens' keys and values as they are (a prefill)."""
        heads, kv_heads = self.shape.heads, self.shape.kv_heads
        chunk = (self.qkv[:, heads : heads + kv_heads], self.qkv[:, heads + kv_heads :]) if own_exact else None
        return lambda: self.kernels.attention(
            self.query,
            self.cache,
            self.block_table,
            self.seq_lens,
            self.starts,
            self.transform,
            self.shape.head_size**-0.5,
            sink_tokens=SINKS,
            recent_tokens=RECENT,
            hot=hot,
            chunk=chunk,
            out=self.out,
        )

    def store(self) -> Call:
        heads, kv_heads = self.shape.heads, self.shape.kv_heads
        key, value = self.qkv[:, heads : heads + kv_heads], self.qkv[:, heads + kv_heads :]
        return lambda: self.kernels.store(
            key, value, self.cache, self.new_slots, self.transform, self.hot, self.new_hot_slots
        )

    def pytorch_path(self) -> Call:
        return lambda: reference.attention(
            self.query,
            self.cache,
            self.block_table,
            self.seq_lens,
            self.starts,
            self.fmt,
            self.transform,
            self.shape.head_size**-0.5,
        )

    def sdpa(self) -> Call:
        """PyTorch's attention on contiguous bf16 keys and values, heads repeated beforehand: no paging at all."""
        repeat = self.shape.heads // self.shape.kv_heads

        def heads_first(x: Tensor, tokens: int) -> Tensor:
            return x.view(self.requests, tokens, -1, self.shape.head_size).transpose(1, 2)

        query = heads_first(self.query.contiguous(), self.new)
        key, value = (
            heads_first(x, self.length).repeat_interleave(repeat, 1).contiguous() for x in (self.key, self.value)
        )
        position = torch.arange(self.length)
        mask = None if self.new == 1 else position[None] <= position[-self.new :, None]
        return lambda: functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def vllm(self) -> Call | None:
        """vLLM's CPU operator over its own paged bf16 cache; None where vLLM's CPU build is not installed."""
        try:
            from vllm import _custom_ops as vllm_ops
            from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
        except ImportError:
            return None
        size, kv_heads = self.shape.head_size, self.shape.kv_heads
        cache = torch.zeros(self.pages, kv_heads, 2 * PAGE_TOKENS, size, dtype=torch.bfloat16)
        key_cache, value_cache = cache.chunk(2, dim=2)
        isa = _get_attn_isa(torch.bfloat16, PAGE_TOKENS, size)
        vllm_ops.cpu_attn_reshape_and_cache(
            self.key, self.value, key_cache, value_cache, self.slots.reshape(-1).contiguous(), isa
        )
        metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=self.requests,
            num_heads=self.shape.heads,
            num_kv_heads=kv_heads,
            head_dim=size,
            seq_lens=self.seq_lens,
            dtype=torch.bfloat16,
            query_start_loc=self.starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )
        out = torch.empty_like(self.out)
        return lambda: vllm_ops.cpu_attention_with_kv_cache(
            query=self.query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=out,
            query_start_loc=self.starts,
            seq_lens=self.seq_lens,
            scale=size**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.block_table,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
        )


def time_calls(calls: dict[str, Call | None], rounds: int, clock: Callable[[], float]) -> dict[str, str]:
    """Median and least microseconds of each call over interleaved rounds, as text."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    flush = torch.zeros(FLUSH_BYTES, dtype=torch.uint8)
    for warm in (True, *[False] * rounds):
        for name, call in calls.items():
            if call is not None:
                flush.add_(1)
                started = clock()
                call()
                if not warm:
                    seconds[name].append(clock() - started)
    return {
        name: f"{statistics.median(values) * 1e6:,.0f} ({min(values) * 1e6:,.0f})" if values else "-"
        for name, values in seconds.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m manthanquant.bench.cpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--format", default=DEFAULT_FORMAT, help="default: %(default)s")
    parser.add_argument("--heads", type=int, default=9, help="query heads; default: %(default)s, as SmolLM2-135M")
    parser.add_argument("--kv-heads", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--head-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s, as vLLM has on two cores")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: CPU time, for a busy machine; default: wall",
    )
    parser.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--with-pytorch-path", action="store_true", help="time the fallback too; it is slow")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    fmt, shape = get_paged(args.format), Shape(args.heads, args.kv_heads, args.head_size)
    report = ops.kernels(fmt, shape.head_size).report
    print(f"{fmt.name} on {report.arch}, {shape}, {args.threads} threads; {args.clock} microseconds, median (least)")
    header: list[str] | None = None
    for requests, length, new in CASES:
        step = Step(fmt, shape, requests, length, new)
        calls: dict[str, Call | None] = {
            "attention": step.attention(None),
            "with hot tier": step.attention(step.hot),
            "new tokens exact": step.attention(step.hot, own_exact=True),
            "store": step.store(),
            "vLLM bf16": step.vllm(),
            "torch SDPA bf16": step.sdpa(),
        }
        if args.with_pytorch_path:
            calls["PyTorch path"] = step.pytorch_path()
        cells = time_calls(calls, args.rounds, CLOCKS[args.clock])
        if header is None:
            header = ["case", *cells]
            print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
        print("| " + " | ".join([step.name, *cells.values()]) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
