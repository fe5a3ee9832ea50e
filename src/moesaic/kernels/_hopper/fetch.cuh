// What goes on beside the consumers: one warp takes items in order and fetches weights, another fetches rows of x, a third
// says what has been made.
//
// Items are handed out by a counter: first-product tiles of all tiles of rows, then (where a scale spans more than a tile)
// encodings, then second-product tiles. What an item needs was taken before it, so that waiting for it ends. While its rows
// of h are not ready, the weights of a second product are on their way already.
// Those of a dense product (`band`), which are all alike, thread blocks take in turn, without a counter.
// Of a token alone, weights are on their way even while `prepare` is at work on its row: a thread block's first item is that
// of its own number. There, waiting ends because thread blocks begin in the order of their numbers. Those that begin with the
// second product let the first one's weights come through before they ask for any.
#pragma once
#include "room.cuh"

// Of a token alone: the choices that are not padding, and which expert choice `tile` of them is. For a whole warp.
DEVICE int lone_tiles(const Arguments &a, int tile, int &e, int lane) {
    int count = 0;
#pragma unroll 1  // cold code takes longer to come than to run
    for (int first = 0; first < a.top_k; first += 32) {
        int id = first + lane < a.top_k ? a.ids[first + lane] : -1;
        bool real = id >= 0 && id < a.experts;
        u32 all = __ballot_sync(0xFFFFFFFFu, real);
        u32 mine = __ballot_sync(0xFFFFFFFFu, real && count + __popc(all & ((1u << lane) - 1)) == tile);
        if (mine) e = __shfl_sync(0xFFFFFFFFu, id, __ffs(mine) - 1);
        count += __popc(all);
    }
    return count;
}

// Of a dense product: columns of `band` tiles of rows, one after another, then the next so many tiles. What runs at one time
// reads few rows and few columns, which the L2 cache holds.
DEVICE Item dense_item(const Arguments &a, int i, int tiles) {
    Item item = {};
    if (i >= tiles * a.second.tiles) return item;
    int all = a.band * a.second.tiles, at = i % all, begin = i / all * a.band, high = min(a.band, tiles - begin);
    item.phase = 3, item.tile = begin + at % high, item.column = at / high;
    item.first = item.tile * MOST, item.count = min(MOST, a.rows - item.first), item.rounded = height_of(item.count);
    return item;
}

DEVICE Item item_of(const Arguments &a, int i, int tiles, int lane) {
    if (a.band) return dense_item(a, i, tiles);
    int per1 = a.phases & 1 ? a.first.tiles : 0, per2 = a.phases & 2 ? a.second.tiles : 0;
    int end1 = tiles * per1, end2 = end1 + ((a.phases & 1) && BY_ROW ? tiles : 0), end3 = end2 + tiles * per2;
    Item item = {};
    if (i >= end3) return item;
    item.phase = i < end1 ? 1 : i < end2 ? 2 : 3;
    int at = item.phase == 1 ? i : item.phase == 2 ? i - end1 : i - end2, per = item.phase == 1 ? per1 : item.phase == 2 ? 1 : per2;
    item.tile = at / per, item.column = at % per;
    if (a.ids) {
        lone_tiles(a, item.tile, item.e, lane);
        item.first = item.tile, item.count = 1, item.rounded = HEIGHT_0;
        return item;
    }
    int4 rows = __ldg(a.tiles + item.tile);
    item.e = rows.x, item.first = rows.y, item.count = rows.z, item.rounded = rows.w;
    return item;
}

// Row r of the weight rows that a tile has in shared memory: of the first product eight gate rows lie before the eight up rows
// of the same elements.
DEVICE int weight_row(const Item &item, const Weight &weight, int r) {
    if (item.phase != 1) return min(item.column * Y_COLUMNS + r, weight.rows - 1);
    return min(item.column * H_COLUMNS + r / 16 * 8 + r % 8, weight.rows - 1) + r / 8 % 2 * weight.rows;
}

