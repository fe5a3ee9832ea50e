// A dense product of few rows with a weight of 4 or 8 bits, which is read once.
//
// A thread block has ROWS rows of w and a part of K, whose units of 128 elements its warps take in turn: from memory through
// registers to the tensor cores. The first units are on their way before the kernel in front has ended. Rows of x wait in
// shared memory, as they are encoded. In the end the warps' sums are added up, in their order.
//
// Of a unit, a lane has chunks of 16 bytes of rows lane / 4 and lane / 4 + 8 of each block of 16, and the same elements of row
// lane / 4 of x: which elements of K are multiplied together is free, as long as both sides agree.
#include "formats.cuh"

// FP8 meets E4M3 rows, with scales of blocks (BLOCKS) or of whole rows; all else rows of BF16 numbers.
// HEIGHT rows of x at most, STACK blocks of 16 rows of w, PER_SM thread blocks per multiprocessor
#define WARPS 8
#define AHEAD 2
#define ROWS (16 * STACK)
#define CHUNKS (FOUR_BIT ? 1 : 2)                            /* of 16 bytes that a lane has of a weight row's unit */
#define PIECES (FORMAT == FP8 ? 1 : FORMAT == MXFP8 ? 2 : 4) /* of 16 bytes of x that belong to one */
#define W_UNIT (64 * CHUNKS)
#define X_UNIT (64 * CHUNKS * PIECES)
#define LIFT (FORMAT == FP8 ? 0x1p8f : FORMAT == MXFP8 ? 0x1p60f : 0x1p63f) /* by which a sum of products is too small */

struct Few {
    const u8 *x;
    const float *x_scales;
    const u8 *w, *w_scales;
    const float *top;
    const int *coarse;
    const u16 *bias;
    void *y;
    i64 x_stride, w_stride, scale_stride;  // bytes
    int scale_row, scale_group;            // of x_scales, elements; 0: one for all
    int rows, columns, units, per_part, parts;
};

struct Unit {
    uint4 codes[STACK][2][CHUNKS];
    u32 scales[STACK][2];
};

// A barrier; scales of whole rows of x; at RESERVED rows of x and the scales of their groups, then the warps' sums.
extern __shared__ __align__(1024) u8 memory[];
#define ROW_SCALES 64
#define RESERVED 256
static_assert(ROW_SCALES + 4 * HEIGHT <= RESERVED, "scales of rows have no room");

// Four E4M3 codes -> halves (b0, b2), (b1, b3), 2^-8 times their values.
DEVICE void halves_of(u32 w, u32 &low, u32 &high) {
    u32 up = w << 8;
    low = picked(up >> 1, 0x3F803F80u, up & 0x80008000u);
    high = picked(w >> 1, 0x3F803F80u, w & 0x80008000u);
}

// The same of rows, by the hardware, as large as they are: these may hold NaN, which stays (weights that do are not loaded).
DEVICE void rows_of(u32 x, u32 &low, u32 &high) {
    low = e4m3_halves(__byte_perm(x, 0, 0x4420)), high = e4m3_halves(__byte_perm(x, 0, 0x4431));
}

// The same in BF16, 2^-120 times their values.
DEVICE void bf16_of(u32 w, u32 &low, u32 &high) {
    u32 up = w << 8;
    low = picked(up >> 4, 0x07F007F0u, up & 0x80008000u);
    high = picked(w >> 4, 0x07F007F0u, w & 0x80008000u);
}

// Eight E2M1 codes -> BF16 (n0, n4), (n1, n5), (n2, n6), (n3, n7), 2^-126 times their values: a multiplication moves the sign and
// the rest each to its place.
DEVICE void e2m1_of(u32 w, u32 (&o)[4]) {
    u32 upper = w >> 8;
    o[0] = (w & 0x000F000Fu) * 0x1040u & 0x81C081C0u;
    o[1] = (w & 0x00F000F0u) * 0x104u & 0x81C081C0u;
    o[2] = (upper & 0x000F000Fu) * 0x1040u & 0x81C081C0u;
    o[3] = (upper & 0x00F000F0u) * 0x104u & 0x81C081C0u;
}

// Two scales of NVFP4, times LIFT: see decode.cuh.
DEVICE u32 nvfp4_scales(u32 codes) { return mul_pair(mul_pair(__byte_perm(codes & 0x7F7Fu, 0, 0x4140) << 4, 0x7B807B80u), 0x5F005F00u); }

// A scale of a word of codes, as an operand.
DEVICE u32 scale_of(u32 scales, int chunk, int word) {
    if (FORMAT == NVFP4) return __byte_perm(nvfp4_scales(scales), 0, word < 2 ? 0x1010 : 0x3232);
    return ((scales >> (FORMAT == MXFP8 ? 16 * chunk : 0) & 255) + (FORMAT == MXFP8 ? 60 : 63)) * 0x00800080u;
}

