// Formats of weights, as variants.py numbers them, for all kernels that read codes.
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
