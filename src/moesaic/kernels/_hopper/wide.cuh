// The product of a tile for many rows of x, by groups of four warps, whose operands the tensor cores take from shared memory
// (x always; codes that need no decoding) or registers. Warp 4 g + i of the consumers is warp i of group g.
#pragma once
#include "room.cuh"
#include "wgmma.cuh"  // generated: wgmma.py

#if !DECODED

template <int N> DEVICE void product(float (&sums)[STACK][HALF], Consumer &me, int stages) {
    u64 *before = nullptr;
    for (int s = 0; s < stages; s++) {
        wait_full(room.full, me.at);
        fence_shared_to_async();  // rows of x came by ordinary copies
        u64 x_tile = tile_descriptor(shared_address(room.x[me.at.slot]));
        u64 w_tile = tile_descriptor(shared_address(room.w[me.at.slot]) + me.warp / 4 * 8192);
#pragma unroll
        for (int m = 0; m < STACK; m++) {
#if FORMAT == FP8
            float part[N / 2];
            multiply_stage<N>(part, w_tile + m * 1024, x_tile);
            RowScales scales(me.at.slot, 0);
            fold<N>(sums[m], part, scales.fold_by(m, 0, 0), scales.fold_by(m, 1, 0), room.x_scales[GROUP_SCALES ? me.at.slot : 0], me.lane);
#else
            products_fence();
#pragma unroll
            for (int k = 0; k < 4; k++) multiply_shared<N>(sums[m], w_tile + m * 1024 + 2 * k, x_tile + 2 * k);
            products_commit();
#endif
        }
#if FORMAT == FP8
        release(room.empty + me.at.slot, me.lane);
#else
        products_wait<STACK>();  // those of the stage before are done
        if (before) release(before, me.lane);
        before = room.empty + me.at.slot;
#endif
        me.at.next(STAGES);
    }
#if FORMAT != FP8
    products_wait<0>();
    release(before, me.lane);
#pragma unroll
    for (int m = 0; m < STACK; m++) hold(sums[m]);
#endif
}

#else

// Decodes a word of codes of each of two rows and multiplies; then the products of the word before are done, and their
// registers free. fresh: they begin a new sum.
template <int N>
DEVICE void multiply_word(float *sums, u32 (&a)[4 * STEPS], u32 (&before)[4 * STEPS], u32 upper, u32 lower, u32 upper_scale, u32 lower_scale, u64 x_tile, bool fresh) {
    decode_words(upper, lower, upper_scale, lower_scale, a);
    products_fence();
#pragma unroll
    for (int t = 0; t < STEPS; t++)
        if (fresh && t == 0)
            begin_registers<N>(sums, a[4 * t], a[4 * t + 1], a[4 * t + 2], a[4 * t + 3], x_tile + 2 * t);
        else
            multiply_registers<N>(sums, a[4 * t], a[4 * t + 1], a[4 * t + 2], a[4 * t + 3], x_tile + 2 * t);
    products_commit();
    products_wait<1>();
    hold(before);
}

#if FORMAT == INT4

