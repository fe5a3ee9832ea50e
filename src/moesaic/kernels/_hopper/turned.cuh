// Full tiles of FP8 with scales of groups and blocks. Else a sum belongs to two rows of w and many of x, and what it is
// multiplied by, to itself: a product of two scales. Here rows of x are the products' rows, those of w their columns, and a
// lane's two rows have two scales for each block of w: half of the arithmetic between products, which would hold those up.
// Group g of four warps has rows 64 g .. + 63 of x. A sum meets the same numbers in the same order as in wide.cuh, and
// tensor cores give it the same bits (`test_all_tiles_give_the_same_bits`).
#pragma once
#include "broad.cuh"

#if TURNS_FULL

// sums += part x scales. upper, lower: of a lane's rows and of the even or odd blocks of eight columns.
DEVICE void fold_turned(float (&sums)[HALF], const float (&part)[HALF], const float (&upper)[2], const float (&lower)[2]) {
#pragma unroll
    for (int j = 0; j < HALF / 4; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            sums[4 * j + i] += part[4 * j + i] * upper[j % 2];
            sums[4 * j + 2 + i] += part[4 * j + 2 + i] * lower[j % 2];
        }
}

// sums[m]: of the lane's rows 16 warp + lane / 4 and + 8 with rows 128 m + 8 j + 2 (lane % 4) + {0, 1} of w: [4 j + {0, 1}] and
// [4 j + {2, 3}].
DEVICE void product_turned(float (&sums)[STACK][HALF], Consumer &me, int stages) {
    int row = me.warp * 16 + me.lane / 4;
    for (int s = 0; s < stages; s++) {
        wait_full(room.full, me.at);
        fence_shared_to_async();  // rows of x came by ordinary copies
        u64 x_tile = tile_descriptor(shared_address(room.x[me.at.slot]) + me.warp / 4 * 8192);
        u64 w_tile = tile_descriptor(shared_address(room.w[me.at.slot]));
        float upper = room.x_scales[me.at.slot][row], lower = room.x_scales[me.at.slot][row + 8];
        RowScales scales(me, s, 0);
#pragma unroll
        for (int m = 0; m < STACK; m++) {
            float part[HALF], even = scales.fold_by(m, 0, 0), odd = scales.fold_by(m, 1, 0);
            multiply_stage<MOST>(part, x_tile, w_tile + m * 1024);
            fold_turned(sums[m], part, {upper * even, upper * odd}, {lower * even, lower * odd});
        }
        release(room.empty + me.at.slot, me.lane);
        me.at.next(STAGES);
    }
}

// Four lanes have a word of each of four numbers; then lane l % 4 has all words of number l % 4, in the order of lanes.
DEVICE void exchange(u32 (&v)[4], int lane) {
    bool odd = lane & 1, high = lane & 2;
    u32 a = __shfl_xor_sync(0xFFFFFFFFu, odd ? v[0] : v[1], 1), b = __shfl_xor_sync(0xFFFFFFFFu, odd ? v[2] : v[3], 1);
    u32 low[2] = {odd ? a : v[0], odd ? v[1] : a}, up[2] = {odd ? b : v[2], odd ? v[3] : b};  // of number l % 2, and of 2 + l % 2
    u32 c = __shfl_xor_sync(0xFFFFFFFFu, high ? low[0] : up[0], 2), d = __shfl_xor_sync(0xFFFFFFFFu, high ? low[1] : up[1], 2);
    v[0] = high ? c : low[0], v[1] = high ? d : low[1], v[2] = high ? up[0] : c, v[3] = high ? up[1] : d;
}

