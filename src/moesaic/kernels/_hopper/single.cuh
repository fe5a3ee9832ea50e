// All experts of one token in one launch, with nothing before or behind it: a token's choices need no sorting, and whoever has
// a row of all its experts can sum them.
//
// A thread block has tiles of 16 weight rows: eight gate rows and the eight up rows of the same elements; later the same eight
// rows of two experts. All stages of all its tiles, one after the other, are cut into equal shares, one for each warp, which
// has a ring of stages in shared memory and fills it itself; what several warps have of a tile is added up at the end. All
// thread blocks meet once, between the products; until then the weights of the second one are fetched as far as there is room.
// Every thread block then encodes all of h for itself. Of a product's eight columns, the first one needs one (x), the second
// two: even ones have the h of a tile's first expert, odd ones that of its second.
#pragma once
#include "prepare.cuh"

#if SINGLE

#define WARPS 16
#define TILE_BYTES 2048 /* of a stage: 16 weight rows of 128 bytes */
#define TILE_SCALES (BLOCK_SCALES ? 16 : 16 * SCALE_BYTES)
#define AT_ONCE 2 /* groups of 128 elements that a warp encodes at a time */
#define MEETINGS 4096

__device__ u32 meetings[2 * MEETINGS];  // arrivals, and how often all have arrived

// Where things lie in shared memory; `single_bytes` in single.py adds up the same.
struct Places {
    u8 *tiles, *scales, *x, *h, *space;
    u64 *full;
    float *x_scale, *h_scale, *y, *top;  // scales of groups, or of a row
    float *parts;                        // of tiles: 16 sums of each that a warp has a part of
    int *chosen, *place;                 // of a choice that is real: its expert, and which it is
    DEVICE_MEMBER Places(const Single &a) {
        u8 *at = memory;
        tiles = take(at, WARPS * a.ring * TILE_BYTES), x = take(at, a.x_width * ROW_BYTES);
        h = take(at, a.top_k * a.h_width * ROW_BYTES), space = take(at, WARPS * AT_ONCE * 512);
        scales = take(at, WARPS * a.ring * TILE_SCALES), full = (u64 *)take(at, WARPS * a.ring * 8);
        x_scale = (float *)take(at, a.x_width / 128 * 4), h_scale = (float *)take(at, a.top_k * (a.h_width / 128) * 4);
        y = (float *)take(at, a.top_k * a.units * 32), top = (float *)take(at, 64), parts = (float *)take(at, WARPS * a.shared_tiles * 64);
        chosen = (int *)take(at, a.top_k * 4), place = (int *)take(at, a.top_k * 4);
    }
    DEVICE_MEMBER static u8 *take(u8 *&at, int bytes) {
        u8 *mine = at;
        at += (bytes + 15) / 16 * 16;
        return mine;
    }
};

// Tiles of this thread block.
struct Tiles {
    int count, pairs;      // of choices; of those, two at a time
    int first, second;     // how many tiles the products have
    DEVICE_MEMBER Tiles(const Single &a, int chosen) : count(chosen), pairs((chosen + 1) / 2) {
        int grid = (int)gridDim.x, mine = grid - 1 - (int)blockIdx.x;
        first = (count * (a.first.rows / 8) + mine) / grid, second = pairs * ((a.hidden / 8 + mine) / grid);
    }
    DEVICE_MEMBER int of(int phase) const { return phase == 1 ? first : second; }
    // Where a warp's share of a phase begins, in stages.
    DEVICE_MEMBER int begin(int phase, int stages, int warp) const { return (int)((i64)of(phase) * stages * warp / WARPS); }
};

// slot: the choice (of two the first one).  column: eight weight rows.  unit: of this thread block's columns of y.
struct Tile {
    int slot, column, unit;
    DEVICE_MEMBER Tile(const Single &a, const Tiles &tiles, int phase, int k) {
        if (phase == 1) {
            int per = a.first.rows / 8, u = blockIdx.x + gridDim.x * k;
            slot = u / per, column = u % per, unit = 0;
        } else {
            unit = k / tiles.pairs, slot = k % tiles.pairs * 2, column = blockIdx.x + gridDim.x * unit;
        }
    }
};