// Groups of GROUP elements, each summed by itself. A chunk of 16 bytes holds 32 elements, of which a thread takes a word.
template <int N> DEVICE void product(float (&sums)[STACK][HALF], Consumer &me, int stages) {
    constexpr int PER_GROUP = GROUP / 32, PER_PIECE = 128 / ROW_BYTES / 32, GROUPS = ELEMENTS / GROUP;
    u32 a[2][4 * STEPS] = {};
    int row = me.warp * 16 + lane_row(me.lane), word = me.lane % 4;
    for (int s = 0; s < stages; s++) {
        wait_full(room.full, me.at);
        fence_shared_to_async();  // rows of x came by ordinary copies
        const u8 *w = room.w[me.at.slot];
        RowScales scales(me.at.slot, row);
        u64 x_tile = tile_descriptor(shared_address(room.x[me.at.slot]));
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
#pragma unroll
            for (int m = 0; m < STACK; m++) {
                float part[N / 2];
                u32 words[2][PER_GROUP];
#pragma unroll
                for (int c = 0; c < PER_GROUP; c++)
#pragma unroll
                    for (int r = 0; r < 2; r++) words[r][c] = load_word(w + m * W_BLOCK, row + 8 * r, g * PER_GROUP + c, word);
#pragma unroll
                for (int c = 0; c < PER_GROUP; c++) {
                    int chunk = g * PER_GROUP + c;
                    multiply_word<N>(part, a[c % 2], a[(c + 1) % 2], words[0][c], words[1][c], 0, 0, x_tile + chunk / PER_PIECE * (MOST * 8) + chunk % PER_PIECE * 2 * STEPS, c == 0);
                }
                products_wait<0>();
                hold(part);
                int group = g + s % SCALED_STAGES;
                fold<N>(sums[m], part, scales.fold_by(m, 0, group), scales.fold_by(m, 1, group), nullptr, me.lane);
                if (g == GROUPS - 1 && m == STACK - 1) release(room.empty + me.at.slot, me.lane);
            }
        }
        me.at.next(STAGES);
    }
}

#else

// A thread takes chunks of 16 bytes of a row: lane % 4, then lane % 4 + 4, if there are so many. A stage is released a product
// late.
template <int N> DEVICE void product(float (&sums)[STACK][HALF], Consumer &me, int stages) {
    constexpr int CHUNKS = W_ROW / 64, PER_PIECE = 4 * CHUNKS / PIECES;  // words of a chunk that one piece of x serves
    u32 a[2][4 * STEPS] = {};
    int row = me.warp * 16 + lane_row(me.lane), chunk = me.lane % 4;
    u64 *before = nullptr;
    for (int s = 0; s < stages; s++) {
        wait_full(room.full, me.at);
        fence_shared_to_async();  // rows of x came by ordinary copies
        const u8 *w = room.w[me.at.slot];
        RowScales scales(me.at.slot, row);
        u64 x_tile = tile_descriptor(shared_address(room.x[me.at.slot]));
#if FOLDS
        float part[STACK][N / 2];
#endif
#pragma unroll
        for (int half = 0; half < CHUNKS; half++) {
#pragma unroll
            for (int m = 0; m < STACK; m++) {
                u32 bits[2] = {scales.bits(m, 0, half, me.lane), scales.bits(m, 1, half, me.lane)};
                uint4 upper = load_chunk(w + m * W_BLOCK, row, chunk + 4 * half), lower = load_chunk(w + m * W_BLOCK, row + 8, chunk + 4 * half);
#pragma unroll
                for (int word = 0; word < 4; word++) {
                    u64 tile = x_tile + (half * PIECES / CHUNKS + word / PER_PIECE) * (MOST * 8) + word % PER_PIECE * 2 * STEPS;
#if FOLDS
                    multiply_word<N>(part[m], a[word % 2], a[1 - word % 2], word_of(upper, word), word_of(lower, word), operand_scale(bits[0], word), operand_scale(bits[1], word), tile, half + word == 0);
#else
                    multiply_word<N>(sums[m], a[word % 2], a[1 - word % 2], word_of(upper, word), word_of(lower, word), operand_scale(bits[0], word), operand_scale(bits[1], word), tile, false);
#endif
                    if (half + m + word == 0 && before) release(before, me.lane);
                }
            }
        }
#if FOLDS
        products_wait<0>();
#pragma unroll
        for (int m = 0; m < STACK; m++) {
            hold(part[m]);
            fold<N>(sums[m], part[m], scales.fold_by(m, 0, 0), scales.fold_by(m, 1, 0), nullptr, me.lane);
        }
#endif
        before = room.empty + me.at.slot;
        me.at.next(STAGES);
    }
    products_wait<0>();
    release(before, me.lane);
#pragma unroll
    for (int m = 0; m < STACK; m++) hold(sums[m]);
}

#endif
#endif
