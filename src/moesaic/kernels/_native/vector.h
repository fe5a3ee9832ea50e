// Vectors of L 32-bit lanes in the compiler's own vector extension, with intrinsics where it cannot express the
// instruction (BF16 products, transposition). A *word* is 32 bits: one FP32 element, or two consecutive BF16 elements.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define WIDE 1
#else
#define WIDE 0
#endif
#if WIDE && defined(__AVX512BF16__)
#define BF16_PRODUCTS 1
#else
#define BF16_PRODUCTS 0
#endif
#define INLINE inline __attribute__((always_inline))

constexpr int LANES = WIDE ? 16 : 8;

template <int L> struct Vec {
    typedef float F __attribute__((vector_size(4 * L)));
    typedef uint32_t U __attribute__((vector_size(4 * L)));
    typedef int32_t I __attribute__((vector_size(4 * L)));
    typedef uint16_t H __attribute__((vector_size(2 * L)));
};
template <int L> using F = typename Vec<L>::F;
template <int L> using U = typename Vec<L>::U;
template <int L> using H = typename Vec<L>::H;

template <class V> INLINE V load(const void* at) {
    V v;
    memcpy(&v, at, sizeof v);
    return v;
}
template <class V> INLINE void store(void* at, V v) { memcpy(at, &v, sizeof v); }

template <int L> INLINE F<L> all(float x) { return F<L>{} + x; }
template <int L> INLINE U<L> all_words(uint32_t x) { return U<L>{} + x; }
template <class V> INLINE V larger(V a, V b) { return a > b ? a : b; }

// Bits of BF16 (round to nearest even; any NaN becomes the quiet one) in the upper half of each lane.
template <int L> INLINE U<L> rounded(F<L> x) {
    U<L> bits = (U<L>)x, even = (bits >> 16) & 1;
    return x == x ? ((bits + 0x7fffu + even) & 0xffff0000u) : all_words<L>(0x7fc00000u);
}

// One element type: how elements become FP32, and what one multiply-accumulate of words does.
struct Single {
    typedef float Element;
    static constexpr int PER_WORD = 1;
    template <int L> static INLINE F<L> get(const float* at) { return load<F<L>>(at); }
    template <int L> static INLINE void put(float* at, F<L> x) { store(at, x); }
    static INLINE float one(const float* at) { return *at; }
    static INLINE void put_one(float* at, float x) { *at = x; }
    template <int L> static INLINE F<L> round(F<L> x) { return x; }
    template <int L> static INLINE F<L> mac(F<L> sum, U<L> a, U<L> b) { return sum + (F<L>)a * (F<L>)b; }
    // Lanes of words: of one vector of elements, or of two whose elements take turns.
    template <int L> static INLINE U<L> join(F<L> x, F<L>) { return (U<L>)x; }
    // The even and the odd ones of 2 L elements.
    template <int L> static INLINE void pairs(const float* at, F<L>& even, F<L>& odd) {
        for (int i = 0; i < L; i++) even[i] = at[2 * i], odd[i] = at[2 * i + 1];
    }
};

