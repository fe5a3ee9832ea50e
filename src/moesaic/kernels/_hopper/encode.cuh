// Rows into an encoding, bit for bit as `formats/encodings` has it, and into the order of K that products want.
//
// A warp encodes 64 or 128 neighbouring elements of a row at a time, two or four per lane. What multiplies in BF16 is kept as
// the BF16 numbers that its codes and block scales stand for (exact); E4M3 codes as they are.
#pragma once
#include "decode.cuh"

// Encodings, as variants.py numbers them.
#define PLAIN 0
#define TENSOR 1          // E4M3, one scale that is given
#define TENSOR_DYNAMIC 2  // ... that spans all rows
#define TOKEN 3           // ... of each row
#define GROUP128 4        // ... of each 128 elements
#define MX8 5
#define NV4 6          // one global scale that is given
#define NV4_DYNAMIC 7  // ... of each row

#define CODES8 (ENCODING >= TENSOR && ENCODING <= GROUP128) /* rows that come encoded hold E4M3 codes */

// The scale of a row needs the whole row (or all rows) first.
#define BY_ROW (ENCODING == TENSOR_DYNAMIC || ENCODING == TOKEN || ENCODING == NV4_DYNAMIC)

// To nearest, ties to the even code, saturating; NaN gives 0. Codes are 0.5 apart below 2, then 1, from 4 on 2: adding and
// subtracting 2^22 times what such a step is of the first one leaves whole steps.
DEVICE float e2m1_rounded(float x) {
    float a = fminf(fabsf(x), 6.0f);
    float steps = __int_as_float((max(__float_as_int(a), 0x3F800000) & 0x7F800000) + (22 << 23));
    float r = __fsub_rn(__fadd_rn(a, steps), steps);
    return x == x ? copysignf(r, x) : 0.0f;
}

DEVICE float scale_of_row(float amax) {
    if (ENCODING == NV4_DYNAMIC) return fmaxf(__fdiv_rn(amax, 448.0f * 6.0f), 1.17549435e-38f);
    return __fdiv_rn(amax, 448.0f);
}

// What 1 / d is rounded to, for d that is neither tiny nor huge: the compiler's own steps without its branch, behind which
// nothing could be done at the same time.
DEVICE float reciprocal(float d) {
    float y = about_reciprocal(d);
    return __fmaf_rn(y, __fmaf_rn(-d, y, 1.0f), y);
}

DEVICE bool is_odd(float x) { return (((u32)__float_as_int(x) >> 23 & 255) - 67u) > 120u; }  // not within 2^-60 .. 2^60

// x / d as IEEE rounds it, by steps like the compiler's. odd: becomes true where they may not serve.
DEVICE float quotient(float x, float d, float inverse, bool &odd) {
    odd |= is_odd(d) || (is_odd(x) && x != 0.0f);
    float q = __fmul_rn(x, inverse);
    q = __fmaf_rn(__fmaf_rn(-d, q, x), inverse, q);
    return __fmaf_rn(__fmaf_rn(-d, q, x), inverse, q);
}

// x / d, rounded as IEEE has it (0 where d is 0), for many x. A rounded reciprocal and one correction give it (Markstein
// 1990) unless something on the way is too small or too large, which `lift` prevents for d; quotients below 2^-30 or
// above 2^90 come out as such, which is all that rounding to a code asks for.
struct Divisor {
    float by, inverse, lift;
    DEVICE_MEMBER void set(float d) {
        lift = d < 0x1p-90f ? 0x1p96f : d > 0x1p90f ? 0x1p-96f : 1.0f;
        by = d * lift, inverse = d == 0.0f ? 0.0f : reciprocal(by);
    }
    DEVICE_MEMBER float operator()(float x) const {
        x *= lift;
        float q = x * inverse, better = __fmaf_rn(-__fmaf_rn(q, by, -x), inverse, q);  // so -0 remains -0
        return fabsf(q) > 0x1p90f ? q : better;
    }
};

// The largest of LANES lanes, for R rows at a time: one would wait for each of its steps.
template <int LANES, int R> DEVICE void largest_of(float (&x)[R]) {
#pragma unroll
    for (int step = LANES / 2; step; step /= 2)
#pragma unroll
        for (int r = 0; r < R; r++) x[r] = larger(x[r], __shfl_xor_sync(0xFFFFFFFFu, x[r], step));
}

// v -> v / by
template <int R, int C> DEVICE void divide(float (&v)[R][C], const float (&by)[R]) {
#pragma unroll
    for (int r = 0; r < R; r++) {
        Divisor divisor;
        divisor.set(by[r]);
#pragma unroll
        for (int i = 0; i < C; i++) v[r][i] = divisor(v[r][i]);
    }
}