// Scales along K of a tile's weight rows, for SPAN stages at a time, or of its blocks of weight rows, stage by stage: where a
// lane's lie, and copies. A slot of spans is filled anew when consumers are through with the stages that it served.
struct ScaleFetcher {
    static constexpr int MINE = BLOCK_SCALES ? 1 : 4 * STACK, OLDER = SPAN > 1 ? SCALE_SLOTS - 1 : 1;
    const u8 *base;
    u32 row[MINE];
    int bytes;  // of a row
    bool by16;
    int span;
    u32 stage, begun[OLDER];  // stages since the kernel began; at which of them the spans before began, the newest first
    DEVICE_MEMBER ScaleFetcher() : span(SCALE_SLOTS - 1), stage(0), begun() {}
    DEVICE_MEMBER void begin(const Item &item, const Weight &weight, int lane) {
        base = weight.scales + item.e * weight.scales_expert;
        bytes = weight.scale_bytes, by16 = ((u64)base | weight.scales_row) % 16 == 0;
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            int n = BLOCK_SCALES ? 0 : weight_row(item, weight, lane + 32 * i);
            if (BLOCK_SCALES) {  // blocks begin anew at the up rows
                int block = item.phase == 1 ? item.column * H_COLUMNS / 128 : min(item.column * Y_COLUMNS / 128 + lane / 2, (weight.rows + 127) / 128 - 1);
                n = block + (item.phase == 1 && lane % 2 ? (weight.rows + 127) / 128 : 0);
            }
            row[i] = (u32)(n * weight.scales_row);
        }
    }
    template <int SIZE> DEVICE_MEMBER void copy(int first) const {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < MINE; i++)
#pragma unroll
            for (int k = 0; k < SPAN_BYTES; k += SIZE) {
                u8 *to = room.w_scales[span] + (lane + 32 * i) * SPAN_BYTES + k;
                int real = min(SIZE, bytes - first - k);
                const u8 *from = base + row[i] + first + k;
                if (SIZE == 2)
                    *(u16 *)to = real > 0 ? *(const u16 *)from : 0;
                else
                    copy_small<SIZE == 2 ? 4 : SIZE>(shared_address(to), real > 0 ? from : base, max(real, 0));
            }
    }
    // s: of this product, whose place in the ring is free.
    DEVICE_MEMBER void fetch(int s, int slot, int lane) {
        if (BLOCK_SCALES && lane < 2 * STACK) copy_small<4>(shared_address(room.w_scales[slot] + 4 * lane), base + row[0] + 4 * s, 4);
        if (!SCALE_BYTES) return;
        if (SPAN == 1)
            span = slot;
        else if (s % SPAN == 0)
            claim();
        stage++;
        int first = s / SPAN * SPAN_BYTES;
        if (s % SPAN)
            return;
        else if (!SCALE_UNIT)
            copy<2>(first);
        else if (SPAN > 1 && by16)
            copy<16>(first);
        else
            copy<SCALE_UNIT ? SCALE_UNIT : 4>(first);
    }
    // The slot of the span that begins.
    DEVICE_MEMBER void claim() {
        if (++span == SCALE_SLOTS) span = 0;
        u32 end = begun[OLDER - 1];  // of the span that has been there
        if (end && end - 1 + STAGES > stage) barrier_wait(shared_address(room.empty + (end - 1) % STAGES), (end - 1) / STAGES & 1);
#pragma unroll
        for (int i = OLDER - 1; i > 0; i--) begun[i] = begun[i - 1];
        begun[0] = stage;
    }
};

// While rows are being sorted, weights that the first items will probably want move into the cache: if most experts have one
// tile, this thread block's first item is the one of its own number, about.
DEVICE void fetch_likely(const Arguments &a, const Maps &maps) {
    constexpr int STAGES_AHEAD = 80 * 1024 / BLOCKS_PER_SM / W_BYTES;
    if (!a.likely) return;
    int per = a.first.tiles, e = blockIdx.x / per;
    if (e >= a.experts) return;
#pragma unroll 1
    for (int s = 0; s < min(a.first.stages, STAGES_AHEAD); s++) prefetch_tile5(&maps.first, s * W_ROW, blockIdx.x % per * H_COLUMNS / 8, e);
}

