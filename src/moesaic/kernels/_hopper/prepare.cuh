// What goes before and behind the products. One launch encodes token rows while its first thread block, or the first cluster of
// them, sorts by expert. At the end a token's results are summed.
#pragma once
#include "room.cuh"

#define PREPARERS 512
#define COMBINERS 128
#define SORT_WARPS (PREPARERS / 32)
#define MOST_EXPERTS PREPARERS

// One token's choices are their own tiles, as they are.
DEVICE void sort_one(const Preparation &p) {
#pragma unroll 1
    for (int i = threadIdx.x; i < p.counter_count; i += 32) p.counters[i] = 0;
    __syncwarp();
    int tiles = 0;
#pragma unroll 1
    for (int first = 0; first < p.routed; first += 32) {
        int r = first + threadIdx.x, e = r < p.routed ? p.ids[r] : -1;
        bool real = e >= 0 && e < p.experts;
        u32 all = __ballot_sync(0xFFFFFFFFu, real);
        int at = tiles + __popc(all & ((1u << threadIdx.x) - 1));
        if (real) p.order[at] = r, p.tiles[at] = make_int4(e, at, 1, HEIGHT_0);
        tiles += __popc(all);
    }
    if (threadIdx.x == 0) p.counters[0] = tiles;
}

DEVICE int expert_of(const Preparation &p, int r, int end) {
    int e = r < end ? p.ids[r] : -1;
    return e < p.experts ? e : -1;
}

// Of the sums of all threads before, and of all: a is theirs (inclusive of it), b another such number.
struct Ends {
    int a, b, all_a, all_b;
};

DEVICE Ends ends_of(int a, int b, int2 *sums) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        int before = __shfl_up_sync(0xFFFFFFFFu, a, step), beside = __shfl_up_sync(0xFFFFFFFFu, b, step);
        if (lane >= step) a += before, b += beside;
    }
    if (lane == 31) sums[warp] = make_int2(a, b);
    __syncthreads();
    Ends ends = {a, b, 0, 0};
#pragma unroll 4
    for (int w = 0; w < SORT_WARPS; w++) {
        int2 sum = sums[w];
        if (w < warp) ends.a += sum.x, ends.b += sum.y;
        ends.all_a += sum.x, ends.all_b += sum.y;
    }
    return ends;
}

// Rows in order of their expert, stable, and tiles of up to MOST of them, each expert's of equal height. Where full tiles are
// cheaper and equal ones would have more than 72 rows, full ones come first, the rest behind them (from 0 to 80 rows it makes no
// difference; up to 96 it costs 3% to 9%). Every warp counts the experts of its own stretch of rows, then hands out places. rank:
// of this block among those that share the rows. This runs once and from cold memory: what is short is fast.
DEVICE void sort_rows(const Preparation &p, int rank, int blocks) {
    if (p.tokens == 1) {
        if (threadIdx.x < 32) sort_one(p);
        return;
    }
    __shared__ int count[SORT_WARPS][MOST_EXPERTS];
    __shared__ int mine[MOST_EXPERTS], place[MOST_EXPERTS];  // rows of this block; where the first of them goes
    __shared__ int2 sums[SORT_WARPS];
    constexpr int AHEAD = 4;
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, e = thread;  // of PREPARERS = MOST_EXPERTS threads
    int threads = PREPARERS * blocks, share = (p.routed + threads - 1) / threads * 32;
    int begin = (rank * SORT_WARPS + warp) * share, end = min(p.routed, begin + share);
#pragma unroll 1
    for (int i = lane; i < p.experts; i += 32) count[warp][i] = 0;
    if (rank == 0)
#pragma unroll 1
        for (int i = thread; i < p.counter_count; i += PREPARERS) p.counters[i] = 0;
    __syncwarp();
#pragma unroll 1
    for (int from = begin; from < end; from += 32 * AHEAD) {
        int ids[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) ids[k] = expert_of(p, from + 32 * k + lane, end);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            u32 same = __match_any_sync(0xFFFFFFFFu, ids[k]);
            if (ids[k] >= 0 && __ffs(same) - 1 == lane) count[warp][ids[k]] += __popc(same);
            __syncwarp();
        }
    }
    __syncthreads();
    int all = 0, before = 0;
    if (e < p.experts)
