"""A GGUF file to a Hugging Face model directory (bf16 safetensors, tokenizer, chat template).

    python -m manthanquant.gguf MODEL.gguf OUT_DIR

Needs `transformers`, `gguf` and `accelerate`. The weights are dequantised: the result is as good as the GGUF's own
quantisation and no better.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def convert(gguf_path: str | Path, out_dir: str | Path) -> Path:
    """Write the model of `gguf_path` to `out_dir` and return it; a directory that is already complete is kept.

    The directory appears in one rename, so a converter that was killed leaves nothing that looks like a model.

    Raises:
        FileNotFoundError: there is no such GGUF file.
    """
    source, target = Path(gguf_path).resolve(), Path(out_dir)
    if not source.is_file():
        raise FileNotFoundError(f"no GGUF file at {source}")
    if (target / "config.json").is_file():
        return target

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    # transformers forgets whether a prompt starts with the BOS token; some models predict badly without it.
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, add_bos_token=_adds_bos(source))
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=source.name, dequantize=True),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(target)
    except OSError:
        if not (target / "config.json").is_file():  # else another process has just made the same
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _adds_bos(source: Path) -> bool:
    from gguf import GGUFReader

    field = GGUFReader(source).get_field("tokenizer.ggml.add_bos_token")
    return field is not None and bool(field.contents())


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    print(convert(*argv))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
