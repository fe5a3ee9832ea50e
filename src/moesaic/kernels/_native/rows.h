// What happens to each row by itself: norms, rotary embedding, activation, routing.
#pragma once
#include "products.h"
#include "team.h"

// Runs body(i) for i in [0, n), in a team if the work (elements touched) is worth waking it.
template <class Body> void each(int64_t n, int64_t work, int64_t threads, const Body& body) {
    in_team(work < 65536 ? 1 : threads, [&](Member me) {
        int64_t begin, end;
        me.share(n, 1, begin, end);
        for (int64_t i = begin; i < end; i++) body(i);
    });
}

// Calls f(at, Count<L>) over [0, n): whole vectors, then shorter ones; single places at the end.
template <class Body> INLINE void in_vectors(int64_t n, const Body& f) {
    int64_t at = 0;
    for (; at + LANES <= n; at += LANES) f(at, Count<LANES>());
    for (; at + 4 <= n; at += 4) f(at, Count<4>());
    for (; at < n; at++) f(at, Count<1>());
}
template <class T, int L> INLINE F<L> get(const typename T::Element* at) {
    if constexpr (L == 1) return F<1>{T::one(at)};
    else return T::template get<L>(at);
}
template <class T, int L> INLINE void put(typename T::Element* at, F<L> x) {
    if constexpr (L == 1) T::put_one(at, x[0]);
    else T::template put<L>(at, x);
}

// x / sqrt(mean(x^2) + eps) * w
template <class T>
INLINE void norm_row(const typename T::Element* x, const typename T::Element* w, int64_t n, float eps,
                     typename T::Element* y) {
    F<LANES> squares = {};
    float rest = 0;
    in_vectors(n, [&](int64_t at, auto lanes) {
        constexpr int L = decltype(lanes)::value;
        F<L> v = get<T, L>(x + at);
        if constexpr (L == LANES) squares += v * v;
        else rest += sum_of<L>(v * v);
    });
    float scale = 1.0f / std::sqrt((sum_of<LANES>(squares) + rest) / (float)n + eps);
    in_vectors(n, [&](int64_t at, auto lanes) {
        constexpr int L = decltype(lanes)::value;
        put<T, L>(y + at, get<T, L>(x + at) * scale * get<T, L>(w + at));
    });
}

template <class T>
INLINE void add_row(const typename T::Element* x, const typename T::Element* z, int64_t n, typename T::Element* y) {
    in_vectors(n, [&](int64_t at, auto lanes) {
        constexpr int L = decltype(lanes)::value;
        put<T, L>(y + at, get<T, L>(x + at) + get<T, L>(z + at));
    });
}

// Pairs (2i, 2i+1), or (i, i + half): all first elements come out in front of all second ones.
template <class T>
INLINE void rotate_row(const typename T::Element* x, const float* cos, const float* sin, int64_t half, bool interleaved,
                       typename T::Element* y) {
    in_vectors(half, [&](int64_t at, auto lanes) {
        constexpr int L = decltype(lanes)::value;
        F<L> a, b;
        if (interleaved) T::template pairs<L>(x + 2 * at, a, b);
        else a = get<T, L>(x + at), b = get<T, L>(x + half + at);
        F<L> c = get<Single, L>(cos + at), s = get<Single, L>(sin + at);
        put<T, L>(y + at, a * c - b * s);
        put<T, L>(y + half + at, b * c + a * s);
    });
}

struct Activation {
    int64_t kind;  // 0 silu, 1 swiglu_oai
    double limit, alpha;
};
template <int L> INLINE F<L> activated(const Activation& how, F<L> gate, F<L> up) {
    if (how.kind == 0) return gate * sigmoid<L>(gate) * up;
    float limit = (float)how.limit, alpha = (float)how.alpha;
    gate = gate > limit ? all<L>(limit) : gate;
    up = up > limit ? all<L>(limit) : up;
    up = up < -limit ? all<L>(-limit) : up;
    return (up + 1.0f) * gate * sigmoid<L>(gate * alpha);
}
template <class T>
INLINE void activate_row(const Activation& how, const typename T::Element* gate_up, int64_t n, typename T::Element* y) {
    in_vectors(n, [&](int64_t at, auto lanes) {
        constexpr int L = decltype(lanes)::value;
        put<T, L>(y + at, activated<L>(how, get<T, L>(gate_up + at), get<T, L>(gate_up + n + at)));
    });
}