// Even blocks of eight columns are gate rows, odd ones the up rows of the same elements: 128 elements of h are on four lanes.
DEVICE void finish_turned_h(const Arguments &a, const Item &item, int slot, const Consumer &me, const float (&sums)[STACK][HALF]) {
    constexpr int C = HALF / 4;
    int local = me.warp * 16 + me.lane / 4, part = me.lane % 4, column = item.column * H_COLUMNS;
    float v[2][STACK * C];
#pragma unroll
    for (int m = 0; m < STACK; m++) {
        float gate[2][C], up[2][C];
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < C; i++) {
                int at = i / 2 * 8 + 2 * r + i % 2;
                gate[r][i] = sums[m][at], up[r][i] = sums[m][at + 4];
            }
        if (a.first.bias)
#pragma unroll
            for (int i = 0; i < C; i++) {
                const float *bias = room.bias[slot] + 128 * m + i / 2 * 16 + 2 * part + i % 2;
#pragma unroll
                for (int r = 0; r < 2; r++) gate[r][i] += bias[0], up[r][i] += bias[8];
            }
        join_all(a, gate, up);
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < C; i++) v[r][m * C + i] = column + 64 * m + i / 2 * 8 < a.columns ? gate[r][i] : 0.0f;
    }
    bool wanted[2] = {local < item.count, local + 8 < item.count};
    i64 row = item.first + local;
    if (a.wide)
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < STACK * C; i += 2)
                if (wanted[r]) *(float2 *)(a.wide + (row + 8 * r) * a.width + column + i * 4 + 2 * part) = make_float2(v[r][i], v[r][i + 1]);
    float scale[2];
    encode_elements(v, scale);
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int m = 0; m < STACK; m++) {
            u32 pairs[4];  // of codes of two blocks
#pragma unroll
            for (int b = 0; b < 4; b++) pairs[b] = codes_of(v[r] + m * C + 4 * b);
            exchange(pairs, me.lane);
            uint4 codes = make_uint4(__byte_perm(pairs[0], pairs[1], 0x5410), __byte_perm(pairs[2], pairs[3], 0x5410), __byte_perm(pairs[0], pairs[1], 0x7632), __byte_perm(pairs[2], pairs[3], 0x7632));
            if (wanted[r]) *(uint4 *)(a.h.data + (row + 8 * r) * a.h.stride + column + 64 * m + 16 * part) = codes;
        }
#pragma unroll
    for (int r = 0; r < 2; r++)
        if (part == 0 && wanted[r]) a.h.scales[(row + 8 * r) * a.h.scale_row + (i64)item.column * a.h.scale_group] = scale[r];
}

DEVICE void finish_turned_y(const Arguments &a, const Item &item, int slot, const Consumer &me, const float (&sums)[STACK][HALF]) {
    int local = me.warp * 16 + me.lane / 4, part = me.lane % 4, column = item.column * Y_COLUMNS;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        bool wanted = local + 8 * r < item.count;
        u16 *to = a.y + (i64)(wanted ? room.place[slot][local + 8 * r] : 0) * a.hidden + column;
#pragma unroll
        for (int m = 0; m < STACK; m++)
#pragma unroll
            for (int j = 0; j < HALF / 4; j += 4) {
                u32 pairs[4];
#pragma unroll
                for (int b = 0; b < 4; b++) {
                    float2 q = make_float2(sums[m][4 * (j + b) + 2 * r], sums[m][4 * (j + b) + 2 * r + 1]);
                    if (a.second.bias) {
                        const float *bias = room.bias[slot] + 128 * m + 8 * (j + b) + 2 * part;
                        q.x += bias[0], q.y += bias[1];
                    }
                    pairs[b] = bf16_pair(q.x, q.y);
                }
                exchange(pairs, me.lane);
                int at = 128 * m + 8 * (j + part);
                if (wanted && column + at < a.hidden) *(uint4 *)(to + at) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            }
    }
}

DEVICE void finish_turned(const Arguments &a, const Item &item, int slot, const Consumer &me, const float (&sums)[STACK][HALF]) {
    if (item.phase == 1)
        finish_turned_h(a, item, slot, me, sums);
    else
        finish_turned_y(a, item, slot, me, sums);
}

#endif
