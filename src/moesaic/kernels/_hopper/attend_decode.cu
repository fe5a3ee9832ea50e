// Attention of sequences that decode: one query per sequence and head, over rows of the paged pool, in a single launch.
//
// A cluster of thread blocks has one kv head of one sequence: each block a share of the positions, each warp every
// WARPS-th tile of 16 of them. A warp fetches its own tiles, some ahead, and folds them by online softmax without waiting
// for anybody. Then a block's warps join their results, and send each query head's part to the block of the cluster that
// adds that head up, writes it, and encodes it. Nothing passes through memory.
//
// Scores are Q K^T [heads, positions], results P V [heads, elements], both by the tensor core with 16 heads as its rows.
//
// What the kernel in front of this one may still be writing is the queries, and of each sequence the last position's row:
// these are read behind `wait_for_grid`. Tables, lengths and earlier rows were there before: they are fetched ahead of it,
// unless the sequence is a row of a prompt, whose earlier rows are being written, too.
//
// FP8 rows (formats/kv.py) are decoded in registers into BF16 numbers 2^-120 too small: half of that power goes into each
// row's own, half into the sum (as `_triton/attention.py` has it). Their order of elements follows from what a thread reads.
#include "attend.cuh"

#define TILE 16
#define ROW (WIDTH * (FP8 ? 1 : 2))  /* bytes of a head's row */
#define CHUNKS (ROW / 16)
#define PASS (32 / CHUNKS)           /* rows that a warp copies at once */
#define STEPS (WIDTH / 16)
#define SIDES (TALL ? 2 : 1)         /* halves of the 16 heads that are in use */
#define HEADS (8 * SIDES)
#define STAGE (2 * TILE * ROW + (FP8 ? 128 : 0))
#define PITCH (WIDTH + 8)             /* floats between the heads of a warp's result: no bank twice */
#define LANES (WIDTH / 4)             /* that have one head's elements, four each */
#define THREADS (32 * WARPS)

struct Room {
    alignas(128) u8 ring[WARPS][STAGES][STAGE];
    float parts[16][WIDTH];  // from each block of the cluster, of the heads that this one adds up
    float2 sums[16];        // largest score and sum of exponentials of each
    float2 warp_sums[WARPS][HEADS];
};

static_assert(HEADS * PITCH * 4 <= STAGES * STAGE, "a warp's result takes the place of its ring");
static_assert(sizeof(Room) <= ROOM_LIMIT, "fewer stages are needed");
extern "C" __device__ const int room_bytes = sizeof(Room);
extern "C" __device__ const int threads = THREADS;

// Where a 16-byte chunk of a row lies: such that what is read together is in different banks.
DEVICE int key_chunk(int row, int chunk) {
    if (FP8) return WIDTH == 128 ? chunk ^ ((row & 1) << 2) : chunk;
    return chunk ^ (row & 7);
}

DEVICE int value_chunk(int row, int chunk) {
    if (FP8 && WIDTH == 64) return chunk ^ ((row >> 1) & 3);
    return chunk ^ (row & 7);
}

struct Share {  // of a warp: tiles of positions first, first + step, ... below end
    int first, step, end;
    DEVICE_MEMBER int at(int tile) const { return first + tile * step; }
};

// A warp's fetching: lanes 0..15 know the slots of a tile's positions, and the other 16 the same.
struct Fetch {
    const Decode &a;
    const u8 *pool;  // at the kv head's keys
    u32 ring;
    int s, group, lane;

    DEVICE_MEMBER int slot(const Share &share, int tile) const {
        int p = share.at(tile) + (lane & 15);
        if (p >= share.end) return 0;
        i64 entry = s * a.table_row + p / a.block;
        int block = a.wide_table ? (int)((const i64 *)a.table)[entry] : ((const int *)a.table)[entry];
        return block * a.block + p % a.block;
    }

