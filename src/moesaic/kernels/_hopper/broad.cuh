// The end of a tile of 64 or 128 elements of h, or twice as many of y. Of h a lane takes 16 elements of one row, so that what
// belongs to a block of them is computed once; y is transposed on its way to shared memory.
#pragma once
#include "room.cuh"

// Where element e of a row of a chunk lies: quarters (halves, where a row has 64 elements) of 16 elements change places, so
// that eight lanes that read 16 bytes each, of one row or of two, meet no other in a bank.
DEVICE int broad_place(int e) { return e ^ (STACK == 2 ? e / 32 % 4 * 4 : e / 32 % 2 * 8); }

// gate -> the activated gate times up, for many, a step of all of them at a time. alpha 0: SiLU.
template <int R, int C> DEVICE void join_all(const Arguments &a, float (&gate)[R][C], float (&up)[R][C]) {
    float below[R][C], slope = 1.0f;
    if (a.alpha != 0.0f) {
        slope = a.alpha;
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int i = 0; i < C; i++) gate[r][i] = fminf(gate[r][i], a.limit), up[r][i] = fminf(fmaxf(up[r][i], -a.limit), a.limit) + 1.0f;
    }
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int i = 0; i < C; i++) below[r][i] = 1.0f + __expf(-gate[r][i] * slope);
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int i = 0; i < C; i++) gate[r][i] = __fdividef(gate[r][i], below[r][i]) * up[r][i];
}

// Of every EACH-th number.
template <int EACH = 1> DEVICE u32 codes_of(const float *v) { return e4m3_pair(v[0], v[EACH]) | (u32)e4m3_pair(v[2 * EACH], v[3 * EACH]) << 16; }

// Elements column .. column + 15 of a stored row, in the order of K that products want (element_at in decode.cuh).
DEVICE void put_broad(u8 *row, int column, const float (&v)[16]) {
#if MAP_BLOCK == 1 && ROWS8
    *(uint4 *)(row + column) = make_uint4(codes_of(v), codes_of(v + 4), codes_of(v + 8), codes_of(v + 12));
#elif MAP_BLOCK == 1
#pragma unroll
    for (int i = 0; i < 16; i += 8)
        *(uint4 *)(row + 2 * (column + i)) = make_uint4(bf16_pair(v[i], v[i + 1]), bf16_pair(v[i + 2], v[i + 3]), bf16_pair(v[i + 4], v[i + 5]), bf16_pair(v[i + 6], v[i + 7]));
#elif FORMAT == INT4 && ROWS8
    u8 *to = row + column - column % 32 / 2;  // eight bytes of even elements, and eight of odd ones
#pragma unroll
    for (int odd = 0; odd < 2; odd++) *(uint2 *)(to + 16 * odd) = make_uint2(codes_of<2>(v + odd), codes_of<2>(v + 8 + odd));
#elif FORMAT == INT4
    u8 *to = row + 2 * (column / 32 * 32) + column % 32 / 2;
#pragma unroll
    for (int n = 0; n < 4; n++) *(uint2 *)(to + 16 * n) = make_uint2(bf16_pair(v[n], v[n + 4]), bf16_pair(v[n + 8], v[n + 12]));
#elif FOUR_BIT
    u8 *to = row + 2 * (column / 128 * 128) + column % 32 * 8 + column % 128 / 32 * 4;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        float low = v[n / 4 * 8 + n % 4], high = v[n / 4 * 8 + n % 4 + 4];
        *(u32 *)(to + 16 * n) = HALVES ? half_pair(low, high) : bf16_pair(low, high);
    }
#else
    u8 *to = row + 2 * (column / 64 * 64) + column % 64 / 4;
#pragma unroll
    for (int n = 0; n < 8; n++) *(u32 *)(to + 16 * n) = bf16_pair(v[n / 2 * 4 + n % 2], v[n / 2 * 4 + n % 2 + 2]);
#endif
}

