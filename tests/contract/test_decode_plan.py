"""`csrc/decode_plan.cuh` on the CPU, 32 threads for a warp: every item of every pair is worked on exactly once."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from manthanquant import formats

CSRC = Path(formats.__file__).parent / "csrc"

# What the header needs of CUDA: collectives among threads that meet at a barrier.
STUB = r"""
#pragma once
#include <algorithm>
#include <barrier>
#include <cstdint>
#define __device__
#define __forceinline__ inline
using std::max;
using std::min;
inline thread_local struct { int x; } threadIdx;
inline std::barrier warp_barrier(32);
inline int exchange[32];
template <class Read>
auto collective(int value, Read read) {
    exchange[threadIdx.x] = value;
    warp_barrier.arrive_and_wait();
    auto result = read();
    warp_barrier.arrive_and_wait();
    return result;
}
inline int __shfl_sync(unsigned, int value, int lane) { return collective(value, [&] { return exchange[lane]; }); }
inline int __shfl_up_sync(unsigned, int value, int step) {
    return collective(value, [&] { return exchange[max(0, threadIdx.x - step)]; });
}
inline int __reduce_add_sync(unsigned, int value) {
    return collective(value, [] { int sum = 0; for (int x : exchange) sum += x; return sum; });
}
inline int __reduce_max_sync(unsigned, int value) {
    return collective(value, [] { return *std::max_element(exchange, exchange + 32); });
}
inline unsigned __ballot_sync(unsigned, bool value) {
    return collective(value, [] {
        unsigned bits = 0;
        for (int lane = 0; lane < 32; ++lane) bits |= exchange[lane] << lane;
        return bits;
    });
}
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
template <class T>
T __ldg(const T* p) { return *p; }
namespace mq { constexpr unsigned kFullWarp = 0xffffffffu; }
"""

PROGRAM = r"""
#include <cstdio>
#include <thread>
#include <vector>
#include "decode_plan.cuh"

template <bool kHasExact>
void print_plan(const mq::DecodeParams& params, int teams, int team_warps) {
    for (int team = 0; team < teams; ++team) {
        mq::Work<kHasExact> work(params, team, teams, team_warps);
        for (; !work.done(); work.next(params)) {
            if (threadIdx.x != 0) continue;
            const mq::Segment s = work.segment;
            const mq::Span span = mq::request_span<kHasExact>(params, s.request);
            const mq::Split split = mq::split_of(params, s, span.items(), work.stretch, team);
            const int exact_part = split.part_of(span.coded_blocks, work.stretch);
            std::printf("%d %d %d %d %d %d %d %d %d %d %d\n", team, s.request, s.head, s.row_tile, s.begin, s.end,
                        span.items(), split.parts, split.slot, split.slot - split.first_slot,
                        span.exact_units() > 0 && s.end > span.coded_blocks ? exact_part : -1);
        }
    }
}

