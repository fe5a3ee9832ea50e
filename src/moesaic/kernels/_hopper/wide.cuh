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

#else

// Words that are decoded together, so that their steps need not wait for one another; where there are registers for it.
#if FORMAT == INT4
#define AT_ONCE (GROUP < 64 || (MOST == 128 && !ROWS8) ? 1 : 2)
#else
#define AT_ONCE (MOST == 128 || (MOST == 96 && FOUR_BIT) ? 1 : 2)
#endif

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

#if FORMAT == INT4 && !ROWS8 && GROUP >= 64

// Decodes and multiplies, step by step: while one is multiplied, the next is decoded, and the registers of the one before are
// free. fresh: they begin a new sum.
template <int N> DEVICE void multiply_words(float *sums, Operands &a, Operands &before, const Words &of, bool fresh) {
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
            u32 *mine = a[k] + 4 * t, *last = t ? mine - 4 : (k ? a[k - 1] : before[AT_ONCE - 1]) + 4 * (STEPS - 1), all[4 * STEPS];
            decode_words(of.upper[k], of.lower[k], of.upper_scale[k], of.lower_scale[k], all);
#pragma unroll
            for (int i = 0; i < 4; i++) mine[i] = all[4 * t + i];
            products_fence();
            multiply_step<N>(sums, mine, of.x_tile[k] + 2 * t, fresh && k + t == 0);
            products_commit();
            products_wait<1>();
            hold(*(u32(*)[4])last);
        }
}

#else

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

#endif

#if FORMAT == INT4

// Groups of GROUP elements, each summed by itself. A chunk of 16 bytes holds 32 elements, of which a thread takes a word.
// Where there are registers for two such sums, one is folded while the other grows; at the end of a stage nothing is under way,
// or the assembler would do one product after another.
template <int N> DEVICE void product(float (&sums)[STACK][HALF], Consumer &me, int stages) {
    constexpr int PER_GROUP = GROUP / 32, PER_PIECE = 128 / ROW_BYTES / 32, GROUPS = ELEMENTS / GROUP;
    constexpr bool TURNS = STACK == 2 && N <= 64;
    Operands a[2] = {};
    int row = me.warp * 16 + lane_row(me.lane), word = me.lane % 4;
    for (int s = 0; s < stages; s++) {
        wait_full(room.full, me.at);
        fence_shared_to_async();  // rows of x came by ordinary copies
        const u8 *w = room.w[me.at.slot];
        me.begin_stage(s);
        RowScales scales(me, s, row);
        u64 x_tile = tile_descriptor(shared_address(room.x[me.at.slot]));
        float part[TURNS ? 2 : 1][N / 2];
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
#pragma unroll
            for (int m = 0; m < STACK; m++) {
                bool last = g == GROUPS - 1 && m == STACK - 1;
                int mine = TURNS ? m : 0, before = m ? g : g - 1;
                u32 words[2][PER_GROUP];
#pragma unroll
                for (int c = 0; c < PER_GROUP; c++) {
                    const u8 *codes = chunk_at(w + m * W_BLOCK, row, g * PER_GROUP + c) + 4 * word;
                    words[0][c] = *(const u32 *)codes, words[1][c] = *(const u32 *)(codes + 8 * W_ROW);
                }
#pragma unroll
                for (int c = 0; c < PER_GROUP; c += AT_ONCE) {
                    Words of = {};
#pragma unroll
                    for (int k = 0; k < AT_ONCE; k++) {
                        int chunk = g * PER_GROUP + c + k;
                        of.upper[k] = words[0][c + k], of.lower[k] = words[1][c + k];
                        of.x_tile[k] = x_tile + chunk / PER_PIECE * (MOST * 8) + chunk % PER_PIECE * 2 * STEPS;
                    }
                    int turn = ((g * STACK + m) * PER_GROUP + c) / AT_ONCE;
                    multiply_words<N>(part[mine], a[turn % 2], a[1 - turn % 2], of, c == 0);
                    if (!TURNS || c || g + m == 0) continue;
                    hold(part[TURNS - mine]);
                    fold<N>(sums[STACK - 1 - m], part[TURNS - mine], scales.fold_by(STACK - 1 - m, 0, before), scales.fold_by(STACK - 1 - m, 1, before), nullptr, me.lane);
                }
                if (TURNS && !last) continue;
                products_wait<0>();
                hold(part[mine]);
                fold<N>(sums[m], part[mine], scales.fold_by(m, 0, g), scales.fold_by(m, 1, g), nullptr, me.lane);
            }
        }
        release(room.empty + me.at.slot, me.lane);
        me.at.next(STAGES);
    }
}

#else

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
#endif