#define SCALE_SIZE (BLOCK_SCALES || !SCALE_BYTES ? 4 : SCALE_BYTES)

// Fetches a warp's stages in their order: its share of the first product, then of the second.
struct Fetcher {
    int phase, at, end, stage, stages, column, e, other;  // other: the second expert of a tile, or -1
    const u8 *scales;                                     // this lane's, at stage 0
    int bytes;
    DEVICE_MEMBER void begin(const Single &a, const Places &places, const Tiles &tiles, int which, int warp, int lane) {
        phase = which, stages = phase == 1 ? a.first.stages : a.second.stages;
        at = tiles.begin(phase, stages, warp), end = tiles.begin(phase, stages, warp + 1);
        stage = at % stages;
        if (at < end)
            enter(a, places, tiles, lane);
        else if (phase == 1)
            begin(a, places, tiles, 2, warp, lane);
        else
            phase = 0;
    }
    DEVICE_MEMBER void enter(const Single &a, const Places &places, const Tiles &tiles, int lane) {
        Tile tile(a, tiles, phase, at / stages);
        const Weight &weight = phase == 1 ? a.first : a.second;
        column = tile.column, e = places.chosen[tile.slot], other = phase == 2 && tile.slot + 1 < tiles.count ? places.chosen[tile.slot + 1] : -1;
        if (!TILE_SCALES) return;
        int r = lane % 16, half = BLOCK_SCALES ? lane % 2 : r / 8, n = column * 8 + r % 8 + (phase == 1 ? half * weight.rows : 0);
        if (BLOCK_SCALES) n = column / 16 + (phase == 1 ? half * ((weight.rows + 127) / 128) : 0);  // blocks begin anew at the up rows
        scales = weight.scales + (phase == 2 && half && other >= 0 ? other : e) * weight.scales_expert + n * weight.scales_row;
        bytes = weight.scale_bytes;
    }
    DEVICE_MEMBER void fetch(const Single &a, const Maps &maps, const Places &places, const Tiles &tiles, int slot, int warp, int lane) {
        u32 bar = shared_address(places.full + slot), to = shared_address(places.tiles + slot * TILE_BYTES);
        if (lane == 0) {
            barrier_announce(bar, phase == 1 || other >= 0 ? TILE_BYTES : TILE_BYTES / 2);
            if (phase == 1) {
                copy_tile5(to, &maps.first, bar, stage * 128, column, e);
            } else {
                copy_tile3(to, &maps.second, bar, stage * 128, column * 8, e);
                if (other >= 0) copy_tile3(to + TILE_BYTES / 2, &maps.second, bar, stage * 128, column * 8, other);
            }
        }
        if (TILE_SCALES) {
            int real = max(0, min(SCALE_SIZE, bytes - stage * SCALE_SIZE));
            if (lane < (BLOCK_SCALES ? 2 : 16)) copy_small<SCALE_SIZE>(shared_address(places.scales + slot * TILE_SCALES + lane * SCALE_SIZE), real ? scales + stage * SCALE_SIZE : scales, real);
            barrier_arrive_copies(bar);
        }
        at++, stage++;
        if (at == end) {
            if (phase == 1)
                begin(a, places, tiles, 2, warp, lane);
            else
                phase = 0;
        } else if (stage == stages) {
            stage = 0;
            enter(a, places, tiles, lane);
        }
    }
};