DEVICE void fetch_weights(const Arguments &a, const Maps &maps, int lane) {
    Ring slot = {0, 0}, at = {0, 0};
    ScaleFetcher scales;
    u64 begun = nanoseconds(), policy = first_to_go();
    bool ahead = a.ids;  // whoever wrote `ids` had ended before `prepare` let this grid start
    int none = 0, tiles = ahead ? lone_tiles(a, -1, none, lane) : a.band ? (a.rows + MOST - 1) / MOST : a.counters[0];
    int next = blockIdx.x, taken = ahead ? gridDim.x : 0;
    if (!ahead && !a.band && lane == 0) next = atomicAdd(a.counters + 1, 1);
    for (;;) {
        Item item = item_of(a, __shfl_sync(0xFFFFFFFFu, next, 0), tiles, lane);
        if (lane == 0) {
            wait_empty(room.item_empty, slot);
            room.items[slot.slot] = item;
            barrier_arrive(shared_address(room.item_full + slot.slot));
            if (item.phase == 2) {
                if (ahead) wait_for_grid();
                next = taken + atomicAdd(a.counters + 1, 1);
            }
        }
        slot.next(SLOTS);
        if (!item.phase) return;
        if (item.phase == 2) continue;
        bool up = item.phase == 1;
        const Weight &weight = up ? a.first : a.second;
        scales.begin(item, weight, lane);
        if (ahead && !up)
            while (nanoseconds() - begun < a.lead) __nanosleep(50);
        __syncwarp();
        for (int s = 0; s < weight.stages; s++) {
            u32 bar = shared_address(room.full + at.slot), to = shared_address(room.w[at.slot]);
            wait_empty(room.empty, at);
            if (lane == 0) {
                // Just in time: an item that is taken too early waits here while other thread blocks have nothing to do.
                if (s == max(weight.stages - 2, 0)) {
                    if (ahead) wait_for_grid();
                    next = a.band ? next + gridDim.x : taken + atomicAdd(a.counters + 1, 1);
                }
                barrier_announce(bar, W_BYTES);
                int column = up ? item.column * H_COLUMNS / 8 : item.column * Y_COLUMNS;
                if (up && a.once)
                    copy_once5(to, &maps.first, bar, s * W_ROW, column, item.e, policy);
                else if (up)
                    copy_tile5(to, &maps.first, bar, s * W_ROW, column, item.e);
                else if (a.once)
                    copy_once3(to, &maps.second, bar, s * W_ROW, column, item.e, policy);
                else
                    copy_tile3(to, &maps.second, bar, s * W_ROW, column, item.e);
            }
            if (STAGE_SCALES) {
                scales.fetch(s, at.slot, lane);
                if (SCALE_UNIT)
                    barrier_arrive_copies(bar);
                else
                    barrier_arrive(bar);
            }
            at.next(STAGES);
        }
        __syncwarp();
    }
}

// What the epilogue needs to know of a tile's rows: where results go, and their scales. Asked for first, stored later.
struct Tables {
    static constexpr int MINE = (MOST + 31) / 32;
    int place[MINE], source[MINE];
    float scale[MINE];
    DEVICE_MEMBER void load(const Arguments &a, const Item &item, const Rows &rows, int lane) {
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            int sorted = item.first + min(lane + 32 * i, item.count - 1);
            place[i] = a.order ? a.order[sorted] : sorted;
            source[i] = item.phase == 1 ? place[i] / a.top_k : sorted;
            if (ROW_SCALES) scale[i] = __ldcg(rows.scales + (i64)source[i] * rows.scale_row);
        }
    }
    DEVICE_MEMBER void store(int slot, int lane) {
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            if (lane + 32 * i >= MOST) continue;
            room.place[slot][lane + 32 * i] = place[i];
            if (ROW_SCALES) room.row_scale[slot][lane + 32 * i] = scale[i];
        }
        barrier_arrive(shared_address(room.table_full + slot));
    }
};