    // Positions from `limit` on become zeros.
    DEVICE_MEMBER void tile(int first, int limit, int slots, int stage) const {
        u32 to = ring + stage * STAGE;
        int chunk = lane % CHUNKS;
#pragma unroll
        for (int i = 0; i < TILE / PASS; i++) {
            int row = i * PASS + lane / CHUNKS, real = first + row < limit ? 16 : 0;
            const u8 *from = pool + (i64)__shfl_sync(0xFFFFFFFFu, slots, row) * a.pool_row + chunk * 16;
            copy16_or_zero(to + row * ROW + key_chunk(row, chunk) * 16, from, real);
            copy16_or_zero(to + (TILE + row) * ROW + value_chunk(row, chunk) * 16, from + a.value_at, real);
        }
        if (FP8) copy_small<4>(to + 2 * TILE * ROW + lane * 4, exponents(slots), first + (lane & 15) < limit ? 4 : 0);
    }

    // The word that has the exponent of a lane's key, or from lane 16 on, value.
    DEVICE_MEMBER const u8 *exponents(int slot) const {
        return pool - group * ROW + (i64)slot * a.pool_row + (exponent_at(lane >> 4) & ~3);
    }

    DEVICE_MEMBER int exponent_at(int value) const { return a.exponents_at + value * a.groups + group; }
};

// A row that was fetched as zeros, since it might not have been written yet: kept in registers until its tile's turn.
struct Late {
    uint4 chunk;
    u32 word;
    int row;
    DEVICE_MEMBER void load(const Fetch &f, int slot, int r) {
        row = r, slot = __shfl_sync(0xFFFFFFFFu, slot, r);
        const u8 *from = f.pool + (i64)slot * f.a.pool_row;
        if (f.lane < 2 * CHUNKS) chunk = load_fresh16(from + f.lane % CHUNKS * 16 + (f.lane >= CHUNKS ? f.a.value_at : 0));
        if (FP8 && (f.lane & 15) == 0) word = load_fresh4(f.exponents(slot));
    }
    DEVICE_MEMBER void store(const Fetch &f, int stage) const {
        u32 to = f.ring + stage * STAGE;
        int c = f.lane % CHUNKS;
        if (f.lane < CHUNKS) store16(to + row * ROW + key_chunk(row, c) * 16, chunk);
        else if (f.lane < 2 * CHUNKS) store16(to + (TILE + row) * ROW + value_chunk(row, c) * 16, chunk);
        if (FP8 && (f.lane & 15) == 0) store4(to + 2 * TILE * ROW + (f.lane + row) * 4, word);
        __syncwarp();
    }
};

// Of one warp: queries as operands, and the results so far. A lane has heads lane / 4 and, if SIDES is 2, 8 more.
struct Fold {
    u32 q[STEPS][2 * SIDES];
    float o[WIDTH / 8][4], top[SIDES], total[SIDES];

