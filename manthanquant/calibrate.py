"""Statistics of a model's keys, queries and values, and the transforms that follow from them.

The error of attention over coded keys is a sum over pairs of query i and key j of

    w_ij |q_i^T e_j|^2,   w_ij = p_ij^2 |W_o (v_j - o_i)|^2 / |W_o o_i|^2

with e_j the key's error, p the attention probability, o the output and W_o the output projection (a first-order
expansion of the softmax). For codes that spend the same error on each coded channel, the transform that makes it least
depends on two moments a KV head: A of keys and B of queries, each weighted by w. With diagonal transforms it is the
gain (B_ii / A_ii)^(1/4); with any transform it is built from the eigenvectors of A^(1/2) B A^(1/2). Either way the
eigenvalues (A_ii B_ii for gains) say how much a channel matters, which decides who gets the wider codes. Values follow
the same rule with A from values and B = W_o^T W_o.

The mean that keys lose is weighted in the same way: it is the point about which A is least.

Two things keep the result from fitting the calibration text: a quarter of each moment is unweighted, and keys and
queries are turned back to position 0, where the text's positions do not matter, and their moments are then averaged
over all positions up to the served length, in closed form (`hf.Rotary`). Pairs closer than the exact tiers are left
out: their keys are not coded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from manthanquant import calibration
from manthanquant.calibration import Calibration, CalibrationError
from manthanquant.contract import DEFAULT_RECENT_TOKENS, DEFAULT_SINK_TOKENS
from manthanquant.formats import Format, Side
from manthanquant.hf import AttentionCall, Model, ModelError, Rotary, attend
from manthanquant.transform import (
    Kind,
    LayerTransform,
    SideTransform,
    dense_transform,
    gain_transform,
)

DEFAULT_KINDS: dict[str, Kind] = {"k3v3": "gain", "k42v3": "dense", "k42v42": "dense", "k4v4": "gain"}
KINDS: tuple[Kind, ...] = ("gain", "dense")
MAX_TOKENS = 10_240  # of a text that count
WINDOW_TOKENS = 1280  # at most: several short windows, as attention costs the square
_WINDOW_RECENT = 4  # or this many times the recent tier where that is more: pairs within it do not count
MIN_TOKENS = 512
_WEIGHTED_SHARE = 0.75  # of a blended moment; the rest is unweighted
_SHRINK = 0.003  # of a moment's mean diagonal, added to it: what was never seen still gets some of the code
_BUILT_IN_TEXT = "calibration.txt"


@dataclass(frozen=True)
class LayerStatistics:
    """Moments of one layer, fp64, one a KV head, each of trace 1.

    Attributes:
        mean: fp64 `[KV heads, D]`, the keys' weighted mean over the text, and its mean over positions.
        key: `[KV heads, D, D]`, of keys about `mean`.
        query, value, output: `[KV heads, D, D]`: of queries, of values, and of the output projection.
    """

    mean: Tensor
    key: Tensor
    query: Tensor
    value: Tensor
    output: Tensor


def built_in_text() -> str:
    """The calibration text that ships: about 5,500 tokens of prose, dialogue, code, logs and tables."""
    return resources.files("manthanquant").joinpath("data", _BUILT_IN_TEXT).read_text(encoding="utf-8")


def calibrate(
    model_path: str | Path,
    fmt: Format,
    max_positions: int,
    *,
    text: str | None = None,
    kind: Kind | None = None,
    recent_tokens: int = DEFAULT_RECENT_TOKENS,
    sink_tokens: int = DEFAULT_SINK_TOKENS,
    device: str = "cpu",
) -> Calibration:
    """Measures the model at `model_path` on a text and derives the transforms of `fmt`.

    Args:
        max_positions: the served length: statistics are averaged over positions 0 to `max_positions - 1`.
        text: instead of the built-in one; at least `MIN_TOKENS` tokens, of which the first
            `MAX_TOKENS` count.
        kind: `gain` or `dense`, instead of the format's default.
        recent_tokens, sink_tokens: the exact tiers; pairs of tokens within them do not count.

    Raises:
        CalibrationError: the model or the text does not allow it; the text says why.
    """
    text = built_in_text() if text is None else text
    kind = kind or DEFAULT_KINDS[fmt.name]
    started = time.monotonic()
    try:
        model = Model(model_path, device)
        statistics = measure(model, text, max_positions, recent_tokens=recent_tokens, sink_tokens=sink_tokens)
    except ModelError as error:
        raise CalibrationError(str(error)) from error
    layers = {index: transforms(layer, fmt, kind) for index, layer in statistics.items()}
    key = calibration.cache_key(
        model_path, fmt, max_positions, text=text, kind=kind, recent_tokens=recent_tokens, sink_tokens=sink_tokens
    )
    return Calibration(fmt.name, kind, layers, key, {"seconds": f"{time.monotonic() - started:.1f}"})


def measure(
    model: Model,
    text: str,
    max_positions: int,
    *,
    recent_tokens: int = DEFAULT_RECENT_TOKENS,
    sink_tokens: int = DEFAULT_SINK_TOKENS,
) -> dict[int, LayerStatistics]:
    """One pass over `text` with exact attention: statistics of each layer. Serves every format and kind.

    Raises:
        ModelError, CalibrationError: as `calibrate`.
    """
    length = min(max(WINDOW_TOKENS, _WINDOW_RECENT * recent_tokens), max_positions)
    windows = list(_windows(model, text, length))
    sums: dict[int, _Sums] = {}
    rotaries = model.rotaries(max_positions)

    def observe(call: AttentionCall) -> Tensor:
        if call.layer not in sums:
            sums[call.layer] = _Sums(call, rotaries[call.layer], max_positions, recent_tokens, sink_tokens)
        return sums[call.layer].add(call)

    with model.replaced(observe):
        for tokens in windows:
            model.hidden(tokens)
    return {layer: s.statistics() for layer, s in sorted(sums.items())}


def _windows(model: Model, text: str, length: int) -> Iterator[Tensor]:
    """The text's tokens in windows of at most `length`, each behind the tokenizer's own leading token."""
    tokens = model.tokens(text)
    if len(tokens) < MIN_TOKENS or length < MIN_TOKENS:
        raise CalibrationError(
            f"calibration needs {MIN_TOKENS} tokens or more: the text has {len(tokens)} and the served length "
            f"allows windows of {length}; give a longer text or serve with the calibration off"
        )
    empty = model.tokens("")
    lead = tokens[: len(empty)] if len(empty) and torch.equal(tokens[: len(empty)], empty) else tokens[:0]
    body = tokens[len(lead) : MAX_TOKENS]
    for part in body.tensor_split(-(-len(body) // (length - len(lead)))):
        yield torch.cat([lead, part])


class _Sums:
    """Running sums of one layer; keys and queries are turned back to position 0 before they are summed."""

    def __init__(
        self, call: AttentionCall, rotary: Rotary, max_positions: int, recent_tokens: int, sink_tokens: int
    ) -> None:
        if call.output_weight is None:
            raise CalibrationError(f"layer {call.layer}: no output projection found, so values cannot be weighed")
        self.rotary, self.span = rotary, max_positions
        self.recent, self.sinks = recent_tokens, sink_tokens
        heads, _, size = call.query.shape
        self.kv_heads, self.group, self.size = call.key.shape[0], heads // call.key.shape[0], size
        weight = call.output_weight.float().view(-1, heads, size)
        self.metric = torch.einsum("ohd,ohe->hde", weight, weight)  # W_o^T W_o of each query head
        self.root = _power(self.metric.double(), 0.5).float()
        self.totals: dict[str, Tensor] = {}

    def _add(self, name: str, value: Tensor) -> None:
        value = value.double().cpu()
        self.totals[name] = self.totals[name] + value if name in self.totals else value

    def _add_moments(self, name: str, x: Tensor, weight: Tensor | None = None) -> None:
        """Count, sum and second moment of `[KV heads, n, D]` under weights `[KV heads, n]`."""
        weight = torch.ones(x.shape[:2], device=x.device) if weight is None else weight
        weighted = x * weight[..., None]
        self._add(name + "0", weight.double().sum(1))
        self._add(name + "1", weighted.double().sum(1))
        self._add(name + "2", weighted.transpose(1, 2) @ x)

    def add(self, call: AttentionCall) -> Tensor:
        """Takes one window's call into the sums; returns the exact attention output."""
        length = call.query.shape[1]
        positions = torch.arange(length, device=call.query.device)
        key = self.rotary.turn(call.key, -positions)
        query = self.rotary.turn(call.query, -positions).view(self.kv_heads, self.group, length, self.size)
        mean = self.rotary.average_vector(key[:, self.sinks :].mean(1).double().cpu(), self.span).to(key)
        key_square = (call.key - mean[:, None]).square().sum(-1)
        query_square = query.square().sum(-1)
        value = call.value.repeat_interleave(self.group, 0) @ self.root
        value_square = value.square().sum(-1).view(self.kv_heads, self.group, length)

        key_weight = torch.zeros(self.kv_heads, length, device=key.device)
        query_weight = torch.zeros_like(query_square)
        value_weight = torch.zeros_like(query_square)
        outputs = []
        for rows, probability, output in attend(call):
            outputs.append(output)
            start = rows.stop - probability.shape[-1]
            distance = positions[rows.start : rows.stop, None] - positions[start : rows.stop]
            far = (distance >= self.recent) & (positions[start : rows.stop] >= self.sinks)
            if not bool(far.any()):
                continue
            projected = output @ self.root
            square = projected.square().sum(-1)  # |W_o o_i|^2 of each head
            weight = probability.square_().mul_(far).div_(square.sum(0).clamp_min(1e-9)[:, None])
            value_weight[..., start : rows.stop] += weight.sum(2)
            cross = projected @ value[:, start : rows.stop].transpose(1, 2)
            shape = (self.kv_heads, self.group, len(rows), -1)
            change = cross.mul_(-2).view(shape).add_(square.view(*shape[:3], 1))
            weight.mul_(change.add_(value_square[:, :, None, start : rows.stop]).clamp_min_(0))  # w_ij
            key_weight[:, start : rows.stop] += torch.einsum(
                "hgnt,hgn->ht", weight, query_square[:, :, rows.start : rows.stop]
            )
            query_weight[:, :, rows.start : rows.stop] = torch.einsum(
                "hgnt,ht->hgn", weight, key_square[:, start : rows.stop]
            )

        flat = query.reshape(self.kv_heads, -1, self.size)
        late = query[:, :, self.recent :].reshape(self.kv_heads, -1, self.size)  # queries that read any code
        self._add_moments("key", key[:, self.sinks :])
        self._add_moments("weighted_key", key, key_weight)
        self._add_moments("query", late)
        self._add_moments("weighted_query", flat, query_weight.view(self.kv_heads, -1))
        self._add_moments("value", call.value[:, self.sinks :])
        self._add_moments("weighted_value", call.value, value_weight.sum(1))
        head_weight = (value_weight * call.value.square().sum(-1)[:, None]).sum(2)
        metric = self.metric.view(self.kv_heads, self.group, self.size, self.size)
        self._add("output", metric.sum(1))
        self._add("weighted_output", (metric * head_weight[..., None, None]).sum(1))
        return torch.cat(outputs, 1)

    def statistics(self) -> LayerStatistics:
        sums = self.totals
        weight = sums["weighted_key0"][:, None]
        mean = torch.where(weight > 0, sums["weighted_key1"] / weight, sums["key1"] / sums["key0"][:, None])
        mean = self.rotary.average_vector(mean, self.span)

        def keys(name: str) -> Tensor:
            """The second moment about the mean that is taken off, over all positions."""
            first = self.rotary.average_vector(sums[name + "1"] / sums[name + "0"][:, None], self.span)
            second = self.rotary.average_moment(sums[name + "2"] / sums[name + "0"][:, None, None], self.span)
            cross = first[:, :, None] * mean[:, None]
            return second - cross - cross.transpose(1, 2) + mean[:, :, None] * mean[:, None]

        queries = (self.rotary.average_moment(sums[name], self.span) for name in ("query2", "weighted_query2"))
        found = LayerStatistics(
            mean,
            _blend(keys("key"), keys("weighted_key")),
            _blend(*queries),
            _blend(sums["value2"], sums["weighted_value2"]),
            _blend(sums["output"], sums["weighted_output"]),
        )
        if not all(bool(torch.isfinite(x).all()) for x in vars(found).values()):
            raise CalibrationError("the model's keys, queries or values are not finite on the calibration text")
        return found


