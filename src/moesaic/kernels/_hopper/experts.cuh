// All experts of a layer in one launch: both products, the activation and the encoding between them. Who does what of an
// item: eight warps multiply (narrow.cuh, wide.cuh) and finish the tile here (both in turned.cuh), three more see to the rest (fetch.cuh).
#pragma once
#include "room.cuh"
#if NARROW
#include "narrow.cuh"
#else
#include "wide.cuh"
#endif
#include "fetch.cuh"
#include "broad.cuh"
#include "turned.cuh"

DEVICE int row_in_tile(const Consumer &me, int m) { return (8 * m + me.warp) * 16 + lane_row(me.lane); }

DEVICE int element_of_h(const Consumer &me, int m) { return (8 * m + me.warp) * 8 + lane_row(me.lane); }

// The rows of a chunk that each warp takes.
#define TAKEN (CHUNK / 8)

struct Emitted {
    bool wanted[TAKEN];
    int row[TAKEN];  // sorted
    u8 *space[TAKEN];
};

DEVICE void put_h(const Arguments &a, const Emitted &to, int column, float (&v)[TAKEN][H_COLUMNS / 32], int slot, int lane) {
    constexpr int C = H_COLUMNS / 32;
    if (a.wide)
#pragma unroll
        for (int r = 0; r < TAKEN; r++) {
            if (!to.wanted[r]) continue;
            float *at = a.wide + (i64)to.row[r] * a.width + column + lane * C;
#pragma unroll
            for (int i = 0; i < C; i += 2) *(float2 *)(at + i) = make_float2(v[r][i], v[r][i + 1]);
        }
    if (ENCODING == TENSOR_DYNAMIC) {
        float top[1] = {};
#pragma unroll
        for (int r = 0; r < TAKEN; r++)
#pragma unroll
            for (int i = 0; i < C; i++) top[0] = larger(top[0], to.wanted[r] ? fabsf(v[r][i]) : 0.0f);
        largest_of<32>(top);
        if (lane == 0) atomicMax(a.counters + 3, __float_as_int(top[0]));
    }
    if (!DIRECT) return;
    float scale[TAKEN];
    u8 *rows[TAKEN];
#pragma unroll
    for (int r = 0; r < TAKEN; r++) scale[r] = ENCODING == TENSOR || ENCODING == NV4 ? room.h_scale[slot] : 1.0f, rows[r] = a.h.data + to.row[r] * a.h.stride;
    encode_elements(v, scale);
    put_elements(rows, to.wanted, column, v, to.space, lane);
    if (GROUP_SCALES)
#pragma unroll
        for (int r = 0; r < TAKEN; r++)
            if (lane == r && to.wanted[r]) a.h.scales[(i64)to.row[r] * a.h.scale_row + (i64)column / 128 * a.h.scale_group] = scale[r];
}

DEVICE void emit_h(const Arguments &a, const Item &item, int begin, int slot, const Consumer &me) {
    constexpr int C = H_COLUMNS / 32;
    Emitted to;
    float v[TAKEN][C];
    int column = item.column * H_COLUMNS, at = me.lane * C;
#pragma unroll
    for (int r = 0; r < TAKEN; r++) {
        int local = me.warp + 8 * r;
        to.wanted[r] = begin + local < item.count, to.row[r] = item.first + begin + local, to.space[r] = (u8 *)room.chunk[local];
#pragma unroll
        for (int i = 0; i < C; i += 2) *(float2 *)(v[r] + i) = *(const float2 *)(room.chunk[local] + at + i);
        if (column + at >= a.columns)
#pragma unroll
            for (int i = 0; i < C; i++) v[r][i] = 0.0f;
    }
    put_h(a, to, column, v, slot, me.lane);
    if (item.column != a.first.tiles - 1) return;
    for (column += H_COLUMNS; column < a.width; column += H_COLUMNS) {  // behind the last tile h is zero
#pragma unroll
        for (int r = 0; r < TAKEN; r++)
#pragma unroll
            for (int i = 0; i < C; i++) v[r][i] = 0.0f;
        put_h(a, to, column, v, slot, me.lane);
    }
}