// 16 elements of sorted row `row`, from `column` on.
DEVICE void emit_elements(const Arguments &a, i64 row, int column, bool wanted, float (&v)[1][16], int slot) {
    if (a.wide && wanted)
#pragma unroll
        for (int i = 0; i < 16; i += 4) *(float4 *)(a.wide + row * a.width + column + i) = make_float4(v[0][i], v[0][i + 1], v[0][i + 2], v[0][i + 3]);
    if (ENCODING == TENSOR_DYNAMIC) {
        float top[1] = {};
#pragma unroll
        for (int i = 0; i < 16; i++) top[0] = larger(top[0], wanted ? fabsf(v[0][i]) : 0.0f);
        largest_of<32>(top);
        if (threadIdx.x % 32 == 0) atomicMax(a.counters + 3, __float_as_int(top[0]));
    }
    if (!DIRECT) return;
    float scale[1] = {ENCODING == TENSOR || ENCODING == NV4 ? room.h_scale[slot] : 1.0f};
    encode_elements(v, scale);
    if (!wanted) return;
    put_broad(a.h.data + row * a.h.stride, column, v[0]);
    if (GROUP_SCALES && column % 128 == 0) a.h.scales[row * a.h.scale_row + (i64)column / 128 * a.h.scale_group] = scale[0];
}

// The chunk of rows from `begin` of the tile on, 16 elements to a lane.
DEVICE void emit_broad(const Arguments &a, const Item &item, int begin, int slot, const Consumer &me) {
    constexpr int LANES = H_COLUMNS / 16;
    if (CHUNK * LANES < CONSUMERS && me.warp * 32 >= CHUNK * LANES) return;
    int local = (me.warp * 32 + me.lane) / LANES, part = me.lane % LANES, column = item.column * H_COLUMNS + part * 16;
    bool wanted = begin + local < item.count;
    i64 row = item.first + begin + local;
    float v[1][16];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float4 q = *(const float4 *)(room.chunk[local] + broad_place(part * 16 + 4 * i));
        v[0][4 * i] = q.x, v[0][4 * i + 1] = q.y, v[0][4 * i + 2] = q.z, v[0][4 * i + 3] = q.w;
    }
    if (column >= a.columns)
#pragma unroll
        for (int i = 0; i < 16; i++) v[0][i] = 0.0f;
    emit_elements(a, row, column, wanted, v, slot);
    if (H_COLUMNS == 128 || item.column != a.first.tiles - 1) return;
    for (column += H_COLUMNS; column - part * 16 < a.width; column += H_COLUMNS) {  // behind the last tile h is zero
#pragma unroll
        for (int i = 0; i < 16; i++) v[0][i] = 0.0f;
        emit_elements(a, row, column, wanted, v, slot);
    }
}

// Sums of this lane's rows of w (8 rows apart) with CHUNK rows of x, as BF16, into the rows of the chunk.
template <int N> DEVICE void put_broad_y(const Consumer &me, const float (&first)[STACK][N], const float (&second)[STACK][N]) {
    int row = me.lane / 16 * 8 + me.lane % 8, column = me.warp * 16 + me.lane / 8 % 2 * 8;
#pragma unroll
    for (int m = 0; m < STACK; m++)
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            u32 to = shared_address((u16 *)room.chunk[i / 4 * 16 + row] + 128 * m + column);
            store_transposed(to, bf16_pair(first[m][i], first[m][i + 1]), bf16_pair(second[m][i], second[m][i + 1]), bf16_pair(first[m][i + 2], first[m][i + 3]), bf16_pair(second[m][i + 2], second[m][i + 3]));
        }
}

// Eight neighbours of y, which lie in the order of their lanes.
DEVICE uint4 in_order(uint4 q) {
    if (!PERMUTED) return q;
    return make_uint4(__byte_perm(q.x, q.y, 0x5410), __byte_perm(q.z, q.w, 0x5410), __byte_perm(q.x, q.y, 0x7632), __byte_perm(q.z, q.w, 0x7632));
}