// d += w x^T for a stage; x: the row of x (or h) of this lane's column, at that stage. Products take turns at two sums.
DEVICE void multiply_stage_of_one(float (&sums)[2], float (&kept)[2][4], const u8 *w, const u8 *scale_bytes, const u8 *x, int flip, float first_x, float second_x, int upper, int lane) {
    constexpr int PER_LOAD = 4 / X_PARTS;
    int row = lane_row(lane);
    RowScales scales(scale_bytes + (BLOCK_SCALES ? 0 : row * SCALE_BYTES));
    uint4 codes[2][2], mine[2][X_PARTS];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        codes[half][0] = load_chunk(w, row, lane % 4 + 4 * half), codes[half][1] = load_chunk(w, row + 8, lane % 4 + 4 * half);
#pragma unroll
        for (int part = 0; part < X_PARTS; part++) mine[half][part] = *(const uint4 *)(x + (((half * X_PARTS + part) * 4 + lane % 4) ^ flip) * 16);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 bits[2] = {scales.bits(0, 0, half, lane), scales.bits(0, 1, half, lane)};
        if (FOLDS && (half == 0 || FORMAT == INT4))
#pragma unroll
            for (int i = 0; i < 4; i++) kept[0][i] = kept[1][i] = 0.0f;
#pragma unroll
        for (int part = 0; part < X_PARTS; part++) {
#if DECODED
#pragma unroll
            for (int k = 0; k < PER_LOAD; k++) {
                u32 a[4 * STEPS];
                int word = part * PER_LOAD + k;
                decode_words(word_of(codes[half][0], word), word_of(codes[half][1], word), operand_scale(bits[0], word), operand_scale(bits[1], word), a);
#pragma unroll
                for (int t = 0; t < STEPS; t++)
                    multiply(kept[(word * STEPS + t) % 2], a + 4 * t, word_of(mine[half][part], 2 * (k * STEPS + t)), word_of(mine[half][part], 2 * (k * STEPS + t) + 1));
            }
#else
#pragma unroll
            for (int k = 0; k < 4; k += 2) {
                u32 a[4] = {word_of(codes[half][0], k), word_of(codes[half][1], k), word_of(codes[half][0], k + 1), word_of(codes[half][1], k + 1)};
                multiply(kept[k / 2], a, word_of(mine[half][part], k), word_of(mine[half][part], k + 1));
            }
#endif
        }
        if (!FOLDS || (half == 0 && FORMAT != INT4)) continue;  // INT4: each half is a group
        sums[0] += (kept[0][0] + kept[1][0]) * (scales.fold_by(0, 0, half) * first_x);
        sums[1] += (kept[0][upper] + kept[1][upper]) * (scales.fold_by(0, 1, half) * second_x);
    }
}

// What a sum of row r of the tile is multiplied by, beside the scale of x; and what is added.
DEVICE float row_factor(const Weight &weight, int e, int n, int segment, int parts) {
    float f = LIFT;
    if (FORMAT == FP8 && !BLOCKS) f *= *(const float *)(weight.scales + e * weight.scales_expert + (BY_SEGMENT ? segment : n) * weight.scales_row);
    return FORMAT == NVFP4 ? f * weight.top[e * parts + segment] : f;
}

DEVICE float row_bias(const Weight &weight, int e, int n, int parts) { return weight.bias ? __uint_as_float((u32)weight.bias[(i64)e * weight.rows * parts + n] << 16) : 0.0f; }

// The largest of all threads' values.
DEVICE float largest_of_all(float v, float *top) {
    float mine[1] = {v};
    largest_of<32>(mine);
    __syncthreads();  // who asked before has read it
    if (threadIdx.x % 32 == 0) top[threadIdx.x / 32] = mine[0];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WARPS; i++) mine[0] = larger(mine[0], top[i]);
    return mine[0];
}

DEVICE float largest_of_four(const float (&v)[4]) { return larger(larger(fabsf(v[0]), fabsf(v[1])), larger(fabsf(v[2]), fabsf(v[3]))); }

// Groups of 128 elements, encoded or with `as_is` only put in order, to where products look for them. rows[r]: the row in
// shared memory; groups[r]: its group, or -1; row_numbers: their last bit tells how banks are used.
DEVICE void put_groups(float (&v)[AT_ONCE][4], float (&scale)[AT_ONCE], bool as_is, u8 *const (&rows)[AT_ONCE], const int (&groups)[AT_ONCE], const int (&numbers)[AT_ONCE], u8 *space, int lane) {
    u8 *to[AT_ONCE], *spaces[AT_ONCE];
    bool wanted[AT_ONCE];
#pragma unroll
    for (int r = 0; r < AT_ONCE; r++) to[r] = space + 512 * r, spaces[r] = to[r] + 256, wanted[r] = true;
    if (!as_is) encode_elements(v, scale);
    __syncwarp();  // what lay there has been read
    put_elements(to, wanted, 0, v, spaces, lane);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < AT_ONCE / 2; i++) {
        int r = 2 * i + lane / 16, part = lane % 16;
        int group = lane < 16 ? groups[2 * i] : groups[2 * i + 1], number = lane < 16 ? numbers[2 * i] : numbers[2 * i + 1];
        u8 *row = lane < 16 ? rows[2 * i] : rows[2 * i + 1];
        int byte = group * 256 + part * 16;
        if (group >= 0) *(uint4 *)(row + byte / X_ROW * X_ROW + x_position(number, byte % X_ROW / 16) * 16) = *(const uint4 *)(space + 512 * r + part * 16);
    }
}

