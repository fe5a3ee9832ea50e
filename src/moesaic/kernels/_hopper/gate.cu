// Gate product and expert choice of few rows, in one launch: a cluster of thread blocks has HEIGHT rows of x.
//
// Block i of a cluster multiplies the rows with TILE experts' weights, in one of `splits` parts of K, of which its warps take
// STEP elements in turn. The first AHEAD steps' weights are on their way, in registers, before the kernel in front has ended. Each row's
// logits are sent to a block of the cluster, where a warp chooses the row's experts. Nothing passes through memory.
//
// Weights are FP32, of which the tensor core takes the upper 11 bits and, in a product of its own, 11 of the other 13, if there
// are any (weights that were stored in BF16 have none); rows of BF16 are TF32 numbers as they are. It cuts low bits off a sum each time it adds to it: so a step has a sum of its own, the lower
// bits' first, and steps are added to one another outside.
#include "base.cuh"

#define WARPS 8
#define THREADS (32 * WARPS)
#define TILE 16
#define HEIGHT 8
#define STEP 64
#define MOST_BLOCKS 16 /* of a cluster, which has a power of two; where it has fewer than HEIGHT, a block has several rows */
#define MOST_CHOSEN 32
#define NOTHING __int_as_float(0xFF800000) /* minus infinity */

// Scoring, as gate.py numbers it.
#define SOFTMAX 0
#define SIGMOID 1
#define LATE 2  // chosen by logits, weighted by the softmax of the chosen

// As gate.py packs them. Strides: elements.
struct Gate {
    const u16 *x;       // BF16 [rows, K]
    const float *w;     // [experts, K]
    const float *logit_bias, *bias;  // [experts]: of logits, and of the choice; or null
    const i64 *live;    // [rows]: 0 for padding; or null
    u64 *counts;        // [experts], to which choices are added; or null
    int *ids;           // [rows, top_k]
    float *weights;     // [rows, top_k]
    i64 x_stride, w_stride;
    int rows, experts, steps, tiles, splits, top_k, scoring, renormalize;
    float scale;
};

struct Room {
    float sums[WARPS][HEIGHT][TILE];
    float logits[MOST_BLOCKS * TILE];  // [split, row of this block's, expert]
    int ids[HEIGHT][MOST_CHOSEN];      // of each row of this block's
    float scores[HEIGHT][MOST_CHOSEN];
};

extern "C" __device__ const int room_bytes = sizeof(Room);

// A step of two experts' weights: eight elements of each half for each of four lanes.
struct Step {
    float4 w[2][2][2];  // half, row, part
};

DEVICE void load(Step &to, const Gate &g, int tile, int step, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = min(tile * TILE + lane / 4 + 8 * r, g.experts - 1);
        const float *from = g.w + row * g.w_stride + (i64)step * STEP + lane % 4 * 8;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < 2; i++) to.w[half][r][i] = *(const float4 *)(from + 32 * half + 4 * i);
    }
}

DEVICE float of(const float4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

DEVICE u32 upper_bits(float v) { return __float_as_uint(v) & 0xFFFFE000u; }

// Of eight operands: what the tensor core takes of them, or what it leaves.
template <bool LOW> DEVICE void multiply_part(float (&part)[2][4], const Step &mine, const uint4 (&x)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 pair = i == 0 ? x[half].x : i == 1 ? x[half].y : i == 2 ? x[half].z : x[half].w, a[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float v = of(mine.w[half][k % 2][i / 2], i % 2 * 2 + k / 2), upper = __uint_as_float(upper_bits(v));
                a[k] = __float_as_uint(LOW ? v - upper : upper);
            }
            multiply_tf32(part[half], a[0], a[1], a[2], a[3], pair << 16, pair & 0xFFFF0000u);
        }
}

// sums: of experts lane / 4 and + 8 with rows 2 (lane % 4) and the next one.
DEVICE void multiply(float (&sums)[4], const Step &mine, const uint4 (&x)[2]) {
    float part[2][4] = {};
    u32 rest = 0;
#pragma unroll
    for (int i = 0; i < 32; i++) rest |= __float_as_uint(of(mine.w[i / 16][i / 8 % 2][i / 4 % 2], i % 4));
    if (__any_sync(0xFFFFFFFFu, rest & 0x1FFFu)) multiply_part<true>(part, mine, x);
    multiply_part<false>(part, mine, x);
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] += part[0][i] + part[1][i];
}

template <class T> DEVICE T added(T x) {
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
}

// Orders as the number does; NaN is the largest, and minus zero equals zero. Never 0, which is for what is taken.
DEVICE u32 ordered(float x) {
    u32 bits = __float_as_uint(x + 0.0f);
    return x != x ? 0xFFFFFFFFu : bits >> 31 ? ~bits : bits | 0x80000000u;
}

// But for NaN.
DEVICE float largest(float x) {
    u32 found = __reduce_max_sync(0xFFFFFFFFu, x == x ? ordered(x) : 0);
    return __uint_as_float(found >> 31 ? found & 0x7FFFFFFFu : ~found);
}

// What a lane knows of its own experts, PER_LANE neighbours, whatever the row.
struct Experts {
    float logit_bias[PER_LANE], bias[PER_LANE];
    DEVICE_MEMBER Experts(const Gate &g, int lane) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            int e = lane * PER_LANE + i;
            logit_bias[i] = g.logit_bias && e < g.experts ? g.logit_bias[e] : 0.0f;
            bias[i] = g.bias && e < g.experts ? g.bias[e] : 0.0f;
        }
    }
};

