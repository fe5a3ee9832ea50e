// Products y[i][n] = sum over k of x[i][k] w[n][k]: few rows i, both operands contiguous in k, w as it is stored.
//
// lanes: L rows of x are transposed into a panel [word][row]; a lane is a row, and words of w are broadcast. Nothing is
//        summed across lanes. One row costs as much as L.
// dots:  a lane is a place in k; the lanes of 16 sums at a time are added up at the end. For a handful of rows.
//
// Rows are given by address and distance in bytes. Counts are elements unless they are called words.
#pragma once
#include "vector.h"

constexpr int DOTS = 10;     // most rows that are multiplied as dots (measured: from 11 on, a panel is faster)
constexpr int COLUMNS = 48;  // columns of y that are finished at a time

template <class T> INLINE int64_t words_of(int64_t elements) { return (elements + T::PER_WORD - 1) / T::PER_WORD; }
template <class T> INLINE const typename T::Element* row_at(const char* rows, int64_t row, int64_t i) {
    return (const typename T::Element*)(rows + i * row);
}

// The word at s of a row of k elements; the half beyond an odd end is zero.
template <class T> INLINE uint32_t word(const typename T::Element* row, int64_t s, int64_t k) {
    uint32_t bits = 0;
    int64_t left = k - s * T::PER_WORD;
    memcpy(&bits, row + s * T::PER_WORD, left < T::PER_WORD ? sizeof(typename T::Element) : 4);
    return bits;
}

// How m rows are multiplied: the first `in_panels` of them in panels, the others as dots.
struct Split {
    int64_t panels, in_panels, dots;
    static Split of(int64_t m) {
        int64_t whole = m / LANES, rest = m % LANES;
        if (rest > DOTS) return {whole + 1, m, 0};
        return {whole, whole * LANES, rest};
    }
};

// `count` <= L rows of k elements, given one by one, -> panel [words][L]; absent rows are zero.
template <class T, int L, class Row> void pack(const Row& row, int count, int64_t k, uint32_t* panel) {
    const typename T::Element* rows[L];
    for (int i = 0; i < L; i++) rows[i] = row(i < count ? i : 0);
    int64_t s = 0, whole = k / T::PER_WORD;
    for (; s + L <= whole; s += L) {
        U<L> block[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) block[i] = i < count ? load<U<L>>(rows[i] + s * T::PER_WORD) : U<L>{};
        transpose<L>(block);
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) store(panel + (s + i) * L, block[i]);
    }
    for (int64_t words = words_of<T>(k); s < words; s++)
        for (int i = 0; i < L; i++) panel[s * L + i] = i < count ? word<T>(rows[i], s, k) : 0;
}