DEVICE void encode_x(const Single &a, const Places &at, int warp, int lane) {
    constexpr bool WHOLE = ENCODING == TOKEN || ENCODING == NV4_DYNAMIC;
    int groups = a.x_width / 128;
    float all = ROW_SCALES && a.given && !(WHOLE && !a.encoded) ? *a.given : 1.0f;
    if (WHOLE && !a.encoded) {
        float most = 0.0f, v[4];
        for (int g = warp; g < groups; g += WARPS) load_four(a.source, g * 128 + 4 * lane, a.x_columns, v), most = larger(most, largest_of_four(v));
        all = scale_of_row(largest_of_all(most, at.top));
    }
    for (int first = warp; first < groups; first += WARPS * AT_ONCE) {
        float v[AT_ONCE][4], scale[AT_ONCE];
        int mine[AT_ONCE], numbers[AT_ONCE];
        u8 *rows[AT_ONCE];
#pragma unroll
        for (int r = 0; r < AT_ONCE; r++) {
            int g = first + WARPS * r;
            mine[r] = g < groups ? g : -1, numbers[r] = 0, rows[r] = at.x;
            scale[r] = GROUP_SCALES && a.encoded && g < groups ? a.given[(i64)g * a.given_group] : all;
            if (a.encoded)
                load_encoded(a.source, g * 128 + 4 * lane, a.x_columns, v[r]);
            else
                load_four(a.source, g * 128 + 4 * lane, a.x_columns, v[r]);
        }
        put_groups(v, scale, a.encoded, rows, mine, numbers, at.space + warp * AT_ONCE * 512, lane);
        if (GROUP_SCALES)
#pragma unroll
            for (int r = 0; r < AT_ONCE; r++)
                if (lane == r && mine[r] >= 0) at.x_scale[mine[r]] = scale[r];
    }
    if (ROW_SCALES && threadIdx.x == 0) at.x_scale[0] = all;
}

DEVICE void load_wide(const Single &a, int slot, int column, float (&v)[4]) {
    float4 q = column < a.h_columns ? __ldcg((const float4 *)(a.wide + (i64)slot * a.h_width + column)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
}

DEVICE void scale_h(const Single &a, const Places &at, int count, int warp, int lane) {
    constexpr bool ALL = ENCODING == TENSOR_DYNAMIC;
    float most = 0.0f;
    for (int slot = warp; slot < count; slot += WARPS) {
        float top[1] = {}, v[4];
#pragma unroll 8
        for (int g = 0; g < a.h_width / 128; g++) load_wide(a, slot, g * 128 + 4 * lane, v), top[0] = larger(top[0], largest_of_four(v));
        largest_of<32>(top);
        most = larger(most, top[0]);
        if (!ALL && lane == 0) at.h_scale[slot] = scale_of_row(top[0]);
    }
    if (ALL) {
        float scale = scale_of_row(largest_of_all(most, at.top));
        for (int slot = threadIdx.x; slot < count; slot += 32 * WARPS) at.h_scale[slot] = scale;
    }
    __syncthreads();
}

DEVICE void encode_h(const Single &a, const Places &at, int count, int warp, int lane) {
    int groups = a.h_width / 128;
    if (BY_ROW) scale_h(a, at, count, warp, lane);
    float given = ENCODING == TENSOR || ENCODING == NV4 ? *a.between : 1.0f;
    for (int first = warp; first < count * groups; first += WARPS * AT_ONCE) {
        float v[AT_ONCE][4], scale[AT_ONCE];
        int mine[AT_ONCE], numbers[AT_ONCE];
        u8 *rows[AT_ONCE];
#pragma unroll
        for (int r = 0; r < AT_ONCE; r++) {
            int i = first + WARPS * r, slot = min(i / groups, count - 1);
            mine[r] = i < count * groups ? i % groups : -1, numbers[r] = slot, rows[r] = at.h + slot * a.h_width * ROW_BYTES;
            scale[r] = BY_ROW ? at.h_scale[slot] : given;
            load_wide(a, slot, i % groups * 128 + 4 * lane, v[r]);
        }
        put_groups(v, scale, false, rows, mine, numbers, at.space + warp * AT_ONCE * 512, lane);
        if (GROUP_SCALES)
#pragma unroll
            for (int r = 0; r < AT_ONCE; r++)
                if (lane == r && mine[r] >= 0) at.h_scale[numbers[r] * groups + mine[r]] = scale[r];
    }
    if (!BY_ROW && ROW_SCALES && threadIdx.x < count) at.h_scale[threadIdx.x] = given;
}

// All thread blocks wait for each other. They all run at once: there is one per multiprocessor, and none waits for a later one.
DEVICE void meet(int meeting) {
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 *arrivals = meetings + 2 * meeting;
        __threadfence();
        int before = load_acquire((const int *)arrivals + 1);
        if (atomicAdd(arrivals, 1) == gridDim.x - 1) {
            *arrivals = 0;
            __threadfence();
            atomicAdd(arrivals + 1, 1);
        } else {
            while (load_acquire((const int *)arrivals + 1) == before) {}
        }
        __threadfence();
    }
    __syncthreads();
}