// Requests' lengths and new tokens on stdin; arguments: exact, KV heads, row tiles, teams, team warps, window, sink
// units, recent tokens. A row tile is one new token.
int main(int, char** argv) {
    std::vector<int> lengths, starts{0};
    for (int length, tokens; std::scanf("%d %d", &length, &tokens) == 2;)
        lengths.push_back(length), starts.push_back(starts.back() + tokens);
    mq::DecodeParams params{};
    params.seq_lens = lengths.data(), params.query_start_loc = starts.data(), params.requests = lengths.size();
    params.kv_heads = std::atoi(argv[2]), params.row_tiles = params.query_tokens = std::atoi(argv[3]);
    params.group = params.tile_rows = 1;
    params.window = std::atoi(argv[6]), params.sink_units = std::atoi(argv[7]);
    params.recent_tokens = std::atoi(argv[8]);
    std::vector<std::thread> lanes;
    for (int lane = 0; lane < 32; ++lane)
        lanes.emplace_back([&, lane] {
            threadIdx.x = lane;
            const int teams = std::atoi(argv[4]), team_warps = std::atoi(argv[5]);
            if (std::atoi(argv[1])) print_plan<true>(params, teams, team_warps);
            else print_plan<false>(params, teams, team_warps);
        });
    for (auto& lane : lanes) lane.join();
}
"""


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    directory = tmp_path_factory.mktemp("plan")
    for name in ("decode_plan.cuh", "decode_params.h", "layout.h"):
        shutil.copy(CSRC / name, directory)
    (directory / "ptx.cuh").write_text(STUB)
    (directory / "main.cpp").write_text(PROGRAM)
    command = ["g++", "-std=c++20", "-O1", "-pthread", "-include", "cstdlib", "main.cpp", "-o", "plan"]
    subprocess.run(command, cwd=directory, check=True)
    return directory / "plan"


CASES = [
    # exact, KV heads, row tiles, teams, team warps, window, sink units, recent tokens; lengths
    ((0, 8, 1, 264, 8, 0, 0, 0), [16384] * 8),
    ((0, 8, 1, 264, 8, 0, 0, 0), [131072]),
    ((0, 8, 1, 528, 4, 0, 0, 0), [2048] * 40),
    ((0, 1, 1, 264, 8, 0, 0, 0), [1]),
    ((0, 2, 3, 60, 4, 500, 0, 0), [0, 7, 0, 5000, 64, 65, 0]),
    ((1, 8, 1, 264, 8, 0, 1, 128), [32768] * 8),  # each pair cut from its own beginning
    ((1, 8, 1, 264, 8, 0, 1, 128), [16384] * 32),  # whole pairs
    ((1, 8, 1, 264, 8, 0, 1, 128), [131072, 300, 1, 17]),
    ((1, 2, 1, 40, 4, 700, 2, 50), [0, 1, 15, 16, 17, 3000]),
]


def random_cases(count: int):
    rng = random.Random(0)
    for _ in range(count):
        exact = rng.random() < 0.6
        arguments = (
            int(exact),
            rng.choice([1, 2, 8]),
            rng.choice([1, 1, 2]),
            rng.choice([8, 60, 264]),
            rng.choice([2, 4, 8]),
            rng.choice([0, 0, rng.randint(1, 3000)]),
            rng.choice([0, 1, 3]) if exact else 0,
            rng.choice([0, 50, 128, 512]) if exact else 0,
        )
        yield arguments, [rng.randint(0, rng.choice([50, 5000, 40000])) for _ in range(rng.randint(1, 70))]


@pytest.mark.parametrize(("arguments", "lengths"), [*CASES, *random_cases(12)])
@pytest.mark.parametrize("ragged", [False, True])
def test_every_item_once(planner: Path, arguments: tuple[int, ...], lengths: list[int], ragged: bool) -> None:
    kv_heads, row_tiles = arguments[1:3]
    rng = random.Random(len(lengths))
    new = [rng.randint(0, row_tiles) if ragged else row_tiles for _ in lengths]
    done = subprocess.run(
        [planner, *map(str, arguments)],
        input=" ".join(f"{length} {tokens}" for length, tokens in zip(lengths, new)),
        capture_output=True,
        text=True,
        check=True,
    )
    pairs: dict[tuple[int, int, int], list[tuple[int, ...]]] = defaultdict(list)
    slots = []
    for line in done.stdout.splitlines():
        _team, request, head, tile, *rest = map(int, line.split())
        pairs[request, head, tile].append(tuple(rest))
        slots.append(rest[4])
    assert len(pairs) == kv_heads * sum(new), "a pair was left out"
    assert len(set(slots)) == len(slots), "two parts share a slot"
    for parts in pairs.values():
        parts.sort()
        begins, ends = [p[0] for p in parts], [p[1] for p in parts]
        assert [0, *ends] == [*begins, parts[0][2]], "items are missing or worked on twice"
        assert all(p[3] == len(parts) for p in parts), "the parts disagree on how many they are"
        assert [p[5] for p in parts] == list(range(len(parts))), "slots are not consecutive"
        exact = [i for i, p in enumerate(parts) if p[6] >= 0]
        assert all(parts[i][6] == exact[0] for i in exact), "the first part with exact units is another one"
