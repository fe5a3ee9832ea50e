// Formats of weights, as variants.py numbers them, for all kernels that read codes; and what they have in common.
#pragma once
#include "base.cuh"

#define BF16 0
#define FP8 1  // E4M3, scales of rows or of 128 x 128 blocks
#define MXFP8 2
#define MXFP4 3
#define NVFP4 4
#define INT4 5

#define FOUR_BIT (FORMAT >= MXFP4)

DEVICE u32 word_of(const uint4 &q, int i) { return i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w; }

// Eight codes n of INT4 -> (n - 8) / 4 as pairs (n0, n4), (n1, n5), ...: 128 + n is a pattern of bits, and so is 2^-129 n, up to the
// exponent's lowest bit.
DEVICE void decode_int4(u32 w, u32 (&o)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        u32 mine = w >> (4 * i);
        o[i] = fma_pair(picked(mine, 0x000F000Fu, 0x43004300u), 0x3E803E80u, 0xC208C208u);  // / 4, - 34
        o[i + 1] = fma_pair(mine & 0x00F000F0u, 0x7F007F00u, 0xC000C000u);                  // 2^127, - 2
    }
}
