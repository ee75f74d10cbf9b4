"""A transformers model whose attention is ours: calibration and quality runs see every query, key and value.

transformers lets a named function stand in for a model's attention (`AttentionInterface`). Ours hands each call to
whatever `Model.attention` is at the time. Everything runs in fp32, so that what is measured is the cache alone.

`Rotary` is what a layer's rotary embedding does to a key. Its frequencies are the model's own buffers (with all their
scaling); which buffer and which pairing of channels a layer uses is not guessed from names but observed on its keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from manthanquant.formats import DEFAULT_FORMAT

_INTERFACE = "manthanquant"
_OWNER = "_manthanquant_model"  # attribute of every module: the `Model` it belongs to
_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "wo")
_ROTARY_TOLERANCE = 1e-3
_PROBE_TOKENS = 64
_PROBE_POSITION = 61


class ModelError(ValueError):
    """A model that cannot be loaded or observed; the text says why and what to do instead."""


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention over one whole sequence.

    Attributes:
        layer: the layer's index.
        query, key, value: after the rotary embedding, fp32 `[heads or KV heads, T, D]`.
        scale: of the scores.
        window: how many newest tokens a query sees, itself included; None for all.
        soft_cap: scores s become `soft_cap * tanh(s / soft_cap)`; None for none.
        output_weight: the output projection, fp32 `[hidden, heads * D]`, or None where the layer has none we know.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    window: int | None
    soft_cap: float | None
    output_weight: Tensor | None

    def visible(self, first: int, last: int) -> tuple[int, Tensor]:
        """For queries `first` to `last`: the first key any of them sees, and which they see, bool `[queries, keys]`."""
        start = 0 if self.window is None else max(0, first - self.window + 1)
        device = self.query.device
        distance = torch.arange(first, last, device=device)[:, None] - torch.arange(start, last, device=device)
        seen = distance >= 0
        return start, seen if self.window is None else seen & (distance < self.window)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Queries `[KV heads, n, D]` and keys `[KV heads, m, D]` -> scores before the mask `[KV heads, n, m]`."""
        scores = (query * self.scale) @ key.transpose(1, 2)
        return scores if self.soft_cap is None else self.soft_cap * torch.tanh(scores / self.soft_cap)


Attention = Callable[[AttentionCall], Tensor]  # -> fp32 [heads, T, D]


def exact_attention(call: AttentionCall) -> Tensor:
    """What the model itself computes."""
    length = call.query.shape[1]
    if call.soft_cap is None and (call.window is None or call.window >= length):
        return nn.functional.scaled_dot_product_attention(
            call.query[None], call.key[None], call.value[None], is_causal=True, scale=call.scale, enable_gqa=True
        )[0]
    return torch.cat([output for _, _, output in attend(call)], 1)