// Scales of groups, of rows that `sources` says, beside a stage of x. Each lane has its own rows.
DEVICE void fetch_group_scales(const Item &item, const Rows &rows, const Tables &tables, int stage, int slot, int lane) {
    if (!GROUP_SCALES) return;
#pragma unroll
    for (int i = 0; i < Tables::MINE; i++)
        if (lane + 32 * i < item.count)
            copy_small<4>(shared_address(room.x_scales[slot] + lane + 32 * i), rows.scales + (i64)tables.source[i] * rows.scale_row + (i64)stage * rows.scale_group, 4);
}

#if NARROW

// Copies of 16 bytes to where the products look for them, of rows wherever they lie.
DEVICE void fetch_scattered(const Item &item, const Rows &rows, int stages, int slot, Tables &tables, Ring &at, int lane) {
    constexpr int PARTS = X_ROW / 16, LANES = PARTS < 32 ? PARTS : 32, BESIDE = 32 / LANES;
    int part = lane % LANES, beside = lane / LANES;
    for (int s = 0; s < stages; s++) {
        wait_empty(room.empty, at);
        u32 to = shared_address(room.x[at.slot]), full = shared_address(room.full + at.slot);
        const u8 *from = rows.data + s * X_ROW + part * 16;
#pragma unroll 4
        for (int r = beside; r < MOST; r += BESIDE) {
            if (r - beside >= item.count) break;
            int source = __shfl_sync(0xFFFFFFFFu, tables.source[0], r);
#pragma unroll
            for (int more = 0; more < PARTS; more += LANES)
                if (r < item.count) copy16(to + x_address(r, part + more), from + source * rows.stride + more * 16);
        }
        fetch_group_scales(item, rows, tables, s, at.slot, lane);
        barrier_arrive_copies(full);
        if (s == 0) tables.store(slot, lane);
        at.next(STAGES);
    }
}

#else

// The same for one of two warps that share the rows: eight lanes copy 128 bytes of a row, so that all that changes from row
// to row is known when this is compiled, but where the rows lie.
struct Scattered {
    static constexpr int MINE = MOST / 8;
    u32 offset[MINE];
    DEVICE_MEMBER void load(const Arguments &a, const Item &item, int first) {
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            int sorted = item.first + min(first + 8 * i, item.count - 1);
            offset[i] = (u32)(a.order[sorted] / a.top_k) * (u32)a.x.stride;
        }
    }
    // from, to: of this lane's 16 bytes of the stage, of the first row.
    DEVICE_MEMBER void copy(const u8 *from, u32 to, int rows) const {
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            if (8 * i >= rows) return;
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) copy16(to + piece * (MOST * 128) + i * 1024, from + offset[i] + piece * 128);
        }
    }
};

DEVICE void fetch_scattered(const Arguments &a, const Item &item, int warp, int slot, Tables &tables, Ring &at, int lane) {
    int first = 4 * warp + lane / 8, part = lane % 8;  // rows `first`, `first` + 8 ...
    Scattered mine;
    mine.load(a, item, first);
    const u8 *from = a.x.data + part * 16;
    u32 to = first * 128 + (part ^ first) * 16;
    for (int s = 0; s < a.first.stages; s++) {
        wait_empty(room.empty, at);
        u32 full = shared_address(room.full + at.slot);
        mine.copy(from + s * X_ROW, shared_address(room.x[at.slot]) + to, item.count);
        if (warp == 0) fetch_group_scales(item, a.x, tables, s, at.slot, lane);
        barrier_arrive_copies(full);
        if (warp == 0 && lane == 0) barrier_arrive(full);  // where a tile of h is announced
        if (warp == 0 && s == 0) tables.store(slot, lane);
        at.next(STAGES);
    }
}

