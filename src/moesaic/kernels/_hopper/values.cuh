// What the host hands to the kernels; launch.py packs the same fields in the same order.
#pragma once
#include "base.cuh"

// One of the two products: weights [E, N, K].
struct Weight {
    const u8 *scales;   // of rows and blocks
    i64 scales_expert;  // bytes from one expert's to the next one's
    i64 scales_row;     // bytes from one row's (block of rows', segment's) to the next one's
    const float *top;   // a scale per expert and segment (NVFP4), or null
    const u16 *bias;    // BF16 [E, N], or null
    int stages;         // of K
    int scale_bytes;    // along K: of a row, or of a block of rows
    int rows;           // N; of the first product, of gate and of up
    int tiles;          // of N
};

// Encoded rows, in the order of K that products want.
struct Rows {
    u8 *data;
    float *scales;     // or null
    i64 stride;        // bytes
    int scale_row;     // elements from one row's scale to the next one's; 0: one scale for all
    int scale_group;   // and from one group's
};

struct Arguments {
    Weight first, second;
    Rows x, h;           // x: token rows.  h: activated rows, sorted
    float *wide;         // h before it is encoded, FP32 [R, width]: where that takes more than a tile, or on request
    u16 *y;              // BF16 [R, D], in the rows' places before sorting
    const int *order;    // [R]: sorted row -> t A + a; null: as they are
    const int4 *tiles;   // expert, first sorted row, rows, rows rounded up
    const int *ids;      // of a token alone, or null
    int *counters;       // see below
    const float *weights;  // of a token alone, [top_k] of at most 32, and
    u16 *sum;              // BF16 [D]: the sum of its results, or null: it is another's
    int experts, tile_limit, top_k, columns, width, hidden, phases;  // columns: I; width: of a row of h; phases: 1 first product, 2 second
    int once;           // whether most experts will have at most one tile of rows, so that their weights are read once
    int likely;         // and whether most will have one
    int lead;           // of a token alone: nanoseconds by which weights of the first product go before those of the second
    int parts, groups;  // of a tile's h: how many are announced; groups that are encoded apart
    int rows, band;      // of a dense product, whose only expert has all rows in order: how many, and tiles of them that share columns; or 0
    float limit, alpha;  // of gpt-oss's activation; alpha 0: SiLU
};

// Of weights, and (not NARROW) of h.
struct Maps {
    TensorMap first, second, h;
};

// counters: [0] tiles of rows, [1] next item (of a token alone, behind one for each thread block), [2] first products done, [3] largest magnitude of h;
// then per tile of rows: parts of h that the second product may read; per tile and group: first products done; and, where there
// is a `sum`, per tile of columns: second products done.
#define READY(a, tile) ((a).counters + 4 + (tile))
#define MADE(a, tile, group) ((a).counters + 4 + (a).tile_limit + (tile) * (a).groups + (group))
#define SUMMED(a, column) ((a).counters + 4 + (a).tile_limit * (1 + (a).groups) + (column))

// Sorts and encodes. ids: INT32 [R], -1 for padding.
struct Preparation {
    const u8 *source;  // BF16 rows, or rows that are encoded and not yet in order
    const int *ids;
    const float *given;  // scales of rows that are encoded
    Rows rows;
    int *order;           // [R]: sorted row -> t A + a
    int4 *tiles;
    int *counters;
    i64 source_stride;          // bytes
    int tokens, columns, width; // columns: K; width: of a stored row, in elements
    int routed, experts, counter_count;
    int given_row, given_group;  // strides of `given`, elements
};
