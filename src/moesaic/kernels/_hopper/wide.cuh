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
            RowScales scales(me, s, 0);
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

#elif TAKES_TURNS

// A thread's words of codes of two rows are decoded together and multiplied together: those of a block of weight rows in a
// stage, or in a group of scales. Of INT4 a chunk of 16 bytes holds 32 elements, of which a thread takes a word; of NVFP4 it
// takes chunk lane % 4.
#define WORDS (FORMAT == INT4 ? GROUP / 32 : 4)
#define GROUPS (W_ROW / 16 / WORDS) /* in a stage */

struct Codes {
    u32 upper[WORDS], lower[WORDS], bits[2];
    DEVICE_MEMBER void load(const u8 *block, const RowScales &scales, int row, int m, int group, int lane) {
#if FORMAT == INT4
#pragma unroll
        for (int k = 0; k < WORDS; k++) {
            const u8 *at = chunk_at(block, row, group * WORDS + k) + lane % 4 * 4;
            upper[k] = *(const u32 *)at, lower[k] = *(const u32 *)(at + 8 * W_ROW);  // eight rows on, chunks are exchanged alike
        }
        bits[0] = bits[1] = 0;
#else
        const u8 *at = chunk_at(block, row, lane % 4);
        uint4 first = *(const uint4 *)at, second = *(const uint4 *)(at + 8 * W_ROW);
#pragma unroll
        for (int k = 0; k < WORDS; k++) upper[k] = word_of(first, k), lower[k] = word_of(second, k);
        bits[0] = scales.bits(m, 0, 0, lane), bits[1] = scales.bits(m, 1, 0, lane);
#endif
    }
    DEVICE_MEMBER void decode(u32 (&a)[WORDS][4 * STEPS]) const {
#pragma unroll
        for (int k = 0; k < WORDS; k++) decode_words(upper[k], lower[k], operand_scale(bits[0], k), operand_scale(bits[1], k), a[k]);
    }
};

// The two groups of warps multiply in turn: a warp that gives products to the tensor cores stands still until all but the last
// have begun, and meanwhile the other group decodes. Left alone, both would do the same at once.
DEVICE void begin_turn(int group) { group_sync<CONSUMERS>(3 + group); }

// And lets the other one begin.
DEVICE void end_turn(int group) { group_arrive<CONSUMERS>(3 + (group ^ 1)); }

template <int N> DEVICE void multiply(float *sums, const u32 (&a)[WORDS][4 * STEPS], u64 x_tile, int first) {
    constexpr int PER_PIECE = W_ROW / 16 / PIECES;  // words that one piece of x serves
#pragma unroll
    for (int k = 0; k < WORDS; k++)
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
            const u32 *mine = a[k] + 4 * t;
            u64 x = x_tile + (first + k) / PER_PIECE * (MOST * 8) + (first + k) % PER_PIECE * 2 * STEPS + 2 * t;
            if (FOLDS && k + t == 0)
                begin_registers<N>(sums, mine[0], mine[1], mine[2], mine[3], x);
            else
                multiply_registers<N>(sums, mine[0], mine[1], mine[2], mine[3], x);
        }
}

template <int N> DEVICE void product(float (&sums)[STACK][HALF], Consumer &me, int stages) {
    int row = me.warp * 16 + lane_row(me.lane), group = me.warp / 4;
    Codes codes;
    u32 a[WORDS][4 * STEPS];
    wait_full(room.full, me.at);
    fence_shared_to_async();  // rows of x came by ordinary copies
    me.begin_stage(0);
    RowScales scales(me, 0, row);
    codes.load(room.w[me.at.slot], scales, row, 0, 0, me.lane);
    for (int s = 0; s < stages; s++) {
        u64 x_tile = tile_descriptor(shared_address(room.x[me.at.slot])), *mine = room.empty + me.at.slot;
        RowScales here = scales;
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
#pragma unroll
            for (int m = 0; m < STACK; m++) {
                codes.decode(a);
#if FOLDS
                float part[N / 2];
#else
                float *part = sums[m];
#endif
                begin_turn(group);
                products_fence();
                multiply<N>(part, a, x_tile, g * WORDS);
                products_commit();
                end_turn(group);
                if (m + 1 < STACK) {
                    codes.load(room.w[me.at.slot] + (m + 1) * W_BLOCK, here, row, m + 1, g, me.lane);
                } else if (g + 1 < GROUPS) {
                    codes.load(room.w[me.at.slot], here, row, 0, g + 1, me.lane);
                } else if (s + 1 < stages) {
                    me.at.next(STAGES);
                    wait_full(room.full, me.at);
                    fence_shared_to_async();
                    me.begin_stage(s + 1);
                    scales = RowScales(me, s + 1, row);
                    codes.load(room.w[me.at.slot], scales, row, 0, 0, me.lane);
                }
                products_wait<0>();
#pragma unroll
                for (int k = 0; k < WORDS; k++) hold(a[k]);
#if FOLDS
                hold(part);
                fold<N>(sums[m], part, here.fold_by(m, 0, g), here.fold_by(m, 1, g), nullptr, me.lane);
#endif
            }
        release(mine, me.lane);
    }
    me.at.next(STAGES);
#if !FOLDS
#pragma unroll
    for (int m = 0; m < STACK; m++) hold(sums[m]);
#endif
}

