// A dense product of few rows with a weight of 4, 8 or 16 bits, which is read once.
//
// A thread block has a part of K, whose units its warps take in turn: from memory through registers to the tensor cores. The
// first units are on their way before the kernel in front has ended. Rows of x wait in shared memory, as they are encoded. In
// the end the warps' sums are added up.
//
// PER_SM thread blocks per multiprocessor. A lane has a unit's elements of row lane / 4 of each eight rows of x.
#define WARPS 8
#define SHARES WARPS
#define BLOCK_THREADS (32 * WARPS)
#define AHEAD (FORMAT == BF16 && STACK > 1 ? 1 : 2)
#define ROWS (16 * STACK)
// A barrier; scales of whole rows of x; at RESERVED rows of x and the scales of their groups, then the warps' sums.
#define ROW_SCALES 64
#define RESERVED 256
#define FP8_LIFT 0x1p8f /* their operands are halves of 2^-8 times the codes' values */
#include "dense.cuh"

// Four E4M3 codes of rows -> halves (b0, b2), (b1, b3), by the hardware: these may hold NaN, which stays (weights that do are not loaded).
DEVICE void rows_of(u32 x, u32 &low, u32 &high) {
    low = e4m3_halves(__byte_perm(x, 0, 0x4420)), high = e4m3_halves(__byte_perm(x, 0, 0x4431));
}

// Where 16 bytes of a row's unit lie: pieces change places within 128 bytes, so that what lanes of two rows read at once lies in
// different banks. (Copies take turns if they do not fill such lines.)
DEVICE int place_of(int row, int piece) {
    int odd = row & 1;
    return (PIECES == 1 ? piece ^ odd << 2 : PIECES == 2 ? piece ^ odd : piece ^ odd << 1 ^ (piece >> 3 & 1)) * 16;
}

// x: the rows' unit. x_row: bytes from one to the next; there are `rows`, and whoever has none takes the last one.
DEVICE void multiply(float (&sums)[STACK][HEIGHT / 2], const Unit &mine, const u8 *x, int x_row, int rows, const float *x_scales, int lane) {
    float part[STACK][APART ? HEIGHT / 2 : 1] = {};
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
            constexpr int WORDS = FORMAT == BF16 ? 2 : 4 / PIECES;  // or pairs of them
#pragma unroll
            for (int k = 0; k < WORDS; k++) {
                u32 b[HEIGHT / 8][2 * STEPS];
#pragma unroll
                for (int j = 0; j < HEIGHT / 8; j++) {
                    if (FORMAT == BF16)
                        b[j][0] = word_of(of_x[j], 2 * k), b[j][1] = word_of(of_x[j], 2 * k + 1);
                    else if (FORMAT == FP8)
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
                        u32 o[2 * STEPS];
                        if (FORMAT == BF16)
                            o[0] = word_of(mine.codes[m][r][c], 2 * k), o[1] = word_of(mine.codes[m][r][c], 2 * k + 1);
                        else
                            operands_of(word_of(mine.codes[m][r][c], word), mine.scales[m][r], c, word, o);
#pragma unroll
                        for (int i = 0; i < 2 * STEPS; i++) a[i / 2][i % 2 * 2 + r] = o[i];
                    }
                    float *to = APART ? part[m] : sums[m];
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
#if APART
#pragma unroll
    for (int j = 0; j < HEIGHT / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float of_x = BLOCKS ? x_scales[8 * j + lane % 4 * 2 + i] : 1.0f;
#pragma unroll
            for (int m = 0; m < STACK; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) sums[m][4 * j + 2 * r + i] += part[m][4 * j + 2 * r + i] * (of_x * __uint_as_float(mine.scales[m][r]));
        }
#endif
}

// Rows of x for a part of K, each piece where a lane looks for it; and the scales of its groups, [group, HEIGHT].
DEVICE void bring(const Dense &a, int first, int count, float *x_scales, int thread) {
    constexpr int EACH = X_UNIT / 16;
    for (int row = thread / 32; row < a.rows; row += WARPS) {
        u32 to = shared_address(memory) + RESERVED + row * count * X_UNIT;
        const u8 *from = a.x + row * a.x_stride + (i64)first * X_UNIT;
        for (int i = thread % 32; i < count * EACH; i += 32) {
            u32 place = to + i / EACH * X_UNIT + place_of(row, i % EACH);
            if (FORMAT == BF16 && first * CHUNKS + i / 4 >= a.chunks)
                copy_small<16>(place, a.x, 0);  // zeros
            else
                copy16(place, from + i * 16);
        }
    }
    if (BLOCKS)
        for (int i = thread; i < count * HEIGHT; i += 32 * WARPS) x_scales[i] = i % HEIGHT < a.rows ? a.x_scales[i % HEIGHT * a.scale_row + (first + i / HEIGHT) * a.scale_group] : 0.0f;
    else if (a.x_scales && thread < a.rows)
        ((float *)(memory + ROW_SCALES))[thread] = a.x_scales[thread * a.scale_row];
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, PER_SM) few(const __grid_constant__ Dense a) {
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
        if (d < mine) load(units[d], a, tile * ROWS, first + warp + d * WARPS, lane);
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
                if (i + d + AHEAD < mine) load(units[d], a, tile * ROWS, first + unit + AHEAD * WARPS, lane);
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
    add_up(a, ends, tile, part, 0, a.rows, thread);
}