    DEVICE_MEMBER void begin(const Decode &a, const u16 *queries, int lane) {
#pragma unroll
        for (int side = 0; side < SIDES; side++) {
            int head = lane / 4 + 8 * side;
            const u16 *row = queries + head * a.q_head;
            bool real = head < a.repeat;
            top[side] = -1e38f, total[side] = 0.0f;
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                int d = FP8 ? k / 4 * 64 + lane % 4 * 16 + k % 4 * 4 : k * 16 + lane % 4 * 2;
                u32 low = real ? load_fresh4(row + d) : 0, high = real ? load_fresh4(row + d + (FP8 ? 2 : 8)) : 0;
                q[k][side] = FP8 ? __byte_perm(low, high, 0x5410) : low;
                q[k][SIDES + side] = FP8 ? __byte_perm(low, high, 0x7632) : high;
            }
        }
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n++) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.0f;
    }

    DEVICE_MEMBER void query_times(float *s, int k, u32 b0, u32 b1) const {
        multiply_bf16(s, q[k][0], TALL ? q[k][SIDES - 1] : 0, q[k][SIDES], TALL ? q[k][2 * SIDES - 1] : 0, b0, b1);
    }

    // s[n]: scores of positions 8 n + lane % 4 * 2 and the next one.
    DEVICE_MEMBER void scores(float (&s)[2][4], u32 keys, int lane) const {
#pragma unroll
        for (int n = 0; n < 2; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#if FP8
#pragma unroll
        for (int b = 0; b < WIDTH / 64; b++)
#pragma unroll
            for (int n = 0; n < 2; n++) {
                int row = 8 * n + lane / 4;
                uint4 codes = load16(keys + row * ROW + key_chunk(row, 4 * b + lane % 4) * 16);
                u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    u32 low, high;
                    decode_e4m3(words[i], low, high);
                    query_times(s[n], 4 * b + i, low, high);
                }
            }
#else
#pragma unroll
        for (int k = 0; k < STEPS; k += 2)
#pragma unroll
            for (int n = 0; n < 2; n++) {
                int row = 8 * n + lane % 8;
                u32 b[4];
                load_matrices(b, keys + row * ROW + key_chunk(row, 2 * k + lane / 8) * 16);
                query_times(s[n], k, b[0], b[1]);
                query_times(s[n], k + 1, b[2], b[3]);
            }
#endif
    }

    DEVICE_MEMBER void add_values(const u32 (&p)[4], u32 values, int lane) {
        int row = lane % 16, half = lane / 16;
#pragma unroll
        for (int c = 0; c < CHUNKS; c += 2) {
            u32 b[4];
            load_matrices_turned(b, values + row * ROW + value_chunk(row, c + half) * 16);
#if FP8
            u32 low[4], high[4];
#pragma unroll
            for (int i = 0; i < 4; i++) decode_e4m3(b[i], low[i], high[i]);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                multiply_bf16(o[2 * (c + i)], p[0], p[1], p[2], p[3], low[2 * i], low[2 * i + 1]);
                multiply_bf16(o[2 * (c + i) + 1], p[0], p[1], p[2], p[3], high[2 * i], high[2 * i + 1]);
            }
#else
            multiply_bf16(o[c], p[0], p[1], p[2], p[3], b[0], b[1]);
            multiply_bf16(o[c + 1], p[0], p[1], p[2], p[3], b[2], b[3]);
#endif
        }
    }

    // A tile of positions, of which the first `real` exist. factor: of scores, which come out in units of log 2.
    DEVICE_MEMBER void tile(u32 stage, int real, float factor, const int (&shift)[2], int lane) {
        float s[2][4], power[2][2];  // of values
        u32 p[4] = {0, 0, 0, 0};
        scores(s, stage, lane);
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int at = 8 * n + lane % 4 * 2 + i;
                float by = factor;
                if (FP8) {
                    u32 words = stage + 2 * TILE * ROW;
                    by = power_of(load4(words + at * 4) >> shift[0]) * factor;
                    power[n][i] = power_of(load4(words + (TILE + at) * 4) >> shift[1]);
                }
#pragma unroll
                for (int side = 0; side < SIDES; side++) {
                    float &x = s[n][2 * side + i];
                    if (FP8) x *= HALF_LIFT;
                    x = at < real ? x * by : NOTHING;
                }
            }
#pragma unroll
        for (int side = 0; side < SIDES; side++) {
            float peak = fmaxf(fmaxf(s[0][2 * side], s[0][2 * side + 1]), fmaxf(s[1][2 * side], s[1][2 * side + 1]));
            peak = fmaxf(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, 1));
            peak = fmaxf(top[side], fmaxf(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, 2)));
            float fade = power_of_two(top[side] - peak);
            top[side] = peak, total[side] *= fade;
