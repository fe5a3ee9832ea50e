// Attention over the paged pool, read where it lies: causal, with a window and sinks; softmax in FP32, block by block.
//
// The queries of one kv head are *rows*: token after token, the heads that share the kv head within each. L rows make
// a panel, and a lane is a row all the way: scores, maxima, sums and the weighted values never cross lanes.
// A unit of work is a few panels of one sequence; units are handed out one by one, since contexts differ in length.
#pragma once
#include "rows.h"
#include <type_traits>

struct AttendArgs {
    const char *q, *pool;
    const int64_t *spans, *slots;  // [sequences][start, count, length]; [sequences][slots_row]
    const float* sinks;            // [heads], or none
    char* out;
    int64_t q_row, q_head, pool_row, slots_row, out_row, out_head;  // bytes, but slots_row
    int64_t pool_rows, sequences, heads, kv_heads, key_dim, value_at, value_dim, window, threads;
    double scale;
};

struct AttendUnit {
    int64_t sequence, kv_head, first, rows;
};

constexpr int64_t BLOCK = 64;   // positions worked on at a time
constexpr int64_t PANELS = 4;   // most panels of a unit
constexpr float HIDDEN = -1e30f;

template <class T, int L> struct Attend {
    typedef typename T::Element Element;
    static constexpr int N = WIDE ? 16 : 8;  // positions, or values, of one tile
    const AttendArgs& a;
    const AttendUnit u;
    int64_t k_words, panels, shared, start, count, length;
    uint32_t *queries, *keys, *values, *weights;  // [panel][word][L], [BLOCK][word], [BLOCK or pair][V], the same [L]
    F<L>*sums, *scores, *top, *total;             // [panel][V], [BLOCK], [panel], [panel]
    int32_t* at;                                  // [panel][L]: the row's position
    struct Rows { const char* at; int64_t row; } key_rows[BLOCK / N];

    static int64_t bytes(const AttendArgs& a) {
        int64_t k = words_of<T>(a.key_dim);
        return 4 * (PANELS * k * L + BLOCK * k + BLOCK * a.value_dim + BLOCK * L + PANELS * a.value_dim * L +
                    (BLOCK + N) * L + 3 * PANELS * L) + 16 * 64;
    }

    Attend(const AttendArgs& args, const AttendUnit& unit, char* space) : a(args), u(unit) {
        const int64_t* span = a.spans + 3 * u.sequence;
        start = span[0], count = span[1], length = span[2];
        shared = a.heads / a.kv_heads, k_words = words_of<T>(a.key_dim), panels = (u.rows + L - 1) / L;
        auto take = [&](auto*& where, int64_t words) {
            where = (std::remove_reference_t<decltype(where)>)space;
            space += (4 * words + 63) & ~int64_t(63);
        };
        take(queries, PANELS * k_words * L), take(keys, BLOCK * k_words), take(values, BLOCK * a.value_dim);
        take(weights, BLOCK * L), take(sums, PANELS * a.value_dim * L), take(scores, (BLOCK + N) * L);
        take(top, PANELS * L), take(total, PANELS * L), take(at, PANELS * L);
    }

    int64_t token(int64_t row) const { return start + row / shared; }
    int64_t head(int64_t row) const { return u.kv_head * shared + row % shared; }
    int64_t position(int64_t row) const { return length - count + row / shared; }

    // Gathers the queries; a sink is a first score without a value.
    void begin() {
        for (int64_t p = 0; p < panels; p++) {
            int64_t first = u.first + p * L, rows = std::min<int64_t>(u.first + u.rows - first, L);
            auto query = [&](int i) {
                return (const Element*)(a.q + token(first + i) * a.q_row + head(first + i) * a.q_head);
            };
            pack<T, L>(query, (int)rows, a.key_dim, queries + p * k_words * L);
            top[p] = all<L>(HIDDEN), total[p] = F<L>{};
            for (int64_t i = 0; i < L; i++) {
                int64_t row = first + std::min(i, rows - 1);
                at[p * L + i] = (int32_t)position(row);
                if (a.sinks) top[p][i] = a.sinks[head(row)], total[p][i] = 1;
            }
            for (int64_t v = 0; v < a.value_dim; v++) sums[p * a.value_dim + v] = F<L>{};
        }
    }

    const Element* pool_at(int64_t slot) const { return (const Element*)(a.pool + slot * a.pool_row); }

    // Positions [from, from + n). Keys are read where they are if their slots follow one another, as in a block of the
    // pool, else copied. Values: by position, in pairs where a word holds two.
    void gather(int64_t from, int64_t n) {
        const int64_t* slots = a.slots + u.sequence * a.slots_row + from;
        for (int64_t i = 0; i < n; i += N) {
            int64_t here = std::min<int64_t>(n - i, N);
            bool follow = slots[i] + N <= a.pool_rows;
            for (int64_t j = 1; j < here; j++) follow &= slots[i + j] == slots[i] + j;
            const Element* key = pool_at(slots[i]) + u.kv_head * a.key_dim;
            key_rows[i / N] = {(const char*)key, a.pool_row};
            if (follow) continue;
            for (int64_t j = 0; j < here; j++)
                memcpy(keys + (i + j) * k_words, pool_at(slots[i + j]) + u.kv_head * a.key_dim,
                       (size_t)a.key_dim * sizeof(Element));
            key_rows[i / N] = {(const char*)(keys + i * k_words), k_words * 4};
        }
        auto value = [&](int64_t i) { return pool_at(slots[i]) + a.value_at + u.kv_head * a.value_dim; };
        for (int64_t i = 0, w = 0; i < n; i += T::PER_WORD, w++)
            interleave<T>(value(i), i + 1 < n ? value(i + 1) : nullptr, a.value_dim, values + w * a.value_dim);
    }

    void block(int64_t p, int64_t from, int64_t n) {
        score(p, n);
        I limit = load<I>(at + p * L);
        int32_t oldest = a.window > 0 ? (int32_t)-a.window : INT32_MIN / 2;
        F<L> peak = top[p];
        for (int64_t i = 0; i < n; i++) {
            I place = I{} + (int32_t)(from + i);
            I seen = (place <= limit) & (place > limit + oldest);
            scores[i] = seen ? scores[i] * (float)a.scale : all<L>(HIDDEN);
            peak = larger(peak, scores[i]);
        }
        F<L> fade = exponential<L>(top[p] - peak), sum = total[p] * fade;
        for (int64_t i = 0; i < n; i++) {
            F<L> weight = exponential<L>(scores[i] - peak);
            scores[i] = scores[i] == HIDDEN ? F<L>{} : weight;
            sum += scores[i];
        }
        if (n % 2) scores[n] = F<L>{};
        for (int64_t i = 0, w = 0; i < n; i += T::PER_WORD, w++)
            store(weights + w * L, T::template join<L>(scores[i], scores[i + T::PER_WORD - 1]));
        top[p] = peak, total[p] = sum;
        add_values(p, words_of<T>(n), fade);
    }

    // N positions at a time; what is computed beyond the n-th is not looked at.
    void score(int64_t p, int64_t n) {
        Panels x = {queries + p * k_words * L, 0, L};
        for (int64_t i = 0; i < n; i += N) {
            F<L> sum[N][1] = {};
            product<T, L, 1, N>(x, key_rows[i / N].at, key_rows[i / N].row, a.key_dim, sum);
#pragma GCC unroll 16
            for (int j = 0; j < N; j++) scores[i + j] = sum[j][0];
        }
    }

    void add_values(int64_t p, int64_t words, F<L> fade) {
        Panels x = {weights, 0, L};
        F<L>* of = sums + p * a.value_dim;
        int64_t v = 0;
        auto some = [&](auto number) {
            constexpr int C = decltype(number)::value;
            for (; v + C <= a.value_dim; v += C) {
                F<L> sum[C][1];
#pragma GCC unroll 16
                for (int j = 0; j < C; j++) sum[j][0] = of[v + j] * fade;
                tile<T, L, 1, C>(x, (const char*)(values + v), 4, a.value_dim * 4, words, sum);
#pragma GCC unroll 16
                for (int j = 0; j < C; j++) of[v + j] = sum[j][0];
            }
        };
        some(Count<N>()), some(Count<4>()), some(Count<1>());
    }

    void finish() {
        for (int64_t p = 0; p < panels; p++) {
            F<L>* of = sums + p * a.value_dim;
            F<L> part = 1.0f / total[p];
            int64_t first = u.first + p * L, rows = std::min<int64_t>(u.first + u.rows - first, L), v = 0;
            auto out = [&](int64_t i) {
                return (Element*)(a.out + token(first + i) * a.out_row + head(first + i) * a.out_head);
            };
            for (; v + L <= a.value_dim; v += L) {
                U<L> block[L];
#pragma GCC unroll 16
                for (int j = 0; j < L; j++) block[j] = (U<L>)(of[v + j] * part);
                transpose<L>(block);
                for (int64_t i = 0; i < rows; i++) T::template put<L>(out(i) + v, (F<L>)block[i]);
            }
            for (; v < a.value_dim; v++)
                for (int64_t i = 0; i < rows; i++) T::put_one(out(i) + v, of[v][i] * part[i]);
        }
    }

    void run() {
        begin();
        int64_t from = a.window > 0 ? std::max<int64_t>(0, position(u.first) - a.window + 1) : 0;
        int64_t end = position(u.first + u.rows - 1) + 1;
        for (; from < end; from += BLOCK) {
            int64_t n = std::min(BLOCK, end - from);
            gather(from, n);
            for (int64_t p = 0; p < panels; p++) block(p, from, n);
        }
        finish();
    }

    using I = typename Vec<L>::I;
};