// Tiles of sorted rows, by the copy engine.
DEVICE void fetch_tiles(const Maps &maps, const Item &item, const Rows &rows, int stages, int slot, Tables &tables, Ring &at, int lane) {
    for (int s = 0; s < stages; s++) {
        wait_empty(room.empty, at);
        u32 bar = shared_address(room.full + at.slot), to = shared_address(room.x[at.slot]);
        fetch_group_scales(item, rows, tables, s, at.slot, lane);
        if (lane == 0) {
            barrier_announce(bar, (item.rounded + STEP - 1) / STEP * STEP * X_ROW);
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
                for (int r = 0; r < item.rounded; r += STEP) copy_tile2(to + piece * MOST * 128 + r * 128, &maps.h, bar, s * X_ROW + piece * 128, item.first + r);
        }
        barrier_arrive_copies(bar);
        if (s == 0) tables.store(slot, lane);
        at.next(STAGES);
    }
}

#endif

// warp: of two that share this work (NARROW: there is one).
DEVICE void fetch_rows(const Arguments &a, const Maps &maps, int warp, int lane) {
    Ring slot = {0, 0}, at = {0, 0};
    for (;;) {
        wait_full(room.item_full, slot);
        Item item = room.items[slot.slot];
        if (!item.phase) return;
        bool up = item.phase == 1;
        if (item.phase == 2) {
            if (warp == 0) barrier_arrive(shared_address(room.table_full + slot.slot));
        } else {
            if (!up && (a.phases & 1) && warp == 0) {
                while (load_acquire(READY(a, item.tile)) < a.parts) __nanosleep(20);
                if (!NARROW) fence_to_async();
                __syncwarp();
            }
            Tables tables;
            if (warp == 0) tables.load(a, item, up ? a.x : a.h, lane);
#if NARROW
            fetch_scattered(item, up ? a.x : a.h, up ? a.first.stages : a.second.stages, slot.slot, tables, at, lane);
#else
            if (up)
                fetch_scattered(a, item, warp, slot.slot, tables, at, lane);
            else if (warp == 0)
                fetch_tiles(maps, item, a.h, a.second.stages, slot.slot, tables, at, lane);
            else
                for (int s = 0; s < a.second.stages; s++) {
                    wait_empty(room.empty, at);
                    barrier_arrive(shared_address(room.full + at.slot));
                    at.next(STAGES);
                }
#endif
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(room.item_empty + slot.slot));
        slot.next(SLOTS);
    }
}

// --- what has been made ---

// Scales of rows of a tile from `first` on, of group `group`.
template <int R> DEVICE void put_scales(const Arguments &a, const Item &item, int first, const float (&scale)[R], int group, int lane) {
#pragma unroll
    for (int r = 0; r < R; r++)
        if (lane == r && first + r < item.count) a.h.scales[(i64)(item.first + first + r) * a.h.scale_row + (i64)group * a.h.scale_group] = scale[r];
}