#pragma unroll
            for (int n = 0; n < 2; n++) {
                float w0 = power_of_two(s[n][2 * side] - peak), w1 = power_of_two(s[n][2 * side + 1] - peak);
                total[side] += w0 + w1;
                p[2 * n + side] = FP8 ? bf16_pair(w0 * power[n][0], w1 * power[n][1]) : bf16_pair(w0, w1);
            }
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n++) o[n][2 * side] *= fade, o[n][2 * side + 1] *= fade;
        }
        add_values(p, stage + TILE * ROW, lane);
    }

    // Into the warp's own shared memory.
    DEVICE_MEMBER void leave(float *parts, float2 *sums, int lane) {
#pragma unroll
        for (int side = 0; side < SIDES; side++) {
            int head = lane / 4 + 8 * side;
            total[side] += __shfl_xor_sync(0xFFFFFFFFu, total[side], 1);
            total[side] += __shfl_xor_sync(0xFFFFFFFFu, total[side], 2);
            if (lane % 4 == 0) sums[head] = make_float2(top[side], total[side]);
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n += 2) {
                float *to = parts + head * PITCH + (FP8 ? n * 8 + lane % 4 * 4 : n * 8 + lane % 4 * 2);
                const float *x = &o[n][2 * side], *y = &o[n + 1][2 * side];
                if (FP8)
                    *(float4 *)to = make_float4(x[0], y[0], x[1], y[1]);
                else
                    *(float2 *)to = make_float2(x[0], x[1]), *(float2 *)(to + 8) = make_float2(y[0], y[1]);
            }
        }
    }
};

// Parts of a head, four elements of each per lane, weighted by their sums of exponentials and added in order.
struct Joined {
    float y[4], top, total;
    DEVICE_MEMBER void add(float4 x, float part_top, float part_total) {
        float w = power_of_two(part_top - top);
        total += part_total * w;
        y[0] += x.x * w, y[1] += x.y * w, y[2] += x.z * w, y[3] += x.w * w;
    }
    DEVICE_MEMBER void begin(float peak) { top = peak, total = y[0] = y[1] = y[2] = y[3] = 0.0f; }
};

// Writes a head's elements, and encodes them. A lane of a head that does not exist takes part in what the warp does.
DEVICE void finish(const Decode &a, Joined &j, i64 token, int head, bool wanted, int lane) {
    int heads = a.groups * a.repeat, d = lane % LANES * 4;
    if (a.sinks && wanted) {
        float sink = a.sinks[head] * LOG2E, peak = fmaxf(j.top, sink), fade = power_of_two(j.top - peak);
        j.total = j.total * fade + power_of_two(sink - peak);
#pragma unroll
        for (int i = 0; i < 4; i++) j.y[i] *= fade;
    }
    float by = (FP8 ? HALF_LIFT : 1.0f) / (j.total == 0.0f ? 1.0f : j.total);
    u32 low = bf16_pair(j.y[0] * by, j.y[1] * by), high = bf16_pair(j.y[2] * by, j.y[3] * by);
    i64 at = (token * heads + head) * WIDTH + d;
    if (wanted) *(uint2 *)(a.out + at) = make_uint2(low, high);
    if (a.encoding) {
        float v[4] = {bf16_low(low), bf16_high(low), bf16_low(high), bf16_high(high)};
        encode_four(a, v, at, wanted);
    }
}

// What the block's warps found -> its own part of each head; a warp has heads of its own. Sent to where they are added up,
// or, where nobody else has a part, written.
DEVICE void join_warps(const Decode &a, Room &room, i64 token, int group, int rank, int blocks) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, sub = lane / LANES, d = lane % LANES * 4;
    for (int first = warp * (32 / LANES); first < a.repeat; first += WARPS * (32 / LANES)) {
        int head = min(first + sub, a.repeat - 1);
        float2 sums[WARPS];
        float4 parts[WARPS];
        float peak = -1e38f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            sums[w] = room.warp_sums[w][head], peak = fmaxf(peak, sums[w].x);
            parts[w] = *(const float4 *)((const float *)room.ring[w] + head * PITCH + d);
        }
        Joined j;
        j.begin(peak);
#pragma unroll
        for (int w = 0; w < WARPS; w++) j.add(parts[w], sums[w].x, sums[w].y);
        if (blocks == 1) {
            finish(a, j, token, group * a.repeat + head, first + sub < a.repeat, lane);
            continue;
        }
        int owner = head % blocks, place = head / blocks * blocks + rank;
        store16_at(shared_address(&room.parts[place][d]), owner, make_float4(j.y[0], j.y[1], j.y[2], j.y[3]));
        if (d == 0) store8_at(shared_address(&room.sums[place]), owner, make_float2(j.top, j.total));
    }
}