DEVICE void emit_y(const Arguments &a, const Item &item, int begin, int slot, const Consumer &me) {
    constexpr int C = !NARROW ? 8 : Y_COLUMNS / 32, LANES = Y_COLUMNS / C, BESIDE = 32 / LANES;  // rows that a warp stores at a time
    int part = me.lane % LANES * C, column = item.column * Y_COLUMNS + part;
    if (column >= a.hidden) return;
#pragma unroll
    for (int r = 0; r < TAKEN / BESIDE; r++) {
        int local = (me.warp + 8 * r) * BESIDE + me.lane / LANES;
        if (begin + local >= item.count) continue;
        const u16 *from = (const u16 *)room.chunk[local] + part;
        u16 *to = a.y + (i64)room.place[slot][begin + local] * a.hidden + column;
        if (!NARROW)
            *(uint4 *)to = in_order(*(const uint4 *)from);
        else if (C == 8)
            *(uint4 *)to = *(const uint4 *)from;
        else
            *(uint2 *)to = *(const uint2 *)from;
    }
}

// The first rows of the sums into shared memory, from row `begin` of the tile on: as h, or as y. Which of them is asked once,
// and everything is computed before anything is stored: else each element would wait for the one before.
template <bool FIRST>
DEVICE void put_chunk(const Arguments &a, int begin, int slot, const Consumer &me, const float (&sums)[STACK][HALF], const float (&factor)[STACK][2], const float (&bias)[STACK][2]) {
    constexpr int MINE = CHUNK / 4;
    float x_scale[MINE], first[STACK][MINE], second[STACK][MINE];
#pragma unroll
    for (int i = 0; i < MINE; i++) x_scale[i] = ROW_SCALES ? room.row_scale[slot][begin + i / 2 * 8 + 2 * (me.lane % 4) + i % 2] : 1.0f;
#pragma unroll
    for (int m = 0; m < STACK; m++)
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            int at = i / 2 * 4 + i % 2;
            first[m][i] = sums[m][at] * (factor[m][0] * x_scale[i]) + bias[m][0], second[m][i] = sums[m][at + 2] * (factor[m][1] * x_scale[i]) + bias[m][1];
        }
    if (FIRST) join_all(a, first, second);
    if (!NARROW && !FIRST) return put_broad_y(me, first, second);
#pragma unroll
    for (int m = 0; m < STACK; m++)
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            int local = i / 2 * 8 + 2 * (me.lane % 4) + i % 2;
            if (FIRST) {
                room.chunk[local][!NARROW ? broad_place(element_of_h(me, m)) : element_of_h(me, m)] = first[m][i];
            } else {
                u16 *to = (u16 *)room.chunk[local] + row_in_tile(me, m);
                u32 pair = bf16_pair(first[m][i], second[m][i]);
                to[0] = (u16)pair, to[8] = (u16)(pair >> 16);
            }
        }
}

// A chunk of rows at a time goes through shared memory. The sums move up by a chunk, so that one piece of code serves all.
DEVICE void finish_tile(const Arguments &a, const Item &item, int slot, const Consumer &me, float (&sums)[STACK][HALF]) {
    const Weight &weight = item.phase == 1 ? a.first : a.second;
    float factor[STACK][2], bias[STACK][2];
#pragma unroll
    for (int m = 0; m < STACK; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = row_in_tile(me, m) + 8 * r;
            factor[m][r] = ROW_TERMS ? room.factor[slot][row] : LIFT, bias[m][r] = weight.bias ? room.bias[slot][row] : 0.0f;
        }
#pragma unroll 1
    for (int begin = 0; begin < item.count; begin += CHUNK) {
        group_sync<2, CONSUMERS>();  // the chunk before has been read
        if (item.phase == 1)
            put_chunk<true>(a, begin, slot, me, sums, factor, bias);
        else
            put_chunk<false>(a, begin, slot, me, sums, factor, bias);
#pragma unroll
        for (int m = 0; m < STACK; m++)
#pragma unroll
            for (int i = 0; i + CHUNK / 2 < HALF; i++) sums[m][i] = sums[m][i + CHUNK / 2];
        group_sync<2, CONSUMERS>();
        if (item.phase == 1)
            !NARROW ? emit_broad(a, item, begin, slot, me) : emit_h(a, item, begin, slot, me);
        else
            emit_y(a, item, begin, slot, me);
    }
}

