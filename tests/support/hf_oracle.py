"""The model in transformers, its attention over the cache as our format would have it: the oracle of the engine tests.

All tokens run in one pass, teacher-forced. What a query reads exactly and what from codes follows from how the engine
ran: the prompt in chunks, then one token a step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manthanquant.formats import SIDES, UNIT_TOKENS, Format, Side
from manthanquant.quantize import dequantize, quantize
from manthanquant.transform import LayerTransform, default_transform


class Pairs(NamedTuple):
    """bool `[length, length]`, query by token: read from the step's own tensors; read from the exact tier (bf16)."""

    own: Tensor
    hot: Tensor


def pairs(length: int, prompt: int, chunk: int, sink_tokens: int, recent_tokens: int) -> Pairs:
    """What each query reads exactly. Everything else it reads from codes.

    A chunk of the prompt reads itself exactly, and before it the units that are sinks or in the window at its start. A
    token after the prompt reads itself from the exact tier too, where the window ends with it.
    """
    own, hot = (torch.zeros(length, length, dtype=torch.bool) for _ in range(2))
    unit = torch.arange(length) // UNIT_TOKENS
    for i in range(length):
        start = i // chunk * chunk if i < prompt else i + 1
        above = max(0, start - recent_tokens) // UNIT_TOKENS if recent_tokens > 0 else length
        hot[i] = (unit < -(-sink_tokens // UNIT_TOKENS)) | (unit >= above)
        own[i, start:] = i < prompt
    return Pairs(own, hot & ~own)


def stored(x: Tensor, side: Side, fmt: Format, transform: LayerTransform) -> Tensor:
    """`[T, KV heads, D]` coded and decoded, fp32."""
    turn = getattr(transform, side)
    coded = quantize(turn.apply(x), fmt, side)
    return turn.undo(dequantize(coded.codes, coded.scale_bytes, fmt, side))


class Oracle:
    """A model and, if `fmt` is given, its cache in that format.

    `layers` are the transforms by layer index, Hadamard where absent; `skip` are the layers left exact.
    """

    def __init__(
        self,
        path: Path,
        fmt: Format | None,
        layers: dict[int, LayerTransform] | None = None,
        skip: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        self.fmt, self.layers, self.skip = fmt, layers or {}, skip
        AttentionInterface.register("manthanquant_oracle", self._attention)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="manthanquant_oracle")

    def logprobs(self, ids: list[int], read: Pairs) -> Tensor:
        """Logprob of each token of `ids` from the second on, given those before it, fp32 `[len(ids) - 1]`."""
        self.read = read
        with torch.inference_mode():
            logits = self.model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    def _attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **more: Any
    ) -> tuple[Tensor, None]:
        kv_heads, length, size = key.shape[1:]
        index, window = module.layer_idx, getattr(module, "sliding_window", None)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        hidden = (distance < 0) | (distance >= (window or length))
        q = query[0].float().view(kv_heads, -1, length, size)
        sources = [(~hidden, key[0].float(), value[0].float())]
        if self.fmt is not None and index not in self.skip:
            transform = self.layers.get(index) or default_transform(self.fmt, size)
            coded = [
                stored(x[0].transpose(0, 1), side, self.fmt, transform).transpose(0, 1)
                for side, x in zip(SIDES, (key, value))
            ]
            own, hot = self.read
            sources = [
                (own, key[0].float(), value[0].float()),
                (hot, key[0].bfloat16().float(), value[0].bfloat16().float()),
                (~own & ~hot, coded[0], coded[1]),
            ]
        score = torch.zeros(*q.shape[:3], length)
        for where, k, _ in sources:
            score += torch.einsum("hgid,hjd->hgij", q, k) * where
        weight = (score * scaling).masked_fill(hidden, -torch.inf).softmax(-1)
        out = torch.zeros_like(q)
        for where, _, v in sources:
            out += torch.einsum("hgij,hjd->hgid", weight * where, v)
        return out.reshape(1, -1, length, size).transpose(1, 2).to(query.dtype), None
