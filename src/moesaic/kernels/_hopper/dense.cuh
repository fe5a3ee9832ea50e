// What kernels for dense products have in common: weights go from memory straight to registers, where they are decoded. K is
// taken in units of 128 elements, and may be shared out to thread blocks (parts), and within one to warps or groups of them
// (shares).
//
// Of a unit, a lane has chunks of 16 bytes of rows lane / 4 and lane / 4 + 8 of each block of 16, and the same elements of a
// row of x, of which four lanes have a unit: which elements of K are multiplied together is free, as long as both sides agree.
//
// FP8 meets E4M3 rows, with scales of blocks (BLOCKS) or of whole rows; all else rows of BF16 numbers. So do weights in BF16, which
// are multiplied as they are, and INT4 in groups of 128, whose scales, BF16 or halves (HALF_SCALES), multiply the sums of a unit.
// HEIGHT rows of x at most, STACK blocks of 16 rows of w for a warp; a thread block has ROWS rows of w, BLOCK_THREADS, and RESERVED
// bytes in front of rows of x, of which those at ROW_SCALES hold scales of whole rows.
#pragma once
#include "formats.cuh"

#define CHUNKS (FORMAT == BF16 ? 4 : FOUR_BIT ? 1 : 2)     /* of 16 bytes that a lane has of a weight row's unit */
#define PIECES (FOUR_BIT ? 4 : FORMAT == MXFP8 ? 2 : 1)    /* of 16 bytes of x that belong to one */
#define W_UNIT (64 * CHUNKS)
#define X_UNIT (64 * CHUNKS * PIECES)
#define STEPS (FOUR_BIT ? 2 : 1) /* of 16 elements of K that a word of codes, and others' of its row, are */
#define APART (BLOCKS || FORMAT == INT4) /* a unit has sums of its own */
#define LIFT (FORMAT == BF16 ? 1.0f : FORMAT == INT4 ? 4.0f : FORMAT == FP8 ? FP8_LIFT : FORMAT == MXFP8 ? 0x1p60f : 0x1p63f) /* by which a sum of products is too small */

// As dense.py packs them.
struct Dense {
    const u8 *x;
    const float *x_scales;
    const u8 *w, *w_scales;
    const float *top;
    const int *coarse;
    const u16 *bias;
    void *y;
    i64 x_stride, w_stride, scale_stride;  // bytes
    int scale_row, scale_group;            // of x_scales, elements; 0: one for all
    int rows, columns, units, per_part, parts;
    int chunks;  // of 32 elements of BF16 weights, which may end within a unit
};

struct Unit {
    uint4 codes[STACK][2][CHUNKS];
    u32 scales[STACK][2];
};

extern __shared__ __align__(1024) u8 memory[];
static_assert(ROW_SCALES + 4 * HEIGHT <= RESERVED, "scales of rows have no room");

// Four E4M3 codes -> halves (b0, b2), (b1, b3), 2^-8 times their values.
DEVICE void halves_of(u32 w, u32 &low, u32 &high) {
    u32 up = w << 8;
    low = picked(up >> 1, 0x3F803F80u, up & 0x80008000u);
    high = picked(w >> 1, 0x3F803F80u, w & 0x80008000u);
}

// Four E4M3 codes -> BF16 (b0, b2), (b1, b3), 2^-120 times their values.
DEVICE void bf16_of(u32 w, u32 &low, u32 &high) {
    u32 up = w << 8;
    low = picked(up >> 4, 0x07F007F0u, up & 0x80008000u);
    high = picked(w >> 4, 0x07F007F0u, w & 0x80008000u);
}

// Eight E2M1 codes -> BF16 (n0, n4), (n1, n5), (n2, n6), (n3, n7), 2^-126 times their values: a multiplication moves the sign and
// the rest each to its place.
DEVICE void e2m1_of(u32 w, u32 (&o)[4]) {
    u32 upper = w >> 8;
    o[0] = (w & 0x000F000Fu) * 0x1040u & 0x81C081C0u;
    o[1] = (w & 0x00F000F0u) * 0x104u & 0x81C081C0u;
    o[2] = (upper & 0x000F000Fu) * 0x1040u & 0x81C081C0u;
    o[3] = (upper & 0x00F000F0u) * 0x104u & 0x81C081C0u;
}

// Two scales of NVFP4, times LIFT: see decode.cuh.
DEVICE u32 nvfp4_scales(u32 codes) { return mul_pair(mul_pair(__byte_perm(codes & 0x7F7Fu, 0, 0x4140) << 4, 0x7B807B80u), 0x5F005F00u); }

// A scale of a word of codes, as an operand.
DEVICE u32 scale_of(u32 scales, int chunk, int word) {
    if (FORMAT == NVFP4) return __byte_perm(nvfp4_scales(scales), 0, word < 2 ? 0x1010 : 0x3232);
    return ((scales >> (FORMAT == MXFP8 ? 16 * chunk : 0) & 255) + (FORMAT == MXFP8 ? 60 : 63)) * 0x00800080u;
}

