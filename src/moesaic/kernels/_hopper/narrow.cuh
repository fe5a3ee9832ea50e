// The product of a tile for few rows of x, by warps: codes and rows go from shared memory through registers.
//
// A lane takes chunks of 16 bytes of its two weight rows (lane % 4, then lane % 4 + 4), or, BY_WORD, a word of every chunk;
// of x it takes the same elements of row lane / 4. In shared memory, what four such lanes read at once lies side by side, and
// odd rows have their halves of 128 bytes exchanged (`x_position`): no two lanes meet in a bank.
#pragma once
#include "room.cuh"

template <int N> struct XPart {
    uint4 of[N / 8];
    // Part `part` of the chunks that lanes take in half `half`; BY_WORD: of chunk `half`.
    DEVICE_MEMBER void load(const u8 *x, int half, int part, int lane) {
        int row = lane / 4, at = (((BY_WORD ? half : half * X_PARTS + part) * 4 + lane % 4) ^ ((row & 1) << 2)) * 16;
#pragma unroll
        for (int j = 0; j < N / 8; j++) of[j] = *(const uint4 *)(x + (8 * j + row) * X_ROW + at);
    }
};

DEVICE void multiply(float *d, const u32 *a, u32 b0, u32 b1) {
    if (HALVES)
        multiply_f16(d, a[0], a[1], a[2], a[3], b0, b1);
    else
        multiply_bf16(d, a[0], a[1], a[2], a[3], b0, b1);
}

// Products of one word of codes (or of two, where codes are operands as they are) with a part of x.
template <int N> DEVICE void multiply_word(float *sums, const u32 *a, const XPart<N> &x, int first) {
#pragma unroll
    for (int j = 0; j < N / 8; j++) multiply(sums + 4 * j, a, word_of(x.of[j], first), word_of(x.of[j], first + 1));
}

// Few products in a row would wait for one another: they take turns at two sums, but where all heights of tiles must add up in
// one order.
#define TURNS (MOST <= 16 && STACK == 1 && !ONE_ORDER ? 2 : 1)

template <int N> DEVICE void product(float (&sums)[STACK][HALF], Consumer &me, int stages) {
    constexpr int PARTS = BY_WORD ? 8 : 2;                        // of a stage: chunks of all lanes, or a half of a lane's own
    constexpr int PER_SUM = PARTS / (FORMAT == INT4 ? 256 / GROUP : 1);  // such parts are one sum, where sums are folded
    constexpr int UNROLL = BLOCKS_PER_SM > 2 ? 1 : PARTS;  // three thread blocks have fewer registers
    constexpr int WORDS = BY_WORD ? 1 : 4, PER_LOAD = BY_WORD ? 1 : 4 / X_PARTS;
    int row = me.warp * 16 + lane_row(me.lane);
    float part[STACK][TURNS > 1 || FOLDS ? TURNS * N / 2 : 1] = {};
    for (int s = 0; s < stages; s++) {
        wait_full(room.full, me.at);
        const u8 *w = room.w[me.at.slot], *x = room.x[me.at.slot];
        RowScales scales(me, s, row);
#pragma unroll UNROLL
        for (int i = 0; i < PARTS; i++) {
            if (FOLDS && i % PER_SUM == 0)
#pragma unroll
                for (int m = 0; m < STACK; m++)
#pragma unroll
                    for (int j = 0; j < TURNS * N / 2; j++) part[m][FOLDS ? j : 0] = 0.0f;
#if FORMAT == BF16 && ONE_ORDER
            // Sixteen neighbours of K at a time, as wide.cuh has them.
            int x_row = me.lane / 4, part8 = me.lane % 2 * 8;
#pragma unroll
            for (int chunk = 4 * i + me.lane % 4 / 2, end = chunk + 4; chunk < end; chunk += 2) {
                uint2 mine[N / 8];
#pragma unroll
                for (int j = 0; j < N / 8; j++) mine[j] = *(const uint2 *)(x + (8 * j + x_row) * X_ROW + x_position(x_row, chunk) * 16 + part8);
#pragma unroll
                for (int m = 0; m < STACK; m++) {
                    uint2 upper = *(const uint2 *)(chunk_at(w + m * W_BLOCK, row, chunk) + part8), lower = *(const uint2 *)(chunk_at(w + m * W_BLOCK, row + 8, chunk) + part8);
                    u32 a[4] = {upper.x, lower.x, upper.y, lower.y};
#pragma unroll
                    for (int j = 0; j < N / 8; j++) multiply(sums[m] + 4 * j, a, mine[j].x, mine[j].y);
                }
            }
            continue;
#endif
            uint4 codes[STACK][2];
            u32 bits[STACK][2];
#pragma unroll
            for (int m = 0; m < STACK; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    bits[m][r] = scales.bits(m, r, i, me.lane);
                    if (BY_WORD)
                        codes[m][r].x = load_word(w + m * W_BLOCK, row + 8 * r, i, me.lane % 4);
                    else
                        codes[m][r] = load_chunk(w + m * W_BLOCK, row + 8 * r, me.lane % 4 + 4 * i);
                }
#pragma unroll
            for (int first = 0; first < WORDS; first += PER_LOAD) {
                XPart<N> mine;
                mine.load(x, i, first / PER_LOAD, me.lane);
#pragma unroll
                for (int m = 0; m < STACK; m++) {
                    float *to = FOLDS || TURNS > 1 ? part[m] : sums[m];
#if DECODED
#pragma unroll
                    for (int k = 0; k < PER_LOAD; k++) {
                        u32 a[4 * STEPS];
                        int word = first + k;
                        decode_words(word_of(codes[m][0], word), word_of(codes[m][1], word), operand_scale(bits[m][0], word), operand_scale(bits[m][1], word), a);
#pragma unroll
                        for (int t = 0; t < STEPS; t++) multiply_word<N>(to + (word * STEPS + t) % TURNS * (N / 2), a + 4 * t, mine, 2 * (k * STEPS + t));
                    }
#else
#pragma unroll
                    for (int k = 0; k < 4; k += 2) {
                        u32 a[4] = {word_of(codes[m][0], k), word_of(codes[m][1], k), word_of(codes[m][0], k + 1), word_of(codes[m][1], k + 1)};
                        multiply_word<N>(to + k / 2 % TURNS * (N / 2), a, mine, k);
                    }
#endif
                }
            }
            if (FOLDS && TURNS > 1 && i % PER_SUM == PER_SUM - 1)
#pragma unroll
                for (int m = 0; m < STACK; m++)
#pragma unroll
                    for (int j = 0; j < N / 2; j++) part[m][j] += part[m][TURNS > 1 ? N / 2 + j : j];
            if (FOLDS && i % PER_SUM == PER_SUM - 1)
#pragma unroll
                for (int m = 0; m < STACK; m++) fold<N>(sums[m], part[m], scales.fold_by(m, 0, i / PER_SUM), scales.fold_by(m, 1, i / PER_SUM), room.x_scales[GROUP_SCALES ? me.at.slot : 0], me.lane);
        }
        __syncwarp();
        release(room.empty + me.at.slot, me.lane);
        me.at.next(STAGES);
    }
    if (!FOLDS && TURNS > 1)
#pragma unroll
        for (int m = 0; m < STACK; m++)
#pragma unroll
            for (int j = 0; j < N / 2; j++) sums[m][j] += part[m][j] + part[m][TURNS > 1 ? N / 2 + j : 0];
}