DEVICE void join_blocks(const Decode &a, const Room &room, i64 token, int group, int rank, int blocks) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, sub = lane / LANES, d = lane % LANES * 4;
    for (int first = warp * (32 / LANES); first * blocks + rank < a.repeat; first += WARPS * (32 / LANES)) {
        bool real = (first + sub) * blocks + rank < a.repeat;
        int mine = real ? first + sub : first, begin = mine * blocks;
        float peak = -1e38f;
        for (int b = 0; b < blocks; b++) peak = fmaxf(peak, room.sums[begin + b].x);
        Joined j;
        j.begin(peak);
#pragma unroll 4
        for (int b = 0; b < blocks; b++) {
            float2 sums = room.sums[begin + b];
            j.add(*(const float4 *)&room.parts[begin + b][d], sums.x, sums.y);
        }
        finish(a, j, token, group * a.repeat + mine * blocks + rank, real, lane);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) attend_decode(const __grid_constant__ Decode a) {
    extern __shared__ __align__(128) u8 shared[];
    Room &room = *(Room *)shared;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int blocks = cluster_blocks(), rank = cluster_rank(), item = blockIdx.x / blocks;
    int s = item / a.groups, group = item % a.groups;
    i64 token = a.spans[3 * s];
    let_next_grid_start();
    if (!a.spans[3 * s + 1]) return wait_for_grid();  // so that who waits for this grid has waited for the one in front
    if (blocks > 1) cluster_arrive();     // others may write here once all have begun
    int length = (int)a.spans[3 * s + 2], begin = a.window ? max(0, length - a.window) : 0;
    int share = up(divided_up(length - begin, blocks), TILE), first = begin + rank * share;
    Share own{first + warp * TILE, WARPS * TILE, min(length, first + share)};

    Fetch fetch{a, a.pool + group * ROW, shared_address(room.ring[warp]), s, group, lane};
    if (a.fresh && a.fresh[s] > 1) wait_for_grid();
    int slots[STAGES], late = -1, late_slots = 0;
#pragma unroll
    for (int i = 0; i < STAGES; i++) slots[i] = fetch.slot(own, i);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        int at = own.at(i);
        if (at < own.end) fetch.tile(at, min(own.end, length - 1), slots[i], i);
        if (at < own.end && at + TILE >= length) late = i, late_slots = slots[i];
        commit_copies();
    }
    int ahead = slots[STAGES - 1];
    wait_for_grid();
    Late row;
    if (late >= 0) row.load(fetch, late_slots, length - 1 - own.at(late));
    Fold fold;
    fold.begin(a, a.q + token * a.q_token + group * a.repeat * a.q_head, lane);
    const int shift[2] = {8 * (fetch.exponent_at(0) & 3), 8 * (fetch.exponent_at(1) & 3)};
    for (int i = 0, stage = 0; own.at(i) < own.end; i++) {
        int next = own.at(i + STAGES - 1), behind = stage == 0 ? STAGES - 1 : stage - 1;
        if (next < own.end) fetch.tile(next, own.end, ahead, behind);
        commit_copies();
        ahead = fetch.slot(own, i + STAGES);
        wait_for_copies<STAGES - 1>();
        __syncwarp();
        if (i == late) row.store(fetch, stage);
        fold.tile(fetch.ring + stage * STAGE, own.end - own.at(i), a.factor, shift, lane);
        __syncwarp();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    fold.leave((float *)room.ring[warp], room.warp_sums[warp], lane);
    __syncthreads();
    if (blocks > 1) cluster_wait();
    join_warps(a, room, token, group, rank, blocks);
    if (blocks == 1) return;
    cluster_arrive();
    cluster_wait();
    join_blocks(a, room, token, group, rank, blocks);
}
