import pytest
import torch

from manthanquant import formats, reference
from manthanquant.transform import default_transform
from manthanquant.vllm_plugin import sampling


@pytest.mark.parametrize("name", formats.PAGED_FORMATS)
def test_tokens_read_back_one_by_one_are_those_of_the_reference(name: str) -> None:
    fmt, head_size, page_tokens = formats.get_paged(name), 96, 32
    transform = default_transform(fmt, head_size)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(50, 2, head_size, generator=generator) for _ in range(2))
    cache = torch.zeros(4, 2, page_tokens, fmt.token_bytes(head_size), dtype=torch.uint8)
    pages = torch.tensor([2, 0])
    slots = pages[torch.arange(50) // page_tokens] * page_tokens + torch.arange(50) % page_tokens
    reference.store(key, value, cache, slots, fmt, transform)
    chosen = torch.tensor([0, 15, 16, 31, 32, 49])
    found = sampling.read_tokens(cache, slots[chosen], fmt, transform, head_size)
    for side, turn, stored in (("key", transform.key, found[0]), ("value", transform.value, found[1])):
        whole = turn.undo(reference.read(cache, pages, 50, fmt, side, head_size))  # type: ignore[arg-type]
        torch.testing.assert_close(stored, whole[chosen])
