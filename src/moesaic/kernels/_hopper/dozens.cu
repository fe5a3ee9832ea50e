// A dense product of dozens of rows with a weight of 4 or 8 bits.
//
// A thread block has HEIGHT rows of x, ROWS rows of w and a part of K. Its four groups of four warps have 64 rows of w each, and
// half of the units: weights go from memory through registers, decoded, to the tensor cores, which find rows of x in shared memory.
// There these lie in the order of K in which the codes of four lanes come. E4M3 codes meet E4M3 codes as they are, and the sums of a
// unit are added up in FP32.
#define GROUPS 4
#define STRIPES 2 /* of 64 rows of w */
#define SHARES (GROUPS / STRIPES)
#define BLOCK_THREADS (128 * GROUPS)
#define AHEAD 2
#define STACK 1
#define ROWS (64 * STRIPES)
// Scales of whole rows of x; at RESERVED rows of x and the scales of their groups, then the sums.
#define ROW_SCALES 0
#define RESERVED 1024
#define FP8_LIFT 1.0f
#include "dense.cuh"
#include "wgmma.cuh"

#define LINE (HEIGHT * 128)       // 128 bytes of every row, as the tensor cores want them
#define LINES (X_UNIT / 128)      // of a unit
#define QUARTETS (X_UNIT / 64)    // of a row's unit: see below
#define TOGETHER 2              // of them that a thread asks for at once

// Four pieces of a row's unit, as they lie in memory -> four as tensor cores want them: each has something of all four lanes.
DEVICE void in_order(const uint4 (&of)[4], uint4 (&to)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 each[4];
#pragma unroll
        for (int lane = 0; lane < 4; lane++) {
            if (FORMAT == FP8) {
                each[lane] = word_of(of[lane], i);
            } else {  // in the pairs in which codes are decoded
                int first = FOUR_BIT ? i / 2 : i / 2 * 2, second = first + (FOUR_BIT ? 2 : 1);
                each[lane] = __byte_perm(word_of(of[lane], first), word_of(of[lane], second), i % 2 ? 0x7632 : 0x5410);
            }
        }
        to[i] = make_uint4(each[0], each[1], each[2], each[3]);
    }
}

// Four pieces of 16 bytes of a row of x, which four lanes of those that decode codes share.
struct Quartet {
    int row, number, unit;
    // Eight threads have four rows and both halves of a line, which they put into different banks
    DEVICE_MEMBER Quartet(int i) {
        row = i / 2 % 4 + i / (4 * QUARTETS) % (HEIGHT / 4) * 4, number = i % 2 + i / 8 % (QUARTETS / 2) * 2, unit = i / (QUARTETS * HEIGHT);
    }
    DEVICE_MEMBER int place() const { return unit * X_UNIT + (FORMAT == FP8 ? number * 64 : FORMAT == MXFP8 ? number / 2 * 128 + number % 2 * 16 : number * 16); }
};

// Rows of x for a part of K, and the scales of their groups, [group, HEIGHT].
DEVICE void bring(const Dense &a, int upper, int rows, int first, int count, float *x_scales, int thread) {
    constexpr int STEP = FORMAT == FP8 ? 16 : FORMAT == MXFP8 ? 32 : 64;  // from a lane's piece to the next one's, bytes
    const u8 *from = a.x + upper * a.x_stride + (i64)first * X_UNIT;
    int all = count * QUARTETS * HEIGHT;
    for (int begin = thread; begin < all; begin += TOGETHER * BLOCK_THREADS) {
        uint4 of[TOGETHER][4];
#pragma unroll
        for (int n = 0; n < TOGETHER; n++) {
            Quartet each(begin + n * BLOCK_THREADS);
            if (begin + n * BLOCK_THREADS >= all || each.row >= rows) continue;
#pragma unroll
            for (int lane = 0; lane < 4; lane++) of[n][lane] = __ldcg((const uint4 *)(from + each.row * a.x_stride + each.place() + lane * STEP));
        }
#pragma unroll
        for (int n = 0; n < TOGETHER; n++) {
            Quartet each(begin + n * BLOCK_THREADS);
            if (begin + n * BLOCK_THREADS >= all || each.row >= rows) continue;
            uint4 to[4];
            in_order(of[n], to);
            u8 *line = memory + RESERVED + (each.unit * LINES + each.number / 2) * LINE + each.row * 128;
#pragma unroll
            for (int k = 0; k < 4; k++) *(uint4 *)(line + ((each.number % 2 * 4 + k) ^ (each.row & 7)) * 16) = to[k];
        }
    }
    if (BLOCKS)
        for (int i = thread; i < count * HEIGHT; i += BLOCK_THREADS) x_scales[i] = i % HEIGHT < rows ? a.x_scales[(upper + i % HEIGHT) * a.scale_row + (first + i / HEIGHT) * a.scale_group] : 0.0f;
    else if (a.x_scales && thread < rows)
        ((float *)(memory + ROW_SCALES))[thread] = a.x_scales[(upper + thread) * a.scale_row];
}

