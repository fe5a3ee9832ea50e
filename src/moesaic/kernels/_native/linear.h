// The dense product, and the router's: a product in FP32 and the choice of experts.
#pragma once
#include "rows.h"

struct LinearArgs {
    const char *x, *w, *bias;
    char* y;
    int64_t x_row, w_row, tokens, inputs, outputs, threads;
};

struct GateArgs {
    const char* x;
    const float *w, *logit_bias, *bias;
    int32_t* ids;
    float* weights;
    int64_t x_row, tokens, inputs, threads;
    Router router;
};

template <class T> void linear(const LinearArgs& a, Scratch& space) {
    typedef typename T::Element Element;
    int64_t words = words_of<T>(a.inputs) * LANES;
    Split split = Split::of(a.tokens);
    space.reserve(Scratch::padded<uint32_t>(split.panels * words));
    uint32_t* panels = space.take<uint32_t>(split.panels * words);
    Left x = {a.x, a.x_row, panels, words, a.inputs, split};
    in_team(a.tokens * a.inputs * a.outputs < 196608 ? 1 : a.threads, [&](Member me) {
        for (int64_t p = me.index; p < split.panels; p += me.count)
            pack<T, LANES>([&](int i) { return row_at<T>(a.x, a.x_row, p * LANES + i); },
                           (int)std::min<int64_t>(LANES, split.in_panels - p * LANES), a.inputs, panels + p * words);
        if (split.panels) me.wait();
        int64_t n0, n1;
        me.share(a.outputs, 16, n0, n1);
        multiply<T>(x, a.w, a.w_row, n0, n1, [&](int64_t i, int64_t n, int64_t count, const float* values) {
            Element* y = (Element*)a.y + i * a.outputs + n;
            if (!a.bias) return put_row<T>(y, count, values);
            in_vectors(count, [&](int64_t at, auto lanes) {
                constexpr int L = decltype(lanes)::value;
                put<T, L>(y + at, get<Single, L>(values + at) + get<T, L>((const Element*)a.bias + n + at));
            });
        });
    });
    space.release();
}

// Rows in the model's dtype, weights in FP32, everything computed in FP32; 32 tokens at a time.
template <class T> void gate(const GateArgs& a, Scratch& space) {
    constexpr int64_t SOME = 32;
    int64_t experts = a.router.experts, words = a.inputs * LANES;
    int64_t threads = a.tokens * a.inputs * experts < 65536 ? 1 : a.threads;
    int64_t floats = SOME * a.inputs + (SOME / LANES + 1) * words + SOME * experts + 2 * experts + 2 * a.router.groups;
    int64_t own = Scratch::padded<float>(floats) / 4;
    space.reserve(threads * own * 4);
    float* memory = space.take<float>(threads * own);
    in_team(threads, [&](Member me) {
        float *rows = memory + me.index * own, *panels = rows + SOME * a.inputs;
        float *logits = panels + (SOME / LANES + 1) * words, *scores = logits + SOME * experts;
        float* choice = scores + experts;
        int64_t begin, end;
        me.share(a.tokens, 16, begin, end);
        for (int64_t t = begin; t < end; t += SOME) {
            int64_t m = std::min(SOME, end - t);
            Split split = Split::of(m);
            for (int64_t i = 0; i < m; i++)
                in_vectors(a.inputs, [&](int64_t at, auto lanes) {
                    constexpr int L = decltype(lanes)::value;
                    put<Single, L>(rows + i * a.inputs + at, get<T, L>(row_at<T>(a.x, a.x_row, t + i) + at));
                });
            for (int64_t p = 0; p < split.panels; p++)
                pack<Single, LANES>([&](int i) { return rows + (p * LANES + i) * a.inputs; },
                                    (int)std::min<int64_t>(LANES, split.in_panels - p * LANES), a.inputs,
                                    (uint32_t*)panels + p * words);
            multiply<Single>({(const char*)rows, a.inputs * 4, (uint32_t*)panels, words, a.inputs, split},
                             (const char*)a.w, a.inputs * 4, 0, experts,
                             [&](int64_t i, int64_t n, int64_t count, const float* values) {
                                 memcpy(logits + i * experts + n, values, (size_t)count * 4);
                             });
            for (int64_t i = 0; a.logit_bias && i < m; i++)
                add_row<Single>(logits + i * experts, a.logit_bias, experts, logits + i * experts);
            for (int64_t i = 0; i < m; i++)
                route_row(a.router, logits + i * experts, a.bias, scores, choice, a.ids + (t + i) * a.router.top_k,
                          a.weights + (t + i) * a.router.top_k);
        }
    });
    space.release();
}
