"""Store on the GPU: new keys and values to codes in their pages, and to the hot pool, in one launch.

`StoreTransform` is a layer's transform as the kernel takes it; make it once. `store` then launches one kernel: it
allocates nothing, does not synchronise, and can be captured in a CUDA graph. Under `torch.compile` it is one operator.

A matrix transform is rounded to the dtype of keys and values; sums are fp32. Codes equal the reference's except where a
channel, at unit variance, lies within `tie(boundary)` of a decision boundary: it is rounded to fp16 before it is
compared with the rounded boundary. There either code is as good. A vector with scale 0 may have any codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manthanquant.cuda.fragments import BLOCK, b_fragments
from manthanquant.cuda.module import address, module_for, require_shared_memory, stream_of, traceable
from manthanquant.formats import LANES, SIDES, UNIT_TOKENS, Format, Side, get_paged
from manthanquant.jit.kernels import store_extension
from manthanquant.packing import pages_as_units
from manthanquant.reference import HotPool
from manthanquant.transform import LayerTransform, SideTransform, hadamard, hadamard_block, signs

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Of the kernel's shared memory, see csrc/store.cu: elements between rows of a tile, and what its warps share.
_PADDING, _COUNTER_BYTES = 8, 16


def tie(boundary: float) -> float:
    """How near to `boundary` a channel may get another code: two fp16 roundings, and fp32 sums in another order."""
    return abs(boundary) * 2**-10 + 2e-5


@dataclass(frozen=True)
class SideOperand:
    """One side's transform in the order of the kernel's registers.

    Attributes:
        fragments: 16-bit B fragments of 16 x 16 blocks. A rotation's: `[KV heads or 1, D / 16, 32, 8]`, the diagonal
            before blocks are mixed. A matrix's: `[KV heads or 1, D / 16 in, D / 16 out, 32, 8]`.
        is_matrix: which of the two.
        order: a rotation's order of channels, int32 `[KV heads, D / 16, 32]` (`Inbox::reorder`); None to leave it.
        minus_mean: fp32 `[KV heads, D]`, minus the key mean, transformed, in the kernel's output unit; None for none.
        output_scale: a class each: kernel's output unit to transformed vectors.
    """

    fragments: Tensor
    is_matrix: bool
    order: Tensor | None
    minus_mean: Tensor | None
    output_scale: tuple[float, float]


@dataclass(frozen=True)
class StoreTransform:
    """A layer's transforms as `store` takes them."""

    fmt: Format
    head_size: int
    dtype: torch.dtype
    key: SideOperand
    value: SideOperand