// A unit's sums, apart, onto all: times the scales of its rows of w and of x.
DEVICE void fold(float (&sums)[HEIGHT / 2], const float (&part)[HEIGHT / 2], const Unit &mine, const float *x_scales, int lane) {
#pragma unroll
    for (int j = 0; j < HEIGHT / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float of_x = BLOCKS ? x_scales[8 * j + lane % 4 * 2 + i] : 1.0f;
#pragma unroll
            for (int r = 0; r < 2; r++) sums[4 * j + 2 * r + i] += part[4 * j + 2 * r + i] * (APART ? of_x * __uint_as_float(mine.scales[0][r]) : 1.0f);
        }
}

#if FORMAT == FP8
DEVICE void multiply(float (&sums)[HEIGHT / 2], const Unit &mine, u32 x, const float *x_scales, int lane) {
    float part[HEIGHT / 2];
    const uint4 &upper0 = mine.codes[0][0][0], &upper1 = mine.codes[0][0][1], &lower0 = mine.codes[0][1][0], &lower1 = mine.codes[0][1][1];
    u64 tile = tile_descriptor(x);
    hold(part);
    products_fence();
    begin_registers<HEIGHT>(part, upper0.x, lower0.x, upper0.y, lower0.y, tile);
    multiply_registers<HEIGHT>(part, upper0.z, lower0.z, upper0.w, lower0.w, tile + 2);
    multiply_registers<HEIGHT>(part, upper1.x, lower1.x, upper1.y, lower1.y, tile + 4);
    multiply_registers<HEIGHT>(part, upper1.z, lower1.z, upper1.w, lower1.w, tile + 6);
    products_commit();
    products_wait<0>();
    hold(part);
    fold(sums, part, mine, x_scales, lane);
}
#else
DEVICE void multiply(float (&sums)[HEIGHT / 2], const Unit &mine, u32 x, const float *x_scales, int lane) {
    float apart[APART ? HEIGHT / 2 : 1];
    float(&part)[HEIGHT / 2] = APART ? (float(&)[HEIGHT / 2])apart : sums;
#pragma unroll
    for (int line = 0; line < LINES; line++) {
        u32 w[4][4];  // four products of 16 elements of K
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int n = 0; n < 4 / STEPS; n++) {
                int word = FOUR_BIT ? line * 2 + n : n, chunk = FOUR_BIT ? 0 : line;
                u32 o[2 * STEPS];
                operands_of(word_of(mine.codes[0][r][chunk], word), mine.scales[0][r], chunk, word, o);
#pragma unroll
                for (int i = 0; i < 2 * STEPS; i++) w[n * STEPS + i / 2][i % 2 * 2 + r] = o[i];
            }
        u64 tile = tile_descriptor(x + line * LINE);
#pragma unroll
        for (int k = 0; k < 4; k++) hold(w[k]);
        hold(part);
        products_fence();
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (APART && !line && !k)
                begin_registers<HEIGHT>(part, w[k][0], w[k][1], w[k][2], w[k][3], tile);
            else
                multiply_registers<HEIGHT>(part, w[k][0], w[k][1], w[k][2], w[k][3], tile + 2 * k);
        products_commit();
        products_wait<0>();
        hold(part);
    }
    if (APART) fold(sums, part, mine, x_scales, lane);
}
#endif

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1) dozens(const __grid_constant__ Dense a) {
    int tiles = (a.columns + ROWS - 1) / ROWS, tile = blockIdx.x % tiles, part = blockIdx.x / tiles % a.parts, upper = blockIdx.x / (tiles * a.parts) * HEIGHT;
    int thread = threadIdx.x, lane = thread % 32, stripe = thread / 128 % STRIPES, share = thread / (128 * STRIPES);
    int first = part * a.per_part, count = a.units - first < a.per_part ? a.units - first : a.per_part;
    int row = stripe * 64 + thread / 32 % 4 * 16, rows = a.rows - upper < HEIGHT ? a.rows - upper : HEIGHT;
    float *x_scales = (float *)(memory + RESERVED + count * LINES * LINE);
    u32 x = shared_address(memory) + RESERVED;
    Unit units[AHEAD];  // on their way
#pragma unroll
    for (int d = 0; d < AHEAD; d++)
        if (share + d * SHARES < count) load(units[d], a, tile * ROWS + row, first + share + d * SHARES, lane);
    let_next_grid_start();
    wait_for_grid();
    bring(a, upper, rows, first, count, x_scales, thread);
    fence_shared_to_async();
    __syncthreads();
    Ends ends(a, tile * ROWS + thread % (ROWS / 4) * 4, a.bias && !part);  // on their way, too
    float sums[HEIGHT / 2] = {};
#pragma unroll 1
    for (int i = share; i < count; i += AHEAD * SHARES)
#pragma unroll
        for (int d = 0; d < AHEAD; d++) {
            int unit = i + d * SHARES, next = unit + AHEAD * SHARES;
            if (unit < count) {
                multiply(sums, units[d], x + unit * LINES * LINE, x_scales + unit * HEIGHT, lane);
                if (next < count) load(units[d], a, tile * ROWS + row, first + next, lane);
            }
        }
    __syncthreads();  // rows of x give way to sums
    float *to = (float *)(memory + RESERVED) + share * HEIGHT * (ROWS + 4);
#pragma unroll
    for (int j = 0; j < HEIGHT / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) to[(8 * j + lane % 4 * 2 + i % 2) * (ROWS + 4) + row + lane / 4 + i / 2 * 8] = sums[4 * j + i];
    __syncthreads();
    add_up(a, ends, tile, part, upper, rows, thread);
}