// The elements of two rows in turn, as words; a row that is absent is zero. (Of FP32, the first row alone.)
template <class T> INLINE void interleave(const typename T::Element* x, const typename T::Element* z, int64_t n,
                                          uint32_t* words) {
    int64_t i = 0;
    if constexpr (T::PER_WORD == 1) {
        memcpy(words, x, (size_t)n * 4);
    } else {
#if WIDE
        alignas(64) static const uint16_t TURNS[64] = {
            0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
            11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
            22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
        __m512i first = _mm512_load_si512(TURNS), second = _mm512_load_si512(TURNS + 32), none = _mm512_setzero_si512();
        for (; i + 32 <= n; i += 32) {
            __m512i low = _mm512_loadu_si512(x + i), high = z ? _mm512_loadu_si512(z + i) : none;
            _mm512_storeu_si512(words + i, _mm512_permutex2var_epi16(low, first, high));
            _mm512_storeu_si512(words + i + 16, _mm512_permutex2var_epi16(low, second, high));
        }
#endif
        for (; i + LANES <= n; i += LANES) {
            U<LANES> low = __builtin_convertvector(load<H<LANES>>(x + i), U<LANES>), high = {};
            if (z) high = __builtin_convertvector(load<H<LANES>>(z + i), U<LANES>);
            store(words + i, low | high << 16);
        }
        for (; i < n; i++) words[i] = x[i] | (uint32_t)(z ? z[i] : 0) << 16;
    }
}

// MV panels: word s of panel v begins at words + v * apart + s * step.
struct Panels {
    const uint32_t* words;
    int64_t apart, step;
};

// sum[j][v] += panel v times row j of w. Row j begins at w + j * row; its words lie `step` bytes apart.
template <class T, int L, int MV, int NR>
INLINE void tile(Panels x, const char* w, int64_t row, int64_t step, int64_t words, F<L> (&sum)[NR][MV]) {
    constexpr int BASES = (NR + 3) / 4;  // every fourth row has a pointer; the three after it are at 1, 2 and 3 `row`
    const char* base[BASES];
    for (int g = 0; g < BASES; g++) base[g] = w + 4 * g * row;
    const uint32_t* panel = x.words;
    int64_t three = 3 * row;
    for (; words > 0; words--) {
        // Hides from the compiler how the pointers relate: it would keep one for each row, and most of them in memory.
#pragma GCC unroll 4
        for (int g = 0; g < BASES; g++) asm volatile("" : "+r"(base[g]));
        asm volatile("" : "+r"(panel), "+r"(three));
        U<L> a[MV];
#pragma GCC unroll 4
        for (int v = 0; v < MV; v++) a[v] = load<U<L>>(panel + v * x.apart);
#pragma GCC unroll 16
        for (int j = 0; j < NR; j++) {
            uint32_t bits;
            memcpy(&bits, base[j / 4] + (j % 4 == 3 ? three : j % 4 * row), 4);
            U<L> b = all_words<L>(bits);
#pragma GCC unroll 4
            for (int v = 0; v < MV; v++) sum[j][v] = T::template mac<L>(sum[j][v], a[v], b);
        }
#pragma GCC unroll 4
        for (int g = 0; g < BASES; g++) base[g] += step;
        panel += x.step;
    }
}

// The same for rows whose words follow one another, and whose distance is a multiple of 4,096 bytes: they fall into one
// set of the cache, which holds fewer than are read at a time. A part of each is copied to where that is not so.
template <class T, int L, int MV, int NR>
INLINE void tile_apart(Panels x, const char* w, int64_t row, int64_t words, F<L> (&sum)[NR][MV]) {
    constexpr int64_t PART = 128;
    alignas(64) char copy[NR][PART * 4 + 64];
    for (int64_t s = 0; s < words; s += PART) {
        int64_t n = std::min(PART, words - s);
        for (int j = 0; j < NR; j++) memcpy(copy[j], w + j * row + s * 4, (size_t)n * 4);
        tile<T, L, MV, NR>({x.words + s * x.step, x.apart, x.step}, copy[0], sizeof copy[0], 4, n, sum);
    }
}

// The same for rows of k consecutive elements, an odd one at the end included.
template <class T, int L, int MV, int NR>
INLINE void product(Panels x, const char* w, int64_t row, int64_t k, F<L> (&sum)[NR][MV]) {
    int64_t whole = k / T::PER_WORD;
    if (NR > 8 && row % 4096 == 0) tile_apart<T, L, MV, NR>(x, w, row, whole, sum);
    else tile<T, L, MV, NR>(x, w, row, 4, whole, sum);
    if (whole * T::PER_WORD == k) return;
    for (int j = 0; j < NR; j++)
        for (int v = 0; v < MV; v++)
            sum[j][v] = T::template mac<L>(sum[j][v], load<U<L>>(x.words + v * x.apart + whole * x.step),
                                           all_words<L>(word<T>(row_at<T>(w, row, j), whole, k)));
}

// out[i * NR + j] = row i of x times row j of w, for MR * NR == 16. The rows of x are given one by one.
template <class T, int MR, int NR>
INLINE void dots_of_16(const typename T::Element* const* x, const char* w, int64_t w_row, int64_t k, float* out) {
    constexpr int L = LANES;
    constexpr int64_t AT_ONCE = L * T::PER_WORD;
    F<L> sum[16] = {};
    int64_t at = 0;
    for (; at + AT_ONCE <= k; at += AT_ONCE) {
        U<L> b[NR];
#pragma GCC unroll 16
        for (int j = 0; j < NR; j++) {
            b[j] = load<U<L>>(row_at<T>(w, w_row, j) + at);
            __builtin_prefetch(row_at<T>(w, w_row, j + NR) + at);
        }
#pragma GCC unroll 4
        for (int i = 0; i < MR; i++) {
            U<L> a = load<U<L>>(x[i] + at);
#pragma GCC unroll 16
            for (int j = 0; j < NR; j++) sum[i * NR + j] = T::template mac<L>(sum[i * NR + j], a, b[j]);
        }
    }
    if (at < k) {
        typename T::Element a[AT_ONCE] = {}, b[AT_ONCE] = {};
        size_t left = (size_t)(k - at) * sizeof *a;
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NR; j++) {
                memcpy(a, x[i] + at, left);
                memcpy(b, row_at<T>(w, w_row, j) + at, left);
                sum[i * NR + j] = T::template mac<L>(sum[i * NR + j], load<U<L>>(a), load<U<L>>(b));
            }
    }
    sums_of_16<L>(sum, out);
}

