"""Store on the GPU: new keys and values to codes in their pages, and to the hot pool, in one launch.

`StoreTransform` is a layer's transform as the kernel takes it; make it once. `store` then launches one kernel: it
allocates nothing, does not synchronise, and can be captured in a CUDA graph. Under `torch.compile` it is one operator.

A matrix transform is rounded to the dtype of keys and values; sums are fp32. Codes equal the reference's except where a
channel, at unit variance, lies within `tie(boundary)` of a decision boundary: channels and boundaries are rounded to
fp16 before they are compared. There either code is as good. A vector with scale 0 may have any codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manthanquant.cuda.fragments import BLOCK, CORE
from manthanquant.cuda.module import address, module_for, stream_of, traceable
from manthanquant.formats import SIDES, UNIT_TOKENS, Format, Side, get_paged
from manthanquant.jit.kernels import store_extension
from manthanquant.packing import pages_as_units
from manthanquant.reference import HotPool
from manthanquant.transform import LayerTransform, SideTransform, hadamard_block

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def tie(boundary: float) -> float:
    """How near to `boundary` a channel may get another code: two fp16 roundings, and fp32 sums in another order."""
    return abs(boundary) * 2**-10 + 2e-5


@dataclass(frozen=True)
class SideOperand:
    """One side's transform in the order of the kernel's registers.

    Attributes:
        matrix: T as core matrices, `[KV heads or 1, inputs / 8, D / 8, 8 outputs, 8 inputs]`, 16 bits. Keys have 16
            inputs more than D: minus the mean, transformed, in three parts that the kernel multiplies by 1, and zeros.
        is_rotation: it is a Hadamard rotation, which the kernel can do without most of the matrix.
        has_mean: its mean is not zero.
        output_scale: a class each: kernel's output unit to transformed vectors.
    """

    matrix: Tensor
    is_rotation: bool
    has_mean: bool
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
    return StoreTransform(fmt, head_size, dtype, *sides)


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
        transform.key.matrix,
        transform.value.matrix,
        [transform.key.is_rotation, transform.value.is_rotation],
        transform.key.has_mean,
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
    key_matrix: Tensor,
    value_matrix: Tensor,
    is_rotation: list[bool],
    has_mean: bool,
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
            _side_arguments(key, key_matrix, is_rotation[0], has_mean, output_scale[:2], hot_key),
            _side_arguments(value, value_matrix, is_rotation[1], False, output_scale[2:], hot_value),
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
    x: Tensor, matrix: Tensor, is_rotation: bool, has_mean: bool, scale: list[float], pool: Tensor | None
) -> tuple[int | float | bool, ...]:
    matrix_stride = matrix.stride(0) * matrix.element_size() if matrix.shape[0] > 1 else 0
    source = (x.data_ptr(), x.stride(0), x.stride(1), matrix.data_ptr(), matrix_stride)
    return (*source, is_rotation, has_mean, *scale, address(pool))


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
    forward = side.forward.double().cpu() / per_channel[:, None]
    if name == "key":
        mean = _mean_inputs(side.mean, forward, dtype)
        forward = _dealt(torch.cat([forward.expand(mean.shape[0], -1, -1), mean], -1))
    cores = forward.unflatten(2, (-1, CORE)).unflatten(1, (-1, CORE)).permute(0, 3, 1, 2, 4)
    return SideOperand(
        cores.to(dtype).contiguous().to(device), side.kind == "hadamard", side.mean is not None, (scale[0], scale[-1])
    )


def _mean_inputs(mean: Tensor | None, forward: Tensor, dtype: torch.dtype) -> Tensor:
    """Minus the transformed mean as columns of T `[KV heads, D, 16]`: three parts of `dtype`, as good as fp32."""
    if mean is None:
        return torch.zeros(*forward.shape[:2], BLOCK, dtype=torch.float64)
    rest = -torch.einsum("hd,hed->he", mean.double().cpu(), forward.expand(mean.shape[0], -1, -1))
    columns = torch.zeros(*rest.shape, BLOCK, dtype=torch.float64)
    for part in range(3):
        columns[..., part] = rest.to(dtype).double()
        rest = rest - columns[..., part]
    return columns


def _dealt(matrix: Tensor) -> Tensor:
    """Rows of `[H, D, inputs]`, dealt so that a lane's columns 2 c and 2 c + 1 of a block's two n tiles are its
    channels 4 c to 4 c + 3, in turn."""
    tile, pair, element = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(2), indexing="ij")
    within = (4 * pair + 2 * element + tile).flatten()
    return matrix.unflatten(1, (-1, BLOCK))[:, :, within].flatten(1, 2)


assert UNIT_TOKENS == BLOCK  # a unit's tokens are the rows of one matrix instruction