DEVICE void load(Unit &to, const Few &a, int tile, int unit, int lane) {
#pragma unroll
    for (int m = 0; m < STACK; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = tile * ROWS + 16 * m + 8 * r + lane / 4;
            row = row < a.columns ? row : a.columns - 1;
            const u8 *from = a.w + row * a.w_stride + (i64)unit * W_UNIT + lane % 4 * 16;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) to.codes[m][r][c] = *(const uint4 *)(from + 64 * c);
            if (FORMAT == FP8 && !BLOCKS) continue;
            const u8 *scales = a.w_scales + (FORMAT == FP8 ? a.coarse[row] : row) * a.scale_stride;
            if (FORMAT == FP8)
                to.scales[m][r] = __float_as_uint(((const float *)scales)[unit]);
            else if (FORMAT == NVFP4)
                to.scales[m][r] = ((const u16 *)scales)[unit * 4 + lane % 4];
            else if (FORMAT == MXFP4)
                to.scales[m][r] = scales[unit * 4 + lane % 4];
            else
                to.scales[m][r] = ((const u32 *)scales)[unit] >> (lane % 4 / 2 * 8);
        }
}

// Where 16 bytes of a row's unit lie: pieces change places within 128 bytes, so that what lanes of two rows read at once lies in
// different banks. (Copies take turns if they do not fill such lines.)
DEVICE int place_of(int row, int piece) {
    int odd = row & 1;
    return (PIECES == 1 ? piece ^ odd << 2 : PIECES == 2 ? piece ^ odd : piece ^ odd << 1 ^ (piece >> 3 & 1)) * 16;
}

// x: the rows' unit. x_row: bytes from one to the next; there are `rows`, and whoever has none takes the last one.
DEVICE void multiply(float (&sums)[STACK][HEIGHT / 2], const Unit &mine, const u8 *x, int x_row, int rows, const float *x_scales, int lane) {
    float part[STACK][BLOCKS ? HEIGHT / 2 : 1] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            uint4 of_x[HEIGHT / 8];
#pragma unroll
            for (int j = 0; j < HEIGHT / 8; j++) {
                int row = 8 * j + lane / 4;
                row = row < rows ? row : rows - 1;
                of_x[j] = *(const uint4 *)(x + row * x_row + place_of(row, (c * 4 + lane % 4) * PIECES + p));
            }
            constexpr int WORDS = 4 / PIECES, STEPS = FOUR_BIT ? 2 : 1;
#pragma unroll
            for (int k = 0; k < WORDS; k++) {
                u32 b[HEIGHT / 8][2 * STEPS];
#pragma unroll
                for (int j = 0; j < HEIGHT / 8; j++) {
                    if (FORMAT == FP8)
                        rows_of(word_of(of_x[j], k), b[j][0], b[j][1]);
                    else
#pragma unroll
                        for (int i = 0; i < 2 * STEPS; i++) {  // elements in the pairs in which codes are decoded
                            int first = FOUR_BIT ? i / 2 : 2 * k, second = FOUR_BIT ? first + 2 : first + 1;
                            b[j][i] = __byte_perm(word_of(of_x[j], first), word_of(of_x[j], second), i % 2 ? 0x7632 : 0x5410);
                        }
                }
#pragma unroll
                for (int m = 0; m < STACK; m++) {
                    u32 a[STEPS][4];
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        int word = FOUR_BIT ? p : p * WORDS + k;
                        u32 codes = word_of(mine.codes[m][r][c], word), o[4];
                        if (FORMAT == FP8)
                            halves_of(codes, o[0], o[1]);
                        else if (FORMAT == MXFP8)
                            bf16_of(codes, o[0], o[1]);
                        else
                            e2m1_of(codes, o);
#pragma unroll
                        for (int i = 0; i < 2 * STEPS; i++) a[i / 2][i % 2 * 2 + r] = FORMAT == FP8 ? o[i] : mul_pair(o[i], scale_of(mine.scales[m][r], c, word));
                    }
                    float *to = BLOCKS ? part[m] : sums[m];
#pragma unroll
                    for (int t = 0; t < STEPS; t++)
#pragma unroll
                        for (int j = 0; j < HEIGHT / 8; j++) {
                            if (FORMAT == FP8)
                                multiply_f16(to + 4 * j, a[t][0], a[t][1], a[t][2], a[t][3], b[j][2 * t], b[j][2 * t + 1]);
                            else
                                multiply_bf16(to + 4 * j, a[t][0], a[t][1], a[t][2], a[t][3], b[j][2 * t], b[j][2 * t + 1]);
                        }
                }
            }
        }
#if BLOCKS
#pragma unroll
    for (int j = 0; j < HEIGHT / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float of_x = x_scales[8 * j + lane % 4 * 2 + i];
#pragma unroll
            for (int m = 0; m < STACK; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) sums[m][4 * j + 2 * r + i] += part[m][4 * j + 2 * r + i] * (of_x * __uint_as_float(mine.scales[m][r]));
        }
#endif
}