def prepare(
    transform: LayerTransform, fmt: Format, head_size: int, dtype: torch.dtype, device: torch.device
) -> StoreTransform:
    """A layer's transform for keys and values of `dtype` on `device`. Raises `ValueError` for what is not supported."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not supported by the GPU store: use one of {', '.join(map(str, DTYPES))}")
    if transform.value.mean is not None:
        raise ValueError("a value mean is not supported by the GPU store: take it off keys only")
    sides = (
        _side_operand(side, fmt, name, head_size, dtype, device)
        for side, name in zip((transform.key, transform.value), SIDES)
    )
    prepared = StoreTransform(fmt, head_size, dtype, *sides)
    if prepared.key.is_matrix or prepared.value.is_matrix:
        needs = dtype.itemsize * (head_size * head_size + UNIT_TOKENS * (head_size + _PADDING)) + _COUNTER_BYTES
        require_shared_memory(needs, transform.key.kind, head_size, device)
    return prepared


def store(
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    transform: StoreTransform,
    hot: HotPool | None = None,
    hot_slots: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """Codes new tokens into the cache; copies those with a hot slot.

    Args:
        key, value: `[T or more, KV heads, D]` of the transform's dtype. Any strides of the first two dimensions that
            are multiples of 8; other tensors are copied first.
        cache: uint8 `[pages, KV heads, page tokens, token bytes]`.
        slot_mapping: int64 `[T]`; below 0: skip. Tokens of one unit should be neighbours, in order (an engine lists a
            request's tokens so): such units are written whole. Any other order is right too, and slower. A slot listed
            twice in one call ends up with a mix of both tokens.
        hot, hot_slots: where exact copies go, int64 `[T]` (slot * 16 + offset, below 0: no copy).
        nonfinite: int64 `[1]`, to which the number of vectors that held NaN or an infinity is added; those are stored
            as zero, in the cache and in the hot pool.

    Raises:
        ValueError: an argument does not fit the others; the text names it.
    """
    _store(
        key,
        value,
        cache,
        slot_mapping,
        transform.fmt.name,
        transform.key.fragments,
        transform.key.order,
        transform.key.minus_mean,
        transform.value.fragments,
        transform.value.order,
        [transform.key.is_matrix, transform.value.is_matrix],
        [*transform.key.output_scale, *transform.value.output_scale],
        transform.head_size,
        transform.dtype,
        hot.key if hot else None,
        hot.value if hot else None,
        hot_slots,
        nonfinite,
    )


def _launch(
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    fmt_name: str,
    key_fragments: Tensor,
    key_order: Tensor | None,
    key_minus_mean: Tensor | None,
    value_fragments: Tensor,
    value_order: Tensor | None,
    is_matrix: list[bool],
    output_scale: list[float],
    head_size: int,
    dtype: torch.dtype,
    hot_key: Tensor | None,
    hot_value: Tensor | None,
    hot_slots: Tensor | None,
    nonfinite: Tensor | None,
) -> None:
    """Checks and launches. Takes tensors and plain values only, so that it can be a torch operator."""
    fmt = get_paged(fmt_name)
    tokens, kv_heads = slot_mapping.shape[0], cache.shape[1]
    units = pages_as_units(cache, fmt, head_size)
    for name, x in (("key", key), ("value", value)):
        if x.shape[0] < tokens or x.shape[1:] != (kv_heads, head_size) or x.dtype != dtype:
            raise ValueError(
                f"{name}: expected {dtype} [at least {tokens}, {kv_heads}, {head_size}], got {x.dtype} {tuple(x.shape)}"
            )
    if slot_mapping.dtype != torch.int64 or not slot_mapping.is_contiguous():
        raise ValueError(f"slot_mapping: expected contiguous int64, got {slot_mapping.dtype}")
    if cache.data_ptr() % 16 or units.stride(0) % 16 or units.stride(1) % 16:
        raise ValueError(f"cache: units must start at multiples of 16 bytes, got strides {cache.stride()}")
    if hot_slots is not None and (hot_key is None or hot_slots.dtype != torch.int64 or hot_slots.shape[0] < tokens):
        raise ValueError(f"hot_slots: expected int64 [at least {tokens}] with a pool, got {tuple(hot_slots.shape)}")
    key, value, page_units = _loadable(key), _loadable(value), units.shape[2]
    with torch.cuda.device(cache.device):
        module = module_for(store_extension(fmt, head_size, DTYPES[dtype]), cache.device)
        module.store(
            stream_of(cache.device),
            _side_arguments(key, key_fragments, key_order, is_matrix[0], key_minus_mean, output_scale[:2], hot_key),
            _side_arguments(value, value_fragments, value_order, is_matrix[1], None, output_scale[2:], hot_value),
            slot_mapping.data_ptr(),
            address(hot_slots),
            cache.data_ptr(),
            units.stride(0),
            units.stride(1),
            address(nonfinite),
            tokens,
            kv_heads,
            page_units,
            page_units.bit_length() - 1 if page_units & (page_units - 1) == 0 else -1,
        )


_store = traceable("store", _launch, writes=("cache", "hot_key", "hot_value", "nonfinite"))


def _side_arguments(
    x: Tensor,
    fragments: Tensor,
    order: Tensor | None,
    is_matrix: bool,
    minus_mean: Tensor | None,
    scale: list[float],
    pool: Tensor | None,
) -> tuple[int | float | bool, ...]:
    return (
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        fragments.data_ptr(),
        fragments.stride(0) * fragments.element_size() if fragments.shape[0] > 1 else 0,
        address(order),
        is_matrix,
        address(minus_mean),
        *scale,
        address(pool),
    )


def _loadable(x: Tensor) -> Tensor:
    """`x`, or a copy that can be read sixteen bytes at a time."""
    strided = all(stride % 8 == 0 and stride < 2**31 for stride in x.stride()[:2])
    return (
        x if x.stride(2) == 1 and strided and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
    )


def _side_operand(
    side: SideTransform, fmt: Format, name: Side, head_size: int, dtype: torch.dtype, device: torch.device
) -> SideOperand:
    segments = fmt.segments(name, head_size)
    # Rotations and gains come without the Hadamard matrix's norm: then a rotation is +-1 and a gain is itself.
    normed = side.kind in ("hadamard", "gain")
    scale = [hadamard_block(count) ** -0.5 if normed else 1.0 for count in segments]
    per_channel = torch.tensor([s for s, count in zip(scale, segments) for _ in range(count)], dtype=torch.float64)
    minus_mean = None
    if side.mean is not None:
        turned = torch.einsum(
            "hd,hed->he", side.mean.double().cpu(), side.forward.double().cpu().expand(side.mean.shape[0], -1, -1)
        )
        minus_mean = (-turned / per_channel).float().to(device).contiguous()
    order = None
    if normed:
        factors = torch.tensor(signs(head_size, name), dtype=torch.float64)[None]
        if side.order is not None and side.gain is not None:
            factors = factors * side.gain.double().cpu()
            order = _places(side.order.cpu()).to(device)
        blocks = hadamard(BLOCK) * BLOCK**0.5 * factors.view(-1, 1, BLOCK)
        fragments = _fragments(blocks, name, dtype).view(factors.shape[0], head_size // BLOCK, LANES, -1)
    else:
        fragments = _fragments(side.forward.double().cpu() / per_channel[:, None], name, dtype)
    return SideOperand(fragments.to(device), not normed, order, minus_mean, (scale[0], scale[-1]))


def _fragments(matrix: Tensor, side: Side, dtype: torch.dtype) -> Tensor:
    """`b_fragments` of `[H, N out, N in]`, whose rows csrc/store.cu deals to a block's 16 columns as it needs them."""
    if side == "key":  # a lane's columns 2 c and 2 c + 1 of the two n tiles become channels 4 c to 4 c + 3, in turn
        tile, pair, element = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(2), indexing="ij")
        within = (4 * pair + 2 * element + tile).flatten()
        matrix = matrix.unflatten(1, (-1, BLOCK))[:, :, within].flatten(1, 2)
    return b_fragments(matrix, dtype, grouped_in=False, grouped_out=False)


def _places(order: Tensor) -> Tensor:
    """`order` `[KV heads, D]` -> the byte at which a lane's row of a channel's tokens begins (`Inbox::reorder`)."""
    row_bytes = UNIT_TOKENS // 2 * 2
    lane = torch.arange(LANES)
    channel = order.unflatten(1, (-1, BLOCK))[..., lane // 16 * 8 + lane % 8]
    return (row_bytes * (lane // 8 % 2 * order.shape[1] + channel)).int().contiguous()


assert UNIT_TOKENS == BLOCK  # a unit's tokens are the rows of one matrix instruction