// A warp's share of a product: what it has of each tile goes to `parts`.
template <int PHASE> DEVICE void multiply_share(const Single &a, const Maps &maps, const Places &at, const Tiles &tiles, Fetcher &ahead, Ring &ring, int warp, int lane) {
    int stages = PHASE == 1 ? a.first.stages : a.second.stages, groups = a.h_width / 128;
    int now = tiles.begin(PHASE, stages, warp), end = tiles.begin(PHASE, stages, warp + 1);
    float *to = at.parts + warp * a.shared_tiles * 16;
    for (; now < end; to += 16) {
        Tile tile(a, tiles, PHASE, now / stages);
        int second = min(tile.slot + 1, tiles.count - 1), mine = PHASE == 2 && lane / 4 % 2 ? second : tile.slot;
        const u8 *x = PHASE == 1 ? at.x : at.h + mine * a.h_width * ROW_BYTES;
        int flip = PHASE == 2 && mine % 2 ? 4 : 0, s = now % stages, last = min(stages, s + end - now);
        float sums[2] = {}, kept[2][4] = {};
        for (now += last - s; s < last; s++) {
            int slot = warp * a.ring + ring.slot;
            float first_x = 1.0f, second_x = 1.0f;
            if (GROUP_SCALES) {
                first_x = PHASE == 1 ? at.x_scale[s] : at.h_scale[tile.slot * groups + s];
                second_x = PHASE == 1 ? first_x : at.h_scale[second * groups + s];
            }
            barrier_wait(shared_address(at.full + slot), ring.parity);
            multiply_stage_of_one(sums, kept, at.tiles + slot * TILE_BYTES, at.scales + slot * TILE_SCALES, x + s * X_ROW, flip, first_x, second_x, PHASE == 1 ? 2 : 3, lane);
            __syncwarp();
            if (ahead.phase) ahead.fetch(a, maps, at, tiles, slot, warp, lane);
            ring.next(a.ring);
        }
        if (!FOLDS) sums[0] = kept[0][0] + kept[1][0], sums[1] = kept[0][PHASE == 1 ? 2 : 3] + kept[1][PHASE == 1 ? 2 : 3];
        if (lane % 4 == 0) to[lane_row(lane)] = sums[0], to[lane_row(lane) + 8] = sums[1];
    }
    __syncthreads();
}

// Sum `row` of tile k.
DEVICE float whole(const Single &a, const Places &at, const Tiles &tiles, int phase, int k, int row) {
    int stages = phase == 1 ? a.first.stages : a.second.stages, from = k * stages;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
        int begin = tiles.begin(phase, stages, warp), end = tiles.begin(phase, stages, warp + 1);
        if (max(begin, from) < min(end, from + stages)) sum += at.parts[(warp * a.shared_tiles + k - begin / stages) * 16 + row];
    }
    return sum;
}

