"""Which dense attention calls serve a batch of prefill chunks over packed prefixes, within a workspace of fixed size.

Pure functions of the batch's lengths, which an engine has on the CPU: planning waits for no GPU.

Requests whose visible prefix and chunk fit the workspace together share one causal call over [prefix | chunk] each. A
request too long for it takes one causal call over its chunk alone and one call for each block of its prefix, all of
which the chunk's queries see; those are merged by their sums of exponentials, as FlashAttention merges its own blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from manthanquant.formats import UNIT_TOKENS


@dataclass(frozen=True)
class Piece:
    """Tokens of one request that a call reads from the workspace.

    Attributes:
        request: its row of the block table.
        first, last: positions of the prefix's tokens, `last` excluded.
        length: of the request's whole prefix.
        row: of the workspace, where they begin.
        chunk_first, chunk_tokens: rows of the batch that follow them; none where `chunk_tokens` is 0.
    """

    request: int
    first: int
    last: int
    length: int
    row: int
    chunk_first: int = 0
    chunk_tokens: int = 0

    @property
    def rows(self) -> int:
        return self.last - self.first + self.chunk_tokens

    @property
    def tiles(self) -> int:
        """Units of the prefix, whole or not, and 16 tokens at a time of the chunk."""
        units = -(-self.last // UNIT_TOKENS) - self.first // UNIT_TOKENS if self.last > self.first else 0
        return units + -(-self.chunk_tokens // UNIT_TOKENS)


@dataclass(frozen=True)
class Call:
    """One dense attention call.

    Attributes:
        first_query: row of the batch where its queries begin.
        query_lens: of each request in it.
        pieces: of each request in it, in the workspace; empty where keys and values are the chunk's own rows.
        causal: the last query of a request sees its last key, the one before it one less, and so on.
        left: keys that a query sees before that one; None for all.
        merges: the queries have been answered over other keys by the calls before.
    """

    first_query: int
    query_lens: tuple[int, ...]
    pieces: tuple[Piece, ...]
    causal: bool
    left: int | None
    merges: bool = False

    @property
    def key_lens(self) -> tuple[int, ...]:
        return tuple(piece.rows for piece in self.pieces) or self.query_lens

    @property
    def queries(self) -> slice:
        return slice(self.first_query, self.first_query + sum(self.query_lens))


@dataclass(frozen=True)
class _Request:
    index: int
    first_query: int
    queries: int
    prefix: int
    visible: int  # newest tokens of the prefix that some query sees

    @property
    def rows(self) -> int:
        return self.visible + self.queries


def plan_calls(
    query_lens: Sequence[int], seq_lens: Sequence[int], window: int | None, workspace_tokens: int
) -> tuple[Call, ...]:
    """The calls that answer every query of a batch.

    Args:
        query_lens: tokens of each request's chunk; 0 is allowed and served by no call.
        seq_lens: tokens of each request, its chunk included.
        window: tokens that a query sees, itself included; None for all before it.
        workspace_tokens: tokens that one call may read from the workspace.

    Raises:
        ValueError: a length, the window or the workspace makes no sense; the text names it.
    """
    if workspace_tokens < UNIT_TOKENS or workspace_tokens % UNIT_TOKENS:
        raise ValueError(f"workspace_tokens: {workspace_tokens} is not a positive multiple of {UNIT_TOKENS}")
    if window is not None and window < 1:
        raise ValueError(f"window: {window} tokens: a query sees at least itself; None for no window")
    if len(query_lens) != len(seq_lens):
        raise ValueError(f"query_lens, seq_lens: {len(query_lens)} and {len(seq_lens)} requests")
    requests = []
    for index, (queries, length, end) in enumerate(zip(query_lens, seq_lens, accumulate(query_lens))):
        prefix = length - queries
        if queries < 0 or prefix < 0:
            raise ValueError(f"request {index}: a chunk of {queries} tokens in a sequence of {length}")
        if queries:
            visible = prefix if window is None else min(prefix, window - 1)
            requests.append(_Request(index, end - queries, queries, prefix, visible))
    return tuple(_calls(requests, window, workspace_tokens))


def _calls(requests: Sequence[_Request], window: int | None, workspace_tokens: int) -> Iterator[Call]:
    group: list[_Request] = []
    for request in requests:
        if group and sum(r.rows for r in (*group, request)) > workspace_tokens:
            yield from _together(group, window, workspace_tokens)
            group = []
        group.append(request)
    if group:
        yield from _together(group, window, workspace_tokens)


def _together(group: Sequence[_Request], window: int | None, workspace_tokens: int) -> Iterator[Call]:
    """Calls for requests that fit the workspace together, or for one that may not."""
    first_query, query_lens = group[0].first_query, tuple(r.queries for r in group)
    if any(r.visible for r in group) and sum(r.rows for r in group) <= workspace_tokens:
        starts = accumulate((r.rows for r in group), initial=0)
        pieces = tuple(
            Piece(r.index, r.prefix - r.visible, r.prefix, r.prefix, row, r.first_query, r.queries)
            for r, row in zip(group, starts)
        )
        yield Call(first_query, query_lens, pieces, True, _left(window, max(r.rows for r in group)))
        return
    yield Call(first_query, query_lens, (), True, _left(window, max(query_lens)))
    for request in group:
        yield from _blocks(request, window, workspace_tokens)


def _blocks(request: _Request, window: int | None, workspace_tokens: int) -> Iterator[Call]:
    """The visible prefix in equal blocks of whole units."""
    if not request.visible:
        return
    begin = request.prefix - request.visible
    count = -(-request.visible // workspace_tokens)
    size = -(-request.visible // (count * UNIT_TOKENS)) * UNIT_TOKENS
    for first in range(begin, request.prefix, size):
        last = min(first + size, request.prefix)
        queries, left = request.queries, None
        if window is not None:
            # Query i sees from token prefix + i - window + 1 on: only the first queries see any of the block, and those
            # see all of it or its end. FlashAttention counts `left` from the last query's last key.
            queries = min(queries, last - request.prefix + window - 1)
            if request.prefix + queries - window > first:
                left = last - request.prefix - queries + window - 1
        piece = Piece(request.index, first, last, request.prefix, 0)
        yield Call(request.first_query, (queries,), (piece,), False, left, merges=True)


def _left(window: int | None, keys: int) -> int | None:
    """Keys before its own that a query of a causal call sees, where that hides any of `keys`."""
    return None if window is None or window >= keys else window - 1
