// The shared memory of a thread block of `experts`, and what passes through it.
#pragma once
#include "encode.cuh"
#include "values.cuh"

#define W_BLOCK (128 * W_ROW)       /* bytes of 128 weight rows in a stage */
#define W_BYTES (W_BLOCK * STACK)
#define X_BYTES (MOST * X_ROW)      /* and as many elements of K of up to MOST rows of x */
#define STEP (NARROW ? 8 : 16) /* rows of h that are copied at a time */
#define GROUP_SCALES (ENCODING == GROUP128)
#define BLOCK_SCALES (FORMAT == FP8 && BLOCKS)
#define ROW_SCALES (!GROUP_SCALES && ENCODING != PLAIN && ENCODING != MX8) /* a row of x has one scale, or all have */
#define DIRECT !(BY_ROW || (ENCODING == GROUP128 && STACK == 1)) /* a tile of h is encoded where it is made */
#define SCALE_BYTES (FORMAT == MXFP8 || FORMAT == MXFP4 ? ELEMENTS / 32 : FORMAT == NVFP4 ? ELEMENTS / 16 : FORMAT == INT4 ? ELEMENTS / GROUP * 2 : 0) /* of a weight row, per stage */
#define SPAN_BYTES (FORMAT == INT4 && !NARROW ? 16 : SCALE_BYTES) /* ... that are fetched at a time */
#define SPAN (SCALE_BYTES ? SPAN_BYTES / SCALE_BYTES : 1) /* stages that they serve */
/* SCALE_UNIT: bytes copied together; 0 where rows begin at odd multiples of 2 */
#define SCALE_SLOTS (SPAN == 1 ? STAGES : (STAGES + SPAN - 2) / SPAN + 1)
#define SCALE_ROOM (BLOCK_SCALES ? 16 : SCALE_BYTES ? 128 * STACK * SPAN_BYTES : 16)
#define STAGE_SCALES (BLOCK_SCALES || SCALE_BYTES)
#define ROW_TERMS (FORMAT == NVFP4 || (FORMAT == FP8 && !BLOCKS)) /* weight rows have factors */
#define SLOTS (NARROW ? 4 : 3) /* items under way */
#define FETCHERS (NARROW ? 96 : 128) /* threads before the consumers; three warps of them work */
#define CONSUMERS 256
#define THREADS (FETCHERS + CONSUMERS)
#define CHUNK (NARROW || MOST < 64 / STACK ? MOST : 64 / STACK) /* rows of x that the epilogue takes at a time */
#define H_COLUMNS (64 * STACK)        /* elements of h per tile */
#define Y_COLUMNS (128 * STACK)
#define ENCODED (MOST < 32 ? 2 : 4) /* rows that a warp encodes at a time */

#define TAKES_TURNS (!NARROW && (FORMAT == INT4 || (FORMAT == NVFP4 && MOST >= 80))) /* groups of warps multiply in turn (wide.cuh) */

/* A full tile's rows of x are those of the products, rows of w their columns (turned.cuh). */
#define TURNS_FULL (BLOCK_SCALES && GROUP_SCALES && ROWS8 && MOST == 128 && STACK == 2)

struct Item {
    int phase, tile, column, e, first, count, rounded, padding;  // phase 0: the end, 1 first product, 2 encoding of all, 3 second
};

struct Room {
    alignas(1024) u8 w[STAGES][W_BYTES];
    alignas(1024) u8 x[STAGES][X_BYTES];
    alignas(128) float x_scales[GROUP_SCALES ? STAGES : 1][GROUP_SCALES ? (MOST + 31) / 32 * 32 : 4];
    alignas(16) u8 w_scales[SCALE_SLOTS][SCALE_ROOM];
    alignas(16) float chunk[CHUNK][H_COLUMNS + 4];  // of h, or of y in BF16
    alignas(16) Item items[SLOTS];
    int place[SLOTS][MOST];
    float row_scale[SLOTS][ROW_SCALES ? (MOST + CHUNK - 1) / CHUNK * CHUNK : 1], h_scale[SLOTS];
    float factor[SLOTS][ROW_TERMS ? 128 * STACK : 1], bias[SLOTS][128 * STACK];
    alignas(16) u8 encoding[!NARROW && (DIRECT || BY_ROW) ? 16 : 256 * ENCODED * (BY_ROW && NARROW ? 8 : 1)];  // a warp's rows on their way into K's order
    u64 full[STAGES], empty[STAGES];
    u64 item_full[SLOTS], item_empty[SLOTS], table_full[SLOTS], stored[SLOTS];
};

extern __shared__ __align__(1024) u8 memory[];
#define room (*(Room *)memory)

// A place in a ring; a barrier's phase is even in the first round.
struct Ring {
    u32 slot, parity;
    DEVICE_MEMBER void next(u32 count) {
        if (++slot == count) slot = 0, parity ^= 1;
    }
};

// Of a tile of so many rows, the height that code exists for.
DEVICE int height_of(int rows) {
    return rows <= HEIGHT_0 ? HEIGHT_0 : rows <= HEIGHT_1 ? HEIGHT_1 : rows <= HEIGHT_2 ? HEIGHT_2 : rows <= HEIGHT_3 ? HEIGHT_3 : MOST;
}

DEVICE void wait_full(u64 *bars, const Ring &at) { barrier_wait(shared_address(bars + at.slot), at.parity); }

DEVICE void wait_empty(u64 *bars, const Ring &at) { barrier_wait(shared_address(bars + at.slot), at.parity ^ 1); }

DEVICE void release(u64 *bar, int lane) {
    if (lane == 0) barrier_arrive(shared_address(bar));
}