// out[i][0..n) for MR rows of x and n <= COLUMNS rows of w.
template <class T, int MR>
void dots(const typename T::Element* const* x, const char* w, int64_t w_row, int64_t n, int64_t k,
          float (*out)[COLUMNS]) {
    constexpr int NR = 16 / MR;
    float sums[16];
    int64_t at = 0;
    for (; at + NR <= n; at += NR) {
        dots_of_16<T, MR, NR>(x, w + at * w_row, w_row, k, sums);
        for (int i = 0; i < MR; i++) memcpy(out[i] + at, sums + i * NR, NR * 4);
    }
    for (; at < n; at++)  // one column: distance 0 gives it NR times
        for (int i = 0; i < MR; i++) {
            dots_of_16<T, 1, 16>(x + i, w + at * w_row, 0, k, sums);
            out[i][at] = sums[0];
        }
}

// Column n of MV panels' rows: out[n][v] for n <= COLUMNS rows of w.
template <class T, int L, int MV, int NR>
INLINE void lanes(Panels x, const char* w, int64_t w_row, int64_t n, int64_t k, F<L> (*out)[MV]) {
    int64_t at = 0;
    auto some = [&](auto count) {
        constexpr int N = decltype(count)::value;
        for (; at + N <= n; at += N) {
            F<L> sum[N][MV] = {};
            product<T, L, MV, N>(x, w + at * w_row, w_row, k, sum);
#pragma GCC unroll 16
            for (int j = 0; j < N; j++)
                for (int v = 0; v < MV; v++) out[at + j][v] = sum[j][v];
        }
    };
    some(Count<NR>());
    some(Count<4>());
    some(Count<1>());
}

// The left operand of a product: `rows` from `row` to row apart, and panels made of the first of them.
struct Left {
    const char* rows;
    int64_t row;
    const uint32_t* panels;
    int64_t panel_words, k;
    Split split;
};

// done(i, n, count, values): columns n.. of row i of x are finished.
template <class T, int MV, int NR, class Done>
void multiply_panels(const Left& x, int64_t panel, const char* w, int64_t w_row, int64_t n0, int64_t n1, Done done) {
    F<LANES> sums[COLUMNS][MV];
    float values[LANES][COLUMNS];
    Panels panels = {x.panels + panel * x.panel_words, x.panel_words, LANES};
    for (int64_t n = n0; n < n1; n += COLUMNS) {
        int64_t count = n1 - n < COLUMNS ? n1 - n : COLUMNS;
        lanes<T, LANES, MV, NR>(panels, w + n * w_row, w_row, count, x.k, sums);
        for (int v = 0; v < MV; v++) {
            int64_t first = (panel + v) * LANES, rows = x.split.in_panels - first;
            for (int64_t c = 0; c < count; c += LANES) {
                U<LANES> block[LANES];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) block[i] = (U<LANES>)sums[c + i][v];
                transpose<LANES>(block);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) store(&values[i][c], block[i]);
            }
            for (int64_t i = 0; i < rows && i < LANES; i++) done(first + i, n, count, values[i]);
        }
    }
}

template <class T, int MR, class Done>
void multiply_dots(const Left& x, int64_t i, const char* w, int64_t w_row, int64_t n0, int64_t n1, Done done) {
    const typename T::Element* rows[MR];
    float values[MR][COLUMNS];
    for (int r = 0; r < MR; r++) rows[r] = row_at<T>(x.rows, x.row, i + r);
    for (int64_t n = n0; n < n1; n += COLUMNS) {
        int64_t count = n1 - n < COLUMNS ? n1 - n : COLUMNS;
        dots<T, MR>(rows, w + n * w_row, w_row, count, x.k, values);
        for (int r = 0; r < MR; r++) done(i + r, n, count, values[r]);
    }
}

// Calls f(i, Count<MR>) for rows [i, m) in handfuls.
template <class Body> INLINE void in_handfuls(int64_t i, int64_t m, const Body& f) {
    for (; i + 4 <= m; i += 4) f(i, Count<4>());
    for (; i + 2 <= m; i += 2) f(i, Count<2>());
    for (; i < m; i++) f(i, Count<1>());
}

// Columns [n0, n1) of x w^T, for all rows of x.
template <class T, class Done>
void multiply(const Left& x, const char* w, int64_t w_row, int64_t n0, int64_t n1, Done done) {
    int64_t p = 0, i = x.split.in_panels;
    for (; p + 2 <= x.split.panels; p += 2) multiply_panels<T, 2, WIDE ? 12 : 3>(x, p, w, w_row, n0, n1, done);
    for (; p < x.split.panels; p++) multiply_panels<T, 1, WIDE ? 16 : 8>(x, p, w, w_row, n0, n1, done);
    in_handfuls(i, i + x.split.dots,
                [&](int64_t at, auto rows) { multiply_dots<T, decltype(rows)::value>(x, at, w, w_row, n0, n1, done); });
}

// y[n..] of one row, rounded once.
template <class T> INLINE void put_row(typename T::Element* y, int64_t count, const float* values) {
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES) T::template put<LANES>(y + c, load<F<LANES>>(values + c));
    for (; c < count; c++) T::put_one(y + c, values[c]);
}