struct Brain {
    typedef uint16_t Element;
    static constexpr int PER_WORD = 2;
    template <int L> static INLINE F<L> get(const uint16_t* at) {
        return (F<L>)(__builtin_convertvector(load<H<L>>(at), U<L>) << 16);
    }
    template <int L> static INLINE void put(uint16_t* at, F<L> x) {
#if BF16_PRODUCTS
        if constexpr (L == 16) return store(at, _mm512_cvtneps_pbh((__m512)x));
        if constexpr (L == 8) return store(at, _mm256_cvtneps_pbh((__m256)x));
#endif
        store(at, __builtin_convertvector(rounded<L>(x) >> 16, H<L>));
    }
    static INLINE float one(const uint16_t* at) {
        uint32_t bits = (uint32_t)*at << 16;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
    static INLINE void put_one(uint16_t* at, float x) { *at = (uint16_t)(rounded<4>(all<4>(x))[0] >> 16); }
    template <int L> static INLINE F<L> round(F<L> x) { return (F<L>)rounded<L>(x); }
    template <int L> static INLINE F<L> mac(F<L> sum, U<L> a, U<L> b) {
#if BF16_PRODUCTS
        if constexpr (L == 16) return (F<L>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
        if constexpr (L == 8) return (F<L>)_mm256_dpbf16_ps((__m256)sum, (__m256bh)a, (__m256bh)b);
#endif
        sum += (F<L>)(a << 16) * (F<L>)(b << 16);
        return sum + (F<L>)(a & 0xffff0000u) * (F<L>)(b & 0xffff0000u);
    }
    template <int L> static INLINE U<L> join(F<L> even, F<L> odd) { return rounded<L>(even) >> 16 | rounded<L>(odd); }
    template <int L> static INLINE void pairs(const uint16_t* at, F<L>& even, F<L>& odd) {
        U<L> words = load<U<L>>(at);
        even = (F<L>)(words << 16), odd = (F<L>)(words & 0xffff0000u);
    }
};

// e^x to about one unit in the last place: x = n ln 2 + r, a polynomial in r, and n into the exponent. NaN stays NaN;
// beyond the range of FP32 it saturates at about 1e-38 and 2e38.
template <int L> INLINE F<L> exponential(F<L> x) {
    x = x < -87.3f ? all<L>(-87.3f) : x;
    x = x > 88.3f ? all<L>(88.3f) : x;
    const float magic = 12582912.0f;  // 1.5 x 2^23: adding it rounds to an integer in the low bits
    F<L> shifted = x * 1.44269504f + magic, n = shifted - magic;
    F<L> r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    F<L> p = all<L>(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (F<L>)(((U<L>)shifted + 127u) << 23);
}
// The same for x <= 0, down to the smallest number that FP32 holds.
template <int L> INLINE F<L> exponential_below(F<L> x) {
    F<L> root = exponential<L>(x * 0.5f);
    return x < -80.0f ? root * root : exponential<L>(x);
}
template <int L> INLINE F<L> sigmoid(F<L> x) { return 1.0f / (1.0f + exponential<L>(-x)); }

template <int L> INLINE float sum_of(F<L> x) {
    float total = 0;
    for (int i = 0; i < L; i++) total += x[i];
    return total;
}

// A number known when compiling, as a value.
template <int N> struct Count {
    static constexpr int value = N;
};

// rows[i][j] -> rows[j][i], words of 32 bits.
#if WIDE
INLINE void transpose_16(U<16>* row) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)row[i], (__m512i)row[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)row[i], (__m512i)row[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512i low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), high = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        __m512i low2 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        __m512i high2 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
        row[i] = (U<16>)_mm512_shuffle_i32x4(low, low2, 0x88);
        row[i + 8] = (U<16>)_mm512_shuffle_i32x4(low, low2, 0xdd);
        row[i + 4] = (U<16>)_mm512_shuffle_i32x4(high, high2, 0x88);
        row[i + 12] = (U<16>)_mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}
#endif
#if defined(__AVX2__)
INLINE void transpose_8(U<8>* row) {
    __m256i a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32((__m256i)row[i], (__m256i)row[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32((__m256i)row[i], (__m256i)row[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        row[i] = (U<8>)_mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        row[i + 4] = (U<8>)_mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}
#endif
template <int L> INLINE void transpose(U<L>* row) {
#if defined(__AVX2__)
    if constexpr (L == 8) return transpose_8(row);
#endif
#if WIDE
    if constexpr (L == 16) return transpose_16(row);
#endif
    uint32_t from[L][L], to[L][L];
    memcpy(from, row, sizeof from);
    for (int i = 0; i < L; i++)
        for (int j = 0; j < L; j++) to[j][i] = from[i][j];
    memcpy((void*)row, to, sizeof to);
}

// The sums over the lanes of 16 vectors.
template <int L> INLINE void sums_of_16(const F<L>* x, float* out) {
#if WIDE
    if constexpr (L == 16) {
        __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            __m512 p = (__m512)x[2 * i], q = (__m512)x[2 * i + 1];
            a[i] = _mm512_add_ps(_mm512_unpacklo_ps(p, q), _mm512_unpackhi_ps(p, q));
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m512d p = (__m512d)a[2 * i], q = (__m512d)a[2 * i + 1];
            b[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(p, q), (__m512)_mm512_unpackhi_pd(p, q));
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            __m512 p = b[2 * i], q = b[2 * i + 1];
            c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
        }
        store(out, _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd)));
        return;
    }
#endif
    for (int i = 0; i < 16; i++) out[i] = sum_of<L>(x[i]);
}