def _trace(moment: Tensor) -> Tensor:
    return moment.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _blend(plain: Tensor, weighted: Tensor) -> Tensor:
    """Both at trace 1, mixed by `_WEIGHTED_SHARE`; all of `plain` where no pair had any weight."""
    plain = plain / _trace(plain)
    total = _trace(weighted)
    return torch.where(total > 0, torch.lerp(plain, weighted / total, _WEIGHTED_SHARE), plain)


def _power(moment: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.clamp_min(1e-12).pow(exponent)[..., None, :]) @ vectors.transpose(-1, -2)


def transforms(statistics: LayerStatistics, fmt: Format, kind: Kind) -> LayerTransform:
    """The transforms of one layer, both sides of `kind`. Values keep their mean: taking it off does not help them."""
    return LayerTransform(
        _side(statistics.key, statistics.query, fmt, "key", kind, statistics.mean.float()),
        _side(statistics.value, statistics.output, fmt, "value", kind, None),
    )


def _side(source: Tensor, metric: Tensor, fmt: Format, side: Side, kind: Kind, mean: Tensor | None) -> SideTransform:
    """The transform of least error for vectors of moment `source` whose errors `metric` weighs."""
    size = source.shape[-1]
    eye = torch.eye(size, dtype=source.dtype)
    source, metric = (m + _SHRINK / size * _trace(m) * eye for m in (source, metric))
    segments = fmt.segments(side, size)
    if kind == "gain":
        spread = source.diagonal(dim1=-2, dim2=-1)
        order = (spread * metric.diagonal(dim1=-2, dim2=-1)).argsort(dim=-1, descending=True, stable=True)
        spread, weight = (m.diagonal(dim1=-2, dim2=-1).gather(-1, order) for m in (source, metric))
        gain = (weight / spread) ** 0.25
        gain = gain * _unit_variance(gain.square() * spread, segments)
        return gain_transform(fmt, side, order, gain.float(), mean)  # fp32, as a file keeps it
    if kind != "dense":
        raise ValueError(f"kind {kind!r} is not a calibrated transform: use one of {', '.join(KINDS)}")
    root = _power(source, 0.5)
    values, vectors = torch.linalg.eigh(root @ metric @ root)
    values, vectors = values.flip(-1).clamp_min(1e-20), vectors.flip(-1)  # most important first
    rows = vectors.transpose(-1, -2) @ _power(source, -0.5)
    rows = rows * (values**0.25 * _unit_variance(values.sqrt(), segments))[..., None]
    return dense_transform(fmt, side, rows, mean)


def _unit_variance(variance: Tensor, segments: tuple[int, ...]) -> Tensor:
    """A factor a channel, one value a segment, that brings each segment's mean variance to 1."""
    return torch.cat([p.mean(-1, keepdim=True).rsqrt().expand_as(p) for p in variance.split(segments, -1)], -1)