// --- consumers: who holds what ---
//
// Eight warps share the 128 STACK weight rows of a tile: warp w has rows 16 (8 m + w) .. + 15, m < STACK. Of these, a lane
// holds rows r and r + 8 (r = lane_row) at columns 8 j + 2 (lane % 4) + {0, 1}: sums[m][4 j + {0, 1}] and [4 j + {2, 3}].
// In the first product row r is a gate row and r + 8 the up row of the same element. Full tiles of turned.cuh are held otherwise.

#define HALF (MOST / 2)

struct Consumer {
    Ring at;
    int warp, lane, scales;  // scales: the slot of those in use, where they serve several stages
    DEVICE_MEMBER void begin_stage(int s) {
        if (SPAN > 1 && s % SPAN == 0 && ++scales == SCALE_SLOTS) scales = 0;
    }
};

#define PERMUTED (W_ROW == 128 && (DECODED || NARROW))

DEVICE int lane_row(int lane) {  // where lanes read codes: two rows side by side must differ in bit 2, for the banks' sake
    int i = lane >> 2;
    return PERMUTED ? (i >> 1) | ((i & 1) << 2) : i;
}

// sums += part x (scale of the row of w) x (scale of the row of x)
template <int N> DEVICE void fold(float *sums, const float *part, float first, float second, const float *x_scales, int lane) {
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        float2 s = make_float2(1.0f, 1.0f);
        if (GROUP_SCALES) s = *(const float2 *)(x_scales + 8 * j + 2 * (lane % 4));
        sums[4 * j] += part[4 * j] * (GROUP_SCALES ? s.x * first : first);
        sums[4 * j + 1] += part[4 * j + 1] * (GROUP_SCALES ? s.y * first : first);
        sums[4 * j + 2] += part[4 * j + 2] * (GROUP_SCALES ? s.x * second : second);
        sums[4 * j + 3] += part[4 * j + 3] * (GROUP_SCALES ? s.y * second : second);
    }
}

// FP8 products are added up outside the tensor core after 128 of K (its own adder is narrower than FP32), as are those whose
// scales BF16 cannot hold: `sums` and `part`. What multiplies whole rows of w or x is left to the epilogue.
#define FOLDS (FORMAT == INT4 || BLOCK_SCALES || ROWS8)
#define BY_WORD (FORMAT == INT4 && (GROUP < 128 || !NARROW || ONE_ORDER)) /* lanes share chunks of codes word by word */

// Scales along K of this thread's two rows in block m, at stage s of the product.
struct RowScales {
    const u8 *at;
    DEVICE_MEMBER RowScales(const Consumer &me, int s, int row)
        : at(room.w_scales[SPAN == 1 ? me.at.slot : me.scales] + (BLOCK_SCALES ? 0 : row * SPAN_BYTES + s % SPAN * SCALE_BYTES)) {}
    // What a sum is multiplied by. group: of the stage.
    DEVICE_MEMBER float fold_by(int m, int r, int group) const {
        if (BLOCK_SCALES) return ((const float *)at)[2 * m + r];
        if (FORMAT != INT4) return 1.0f;
        u16 mine = ((const u16 *)(at + (128 * m + 8 * r) * SPAN_BYTES))[group];
        return HALF_SCALES ? half_value(mine) : bf16_low(mine);
    }
    // Of the chunk of 16 bytes that a lane takes in a half of the stage: bits.
    DEVICE_MEMBER u32 bits(int m, int r, int half, int lane) const {
        const u8 *mine = at + (128 * m + 8 * r) * SPAN_BYTES;
        if (FORMAT == MXFP8) return mine[2 * half + lane % 4 / 2];
        if (FORMAT == MXFP4) return mine[4 * half + lane % 4];
        return FORMAT == NVFP4 ? ((const u16 *)mine)[4 * half + lane % 4] : 0;
    }
};

// Such bits as an operand. word: of the chunk; of NVFP4, two have a scale.
DEVICE u32 operand_scale(u32 s, int word) {
    if (FORMAT == FP8) return 0x5D805D80u;  // 2^60: see LIFT
    if (FORMAT == INT4 || FORMAT == BF16) return 0;
    if (FORMAT == NVFP4) return __byte_perm(scale_pair(s), 0, word < 2 ? 0x1010 : 0x3232);
    return (s + (FORMAT == MXFP8 ? 60 : 63)) * 0x00800080u;  // a power of two, times LIFT
}

// Where the copy engine puts 16 bytes of a weight row.
DEVICE const u8 *chunk_at(const u8 *tile, int row, int chunk) { return tile + row * W_ROW + ((chunk ^ (W_ROW == 128 ? row & 7 : row / 2 & 3)) << 4); }

DEVICE uint4 load_chunk(const u8 *tile, int row, int chunk) { return *(const uint4 *)chunk_at(tile, row, chunk); }

DEVICE u32 load_word(const u8 *tile, int row, int chunk, int word) { return *(const u32 *)(chunk_at(tile, row, chunk) + word * 4); }


// --- rows of x ---

#define X_PARTS (X_ROW / 128) /* of 16 bytes of x that belong to a chunk of codes */

// Where 16-byte part i of a stage of a row of x lies, for narrow.cuh.
DEVICE int x_position(int row, int i) {
    int at = BY_WORD ? i : (i / X_PARTS / 4 * X_PARTS + i % X_PARTS) * 4 + i / X_PARTS % 4;
    return at ^ ((row & 1) << 2);
}

// The same in bytes, from the beginning of the stage; for wide.cuh in pieces of 128 bytes, swizzled.
DEVICE int x_address(int row, int i) {
    if (NARROW) return row * X_ROW + x_position(row, i) * 16;
    return i / 8 * (MOST * 128) + row * 128 + ((i % 8) ^ (row & 7)) * 16;
}
