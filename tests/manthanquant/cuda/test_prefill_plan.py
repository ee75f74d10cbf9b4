"""The plan of dense calls: every query meets every token that it sees exactly once, within the workspace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manthanquant.cuda.prefill_plan import plan_calls


@given(
    requests=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 150)), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 120),
    workspace=st.integers(1, 8).map(lambda units: 16 * units),
)
def test_every_visible_pair_once(requests: list[tuple[int, int]], window: int | None, workspace: int) -> None:
    query_lens = [queries for queries, _ in requests]
    prefixes = [prefix for _, prefix in requests]
    owner = [(index, i) for index, count in enumerate(query_lens) for i in range(count)]
    met: dict[tuple[int, int], list[int]] = {pair: [] for pair in owner}
    answered: set[tuple[int, int]] = set()
    calls = plan_calls(query_lens, [q + p for q, p in requests], window, workspace)
    for call in calls:
        assert sum(piece.rows for piece in call.pieces) <= workspace
        assert [piece.row for piece in call.pieces] == [
            sum(p.rows for p in call.pieces[:i]) for i in range(len(call.pieces))
        ]
        first = call.first_query
        for place, count in enumerate(call.query_lens):
            request, start = owner[first]
            assert start == 0
            if call.pieces:
                piece = call.pieces[place]
                assert piece.request == request and piece.length == prefixes[request]
                assert piece.chunk_tokens == 0 or (piece.chunk_first, piece.chunk_tokens) == (first, count)
                keys = [*range(piece.first, piece.last)]
                keys += [piece.length + i for i in range(piece.chunk_tokens)]
            else:
                keys = [prefixes[request] + i for i in range(count)]
            for i in range(count):
                last = len(keys) - count + i  # FlashAttention's: a request's last query and last key are aligned
                for j, key in enumerate(keys):
                    hidden = (call.causal and j > last) or (call.left is not None and j < last - call.left)
                    if not hidden:
                        met[request, i].append(key)
                assert call.merges == ((request, i) in answered)
                answered.add((request, i))
            first += count
    for (request, i), keys in met.items():
        position = prefixes[request] + i
        seen = range(0 if window is None else max(0, position - window + 1), position + 1)
        assert sorted(keys) == list(seen)


def test_what_fits_is_one_call() -> None:
    (call,) = plan_calls([5, 16, 0, 3], [100, 16, 9, 20], None, 256)
    assert [(p.request, p.first, p.last, p.chunk_tokens) for p in call.pieces] == [
        (0, 0, 95, 5),
        (1, 0, 0, 16),
        (3, 0, 17, 3),
    ]
    assert call.causal and call.left is None and call.queries == slice(0, 24)


def test_without_a_prefix_nothing_is_copied() -> None:
    (call,) = plan_calls([500, 200], [500, 200], None, 16)[:1]
    assert call.pieces == () and call.key_lens == (500,)


def test_a_window_reads_only_what_it_shows() -> None:
    (call,) = plan_calls([64], [100_000], 128, 1024)
    (piece,) = call.pieces
    assert (piece.first, piece.last, call.left) == (99_936 - 127, 99_936, 127)


def test_blocks_are_equal_units() -> None:
    own, *blocks = plan_calls([64], [64 + 1000], None, 512)
    assert own.pieces == () and not own.merges
    assert [(b.pieces[0].first, b.pieces[0].last) for b in blocks] == [(0, 512), (512, 1000)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([4], [3], None, 64), "request 0: a chunk of 4 tokens in a sequence of 3"),
        (([4], [5, 6], None, 64), "query_lens, seq_lens: 1 and 2 requests"),
        (([4], [5], 0, 64), "window: 0 tokens"),
        (([4], [5], None, 40), "workspace_tokens: 40 is not a positive multiple of 16"),
    ],
)
def test_bad_lengths_are_named(arguments: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan_calls(*arguments)