// A warp chooses a row's experts. logits: [split, `rows` of them, experts].  ids, scores: room for the chosen.
DEVICE void choose(const Gate &g, const Experts &mine, int token, bool live, const float *logits, int rows, int *ids, float *scores, int lane) {
    float score[PER_LANE], top = NOTHING, total = 0.0f;
    u32 key[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) score[i] = mine.logit_bias[i];
#pragma unroll 1
    for (int s = 0; s < g.splits; s++)
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) score[i] += logits[min(s * rows * g.tiles * TILE + lane * PER_LANE + i, MOST_BLOCKS * TILE - 1)];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        if (lane * PER_LANE + i >= g.experts) score[i] = NOTHING;
        top = fmaxf(top, score[i]);
    }
    if (g.scoring == SOFTMAX) {
        top = largest(top);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            score[i] = lane * PER_LANE + i < g.experts ? __expf(score[i] - top) : 0.0f;
            total += score[i];
        }
        total = __fdiv_rn(1.0f, added(total));
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        if (g.scoring == SOFTMAX) score[i] *= total;
        if (g.scoring == SIGMOID) score[i] = __fdividef(1.0f, 1.0f + __expf(-score[i]));
        key[i] = lane * PER_LANE + i < g.experts ? ordered(score[i] + mine.bias[i]) : 0;
    }
#pragma unroll 1  // cold code takes longer to come than to run
    for (int a = 0; a < g.top_k; a++) {
        u32 head = key[0];
        int at = 0;
        float its = score[0];
#pragma unroll
        for (int i = 1; i < PER_LANE; i++)
            if (key[i] > head) head = key[i], at = i, its = score[i];
        u32 best = __reduce_max_sync(0xFFFFFFFFu, head);
        if (__ffs(__ballot_sync(0xFFFFFFFFu, head == best)) - 1 != lane) continue;
        ids[a] = lane * PER_LANE + at, scores[a] = its;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (i == at) key[i] = 0;
    }
    __syncwarp();
    bool used = lane < g.top_k;
    int id = used ? ids[lane] : 0;
    float weight = used ? scores[lane] : 0.0f;
    if (g.scoring == LATE) {
        top = largest(used ? weight : NOTHING);
        weight = used ? __expf(weight - top) : 0.0f;
        weight = __fdiv_rn(weight, added(weight));
    }
    if (g.renormalize) weight = __fdiv_rn(weight, added(weight) + 1e-20f);
    if (!used) return;
    g.ids[token * g.top_k + lane] = live ? id : -1;
    g.weights[token * g.top_k + lane] = weight * g.scale;
    if (g.counts && live) atomicAdd(g.counts + id, (u64)1);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) gate(const __grid_constant__ Gate g) {
    extern __shared__ __align__(1024) u8 memory[];
    Room &room = *(Room *)memory;
    int blocks = cluster_blocks(), rank = cluster_rank(), tile = rank % g.tiles, split = rank / g.tiles;
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, token = blockIdx.x / blocks * HEIGHT;
    int rows = min(HEIGHT, g.rows - token), per = (g.steps + g.splits - 1) / g.splits, end = min(per * (split + 1), g.steps);
    Step steps[AHEAD];
    int first = per * split + warp;
#pragma unroll
    for (int d = 0; d < AHEAD; d++)
        if (first + d * WARPS < end) load(steps[d], g, tile, first + d * WARPS, lane);
    Experts experts(g, lane);
    cluster_arrive();  // others may write here once all have begun
    let_next_grid_start();
    wait_for_grid();
    const u16 *x = g.x + (token + min(lane / 4, rows - 1)) * g.x_stride + lane % 4 * 8;
    int its = token + warp * blocks + rank;  // row of this warp to choose for
    bool live = !g.live || warp * blocks + rank >= rows || g.live[its];
    float sums[4] = {};
    for (int i = first; i < end; i += AHEAD * WARPS) {
        uint4 mine[AHEAD][2];
#pragma unroll
        for (int d = 0; d < AHEAD; d++)
            if (i + d * WARPS < end)
#pragma unroll
                for (int half = 0; half < 2; half++) mine[d][half] = load_fresh16(x + (i64)(i + d * WARPS) * STEP + 32 * half);
#pragma unroll
        for (int d = 0; d < AHEAD; d++)
            if (i + d * WARPS < end) {
                multiply(sums, steps[d], mine[d]);
                int next = i + (d + AHEAD) * WARPS;
                if (next < end) load(steps[d], g, tile, next, lane);
            }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) room.sums[warp][lane % 4 * 2 + i % 2][lane / 4 + i / 2 * 8] = sums[i];
    __syncthreads();
    cluster_wait();
    int each = (HEIGHT + blocks - 1) / blocks;  // rows of a block
    if (thread < rows * (TILE / 4) && split < g.splits) {
        int row = thread / (TILE / 4), at = thread % (TILE / 4) * 4;
        float4 all = *(const float4 *)&room.sums[0][row][at];
#pragma unroll
        for (int w = 1; w < WARPS; w++) {
            float4 v = *(const float4 *)&room.sums[w][row][at];
            all.x += v.x, all.y += v.y, all.z += v.z, all.w += v.w;
        }
        store16_at(shared_address(room.logits + ((split * each + row / blocks) * g.tiles + tile) * TILE + at), row % blocks, all);
    }
    cluster_arrive();
    cluster_wait();
    if (warp * blocks + rank < rows) choose(g, experts, its, live, room.logits + warp * g.tiles * TILE, each, room.ids[warp], room.scores[warp], lane);
}