#pragma unroll 4
        for (int w = 0; w < SORT_WARPS; w++) {
            int each = count[w][e];
            count[w][e] = all;
            all += each;
        }
    if (blocks > 1) {
        mine[e] = all;
        cluster_arrive();
        cluster_wait();
        all = 0;
#pragma unroll 1
        for (int b = 0; b < blocks; b++) {
            if (b == rank) before = all;
            all += load_at(shared_address(mine + e), b);
        }
        cluster_arrive();  // others may end once all have read
    }
    int tiles = (all + MOST - 1) / MOST;
    Ends ends = ends_of(all, tiles, sums);
    int first = ends.a - all;
    place[e] = first + before;
    if (rank == 0) {
        if (thread == 0) p.counters[0] = ends.all_b;
        int height = tiles > 1 ? (all + tiles - 1) / tiles : all;
        if (TURNS_FULL && tiles > 1 && height > 72) height = MOST;
#pragma unroll 1
        for (int t = 0; t < tiles; t++) {
            int rows = min(height, all - t * height);
            p.tiles[ends.b - tiles + t] = make_int4(e, first + t * height, rows, height_of(rows));
        }
#pragma unroll 1
        for (int r = ends.all_a + thread; r < p.routed; r += PREPARERS) p.order[r] = -1;
    }
    __syncthreads();
#pragma unroll 1
    for (int from = begin; from < end; from += 32 * AHEAD) {
        int ids[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) ids[k] = expert_of(p, from + 32 * k + lane, end);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            int id = ids[k];
            u32 same = __match_any_sync(0xFFFFFFFFu, id);
            int at = id >= 0 ? place[id] + count[warp][id] + __popc(same & ((1u << lane) - 1)) : 0;
            __syncwarp();
            if (id >= 0) p.order[at] = from + 32 * k + lane;
            if (id >= 0 && __ffs(same) - 1 == lane) count[warp][id] += __popc(same);
            __syncwarp();
        }
    }
    if (blocks > 1) cluster_wait();
}

// Four neighbouring elements of a row per lane, in groups of 128; zero behind the end.
DEVICE void load_four(const u8 *row, int at, int columns, float (&v)[4]) {
    uint2 pairs = make_uint2(0, 0);
    if (at < columns) pairs = *(const uint2 *)(row + 2 * at);
    v[0] = bf16_low(pairs.x), v[1] = bf16_high(pairs.x), v[2] = bf16_low(pairs.y), v[3] = bf16_high(pairs.y);
}

DEVICE void load_encoded(const u8 *row, int at, int columns, float (&v)[4]) {
    if (!CODES8) return load_four(row, at, columns, v);
    u32 bytes = at < columns ? *(const u32 *)(row + at) : 0;
    float2 low = e4m3_values(bytes & 0xFFFF), high = e4m3_values(bytes >> 16);
    v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
}

// 128 elements of token t, and the scale of that group or row.
DEVICE void put_row(const Preparation &p, int t, int g, const float (&v)[1][4], float scale, u8 *space, int lane) {
    bool scales = GROUP_SCALES || ((ENCODING == TOKEN || ENCODING == NV4_DYNAMIC || (ENCODING == TENSOR_DYNAMIC && p.rows.scale_row)) && g == 0);
    put_elements<1, 4>({p.rows.data + t * p.rows.stride}, {true}, g * 128, v, {space}, lane);
    if (scales && lane == 0) p.rows.scales[(i64)t * p.rows.scale_row + (i64)g * p.rows.scale_group] = scale;
}