struct Router {
    int64_t experts, top_k, scoring, renormalize, groups, top_groups, two_best;
    double scale;
};
enum Scoring { SIGMOID, SOFTMAX, SOFTMAX_TOPK };

// Reports the places of the `count` largest of n values, best first, and lower places before equal ones. Spoils them.
template <class Report>
INLINE void choose(float* values, int64_t n, int64_t count, const Report& report) {
    for (int64_t c = 0; c < count; c++) {
        int64_t best = -1;
        for (int64_t i = 0; i < n; i++)
            if (values[i] == values[i] && (best < 0 || values[i] > values[best])) best = i;
        report(c, best);
        values[best] = NAN;  // taken; -inf would be confused with what the groups left out
    }
}

// The softmax of n values; in place if x is y.
INLINE void soften(const float* x, int64_t n, float* y) {
    float top = -INFINITY, total = 0;
    for (int64_t i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
    in_vectors(n, [&](int64_t at, auto lanes) {
        constexpr int L = decltype(lanes)::value;
        put<Single, L>(y + at, exponential_below<L>(get<Single, L>(x + at) - top));
    });
    for (int64_t i = 0; i < n; i++) total += y[i];
    for (int64_t i = 0; i < n; i++) y[i] /= total;
}

// One token: FP32 logits -> ids and weights. `scores` and `choice` are space for `experts` floats, `groups` for more.
INLINE void route_row(const Router& r, const float* logits, const float* bias, float* scores, float* choice,
                      int32_t* ids, float* weights) {
    if (r.scoring == SOFTMAX) soften(logits, r.experts, scores);
    else if (r.scoring == SOFTMAX_TOPK) memcpy(scores, logits, (size_t)r.experts * 4);
    else in_vectors(r.experts, [&](int64_t at, auto lanes) {
        constexpr int L = decltype(lanes)::value;
        F<L> x = get<Single, L>(logits + at);
        put<Single, L>(scores + at, x < -80.0f ? exponential_below<L>(x) : sigmoid<L>(x));
    });
    for (int64_t e = 0; e < r.experts; e++) {
        float c = scores[e] + (bias ? bias[e] : 0.0f);
        choice[e] = c == c ? c : INFINITY;  // a NaN is chosen, so that it is seen
    }
    if (r.groups > 1) {
        int64_t size = r.experts / r.groups;
        float* group = choice + r.experts;
        for (int64_t g = 0; g < r.groups; g++) {
            float first = -INFINITY, second = -INFINITY;
            for (const float *c = choice + g * size, *end = c + size; c < end; c++)
                if (*c > first) second = first, first = *c;
                else if (*c > second) second = *c;
            group[g] = r.two_best ? first + second : first;
        }
        float* kept = group + r.groups;
        for (int64_t g = 0; g < r.groups; g++) kept[g] = 0;
        choose(group, r.groups, r.top_groups, [&](int64_t, int64_t g) { kept[g] = 1; });
        for (int64_t e = 0; e < r.experts; e++)
            if (!kept[e / size]) choice[e] = -INFINITY;
    }
    choose(choice, r.experts, r.top_k, [&](int64_t a, int64_t e) { ids[a] = (int32_t)e, weights[a] = scores[e]; });
    if (r.scoring == SOFTMAX_TOPK) soften(weights, r.top_k, weights);
    float sum = 0;
    for (int64_t a = 0; a < r.top_k; a++) sum += weights[a];
    float factor = (float)r.scale / (r.renormalize ? sum + 1e-20f : 1.0f);
    for (int64_t a = 0; a < r.top_k; a++) weights[a] *= factor;
}
