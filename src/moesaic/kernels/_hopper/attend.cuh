// What decoding attention needs beside base.cuh: its arguments, fragments, encodings of results.
#pragma once
#include "base.cuh"

#define LOG2E 1.4426950408889634f
#define NOTHING __int_as_float(0xFF800000) /* minus infinity */
#define HALF_LIFT 0x1p60f  /* the root of what decoded E4M3 operands are too small by */

// q, out: BF16 [tokens, heads, WIDTH].  pool_row, value_at, exponents_at: bytes.  table: INT32 or (wide_table) INT64 rows of
// table_row entries, `block` positions each.  spans: (row, count, length) of each sequence.  fresh: how many of a context's
// last positions the kernel in front may still be writing; null where it is one of each.  window: 0 where there is none.
// factor: of scores, LOG2E included.  data, scale, exact, top: parts of the encoding, numbered as below.
struct Decode {
    const u16 *q;
    const u8 *pool;
    const void *table;
    const i64 *spans;
    const i64 *fresh;
    const float *sinks;
    u16 *out;
    u8 *data;
    void *scale;
    u16 *exact;
    const float *top;
    i64 q_token, q_head, pool_row, table_row;
    int value_at, exponents_at, groups, repeat, block, wide_table, window, encoding;
    float factor;
};

// Encodings of results, as attend_decode.py numbers them.
#define PLAIN 0
#define TENSOR 1    // E4M3, one scale that is given
#define GROUP128 2  // E4M3, a scale of each 128 elements
#define MX8 3
#define NV4 4       // a scale of each 16 elements, and one of all that is given

DEVICE int divided_up(int x, int by) { return (x + by - 1) / by; }

DEVICE int up(int x, int step) { return divided_up(x, step) * step; }

DEVICE float power_of_two(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// UE8M0 -> its power of two, times HALF_LIFT.
DEVICE float power_of(u32 code) {
    code &= 255;
    return __uint_as_float(code == 255 ? 0x7FC00000u : code ? code << 23 : 1u << 22) * HALF_LIFT;
}

// Four E4M3 codes -> pairs (b0, b2), (b1, b3), 2^-120 times their values.
DEVICE void decode_e4m3(u32 w, u32 &low, u32 &high) {
    u32 moved = w << 8;
    low = (moved & 0x80008000u) | ((moved >> 4) & 0x07F007F0u);
    high = (w & 0x80008000u) | ((w >> 4) & 0x07F007F0u);
}

// --- copies, loads and stores ---

DEVICE void copy16_or_zero(u32 to, const void *from, int real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real) : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING> DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

DEVICE u32 load4(u32 p) {
    u32 v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(p) : "memory");
    return v;
}

DEVICE uint4 load16(u32 p) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(p) : "memory");
    return v;
}

DEVICE void store4(u32 p, u32 v) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(p), "r"(v) : "memory"); }

DEVICE void store16(u32 p, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Four matrices of 8 x 8 16-bit elements; lane l names row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 (&x)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(row) : "memory");
}

DEVICE void load_matrices_turned(u32 (&x)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(row) : "memory");
}

DEVICE void store8_at(u32 p, int block, float2 v) {
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address_at(p, block)), "f"(v.x), "f"(v.y) : "memory");
}

// --- encodings ---

DEVICE float quotient(float x, float by) { return by == 0.0f ? 0.0f : __fdiv_rn(x, by); }

template <int COUNT> DEVICE float largest(float x) {
#pragma unroll
    for (int step = COUNT / 2; step; step /= 2) x = larger(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
    return x;
}

// To nearest, ties to the even code, saturating.
DEVICE u32 e2m1_code(float x) {
    float size = fabsf(x);
    u32 rank = (size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) + (size > 2.5f) + (size >= 3.5f) + (size > 5.0f);
    return rank | (__float_as_uint(x) >> 28 & 8);
}

DEVICE float e2m1_value(u32 code) {
    u32 size = code & 7;
    return copysignf(size < 2 ? 0.5f * size : __uint_as_float((size + 252) << 22), code & 8 ? -1.0f : 1.0f);
}

// encode_four of NVFP4, whose scales of blocks are E4M3.
DEVICE void encode_four_nv4(const Decode &a, const float (&v)[4], float amax, i64 at, bool wanted) {
    float top = *a.top;
    u16 block = e4m3_pair(__fdiv_rn(__fdiv_rn(largest<4>(amax), 6.0f), top), 0.0f);
    float scale = e4m3_values(block).x, by = scale * top, values[4];
    u32 codes = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 code = e2m1_code(quotient(v[i], by));
        codes |= code << (4 * i), values[i] = e2m1_value(code) * scale;
    }
    if (!wanted) return;
    *(u16 *)(a.data + at / 2) = codes;
    *(uint2 *)(a.exact + at) = make_uint2(bf16_pair(values[0], values[1]), bf16_pair(values[2], values[3]));
    if (at % 16 == 0) ((u8 *)a.scale)[at / 16] = block;
}

// Four neighbouring elements per lane, which begin at element `at` of all rows; bit for bit as `formats/encodings` has it.
DEVICE void encode_four(const Decode &a, const float (&v)[4], i64 at, bool wanted) {
    float amax = larger(larger(fabsf(v[0]), fabsf(v[1])), larger(fabsf(v[2]), fabsf(v[3])));
    if (a.encoding == MX8) {
        int bits = __float_as_int(largest<8>(amax));
        int code = bits >= 0x7F800000 ? 255 : min(max(((bits + 0x1FFFFF) >> 23) - 135, -127), 127) + 127;
        float down = __int_as_float(code == 255 ? 0x7FC00000 : (254 - code) << 23);
        float back = __int_as_float(code == 255 ? 0x7FC00000 : code ? code << 23 : 1 << 22);
        u16 low = e4m3_pair(v[0] * down, v[1] * down), high = e4m3_pair(v[2] * down, v[3] * down);
        float2 x = e4m3_values(low), y = e4m3_values(high);
        if (!wanted) return;
        *(u32 *)(a.data + at) = low | (u32)high << 16;
        *(uint2 *)(a.exact + at) = make_uint2(bf16_pair(x.x * back, x.y * back), bf16_pair(y.x * back, y.y * back));
        if (at % 32 == 0) ((u8 *)a.scale)[at / 32] = code;
        return;
    }
    if (a.encoding == NV4) return encode_four_nv4(a, v, amax, at, wanted);
    float scale = a.encoding == GROUP128 ? __fdiv_rn(largest<32>(amax), 448.0f) : *(const float *)a.scale;
    if (!wanted) return;
    u16 low = e4m3_pair(quotient(v[0], scale), quotient(v[1], scale)), high = e4m3_pair(quotient(v[2], scale), quotient(v[3], scale));
    *(u32 *)(a.data + at) = low | (u32)high << 16;
    if (a.encoding == GROUP128 && at % 128 == 0) ((float *)a.scale)[at / 128] = scale;
}