// R rows at a time: v -> the values of their codes over `scale`, which is of the row or of everything; of GROUP128 it is
// found here. Of ROWS8 they are rounded when they are stored.
template <int R, int C> DEVICE void encode_elements(float (&v)[R][C], float (&scale)[R]) {
    float amax[R];
    bool odd = false;
#pragma unroll
    for (int r = 0; r < R; r++) {
        amax[r] = 0.0f;
#pragma unroll
        for (int i = 0; i < C; i++) amax[r] = larger(amax[r], fabsf(v[r][i]));
    }
    if (ENCODING == GROUP128) {
        largest_of<(C > 4 ? 128 / C : 32)>(amax);
#pragma unroll
        for (int r = 0; r < R; r++) scale[r] = quotient(amax[r], 448.0f, 1.0f / 448.0f, odd);
        if (odd)
#pragma unroll
            for (int r = 0; r < R; r++) scale[r] = __fdiv_rn(amax[r], 448.0f);
    }
    if (ENCODING == MX8) {
        largest_of<32 / C>(amax);
#pragma unroll
        for (int r = 0; r < R; r++) {
            int bits = __float_as_int(amax[r]);
            int code = bits >= 0x7F800000 ? 255 : min(max(((bits + 0x1FFFFF) >> 23) - 135, -127), 127) + 127;
            float down = __int_as_float(code == 255 ? 0x7FC00000 : (254 - code) << 23);
            float up = __int_as_float(code == 255 ? 0x7FC00000 : code ? code << 23 : 1 << 22);
#pragma unroll
            for (int i = 0; i < C; i += 2) {
                float2 e = e4m3_values(e4m3_pair(v[r][i] * down, v[r][i + 1] * down));
                v[r][i] = e.x * up, v[r][i + 1] = e.y * up;
            }
        }
    } else if (ENCODING == NV4 || ENCODING == NV4_DYNAMIC) {
        float block[R], by[R];
        largest_of<16 / C>(amax);
#pragma unroll
        for (int r = 0; r < R; r++) block[r] = quotient(quotient(amax[r], 6.0f, 1.0f / 6.0f, odd), scale[r], reciprocal(scale[r]), odd);
        if (odd)
#pragma unroll
            for (int r = 0; r < R; r++) block[r] = __fdiv_rn(__fdiv_rn(amax[r], 6.0f), scale[r]);
#pragma unroll
        for (int r = 0; r < R; r++) {
            block[r] = e4m3_values(e4m3_pair(block[r], 0.0f)).x;
            by[r] = block[r] * scale[r];
        }
        divide(v, by);
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int i = 0; i < C; i++) v[r][i] = e2m1_rounded(v[r][i]) * block[r];
    } else if (ENCODING != PLAIN) {
        divide(v, scale);
        if (ROWS8) return;
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int i = 0; i < C; i += 2) {
                float2 e = e4m3_values(e4m3_pair(v[r][i], v[r][i + 1]));
                v[r][i] = e.x, v[r][i + 1] = e.y;
            }
    }
}

// Writes 32 C elements of each of R rows (those of lane l begin at l C), `first` elements behind the rows' beginnings, where
// `wanted`. space: 256 bytes of shared memory of the warp's own, per row.
template <int R, int C> DEVICE void put_elements(u8 *const (&rows)[R], const bool (&wanted)[R], int first, const float (&v)[R][C], u8 *const (&space)[R], int lane) {
    if (MAP_BLOCK > 1) __syncwarp();
#pragma unroll
    for (int r = 0; r < R; r++) {
        if (MAP_BLOCK == 1 && !wanted[r]) continue;
        u8 *to = (MAP_BLOCK == 1 ? rows[r] + first * ROW_BYTES : space[r]) + lane * C * ROW_BYTES;
        u32 pair[C / 2];
#pragma unroll
        for (int i = 0; i < C; i += 2) {
#if ROWS8
            pair[i / 2] = e4m3_pair(v[r][i], v[r][i + 1]);
#else
            pair[i / 2] = HALVES ? half_pair(v[r][i], v[r][i + 1]) : bf16_pair(v[r][i], v[r][i + 1]);
#endif
        }
#if ROWS8
        if (C == 4)
            *(u32 *)to = pair[0] | pair[C / 2 - 1] << 16;
        else
            *(u16 *)to = pair[0];
#else
        if (C == 4)
            *(uint2 *)to = make_uint2(pair[0], pair[C / 2 - 1]);
        else
            *(u32 *)to = pair[0];
#endif
    }
    if (MAP_BLOCK == 1) return;
    __syncwarp();
    if (lane >= 8 * C) return;
    // four positions each; where the map's blocks are wider than 32 C, every other four
    bool part = MAP_BLOCK > 32 * C;
    int half = part ? first / (32 * C) % 2 : 0, begin = part ? first - half * 32 * C : first;
    int p = part ? lane / 2 * 16 + lane % 2 * 8 + half * 4 : 4 * lane;
    int base = p / MAP_BLOCK * MAP_BLOCK, at[4];
#pragma unroll
    for (int i = 0; i < 4; i++) at[i] = base + element_at(p - base + i) - half * 32 * C;
#pragma unroll
    for (int r = 0; r < R; r++) {
        const u8 *from = space[r];
#if ROWS8
        u32 bytes = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) bytes |= (u32)from[at[i]] << (8 * i);
        if (wanted[r]) *(u32 *)(rows[r] + begin + p) = bytes;
#else
        u32 pair[2];
#pragma unroll
        for (int i = 0; i < 2; i++) pair[i] = *(const u16 *)(from + 2 * at[2 * i]) | (u32) * (const u16 *)(from + 2 * at[2 * i + 1]) << 16;
        if (wanted[r]) *(uint2 *)(rows[r] + 2 * (begin + p)) = make_uint2(pair[0], pair[1]);
#endif
    }
}