// Words of codes -> operands of STEPS products, in pairs of 16-bit numbers.
DEVICE void operands_of(u32 codes, u32 scales, int chunk, int word, u32 (&o)[2 * STEPS]) {
#if FORMAT == FP8
    halves_of(codes, o[0], o[1]);
#elif FORMAT == INT4
    decode_int4(codes, o);
#elif FORMAT != BF16
#if FORMAT == MXFP8
    bf16_of(codes, o[0], o[1]);
#else
    e2m1_of(codes, o);
#endif
#pragma unroll
    for (int i = 0; i < 2 * STEPS; i++) o[i] = mul_pair(o[i], scale_of(scales, chunk, word));
#endif
}

// first: row of w.
DEVICE void load(Unit &to, const Dense &a, int first, int unit, int lane) {
#pragma unroll
    for (int m = 0; m < STACK; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = first + 16 * m + 8 * r + lane / 4;
            row = row < a.columns ? row : a.columns - 1;
            const u8 *from = a.w + row * a.w_stride + (i64)unit * W_UNIT + lane % 4 * 16;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) to.codes[m][r][c] = FORMAT != BF16 || unit * CHUNKS + c < a.chunks ? *(const uint4 *)(from + 64 * c) : make_uint4(0, 0, 0, 0);
            if (FORMAT == BF16 || (FORMAT == FP8 && !BLOCKS)) continue;
            const u8 *scales = a.w_scales + (FORMAT == FP8 ? a.coarse[row] : row) * a.scale_stride;
            if (FORMAT == FP8)
                to.scales[m][r] = __float_as_uint(((const float *)scales)[unit]);
            else if (FORMAT == INT4)
                to.scales[m][r] = __float_as_uint(HALF_SCALES ? half_value(((const u16 *)scales)[unit]) : bf16_low(((const u16 *)scales)[unit]));
            else if (FORMAT == NVFP4)
                to.scales[m][r] = ((const u16 *)scales)[unit * 4 + lane % 4];
            else if (FORMAT == MXFP4)
                to.scales[m][r] = scales[unit * 4 + lane % 4];
            else
                to.scales[m][r] = ((const u32 *)scales)[unit] >> (lane % 4 / 2 * 8);
        }
}

// What is applied to the results of four rows of w, which are a thread's own: scales, and what is added.
struct Ends {
    float scale[4], bias[4];
    DEVICE_MEMBER Ends(const Dense &a, int first, bool biased) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = first + j < a.columns ? first + j : a.columns - 1;
            scale[j] = LIFT, bias[j] = biased ? bf16_low(a.bias[row]) : 0.0f;
            if (FORMAT == NVFP4) scale[j] *= a.top[a.coarse[row]];
            if (FORMAT == FP8 && !BLOCKS) scale[j] *= *(const float *)(a.w_scales + (a.coarse ? a.coarse[row] : row) * a.scale_stride);
        }
    }
};

// The sums of SHARES parts of K, [share, HEIGHT, ROWS + 4], are added up in their order. upper: the first of `rows` rows of x.
DEVICE void add_up(const Dense &a, const Ends &ends, int tile, int part, int upper, int rows, int thread) {
    constexpr int STRIDE = ROWS + 4;
    const float *all = (const float *)(memory + RESERVED);
    for (int i = thread; i < rows * (ROWS / 4); i += BLOCK_THREADS) {
        int row = i / (ROWS / 4), first = i % (ROWS / 4) * 4;
        float sums[4] = {}, of_x = BLOCKS || !a.x_scales ? 1.0f : ((const float *)(memory + ROW_SCALES))[row];
#pragma unroll
        for (int w = 0; w < SHARES; w++) {
            float4 mine = *(const float4 *)(all + (w * HEIGHT + row) * STRIDE + first);
            sums[0] += mine.x, sums[1] += mine.y, sums[2] += mine.z, sums[3] += mine.w;
        }
        int column = tile * ROWS + first;
        i64 at = ((i64)part * a.rows + upper + row) * a.columns + column;
#pragma unroll
        for (int j = 0; j < 4; j++) sums[j] = sums[j] * ends.scale[j] * of_x + ends.bias[j];
        if (a.columns % 4 == 0 && column < a.columns) {
            if (a.parts > 1)
                *(float4 *)((float *)a.y + at) = make_float4(sums[0], sums[1], sums[2], sums[3]);
            else
                *(uint2 *)((u16 *)a.y + at) = make_uint2(bf16_pair(sums[0], sums[1]), bf16_pair(sums[2], sums[3]));
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (column + j >= a.columns) break;
                if (a.parts > 1)
                    ((float *)a.y)[at + j] = sums[j];
                else
                    ((u16 *)a.y)[at + j] = (u16)bf16_pair(sums[j], 0.0f);
            }
        }
    }
}