DEVICE void store_h(const Single &a, const Places &at, const Tiles &tiles) {
    for (int i = threadIdx.x; i < tiles.first * 8; i += 32 * WARPS) {
        Tile tile(a, tiles, 1, i / 8);
        int e = at.chosen[tile.slot], n = tile.column * 8 + i % 8, up = n + a.first.rows;
        float x_scale = ROW_SCALES ? at.x_scale[0] : 1.0f;
        float gate = whole(a, at, tiles, 1, i / 8, i % 8) * (row_factor(a.first, e, n, 0, 2) * x_scale) + row_bias(a.first, e, n, 2);
        float other = whole(a, at, tiles, 1, i / 8, i % 8 + 8) * (row_factor(a.first, e, up, 1, 2) * x_scale) + row_bias(a.first, e, up, 2);
        a.wide[(i64)tile.slot * a.h_width + n] = joined(a.limit, a.alpha, gate, other);
    }
}

DEVICE void store_y(const Single &a, const Places &at, const Tiles &tiles) {
    int columns = tiles.pairs ? tiles.second / tiles.pairs : (a.hidden / 8 + (int)gridDim.x - 1 - (int)blockIdx.x) / (int)gridDim.x;
    for (int i = threadIdx.x; i < columns * tiles.count * 8; i += 32 * WARPS) {
        int unit = i / 8 / tiles.count, slot = i / 8 % tiles.count, e = at.chosen[slot], n = (blockIdx.x + gridDim.x * unit) * 8 + i % 8;
        float sum = whole(a, at, tiles, 2, unit * tiles.pairs + slot / 2, i % 8 + slot % 2 * 8);
        float y = sum * (row_factor(a.second, e, n, 0, 1) * (ROW_SCALES ? at.h_scale[slot] : 1.0f)) + row_bias(a.second, e, n, 1);
        at.y[i] = a.weights[at.place[slot]] * y;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < columns * 8; i += 32 * WARPS) {
        float sum = 0.0f;
        for (int slot = 0; slot < tiles.count; slot++) sum += at.y[(i / 8 * tiles.count + slot) * 8 + i % 8];
        a.out[(blockIdx.x + gridDim.x * (i / 8)) * 8 + i % 8] = (u16)bf16_pair(sum, 0.0f);
    }
}

// Which choices are real, in their order. Every warp finds them; the first one tells.
DEVICE int choose(const Single &a, const Places &at, int warp, int lane) {
    int count = 0;
    for (int first = 0; first < a.top_k; first += 32) {
        int i = first + lane, e = i < a.top_k ? a.ids[i] : -1;
        bool real = e >= 0 && e < a.experts;
        u32 all = __ballot_sync(0xFFFFFFFFu, real);
        int slot = count + __popc(all & ((1u << lane) - 1));
        if (warp == 0 && real) at.chosen[slot] = e, at.place[slot] = i;
        count += __popc(all);
    }
    __syncthreads();
    return count;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) single(const __grid_constant__ Maps maps, const __grid_constant__ Single a) {
    Places at(a);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) prefetch_map(&maps.first), prefetch_map(&maps.second);
    for (int i = threadIdx.x; i < WARPS * a.ring; i += 32 * WARPS) barrier_init(shared_address(at.full + i), TILE_SCALES ? 33 : 1);
    fence_barrier_init();
    __syncthreads();
    wait_for_grid();
    let_next_grid_start();
    Tiles tiles(a, choose(a, at, warp, lane));
    Fetcher ahead;
    ahead.begin(a, at, tiles, 1, warp, lane);
    for (int s = 0; s < a.ring && ahead.phase; s++) ahead.fetch(a, maps, at, tiles, warp * a.ring + s, warp, lane);
    encode_x(a, at, warp, lane);
    __syncthreads();
    Ring ring = {0, 0};
    multiply_share<1>(a, maps, at, tiles, ahead, ring, warp, lane);
    store_h(a, at, tiles);
    meet(a.meeting);
    if (tiles.count) encode_h(a, at, tiles.count, warp, lane);
    __syncthreads();
    multiply_share<2>(a, maps, at, tiles, ahead, ring, warp, lane);
    store_y(a, at, tiles);
}

#endif