// Rows of a tile, columns begin .. end (multiples of 128), ENCODED at a time. Warps share the rows; where those are few, several
// take turns at the groups of the same ones. Scales of rows (not of groups) need all columns.
DEVICE void encode_part(const Arguments &a, const Item &item, int begin, int end, float given, u8 *space, int warp, int warps, int lane) {
    constexpr int R = ENCODED;
    u8 *spaces[R];
#pragma unroll
    for (int r = 0; r < R; r++) spaces[r] = space + 256 * r;
    int share = max(1, warps / ((item.count + R - 1) / R)), mine = warp % share;
    for (int first = warp / share * R; first < item.count; first += warps / share * R) {
        const float4 *from[R];
        u8 *to[R];
        float scale[R];
        bool wanted[R];
#pragma unroll
        for (int r = 0; r < R; r++) {
            int row = item.first + min(first + r, item.count - 1);
            from[r] = (const float4 *)(a.wide + (i64)row * a.width) + lane, to[r] = a.h.data + row * a.h.stride;
            wanted[r] = first + r < item.count, scale[r] = given;
        }
        if (ENCODING == TOKEN || ENCODING == NV4_DYNAMIC) {
            float top[R] = {};
#pragma unroll 4
            for (int i = 0; i < a.width / 4; i += 32) {
#pragma unroll
                for (int r = 0; r < R; r++) {
                    float4 v = __ldcg(from[r] + i);
                    top[r] = larger(larger(top[r], larger(fabsf(v.x), fabsf(v.y))), larger(fabsf(v.z), fabsf(v.w)));
                }
            }
            largest_of<32>(top);
#pragma unroll
            for (int r = 0; r < R; r++) scale[r] = scale_of_row(top[r]);
        }
        for (int i = begin / 128 + mine; i < end / 128; i += share) {
            float v[R][4];
#pragma unroll
            for (int r = 0; r < R; r++) {
                float4 q = __ldcg(from[r] + 32 * i);
                v[r][0] = q.x, v[r][1] = q.y, v[r][2] = q.z, v[r][3] = q.w;
            }
            encode_elements(v, scale);
            put_elements(to, wanted, 128 * i, v, spaces, lane);
            if (GROUP_SCALES) put_scales(a, item, first, scale, i, lane);
        }
        if (!GROUP_SCALES && mine == 0) put_scales(a, item, first, scale, 0, lane);
    }
}

// Waits for all of h that a scale of this tile's rows spans, and gives the scale if it is one of everything.
DEVICE float wait_for_scale(const Arguments &a, const Item &item) {
    const int *made = ENCODING == TENSOR_DYNAMIC ? a.counters + 2 : MADE(a, item.tile, 0);
    int target = a.first.tiles * (ENCODING == TENSOR_DYNAMIC ? a.counters[0] : 1);
    while (load_acquire(made) < target) __nanosleep(20);
    return ENCODING == TENSOR_DYNAMIC ? scale_of_row(__int_as_float(__ldcg(a.counters + 3))) : 1.0f;
}

// Of a tile of the first product, which the consumers have stored. Where two of them share a group, whoever is the last encodes.
DEVICE void publish_tile(const Arguments &a, const Item &item, int lane) {
    int last = 0, group = GROUP_SCALES ? item.column * H_COLUMNS / 128 : 0;
    if (lane == 0) {
        __threadfence();
        if (DIRECT)
            atomicAdd(READY(a, item.tile), 1);
        else if (ENCODING == TENSOR_DYNAMIC)
            atomicAdd(a.counters + 2, 1);
        else
            last = atomicAdd(MADE(a, item.tile, group), 1) + 1 == min(128 / H_COLUMNS, a.first.tiles - group * (128 / H_COLUMNS));
    }
    if (DIRECT || BY_ROW || !__shfl_sync(0xFFFFFFFFu, last, 0)) return;
    __threadfence();
    encode_part(a, item, 128 * group, 128 * group + 128, 1.0f, room.encoding, 0, 1, lane);
    __syncwarp();
    if (lane == 0) {
        __threadfence();
        if (!NARROW) fence_to_async();
        atomicAdd(READY(a, item.tile), 1);
    }
}