// Rows of x for a part of K, each piece where a lane looks for it; and the scales of its groups, [group, HEIGHT].
DEVICE void bring(const Few &a, int first, int count, float *x_scales, int thread) {
    constexpr int EACH = X_UNIT / 16;
    for (int row = thread / 32; row < a.rows; row += WARPS) {
        u32 to = shared_address(memory) + RESERVED + row * count * X_UNIT;
        const u8 *from = a.x + row * a.x_stride + (i64)first * X_UNIT;
        for (int i = thread % 32; i < count * EACH; i += 32) copy16(to + i / EACH * X_UNIT + place_of(row, i % EACH), from + i * 16);
    }
    if (BLOCKS)
        for (int i = thread; i < count * HEIGHT; i += 32 * WARPS) x_scales[i] = i % HEIGHT < a.rows ? a.x_scales[i % HEIGHT * a.scale_row + (first + i / HEIGHT) * a.scale_group] : 0.0f;
    else if (a.x_scales && thread < a.rows)
        ((float *)(memory + ROW_SCALES))[thread] = a.x_scales[thread * a.scale_row];
}

// What is applied to the results of four rows of w, which are a thread's own: scales, and what is added.
struct Ends {
    float scale[4], bias[4];
    DEVICE_MEMBER Ends(const Few &a, int first, bool biased) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = first + j < a.columns ? first + j : a.columns - 1;
            scale[j] = LIFT, bias[j] = biased ? bf16_low(a.bias[row]) : 0.0f;
            if (FORMAT == NVFP4) scale[j] *= a.top[a.coarse[row]];
            if (FORMAT == FP8 && !BLOCKS) scale[j] *= *(const float *)(a.w_scales + (a.coarse ? a.coarse[row] : row) * a.scale_stride);
        }
    }
};

DEVICE void add_up(const Few &a, const Ends &ends, int tile, int part, int thread) {
    constexpr int STRIDE = ROWS + 4;
    const float *all = (const float *)(memory + RESERVED);
    for (int i = thread; i < a.rows * (ROWS / 4); i += 32 * WARPS) {
        int row = i / (ROWS / 4), first = i % (ROWS / 4) * 4;
        float sums[4] = {}, of_x = BLOCKS || !a.x_scales ? 1.0f : ((const float *)(memory + ROW_SCALES))[row];
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float4 mine = *(const float4 *)(all + (w * HEIGHT + row) * STRIDE + first);
            sums[0] += mine.x, sums[1] += mine.y, sums[2] += mine.z, sums[3] += mine.w;
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int column = tile * ROWS + first + j;
            if (column >= a.columns) break;
            float sum = sums[j] * ends.scale[j] * of_x + ends.bias[j];
            i64 at = ((i64)part * a.rows + row) * a.columns + column;
            if (a.parts > 1)
                ((float *)a.y)[at] = sum;
            else
                ((u16 *)a.y)[at] = (u16)bf16_pair(sum, 0.0f);
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, PER_SM) few(const __grid_constant__ Few a) {
    int tiles = (a.columns + ROWS - 1) / ROWS, tile = blockIdx.x % tiles, part = blockIdx.x / tiles;
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, first = part * a.per_part;
    int count = a.units - first < a.per_part ? a.units - first : a.per_part, mine = (count - warp + WARPS - 1) / WARPS;
    const u8 *x = memory + RESERVED;
    float *x_scales = (float *)(memory + RESERVED + a.rows * count * X_UNIT);
    u32 bar = shared_address(memory);
    if (!thread) barrier_init(bar, 32 * WARPS), fence_barrier_init();
    Unit units[AHEAD];  // on their way
#pragma unroll
    for (int d = 0; d < AHEAD; d++)
        if (d < mine) load(units[d], a, tile, first + warp + d * WARPS, lane);
    Ends ends(a, tile * ROWS + thread % (ROWS / 4) * 4, a.bias && !part);
    let_next_grid_start();
    wait_for_grid();
    __syncthreads();  // the barrier is there
    bring(a, first, count, x_scales, thread);
    barrier_arrive_copies(bar);
    barrier_wait(bar, 0);
    __syncthreads();  // scales came by ordinary stores
    float sums[STACK][HEIGHT / 2] = {};
    for (int i = 0; i < mine; i += AHEAD)
#pragma unroll
        for (int d = 0; d < AHEAD; d++)
            if (i + d < mine) {
                int unit = warp + (i + d) * WARPS;
                multiply(sums, units[d], x + unit * X_UNIT, count * X_UNIT, a.rows, x_scales + unit * HEIGHT, lane);
                if (i + d + AHEAD < mine) load(units[d], a, tile, first + unit + AHEAD * WARPS, lane);
            }
    __syncthreads();  // rows of x give way to sums
    float *to = (float *)(memory + RESERVED) + warp * HEIGHT * (ROWS + 4);
#pragma unroll
    for (int m = 0; m < STACK; m++)
#pragma unroll
        for (int j = 0; j < HEIGHT / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) to[(8 * j + lane % 4 * 2 + i % 2) * (ROWS + 4) + 16 * m + lane / 4 + i / 2 * 8] = sums[m][4 * j + i];
    __syncthreads();
    add_up(a, ends, tile, part, thread);
}
