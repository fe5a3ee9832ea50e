// Codes of weights -> operands of the tensor core, in registers; and the order of K that this makes.
//
// Of a product over K, a thread holds certain elements of two weight rows and, or others do, the same elements of x. Which
// ones is free, as long as both sides agree: so a thread takes what lies together in memory, and x is stored in the order
// that this gives (`element_at`), within blocks of MAP_BLOCK elements.
//
// FP4 and E4M3 codes become BF16 by moving their bits, which gives a number too small by a power of two (exact: the
// multipliers know subnormals); half of that power goes into the block's scale, half into the sum. Bits of such codes are
// put in order when weights are loaded (pack.py), so that few instructions move many. NVFP4 and FP8 with rows of their own
// fit IEEE halves as well (HALVES): a 4-bit code and its sign are one byte there, and E4M3 is converted by the hardware.
#pragma once
#include "formats.cuh"

// NARROW: products by warps, of few rows of x; else by groups of four
#define W_ROW (FOUR_BIT && !NARROW ? 64 : 128) /* bytes of a weight row per stage; where x takes most of the room, fewer */
#define ELEMENTS (FORMAT == BF16 ? 64 : FOUR_BIT ? 2 * W_ROW : 128) /* of K per stage */
#define DECODED !(FORMAT == BF16 || (FORMAT == FP8 && ROWS8))
#define ROW_BYTES (ROWS8 ? 1 : 2)
#define X_ROW (ELEMENTS * ROW_BYTES) /* bytes of a row of x per stage */
#define PIECES (X_ROW / 128)
// LIFT: by which a sum of products is too small.
#if FORMAT == INT4
#define LIFT (!ROWS8 ? 4.0f : ZIGZAG ? 0x1p8f : 0x1p9f)
#elif FORMAT == MXFP4 || FORMAT == NVFP4
#define LIFT (HALVES ? 0x1p7f : 0x1p63f)
#else
#define LIFT (FORMAT == BF16 || HALVES || ROWS8 ? 1.0f : 0x1p60f)
#endif

#define MAP_BLOCK (!DECODED || (NARROW && FORMAT == FP8 && HALVES) ? 1 : NARROW ? (FOUR_BIT ? 8 : 4) : FORMAT == INT4 ? 32 : FOUR_BIT ? 128 : 64)

// The element of K at position p of a stored row of x, p below MAP_BLOCK.
DEVICE int element_at(int p) {
    if (MAP_BLOCK == 1) return p;
    if (NARROW) return FOUR_BIT ? p / 2 + p % 2 * 4 : p / 2 + p % 2 * 2;  // as the decoders below pair them
    if (FORMAT == INT4 && ROWS8) return p % 16 / 4 * 8 + p % 4 * 2 + p / 16;
    int step = p / 16, lane = p % 8 / 2, i = p % 16 / 8 * 2 + p % 2;
    if (FORMAT == INT4) return lane * 8 + step * 2 + i / 2 + i % 2 * 4;
    if (FOUR_BIT) return lane * 32 + step / 2 * 8 + step % 2 * 2 + i / 2 + i % 2 * 4;
    return lane * 16 + step * 4 + i / 2 + i % 2 * 2;
}

DEVICE u32 rotated(u32 w, int right) { return __funnelshift_r(w, w, right); }

// Eight E2M1 codes, in the order of bits that pack.py gives them -> pairs (n0, n4), (n1, n5), (n2, n6), (n3, n7), 2^-126 times
// their values: a sign, and three bits across the exponent's lowest one.
DEVICE void decode_e2m1(u32 w, u32 (&o)[4]) {
    o[0] = (w & 0x80C080C0u) | (rotated(w, 8) & 0x01000100u);
    o[1] = rotated(w, 2) & 0x81C081C0u;
    o[2] = rotated(w, 12) & 0x81C081C0u;
    o[3] = rotated(w, 6) & 0x81C081C0u;
}

// The same in halves, from another such order, 2^-14 times their values.
DEVICE void decode_e2m1_halves(u32 w, u32 (&o)[4]) {
    u32 even = w & 0x8E8E8E8Eu, odd = ((w << 7) & 0x80808080u) | ((w >> 3) & 0x0E0E0E0Eu);
    o[0] = __byte_perm(even, 0, 0x2404), o[2] = even & 0xFF00FF00u;
    o[1] = __byte_perm(odd, 0, 0x2404), o[3] = odd & 0xFF00FF00u;
}

// Four E4M3 codes, whose bits have an order of their own, too -> pairs (b0, b2), (b1, b3), 2^-120 times their values.
DEVICE void decode_e4m3(u32 w, u32 &low, u32 &high) {
    low = w & 0x87F087F0u;
    high = (rotated(w, 4) & 0x80808080u) | (rotated(w, 8) & 0x07700770u);
}

// The codes n in the low halves of four bytes -> E4M3 codes of 2^-9 (n - 8): up to 8, a code is a number of such steps.
DEVICE u32 decode_int4_e4m3(u32 w) {
    u32 below = ~w & 0x08080808u, one = below >> 3;  // n < 8: magnitude 8 - n = (n ^ 7) + 1, and the sign
    return ((w & 0x07070707u) ^ (below - one)) + one * 0x81u;
}

// The same of zigzag codes (2 v of v >= 0, -2 v - 1 below) -> E4M3 codes of 2^-8 v: up to 16, too, such a code is a number of
// steps. Of a negative v, -2 (v + 1) is there already; two steps and the sign are lacking.
DEVICE u32 decode_zigzag(u32 w) { return (w & 0x01010101u) * 0x82u + (w & 0x0E0E0E0Eu); }

// Two scales of NVFP4 as operands, times LIFT. Bits of E4M3 where wider numbers have theirs, without the sign, which at most a
// zero has: a power of two times their values.
DEVICE u32 scale_pair(u32 codes) {
    u32 apart = __byte_perm(codes & 0x7F7Fu, 0, 0x4140);
    if (HALVES) return mul_halves(apart << 7, 0x78007800u);           // 2^-8 is there: 2^15
    return mul_pair(mul_pair(apart << 4, 0x7B807B80u), 0x5F005F00u);  // 2^-120 is there: 2^120, 2^63
}

#define STEPS (FOUR_BIT && !ROWS8 ? 2 : 1) /* products per word of codes */

// A word of codes of each of two rows -> operands of STEPS products, four registers each.
DEVICE void decode_words(u32 upper, u32 lower, u32 upper_scale, u32 lower_scale, u32 (&a)[4 * STEPS]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        u32 word = r ? lower : upper, scale = r ? lower_scale : upper_scale, o[4];
#if FORMAT == INT4 && ROWS8
        o[0] = ZIGZAG ? decode_zigzag(word) : decode_int4_e4m3(word), o[1] = ZIGZAG ? decode_zigzag(word >> 4) : decode_int4_e4m3(word >> 4);
#elif FORMAT == INT4
        decode_int4(word, o);
#elif HALVES && FORMAT == NVFP4
        decode_e2m1_halves(word, o);
#elif FOUR_BIT
        decode_e2m1(word, o);
#elif FORMAT == FP8 && HALVES
        o[0] = e4m3_halves(word & 0xFFFF), o[1] = e4m3_halves(word >> 16);
#else
        decode_e4m3(word, o[0], o[1]);
#endif
#pragma unroll
        for (int i = 0; i < 2 * STEPS; i++) a[i / 2 * 4 + i % 2 * 2 + r] = FORMAT == INT4 || (FORMAT == FP8 && HALVES) ? o[i] : HALVES ? mul_halves(o[i], scale) : mul_pair(o[i], scale);
    }
}