// What multiplies whole rows of a tile's weight, and what is added.
DEVICE void fill_terms(const Arguments &a, const Item &item, int slot, int lane) {
    if (item.phase == 2) return;
    const Weight &weight = item.phase == 1 ? a.first : a.second;
    int parts = item.phase == 1 ? 2 : 1;
    if (ENCODING == TENSOR || ENCODING == NV4) room.h_scale[slot] = *a.h.scales;
    if (!ROW_TERMS && !weight.bias) return;
#pragma unroll 4
    for (int r = lane; r < 128 * STACK; r += 32) {
        int n = weight_row(item, weight, r), segment = item.phase == 1 && r / 8 % 2;
        float f = LIFT;
        if (FORMAT == FP8 && !BLOCKS) f *= *(const float *)(weight.scales + item.e * weight.scales_expert + (BY_SEGMENT ? segment : n) * weight.scales_row);
        if (FORMAT == NVFP4) f *= weight.top[item.e * parts + segment];
        if (ROW_TERMS) room.factor[slot][r] = f;
        if (weight.bias) room.bias[slot][r] = __uint_as_float((u32)weight.bias[(i64)item.e * weight.rows * parts + n] << 16);
    }
}

// A token alone: who makes the last of its results for some columns adds them up, in the order of its choices. A lane knows the
// choice of its number.
struct LoneSum {
    int count;
    u32 chosen;
    float weight;
    DEVICE_MEMBER void begin(const Arguments &a, int lane) {
        int id = lane < a.top_k ? a.ids[lane] : -1;
        chosen = __ballot_sync(0xFFFFFFFFu, id >= 0 && id < a.experts), count = __popc(chosen);
        weight = lane < a.top_k ? a.weights[lane] : 0.0f;
        if (!count && blockIdx.x == 0)
            for (int i = lane; i < a.hidden / 8; i += 32) ((uint4 *)a.sum)[i] = make_uint4(0, 0, 0, 0);
    }
    DEVICE_MEMBER void add(const Arguments &a, const Item &item, int lane) const {
        int last = 0;
        if (lane == 0) {
            __threadfence();
            last = atomicAdd(SUMMED(a, item.column), 1) + 1 == count;
        }
        if (!__shfl_sync(0xFFFFFFFFu, last, 0)) return;
        __threadfence();
#pragma unroll 1
        for (int part = 0; part < Y_COLUMNS / 128; part++) {
            constexpr int AHEAD = 8;  // rows that are on their way at once
            int column = item.column * Y_COLUMNS + part * 128 + 4 * lane;
            float sum[4] = {};
#pragma unroll 1
            for (int first = 0; first < a.top_k; first += AHEAD) {
                uint2 q[AHEAD];
#pragma unroll
                for (int i = 0; i < AHEAD; i++) {
                    q[i] = make_uint2(0, 0);
                    if ((chosen >> first + i & 1) && column < a.hidden) q[i] = __ldcg((const uint2 *)(a.y + (i64)(first + i) * a.hidden + column));
                }
#pragma unroll
                for (int i = 0; i < AHEAD; i++) {
                    float w = __shfl_sync(0xFFFFFFFFu, weight, first + i);
                    w = chosen >> first + i & 1 ? w : 0.0f;
                    sum[0] += w * bf16_low(q[i].x), sum[1] += w * bf16_high(q[i].x), sum[2] += w * bf16_low(q[i].y), sum[3] += w * bf16_high(q[i].y);
                }
            }
            if (column < a.hidden) *(uint2 *)(a.sum + column) = make_uint2(bf16_pair(sum[0], sum[1]), bf16_pair(sum[2], sum[3]));
        }
    }
};

DEVICE void publish(const Arguments &a, int lane) {
    Ring slot = {0, 0};
#if NARROW
    LoneSum lone;
    if (a.sum) lone.begin(a, lane);
#endif
    for (;;) {
        wait_full(room.item_full, slot);
        Item item = room.items[slot.slot];
        if (!item.phase) return;
        fill_terms(a, item, slot.slot, lane);
        barrier_arrive(shared_address(room.table_full + slot.slot));
        wait_full(room.stored, slot);
        if (item.phase == 1) publish_tile(a, item, lane);
#if NARROW
        if (item.phase == 3 && a.sum) lone.add(a, item, lane);
#endif
        if (item.phase == 2 && lane == 0) {
            __threadfence();
            atomicAdd(READY(a, item.tile), 1);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(room.item_empty + slot.slot));
        slot.next(SLOTS);
    }
}
