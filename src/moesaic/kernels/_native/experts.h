// The mixture's experts: sort by expert, two products per expert, weigh and add up.
//
// A *group* is the rows of one expert. Every member of the team computes its share of the columns of every group: the
// load is even whatever the routing. Groups are worked through in waves whose rows fit into the cache:
//     pack the rows into panels | gate and up, activation | down, added to the tokens
// with a barrier between. A member owns its columns of the output, so that nothing is added by two.
#pragma once
#include "rows.h"

struct Bank {  // the weights of experts: addresses, and bytes from expert to expert
    const char *w13, *w2, *bias13, *bias2;
    int64_t w13_expert, w2_expert, bias13_expert, bias2_expert, count, width;
};

struct ExpertsArgs {
    const char *x, *onto;  // onto: rows [tokens, hidden] to which the result is added, or none
    char* y;
    const int32_t* ids;    // none: all tokens go to expert 0, with weight 1
    const float* weights;
    int64_t x_row, onto_row, tokens, hidden, top_k, threads;
    Activation activation;
    Bank bank;
};

struct Group {
    const char *w13, *w2, *bias13, *bias2;
    int64_t width, first, rows;          // its rows are order[first ..]
    Split split;
    int64_t panel, hidden_panel, hidden_row;  // where its rows lie in the space of its wave: words, words, elements
    bool packed, last;                        // in its wave: are there panels; is it the last
};

constexpr int64_t WAVE = 1 << 18;  // words of packed rows