// The units of every sequence, and how many multiplications they take.
inline int64_t units_of(const AttendArgs& a, AttendUnit* units, int64_t& work) {
    int64_t n = 0, shared = a.heads / a.kv_heads;
    work = 0;
    for (int64_t s = 0; s < a.sequences; s++) {
        int64_t rows = a.spans[3 * s + 1] * shared, length = a.spans[3 * s + 2];
        work += rows * a.kv_heads * length * (a.key_dim + a.value_dim);
        for (int64_t g = 0; g < a.kv_heads; g++)
            for (int64_t r = 0; r < rows; r += PANELS * LANES, n++)
                if (units) units[n] = {s, g, r, std::min(rows - r, PANELS * LANES)};
    }
    return n;
}

template <class T> void attend(const AttendArgs& a, Scratch& space) {
    int64_t work, n = units_of(a, nullptr, work), next = 0;
    int64_t threads = work < 65536 ? 1 : std::min(a.threads, n);
    int64_t own = (std::max(Attend<T, LANES>::bytes(a), Attend<T, 8>::bytes(a)) + 4095) & ~int64_t(4095);
    space.reserve(Scratch::padded<AttendUnit>(n) + threads * own);
    AttendUnit* units = space.take<AttendUnit>(n);
    char* memory = space.take<char>(threads * own);
    units_of(a, units, work);
    in_team(threads, [&](Member me) {
        for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < n;) {
            if (units[i].rows <= 8) Attend<T, 8>(a, units[i], memory + me.index * own).run();
            else Attend<T, LANES>(a, units[i], memory + me.index * own).run();
        }
    });
    space.release();
}