def attend(call: AttentionCall, block: int = 256) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Exact attention in blocks of queries: `(query positions, probabilities, outputs)`.

    Probabilities are `[KV heads, group, queries, keys]` over the keys from the first visible to the block's last;
    outputs are `[heads, queries, D]`.
    """
    heads, length, size = call.query.shape
    kv_heads = call.key.shape[0]
    for first in range(0, length, block):
        last = min(first + block, length)
        start, seen = call.visible(first, last)
        query = call.query[:, first:last].reshape(kv_heads, -1, size)
        scores = call.scores(query, call.key[:, start:last]).view(kv_heads, heads // kv_heads, last - first, -1)
        probabilities = scores.masked_fill_(~seen, -math.inf).softmax(-1)
        output = probabilities.view(kv_heads, -1, last - start) @ call.value[:, start:last]
        yield range(first, last), probabilities, output.view(heads, last - first, size)


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of one layer: channel pairs `(first[i], second[i])` turn by `position * frequency[i]`.

    Attributes:
        first, second: int64 `[D / 2]`, channel indices; channels that do not turn are paired with frequency 0.
        frequency: fp64 `[D / 2]`, radians a position.

    All on the CPU; averages are taken there.
    """

    first: Tensor
    second: Tensor
    frequency: Tensor

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Vectors `[..., T, D]` turned by `positions` `[T]`, same dtype; negative positions turn back."""
        angle = positions.to(x.device, torch.float64)[:, None] * self.frequency.to(x.device)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., self.first], x[..., self.second]
        out = torch.empty_like(x)
        out[..., self.first], out[..., self.second] = a * cos - b * sin, b * cos + a * sin
        return out

    def _average_phase(self, frequency: Tensor, span: int) -> Tensor:
        """mean over t in 0..span-1 of exp(i t frequency), in closed form (a geometric sum)."""
        half = frequency / 2
        small = half.sin().abs() < 1e-12
        ratio = torch.where(small, 1.0, (span * half).sin() / (span * torch.where(small, 1.0, half.sin())))
        return torch.polar(ratio.abs(), half * (span - 1) + torch.where(ratio < 0, math.pi, 0.0))

    def average_vector(self, x: Tensor, span: int) -> Tensor:
        """mean over t in 0..span-1 of R(t) x, for fp64 `[..., D]`."""
        z = torch.complex(x[..., self.first], x[..., self.second]) * self._average_phase(self.frequency, span)
        out = torch.empty_like(x)
        out[..., self.first], out[..., self.second] = z.real, z.imag
        return out

    def average_moment(self, moment: Tensor, span: int) -> Tensor:
        """mean over t in 0..span-1 of R(t) S R(t)^T, for symmetric fp64 `[..., D, D]`.

        With z = x_first + i x_second, turning multiplies E[z z^H] by phases of frequency differences and E[z z^T] by
        phases of frequency sums.
        """
        order = torch.cat([self.first, self.second])
        count = len(self.first)
        aa, ab, ba, bb = (
            moment[..., rows[:, None], columns]
            for rows in (self.first, self.second)
            for columns in (self.first, self.second)
        )
        difference = self.frequency[:, None] - self.frequency
        total = self.frequency[:, None] + self.frequency
        hermitian = torch.complex(aa + bb, ba - ab) * self._average_phase(difference, span)
        plain = torch.complex(aa - bb, ba + ab) * self._average_phase(total, span)
        blocks = torch.empty_like(moment)
        blocks[..., :count, :count] = (hermitian.real + plain.real) / 2
        blocks[..., count:, count:] = (hermitian.real - plain.real) / 2
        blocks[..., count:, :count] = (hermitian.imag + plain.imag) / 2
        blocks[..., :count, count:] = (plain.imag - hermitian.imag) / 2
        back = order.argsort()
        return blocks[..., back[:, None], back]


def rotary_candidates(frequency: Tensor, head_size: int) -> tuple[Rotary, ...]:
    """The two ways in which models pair channels for `frequency` `[n]`: halves apart, and neighbours; and no turn."""
    turning = 2 * len(frequency)
    rest = torch.arange(turning, head_size)
    index, frequency = torch.arange(turning), frequency.double().cpu()
    padded = torch.cat([frequency, torch.zeros(len(rest) // 2, dtype=torch.float64)])
    pairs = ((index[: turning // 2], index[turning // 2 :]), (index[0::2], index[1::2]))
    turns = [Rotary(torch.cat([a, rest[0::2]]), torch.cat([b, rest[1::2]]), padded) for a, b in pairs]
    return (*turns, Rotary(turns[0].first, turns[0].second, torch.zeros_like(padded)))


class Model:
    """A causal language model and its tokenizer, fp32, with `attention` in place of its own.

    Raises:
        ModelError: transformers is missing, or the model cannot be loaded or does not let its attention be replaced.
    """

    def __init__(self, path: str | Path, device: str = "cpu") -> None:
        try:
            from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
            from transformers.utils import logging
        except ImportError as error:
            raise ModelError(f"transformers cannot be used ({error}): pip install 'manthanquant[quality]'") from error
        AttentionInterface.register(_INTERFACE, _dispatch)
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=_INTERFACE)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"model {str(path)!r} cannot be loaded for a quality run: {error}") from error
        finally:
            if shown:
                logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        self.module: Any = cast(nn.Module, module).to(device).eval()
        self.path = str(path)
        self.attention: Attention = exact_attention
        for layer in self.module.modules():
            setattr(layer, _OWNER, self)

    @property
    def layers(self) -> int:
        return int(self.module.config.get_text_config().num_hidden_layers)

    @property
    def head_size(self) -> int:
        config = self.module.config.get_text_config()
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def tokens(self, text: str) -> Tensor:
        """`text` as the tokenizer encodes a prompt, its own leading token included: int64 `[T]`."""
        return torch.tensor(self.tokenizer(text, verbose=False).input_ids)

    @contextmanager
    def replaced(self, attention: Attention) -> Iterator[None]:
        """Within the block, `attention` computes every layer's attention."""
        before, self.attention = self.attention, attention
        try:
            yield
        finally:
            self.attention = before

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """The last hidden states of one sequence: int64 `[T]` -> fp32 `[T, hidden]`."""
        position_ids = None if positions is None else positions[None].to(self.module.device)
        base = self.module.base_model
        return base(tokens[None].to(self.module.device), position_ids=position_ids, use_cache=False)[0][0]

    @torch.inference_mode()
    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Next-token log probabilities `[n, vocabulary]` of hidden states `[n, hidden]`."""
        logits = self.module.get_output_embeddings()(hidden).float()
        cap = getattr(self.module.config.get_text_config(), "final_logit_softcapping", None)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits.sub_(logits.logsumexp(-1, keepdim=True))

    def check_head(self) -> None:
        """Raises `ModelError` unless `log_probabilities` is what the model itself computes from its hidden states."""
        tokens = torch.arange(8)
        with torch.inference_mode():
            own = self.module(tokens[None], use_cache=False).logits[0].float().log_softmax(-1)
        ours = self.log_probabilities(self.hidden(tokens))
        if not torch.allclose(own, ours, atol=1e-3):
            raise ModelError(f"{type(self.module).__name__} changes its logits in a way this tool does not know")

    def rotaries(self, span: int) -> dict[int, Rotary]:
        """The rotary embedding of each layer for contexts of up to `span` tokens.

        Every token attends to itself only, so that nothing but the rotary embedding depends on positions; the keys at
        two positions then show which of the model's frequencies turned them.

        Raises:
            ModelError: no candidate explains a layer's keys.
        """
        keys: dict[int, list[Tensor]] = {}

        def keep(call: AttentionCall) -> Tensor:
            keys.setdefault(call.layer, []).append(call.key)
            return call.value.repeat_interleave(call.query.shape[0] // call.value.shape[0], 0)

        # The last token sits at the end of the span: models that scale by length then scale as they will in serving.
        tokens = torch.arange(_PROBE_TOKENS) % self.module.config.get_text_config().vocab_size
        probe = min(_PROBE_POSITION, span - 1)
        with self.replaced(keep):
            for position in (0, probe):
                positions = torch.full_like(tokens, position)
                positions[-1] = span - 1
                self.hidden(tokens, positions)
        frequencies = [
            buffer
            for name, buffer in self.module.named_buffers()
            if name.endswith("inv_freq") and "original" not in name
        ]
        return {
            layer: _observed_rotary(layer, still, turned, frequencies, probe) for layer, (still, turned) in keys.items()
        }


def _observed_rotary(layer: int, still: Tensor, turned: Tensor, frequencies: list[Tensor], position: int) -> Rotary:
    still, turned = still[:, :-1], turned[:, :-1]
    positions = torch.full((still.shape[1],), position)
    best, least = None, math.inf
    for frequency in frequencies or [torch.zeros(still.shape[-1] // 2)]:
        for candidate in rotary_candidates(frequency, still.shape[-1]):
            error = float((candidate.turn(still, positions) - turned).norm() / turned.norm())
            if error < least:
                best, least = candidate, error
    if best is None or least > _ROTARY_TOLERANCE:
        raise ModelError(
            f"layer {layer}: none of the model's rotary frequencies turns its keys (error {least:.1%}), so a "
            f"calibration would not hold at other positions; serve {DEFAULT_FORMAT} with the calibration off"
        )
    return best


def _dispatch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: `[1, heads, T, D]` in, `[1, T, heads, D]` out. The mask is always causal."""
    layer = getattr(module, "layer_idx", None)
    if layer is None or query.shape[0] != 1 or s_aux is not None or key.shape[-1] != value.shape[-1]:
        raise ModelError(f"{type(module).__name__} is not plain causal attention over keys and values: not supported")
    projection = next((getattr(module, name) for name in _OUTPUT_PROJECTIONS if hasattr(module, name)), None)
    call = AttentionCall(
        layer,
        query[0].float(),
        key[0].float(),
        value[0].float(),
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        sliding_window,
        softcap,
        projection.weight if isinstance(projection, nn.Linear) else None,
    )
    model = cast(Model, getattr(module, _OWNER))
    return model.attention(call).transpose(0, 1)[None].contiguous(), None