// A warp encodes a row (where its scale needs all of it) or 128 elements of one.
DEVICE void encode_rows(const Preparation &p, int warp, int lane, u8 *space) {
    constexpr bool WHOLE = ENCODING == TOKEN || ENCODING == NV4_DYNAMIC;
    int groups = p.width / 128, t = WHOLE ? warp : warp / groups;
    if (t >= p.tokens) return;
    const u8 *row = p.source + t * p.source_stride;
    float scale[1] = {ENCODING == TENSOR || ENCODING == NV4 ? *p.rows.scales : 1.0f};
    if (WHOLE) {
        float top[1] = {}, v[4];
        for (int g = 0; g < groups; g++) {
            load_four(row, g * 128 + 4 * lane, p.columns, v);
            top[0] = larger(larger(top[0], larger(fabsf(v[0]), fabsf(v[1]))), larger(fabsf(v[2]), fabsf(v[3])));
        }
        largest_of<32>(top);
        scale[0] = scale_of_row(top[0]);
    }
    for (int g = WHOLE ? 0 : warp % groups; g < (WHOLE ? groups : warp % groups + 1); g++) {
        float v[1][4];
        load_four(row, g * 128 + 4 * lane, p.columns, v[0]);
        encode_elements(v, scale);
        put_row(p, t, g, v, scale[0], space, lane);
    }
}

// Rows that are encoded already: only put in order.
DEVICE void order_rows(const Preparation &p, int warp, int lane, u8 *space) {
    int groups = p.width / 128, t = warp / groups, g = warp % groups;
    if (t >= p.tokens) return;
    float v[1][4], scale = p.given ? p.given[(i64)t * p.given_row + g * p.given_group] : 1.0f;
    load_encoded(p.source + t * p.source_stride, g * 128 + 4 * lane, p.columns, v[0]);
    put_row(p, t, g, v, scale, space, lane);
}

template <bool ENCODE> DEVICE void prepare_rows(const Preparation &p) {
    __shared__ __align__(16) u8 spaces[PREPARERS / 32][256];
    wait_for_grid();
    let_next_grid_start();
    int sorters = cluster_blocks();
    if (blockIdx.x < sorters) return sort_rows(p, blockIdx.x, sorters);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, at = (blockIdx.x - sorters) * (PREPARERS / 32) + warp;
    if (ENCODE)
        encode_rows(p, at, lane, spaces[warp]);
    else
        order_rows(p, at, lane, spaces[warp]);
}

extern "C" __global__ void __launch_bounds__(PREPARERS) prepare(const __grid_constant__ Preparation p) { prepare_rows<true>(p); }

extern "C" __global__ void __launch_bounds__(PREPARERS) prepare_encoded(const __grid_constant__ Preparation p) { prepare_rows<false>(p); }

// out[t] = sum over a of weights[t, a] y[t A + a], of ids >= 0, in FP32 in the order of a. Eight elements per thread.
extern "C" __global__ void __launch_bounds__(COMBINERS)
    combine(const u16 *y, const int *ids, const float *weights, u16 *out, int tokens, int hidden, int top_k) {
    int per = hidden / 8, at = blockIdx.x * COMBINERS + threadIdx.x, t = at / per, column = at % per * 8;
    if (t >= tokens) return;
    float sum[8] = {};
    y += (i64)t * top_k * hidden + column, ids += t * top_k, weights += t * top_k;
    constexpr int AHEAD = 8;  // rows that are on their way at once
#pragma unroll 1
    for (int first = 0; first < top_k; first += AHEAD, y += AHEAD * (i64)hidden, ids += AHEAD, weights += AHEAD) {
        float weight[AHEAD];
        bool wanted[AHEAD];
        uint4 q[AHEAD];
        const u16 *row = y;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            wanted[i] = i < top_k - first && ids[i] >= 0;
            weight[i] = i < top_k - first ? weights[i] : 0.0f;
        }
        if (first == 0) {  // whoever wrote ids and weights had ended before `prepare` let `experts` start
            wait_for_grid();
            let_next_grid_start();
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++, row += hidden) {
            weight[i] = wanted[i] ? weight[i] : 0.0f, q[i] = make_uint4(0, 0, 0, 0);
            if (wanted[i]) q[i] = *(const uint4 *)row;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            u32 pairs[4] = {q[i].x, q[i].y, q[i].z, q[i].w};
#pragma unroll
            for (int k = 0; k < 4; k++) sum[2 * k] += weight[i] * bf16_low(pairs[k]), sum[2 * k + 1] += weight[i] * bf16_high(pairs[k]);
        }
    }
    *(uint4 *)(out + (i64)t * hidden + column) = make_uint4(bf16_pair(sum[0], sum[1]), bf16_pair(sum[2], sum[3]), bf16_pair(sum[4], sum[5]), bf16_pair(sum[6], sum[7]));
}