// `rounded` is one of the sizes that code exists for.
DEVICE void multiply_tile(float (&sums)[STACK][HALF], Consumer &me, int stages, int rounded) {
#if TURNS_FULL
    if (rounded == MOST) return product_turned(sums, me, stages);
#endif
#define TRY(HEIGHT)                         \
    if (HEIGHT < MOST && rounded <= HEIGHT) \
        return product<HEIGHT>(sums, me, stages);
    TRY(HEIGHT_0)
    TRY(HEIGHT_1)
    TRY(HEIGHT_2)
    TRY(HEIGHT_3)
#if !TURNS_FULL
    product<MOST>(sums, me, stages);
#endif
}

DEVICE void consume(const Arguments &a) {
    Consumer me = {{0, 0}, (int)(threadIdx.x - FETCHERS) / 32, (int)threadIdx.x % 32, SCALE_SLOTS - 1};
    Ring slot = {0, 0};
#if TAKES_TURNS
    if (me.warp >= 4) end_turn(1);  // the first turn is the other group's
#endif
    for (;;) {
        wait_full(room.item_full, slot);
        Item item = room.items[slot.slot];
        if (!item.phase) return;
        if (item.phase == 2) {
            u8 *space = (NARROW ? room.encoding : (u8 *)room.chunk) + 256 * ENCODED * me.warp;
            if (BY_ROW && !NARROW) group_sync<2, CONSUMERS>();  // who finishes the item before may still read `chunk`
            if (BY_ROW) encode_part(a, item, 0, a.width, wait_for_scale(a, item), space, me.warp, 8, me.lane);
        } else {
            const Weight &weight = item.phase == 1 ? a.first : a.second;
            float sums[STACK][HALF];
#pragma unroll
            for (int m = 0; m < STACK; m++)
#pragma unroll
                for (int i = 0; i < HALF; i++) sums[m][i] = 0.0f;
            multiply_tile(sums, me, weight.stages, item.rounded);
            wait_full(room.table_full, slot);
#if TURNS_FULL
            if (item.rounded == MOST)
                finish_turned(a, item, slot.slot, me, sums);
            else
#endif
                finish_tile(a, item, slot.slot, me, sums);
        }
        if (!NARROW && item.phase != 3) fence_to_async();  // the copy engine will read h
        __syncwarp();
        release(room.stored + slot.slot, me.lane);
        release(room.item_empty + slot.slot, me.lane);
        slot.next(SLOTS);
    }
}

DEVICE void prepare_barriers() {
    for (int i = 0; i < STAGES; i++) {
        barrier_init(shared_address(room.full + i), (NARROW ? 33 : 66) + (STAGE_SCALES ? 32 : 0));
        barrier_init(shared_address(room.empty + i), 8);
    }
    for (int i = 0; i < SLOTS; i++) {
        barrier_init(shared_address(room.item_full + i), 1);
        barrier_init(shared_address(room.item_empty + i), NARROW ? 10 : 11);
        barrier_init(shared_address(room.stored + i), 8);
        barrier_init(shared_address(room.table_full + i), 64);
    }
    fence_barrier_init();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) experts(const __grid_constant__ Maps maps, const __grid_constant__ Arguments a) {
    if (threadIdx.x == 0) {
        prefetch_map(&maps.first), prefetch_map(&maps.second);
        if (!NARROW) prefetch_map(&maps.h);
        fetch_likely(a, maps);
        prepare_barriers();
    }
    __syncthreads();
    if (!a.ids || threadIdx.x >= 32) {
        wait_for_grid();
        let_next_grid_start();
    }
    if (threadIdx.x < FETCHERS) {
#if !NARROW
        keep_registers<BLOCKS_PER_SM == 1 ? 56 : 48>();
#endif
        if (threadIdx.x < 32)
            fetch_weights(a, maps, threadIdx.x);
        else if (threadIdx.x < 64)
            fetch_rows(a, maps, 0, threadIdx.x - 32);
        else if (threadIdx.x < 96)
            publish(a, threadIdx.x - 64);
        else
            fetch_rows(a, maps, 1, threadIdx.x - 96);
    } else {
#if !NARROW
        take_registers<BLOCKS_PER_SM == 1 ? 224 : 96>();
#endif
        consume(a);
    }
}