#else

// Words that are decoded together, so that their steps need not wait for one another; where there are registers for it.
#define AT_ONCE (MOST >= 128 || (MOST == 96 && FOUR_BIT) ? 1 : 2)

// Words of codes of two rows, the scales of their blocks, and where the rows of x begin that they meet.
struct Words {
    u32 upper[AT_ONCE], lower[AT_ONCE], upper_scale[AT_ONCE], lower_scale[AT_ONCE];
    u64 x_tile[AT_ONCE];
};

typedef u32 Operands[AT_ONCE][4 * STEPS];

template <int N> DEVICE void multiply_step(float *sums, const u32 *mine, u64 x_tile, bool fresh) {
    if (fresh)
        begin_registers<N>(sums, mine[0], mine[1], mine[2], mine[3], x_tile);
    else
        multiply_registers<N>(sums, mine[0], mine[1], mine[2], mine[3], x_tile);
}

// Decodes and multiplies; then the products of the words before are done, and their registers free. fresh: they begin a new sum.
template <int N> DEVICE void multiply_words(float *sums, Operands &a, Operands &before, const Words &of, bool fresh) {
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) decode_words(of.upper[k], of.lower[k], of.upper_scale[k], of.lower_scale[k], a[k]);
    products_fence();
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
        for (int t = 0; t < STEPS; t++) multiply_step<N>(sums, a[k] + 4 * t, of.x_tile[k] + 2 * t, fresh && k + t == 0);
    products_commit();
    products_wait<1>();
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) hold(before[k]);
}

// A thread takes chunks of 16 bytes of a row: lane % 4, then lane % 4 + 4, if there are so many. A stage is released a product
// late.
template <int N> DEVICE void product(float (&sums)[STACK][HALF], Consumer &me, int stages) {
    constexpr int CHUNKS = W_ROW / 64, PER_PIECE = 4 * CHUNKS / PIECES;  // words of a chunk that one piece of x serves
    Operands a[2] = {};
    int row = me.warp * 16 + lane_row(me.lane), chunk = me.lane % 4;
    u64 *before = nullptr;
    for (int s = 0; s < stages; s++) {
        wait_full(room.full, me.at);
        fence_shared_to_async();  // rows of x came by ordinary copies
        const u8 *w = room.w[me.at.slot];
        RowScales scales(me, s, row);
        u64 x_tile = tile_descriptor(shared_address(room.x[me.at.slot]));
#if FOLDS
        float part[STACK][N / 2];
#endif
#pragma unroll
        for (int half = 0; half < CHUNKS; half++) {
#pragma unroll
            for (int m = 0; m < STACK; m++) {
                u32 bits[2] = {scales.bits(m, 0, half, me.lane), scales.bits(m, 1, half, me.lane)};
                const u8 *codes = chunk_at(w + m * W_BLOCK, row, chunk + 4 * half);
                uint4 upper = *(const uint4 *)codes, lower = *(const uint4 *)(codes + 8 * W_ROW);  // eight rows on, chunks are exchanged alike
#pragma unroll
                for (int word = 0; word < 4; word += AT_ONCE) {
                    Words of;
#pragma unroll
                    for (int k = 0; k < AT_ONCE; k++) {
                        int at = word + k;
                        of.upper[k] = word_of(upper, at), of.lower[k] = word_of(lower, at);
                        of.upper_scale[k] = operand_scale(bits[0], at), of.lower_scale[k] = operand_scale(bits[1], at);
                        of.x_tile[k] = x_tile + (half * PIECES / CHUNKS + at / PER_PIECE) * (MOST * 8) + at % PER_PIECE * 2 * STEPS;
                    }
#if FOLDS
                    multiply_words<N>(part[m], a[word / AT_ONCE % 2], a[1 - word / AT_ONCE % 2], of, half + word == 0);
#else
                    multiply_words<N>(sums[m], a[word / AT_ONCE % 2], a[1 - word / AT_ONCE % 2], of, false);
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