template <class T> struct Experts {
    typedef typename T::Element Element;
    const ExpertsArgs& a;
    int64_t k_words, w13_row, rows, groups;
    int32_t* order;   // token of each row
    float* weight_of;
    Group* group;
    float* sums;      // [tokens][hidden]; y itself for FP32
    uint32_t *panels, *hidden_panels;
    Element* hidden_rows;

    // Counting sort.
    void sort(int64_t* place) {
        int64_t E = a.bank.count, n = a.tokens * a.top_k;
        for (int64_t e = 0; e <= E; e++) place[e] = 0;
        for (int64_t i = 0; i < n; i++)
            if (a.ids[i] >= 0 && a.ids[i] < E) place[a.ids[i] + 1]++;
        for (int64_t e = 0; e < E; e++) {
            if (place[e + 1]) add_group(e, place[e + 1]);
            place[e + 1] += place[e];
        }
        for (int64_t i = 0; i < n; i++)
            if (a.ids[i] >= 0 && a.ids[i] < E) {
                int64_t at = place[a.ids[i]]++;
                order[at] = (int32_t)(i / a.top_k);
                weight_of[at] = a.weights[i];
            }
    }

    void take_all() {
        for (int64_t t = 0; t < a.tokens; t++) order[t] = (int32_t)t, weight_of[t] = 1;
        if (a.tokens) add_group(0, a.tokens);
    }

    void add_group(int64_t e, int64_t count) {
        const Bank& b = a.bank;
        group[groups++] = {b.w13 + e * b.w13_expert, b.w2 + e * b.w2_expert,
                           b.bias13 ? b.bias13 + e * b.bias13_expert : nullptr,
                           b.bias2 ? b.bias2 + e * b.bias2_expert : nullptr, b.width, rows, count, Split::of(count),
                           0, 0, 0, false, false};
        rows += count;
    }

    // Forms waves and gives their groups space; reserves what the largest wave needs.
    void plan(Scratch& space) {
        int64_t most_packed = 0, most_hidden = 0, most_rows = 0, packed = 0, hidden = 0, elements = 0;
        for (int64_t g = 0; g < groups; g++) {
            Group& of = group[g];
            of.panel = packed, of.hidden_panel = hidden, of.hidden_row = elements;
            packed += of.split.panels * k_words * LANES;
            hidden += of.split.panels * words_of<T>(of.width) * LANES;
            elements += of.split.dots * of.width;
            most_packed = std::max(most_packed, packed), most_hidden = std::max(most_hidden, hidden);
            most_rows = std::max(most_rows, elements);
            of.packed = packed > 0, of.last = packed >= WAVE || g + 1 == groups;
            if (of.last) packed = hidden = elements = 0;
        }
        int64_t own_sums = T::PER_WORD == 1 ? 0 : a.tokens * a.hidden;
        space.reserve(Scratch::padded<uint32_t>(most_packed) + Scratch::padded<uint32_t>(most_hidden) +
                      Scratch::padded<Element>(most_rows) + Scratch::padded<float>(own_sums));
        panels = space.take<uint32_t>(most_packed);
        hidden_panels = space.take<uint32_t>(most_hidden);
        hidden_rows = space.take<Element>(most_rows);
        sums = T::PER_WORD == 1 ? (float*)a.y : space.take<float>(own_sums);
    }

    const Element* row(int64_t r) const { return row_at<T>(a.x, a.x_row, order[r]); }

    void pack_rows(const Group& g, Member me, int64_t& turn) const {
        for (int64_t p = 0; p < g.split.panels; p++) {
            if (turn++ % me.count != me.index) continue;
            int64_t first = g.first + p * LANES, count = g.first + g.split.in_panels - first;
            pack<T, LANES>([&](int i) { return row(first + i); }, count < LANES ? (int)count : LANES, a.hidden,
                           panels + g.panel + p * k_words * LANES);
        }
    }

    INLINE float bias13(const Group& g, int64_t i) const { return g.bias13 ? T::one((const Element*)g.bias13 + i) : 0; }

    // Rows [i, i + N) of gate and up for MV panels -> N words or pairs of the hidden panel.
    template <int MV, int N> INLINE void gate_up_tile(const Group& g, int64_t panel, int64_t i) const {
        F<LANES> gate[N][MV], up[N][MV];
        for (int j = 0; j < N; j++)
            for (int v = 0; v < MV; v++)
                gate[j][v] = all<LANES>(bias13(g, i + j)), up[j][v] = all<LANES>(bias13(g, g.width + i + j));
        Panels x = {panels + g.panel + panel * k_words * LANES, k_words * LANES, LANES};
        product<T, LANES, MV, N>(x, g.w13 + i * w13_row, w13_row, a.hidden, gate);
        product<T, LANES, MV, N>(x, g.w13 + (g.width + i) * w13_row, w13_row, a.hidden, up);
        int64_t words = words_of<T>(g.width) * LANES;
        for (int v = 0; v < MV; v++) {
            uint32_t* out = hidden_panels + g.hidden_panel + (panel + v) * words + i / T::PER_WORD * LANES;
            for (int j = 0; j < N; j += T::PER_WORD) {
                F<LANES> first = activated<LANES>(a.activation, gate[j][v], up[j][v]), second = {};
                if (T::PER_WORD == 2 && j + 1 < N)
                    second = activated<LANES>(a.activation, gate[(j + 1) % N][v], up[(j + 1) % N][v]);
                store(out + j / T::PER_WORD * LANES, T::template join<LANES>(first, second));
            }
        }
    }
    template <int MV> void gate_up_panels(const Group& g, int64_t panel, int64_t i0, int64_t i1) const {
        constexpr int N = WIDE ? 16 / MV : 4;
        int64_t i = i0;
        for (; i + N <= i1; i += N) gate_up_tile<MV, N>(g, panel, i);
        for (; i + 2 <= i1; i += 2) gate_up_tile<MV, 2>(g, panel, i);
        for (; i < i1; i++) gate_up_tile<MV, 1>(g, panel, i);
    }
    void gate_up(const Group& g, int64_t i0, int64_t i1) const {
        int64_t p = 0;
        for (; p + 2 <= g.split.panels; p += 2) gate_up_panels<2>(g, p, i0, i1);
        for (; p < g.split.panels; p++) gate_up_panels<1>(g, p, i0, i1);
        in_handfuls(0, g.split.dots,
                    [&](int64_t d, auto rows) { gate_up_dots<decltype(rows)::value>(g, d, i0, i1); });
    }
    template <int MR> void gate_up_dots(const Group& g, int64_t d, int64_t i0, int64_t i1) const {
        float gate[MR][COLUMNS], up[MR][COLUMNS];
        const Element* x[MR];
        for (int m = 0; m < MR; m++) x[m] = row(g.first + g.split.in_panels + d + m);
        for (int64_t i = i0; i < i1; i += COLUMNS) {
            int64_t n = i1 - i < COLUMNS ? i1 - i : COLUMNS;
            dots<T, MR>(x, g.w13 + i * w13_row, w13_row, n, a.hidden, gate);
            dots<T, MR>(x, g.w13 + (g.width + i) * w13_row, w13_row, n, a.hidden, up);
            for (int m = 0; m < MR; m++) {
                Element* out = hidden_rows + g.hidden_row + (d + m) * g.width + i;
                in_vectors(n, [&](int64_t at, auto lanes) {
                    constexpr int L = decltype(lanes)::value;
                    F<L> u = get<Single, L>(gate[m] + at), v = get<Single, L>(up[m] + at);
                    if (g.bias13) {
                        u += get<T, L>((const Element*)g.bias13 + i + at);
                        v += get<T, L>((const Element*)g.bias13 + g.width + i + at);
                    }
                    put<T, L>(out + at, activated<L>(a.activation, u, v));
                });
            }
        }
    }

    // Columns [d0, d1) of the second product, weighed and added to the tokens' sums.
    void down(const Group& g, int64_t d0, int64_t d1) const {
        int64_t row = g.width * (int64_t)sizeof(Element), words = words_of<T>(g.width) * LANES;
        const char* rows = (const char*)(hidden_rows + g.hidden_row - g.split.in_panels * g.width);
        Left x = {rows, row, hidden_panels + g.hidden_panel, words, g.width, g.split};
        multiply<T>(x, g.w2, row, d0, d1, [&](int64_t i, int64_t n, int64_t count, const float* values) {
            float* sum = sums + order[g.first + i] * a.hidden + n;
            float weight = weight_of[g.first + i];
            const Element* bias = g.bias2 ? (const Element*)g.bias2 + n : nullptr;
            in_vectors(count, [&](int64_t at, auto lanes) {
                constexpr int L = decltype(lanes)::value;
                F<L> y = get<Single, L>(values + at);
                if (bias) y += get<T, L>(bias + at);
                put<Single, L>(sum + at, get<Single, L>(sum + at) + y * weight);
            });
        });
    }

    void begin_sum(int64_t t, int64_t d, int64_t count) const {
        float* sum = sums + t * a.hidden + d;
        if (!a.onto) return (void)memset(sum, 0, (size_t)count * 4);
        in_vectors(count, [&](int64_t at, auto lanes) {
            constexpr int L = decltype(lanes)::value;
            put<Single, L>(sum + at, get<T, L>(row_at<T>(a.onto, a.onto_row, t) + d + at));
        });
    }

    void work(Member me) const {
        int64_t d0, d1, turn = 0;
        me.share(a.hidden, 16, d0, d1);
        for (int64_t t = 0; t < a.tokens; t++) begin_sum(t, d0, d1 - d0);
        for (int64_t g = 0, end; g < groups; g = end) {
            for (end = g + 1; !group[end - 1].last;) end++;
            for (int64_t i = g; i < end; i++) pack_rows(group[i], me, turn);
            if (group[end - 1].packed) me.wait();
            for (int64_t i = g; i < end; i++) {
                int64_t i0, i1;
                me.share(group[i].width, 16, i0, i1);
                gate_up(group[i], i0, i1);
            }
            me.wait();
            for (int64_t i = g; i < end; i++) down(group[i], d0, d1);
        }
        if (T::PER_WORD == 1) return;
        for (int64_t t = 0; t < a.tokens; t++)
            put_row<T>((Element*)a.y + t * a.hidden + d0, d1 - d0, sums + t * a.hidden + d0);
    }

    explicit Experts(const ExpertsArgs& args) : a(args) {}

    void run(Scratch& space) {
        static thread_local Scratch buffers;
        int64_t E = a.bank.count, most = a.ids ? a.tokens * a.top_k : a.tokens;
        space.reserve(Scratch::padded<int64_t>(E + 1) + Scratch::padded<Group>(E) + 2 * Scratch::padded<float>(most));
        int64_t* place = space.take<int64_t>(E + 1);
        group = space.take<Group>(E);
        order = space.take<int32_t>(most);
        weight_of = space.take<float>(most);
        k_words = words_of<T>(a.hidden), w13_row = a.hidden * (int64_t)sizeof(Element), rows = groups = 0;
        if (a.ids) sort(place);
        else take_all();
        plan(buffers);
        in_team(rows * a.hidden * a.bank.width < 65536 ? 1 : a.threads, [&](Member me) { work(me); });
        buffers.release();
    }
};
