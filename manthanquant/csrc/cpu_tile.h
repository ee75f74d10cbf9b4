// Tiles: a block of units decoded to integer levels, and exact integer products with them.
//
// A block is decoded once and serves every query row. Queries and attention weights become integers (so only they are
// rounded: by 2^-15 of the largest of a row), levels are integers already, and no product or sum overflows 32 bits. Two
// implementations have the same four types:
//
//   Queries<Side, kRows>   set(row, fp32 query): the row's integers and the scale of each class of channels.
//   KeyTile<Side>          decode(unit, codes); scores<kRows>(units, queries, row, key scales, scores).
//   Weights<kRows>         set(row, units, fp32 weights): the row's integers and their scale.
//   ValueTile<Side>        decode(unit, codes); accumulate<kRows>(class, units, weights, row, output).
#pragma once

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#include "cpu_tile_avx512.h"
#else
#include "cpu_tile_portable.h"
#endif
