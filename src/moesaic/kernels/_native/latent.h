// Multi-head latent attention over the pool's rows (normalised latent, rotated key), without expanding them. Per head:
//     q' = W_k^T q | attention of q' and the rotated q over latent and key | y = W_v (weighted latent)
#pragma once
#include "attention.h"

struct LatentArgs {
    AttendArgs attend;  // q [T, H, nope + rope], not rotated; key_dim = rank + rope, value_dim = rank; out [T, H, V]
    const char *w_k, *w_v;            // [H][nope][rank], [H][value][rank]: rows one after the other within a head
    const float *cos, *sin;           // [T][rope / 2]
    int64_t tokens, w_k_head, w_v_head, nope, rope, rank, value, interleaved;
};

struct StoreLatentArgs {
    const char *x, *norm;             // [T][rank + rope]: latent, key
    const float *cos, *sin;
    char* pool;
    const int64_t* slots;
    int64_t x_row, pool_row, tokens, rank, rope, interleaved, threads;
    double eps;
};

constexpr int64_t TOGETHER = 32;  // tokens of one head that are multiplied together

template <class T> void store_latent(const StoreLatentArgs& a) {
    typedef typename T::Element Element;
    each(a.tokens, a.tokens * (a.rank + a.rope), a.threads, [&](int64_t t) {
        const Element* x = row_at<T>(a.x, a.x_row, t);
        Element* y = (Element*)(a.pool + a.slots[t] * a.pool_row);
        int64_t half = a.rope / 2;
        norm_row<T>(x, (const Element*)a.norm, a.rank, (float)a.eps, y);
        rotate_row<T>(x + a.rank, a.cos + t * half, a.sin + t * half, half, a.interleaved, y + a.rank);
    });
}

template <class T> struct Latent {
    typedef typename T::Element Element;
    const LatentArgs& a;
    Element *queries, *seen;  // [T][H][rank + rope], [T][H][rank]
    int64_t heads, width, row, q_row;
    explicit Latent(const LatentArgs& args) : a(args), heads(args.attend.heads), width(args.rank + args.rope),
        row(args.rank * (int64_t)sizeof(Element)), q_row(args.attend.q_row) {}

    // W_k of a head with its rows in turn, as `tile` wants the panel: a lane is a place of the latent.
    int64_t lanes_of_rank() const { return (a.rank + LANES - 1) / LANES * LANES; }
    void turn(int64_t h, uint32_t* panel) const {
        const char* w = a.w_k + h * a.w_k_head;
        for (int64_t n = 0, s = 0; n < a.nope; n += T::PER_WORD, s++)
            interleave<T>(row_at<T>(w, row, n), n + 1 < a.nope ? row_at<T>(w, row, n + 1) : nullptr, a.rank,
                          panel + s * lanes_of_rank());
    }

    template <int N> INLINE void absorb(int64_t t, int64_t h, const uint32_t* panel) const {
        const char* q = a.attend.q + t * q_row + h * a.attend.q_head;
        for (int64_t r = 0; r < a.rank; r += 2 * LANES) {
            int64_t parts = a.rank - r > LANES ? 2 : 1;
            F<LANES> sum[N][2] = {};
            product<T, LANES, 2, N>({panel + r, parts == 2 ? LANES : 0, lanes_of_rank()}, q, q_row, a.nope, sum);
            for (int j = 0; j < N; j++)
                for (int64_t v = 0; v < parts; v++) {
                    Element* out = queries + ((t + j) * heads + h) * width + r + v * LANES;
                    int64_t left = a.rank - r - v * LANES;
                    if (left >= LANES) T::template put<LANES>(out, sum[j][v]);
                    else for (int64_t i = 0; i < left; i++) T::put_one(out + i, sum[j][v][i]);
                }
        }
    }
    void absorb_some(int64_t h, int64_t t, int64_t end, uint32_t* panel) const {
        turn(h, panel);
        int64_t half = a.rope / 2;
        for (int64_t i = t; i < end; i++)
            rotate_row<T>(row_at<T>(a.attend.q + h * a.attend.q_head, q_row, i) + a.nope, a.cos + i * half,
                          a.sin + i * half, half, a.interleaved, queries + (i * heads + h) * width + a.rank);
        for (; t + 8 <= end; t += 8) absorb<8>(t, h, panel);
        in_handfuls(t, end, [&](int64_t i, auto rows) { absorb<decltype(rows)::value>(i, h, panel); });
    }

    void expand_some(int64_t h, int64_t t, int64_t end, uint32_t* panels) const {
        int64_t x_row = heads * row, words = words_of<T>(a.rank) * LANES;
        const char* x = (const char*)(seen + (t * heads + h) * a.rank);
        Split split = Split::of(end - t);
        for (int64_t p = 0; p < split.panels; p++)
            pack<T, LANES>([&](int i) { return row_at<T>(x, x_row, p * LANES + i); },
                           (int)std::min<int64_t>(LANES, split.in_panels - p * LANES), a.rank, panels + p * words);
        multiply<T>({x, x_row, panels, words, a.rank, split}, a.w_v + h * a.w_v_head, row, 0, a.value,
                    [&](int64_t i, int64_t n, int64_t count, const float* values) {
                        char* out = a.attend.out + (t + i) * a.attend.out_row + h * a.attend.out_head;
                        put_row<T>((Element*)out + n, count, values);
                    });
    }

    void run(Scratch& space) {
        int64_t blocks = (a.tokens + TOGETHER - 1) / TOGETHER, threads = a.attend.threads;
        int64_t panel = std::max(words_of<T>(a.nope) * lanes_of_rank(),
                                 (TOGETHER / LANES + 1) * words_of<T>(a.rank) * LANES);
        if (a.tokens * heads * a.rank * (a.nope + a.value) < 65536) threads = 1;
        space.reserve(Scratch::padded<Element>(a.tokens * heads * width) +
                      Scratch::padded<Element>(a.tokens * heads * a.rank) + threads * Scratch::padded<uint32_t>(panel));
        queries = space.take<Element>(a.tokens * heads * width);
        seen = space.take<Element>(a.tokens * heads * a.rank);
        uint32_t* panels = space.take<uint32_t>(threads * Scratch::padded<uint32_t>(panel) / 4);
        AttendArgs inner = a.attend;
        inner.q = (const char*)queries, inner.out = (char*)seen;
        inner.q_head = width * (int64_t)sizeof(Element), inner.q_row = heads * inner.q_head;
        inner.out_head = row, inner.out_row = heads * row;
        auto by_head = [&](auto some) {
            in_team(threads, [&](Member me) {
                int64_t begin, end;
                me.share(heads * blocks, 1, begin, end);
                for (int64_t i = begin; i < end; i++) {
                    int64_t t = i % blocks * TOGETHER;
                    some(i / blocks, t, std::min(t + TOGETHER, a.tokens),
                         panels + me.index * (Scratch::padded<uint32_t>(panel) / 4));
                }
            });
        };
        by_head([&](int64_t h, int64_t t, int64_t end, uint32_t* p) { absorb_some(h, t, end, p); });
        static thread_local Scratch buffers;
        attend<T>(inner, buffers);
        by_head([&](int64_t h, int64_t t, int64_t end, uint32_t* p) { expand_some(h, t, end, p); });
        space.release();
    }
};
