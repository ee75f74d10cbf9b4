"""Random models of a few thousand weights with a byte tokenizer, saved as transformers loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_model(path: Path, family: str = "llama", seed: int = 0, **settings: Any) -> Path:
    """Saves a random `llama` or `gemma3_text` model with heads of 64 channels, two query heads a KV head."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 256,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**config, **settings}))
    for name, weight in module.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            torch.nn.init.normal_(weight, std=0.3)  # sharp attention, so that errors of keys show
            weight.data *= torch.logspace(-1, 0, weight.shape[0])[torch.randperm(weight.shape[0]), None]
    module.save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path
