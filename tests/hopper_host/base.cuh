// A stand-in for base.cuh: Hopper's multiprocessors for tests, as far as the expert kernels can tell. All threads of all blocks are
// fibers of one thread of the host. Where the lanes of a warp would wait, another warp goes on, by chance; copies are made at once or
// later, by chance; products when they are asked for. So what is checked is who reads, writes and waits for what, in which order
// sums grow, and that waiting ends: not fences, nor waits for products, nor how tensor cores round within one, nor that lanes
// of a warp might part.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#define __expf expf

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(size) __attribute__((aligned(size)))
#define __grid_constant__
#define __shared__ static /* of kernels whose blocks run one after the other; `memory` is the block's own */
#define DEVICE static inline
#define DEVICE_MEMBER inline

// --- fibers ---

namespace machine {

struct Index {
    u32 x;
};

struct Waiters {
    std::vector<struct Fiber *> all;
};

struct Barrier {  // mbarrier
    int expected = 0, pending = 0;
    i64 bytes = 0;
    u32 phase = 0;
    Waiters waiters;
};

struct Gate {  // a named barrier, or __syncthreads
    int there = 0;
    Waiters waiters;
};

struct Warp {
    u32 there = 0;
    int turn = 0;
    u64 given[32][6], seen[2][32][6];
    Waiters waiters;
    std::vector<struct Fiber *> ready;
    bool listed = false;
};

struct Cluster {  // its barrier
    int there = 0;
    u32 phase = 0;
    Waiters waiters;
};

struct Block {
    bool begun;
    Block *first;  // of its cluster
    Cluster cluster;
    u8 *shared;
    size_t room;
    int threads;
    std::vector<Barrier> barriers;
    Gate gates[16];
    std::vector<Warp> warps;
};

struct Fiber {
    void *stack_pointer;
    u8 *stack;
    Block *block;
    Index thread, number;
    bool done;
    const char *waits_for;
    u32 cluster_phase;  // in which it arrived
};

inline Fiber *here;
inline void *scheduler;
inline std::vector<Warp *> ready;
inline std::deque<std::function<void()>> later;  // copies, in order, and who is told
inline u64 chance = 1;
inline Index blocks;
inline u32 cluster;  // thread blocks of one
inline void (*body)();
inline i64 clock;

inline u32 dice(u32 sides) {
    chance ^= chance << 13, chance ^= chance >> 7, chance ^= chance << 17;
    return (u32)(chance >> 20) % sides;
}

// Keeps what a called function must keep, changes stacks, and takes up what was kept there.
extern "C" void machine_change(void **from, void *to);
asm(R"(
.text
machine_change:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");

inline void rest() { machine_change(&here->stack_pointer, scheduler); }

inline void go_on(Fiber *fiber) {
    Warp &warp = fiber->block->warps[fiber->thread.x / 32];
    warp.ready.push_back(fiber);
    if (!warp.listed) ready.push_back(&warp), warp.listed = true;
}

inline void yield() {
    go_on(here);
    rest();
}

inline void wait(Waiters &list, const char *what) {
    here->waits_for = what;
    list.all.push_back(here);
    rest();
    here->waits_for = nullptr;
}

inline void wake(Waiters &list) {
    for (Fiber *each : list.all) go_on(each);
    list.all.clear();
}

inline void begin_fiber() {
    Block &mine = *here->block;
    if (!mine.begun) mine.begun = true, memset(mine.shared, 0x7F, (mine.room + 2047) / 1024 * 1024);
    body();
    here->done = true;
    rest();
    abort();
}

constexpr size_t STACK_BYTES = 64 * 1024;

// Runs all threads of `grid` blocks, `beside` blocks at a time. 0, or 1 where nobody can go on.
inline int run(void (*what)(), u32 grid, int threads, size_t shared, u32 beside, u32 together = 1) {
    body = what, blocks.x = grid, cluster = together;
    for (u32 first = 0; first < grid; first += beside) {
        u32 count = first + beside < grid ? beside : grid - first;
        std::vector<Block> all(count);
        std::vector<Fiber> fibers(count * threads);
        size_t room = (shared + 2047) / 1024 * 1024;
        u8 *memory = (u8 *)aligned_alloc(1024, room * count), *stacks = (u8 *)aligned_alloc(64, STACK_BYTES * fibers.size());
        for (u32 b = 0; b < count; b++) {
            all[b].begun = false, all[b].first = &all[b - b % cluster];
            all[b].shared = memory + b * room, all[b].room = shared, all[b].threads = threads;
            all[b].barriers.resize(room / 8), all[b].warps.resize((threads + 31) / 32);
            for (int t = 0; t < threads; t++) {
                size_t i = b * threads + t;
                u8 *stack = stacks + STACK_BYTES * i;
                void **top = (void **)(stack + STACK_BYTES - 64);
                *--top = nullptr, *--top = (void *)begin_fiber;
                for (int k = 0; k < 6; k++) *--top = nullptr;
                fibers[i] = {top, stack, &all[b], {(u32)t}, {first + b}, false, nullptr, 0};
                go_on(&fibers[i]);
            }
        }
        std::vector<Fiber *> held;  // of a cluster's block that begins when nobody else can go on
        if (cluster > 1) {
            u32 late = dice(count);
            for (int t = 0; t < threads; t++) held.push_back(&fibers[(size_t)late * threads + t]);
            for (int w = 0; w < (threads + 31) / 32; w++) all[late].warps[w].ready.clear();
        }
        size_t left = fibers.size();
        i64 idle = 0;
        for (; (!ready.empty() || !later.empty() || !held.empty()) && idle < 200000000; idle++) {
            if (ready.empty() && later.empty()) {
                for (Fiber *each : held) go_on(each);
                held.clear();
            }
            if (!later.empty() && (ready.empty() || !dice(16))) {
                later.front()();
                later.pop_front();
                continue;
            }
            std::swap(ready[dice((u32)ready.size())], ready.back());
            Warp &warp = *ready.back();
            ready.pop_back(), warp.listed = false;
            std::vector<Fiber *> lanes;
            lanes.swap(warp.ready);
            for (Fiber *each : lanes) {
                here = each;
                machine_change(&scheduler, here->stack_pointer);
                if (here->done) left--, idle = 0;
            }
        }
        ready.clear(), later.clear();
        if (left)
            for (Fiber &each : fibers)
                if (!each.done && each.thread.x % 32 == 0) fprintf(stderr, "block %u, warp %u: %s\n", each.number.x, each.thread.x / 32, each.waits_for ? each.waits_for : "polls");
        free(memory), free(stacks);
        if (left) return 1;
    }
    return 0;
}

inline u8 *at(u32 address, Block *block = here->block) {
    if (address - 1024 >= block->room) fprintf(stderr, "outside of shared memory\n"), abort();
    return block->shared + (address - 1024);
}

// Every lane gives up to six words, and sees what all lanes gave.
inline const u64 (&together(const char *what, u64 a = 0, u64 b = 0, u64 c = 0, u64 d = 0, u64 e = 0, u64 f = 0))[32][6] {
    Warp &warp = here->block->warps[here->thread.x / 32];
    int lane = here->thread.x % 32, turn = warp.turn;
    u64 mine[6] = {a, b, c, d, e, f};
    memcpy(warp.given[lane], mine, sizeof mine);
    warp.there |= 1u << lane;
    if (warp.there == 0xFFFFFFFFu) {
        memcpy(warp.seen[turn], warp.given, sizeof warp.given);
        warp.there = 0, warp.turn ^= 1;
        wake(warp.waiters);
        yield();  // so that all go on together
    } else {
        wait(warp.waiters, what);
    }
    return warp.seen[turn];
}

inline void pass(int id, int count, bool waits) {
    Gate &gate = here->block->gates[id];
    if (++gate.there == count) {
        gate.there = 0;
        wake(gate.waiters);
        yield();
    } else if (waits) {
        wait(gate.waiters, "a numbered barrier");
    }
}

inline Barrier &barrier(u32 address, Block *block = here->block) { return block->barriers[(address - 1024) / 8]; }

inline void settle(Barrier &each) {
    if (each.pending || each.bytes) return;
    each.phase ^= 1, each.pending = each.expected;
    wake(each.waiters);
}

inline void arrive(Barrier &each) {
    if (--each.pending < 0) fprintf(stderr, "more arrivals than a barrier waits for\n"), abort();
    settle(each);
}

inline void arrive_in_cluster() {
    Cluster &each = here->block->first->cluster;
    here->cluster_phase = each.phase;
    if (++each.there < (int)cluster * here->block->threads) return;
    each.there = 0, each.phase++;
    wake(each.waiters);
}

inline void wait_for_cluster() {
    Cluster &each = here->block->first->cluster;
    while (each.phase == here->cluster_phase) wait(each.waiters, "a cluster's barrier");
}

inline void even(u32 to, const void *from, int size) {
    if ((to | (u64)from) % size) fprintf(stderr, "a copy of %d bytes off a multiple of that\n", size), abort();
}

// At once, or behind what others still have to copy.
inline void copy(std::function<void()> what) {
    if (dice(2))
        what();
    else
        later.push_back(what);
}

inline float from_half(u16 bits) {
    _Float16 h;
    memcpy(&h, &bits, 2);
    return (float)h;
}

inline u16 to_half(float v) {
    _Float16 h = (_Float16)v;
    u16 bits;
    memcpy(&bits, &h, 2);
    return bits;
}

inline float from_bits(u32 bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

inline u32 to_bits(float v) {
    u32 bits;
    memcpy(&bits, &v, 4);
    return bits;
}

inline float from_bf16(u16 bits) { return from_bits((u32)bits << 16); }

inline u16 to_bf16(float v) {
    u32 bits = to_bits(v);
    if (v != v) return 0x7FFF;
    return (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float from_e4m3(u8 code) {
    int e = code >> 3 & 15, m = code & 7;
    if ((code & 127) == 127) return NAN;
    float v = e ? ldexpf(8 + m, e - 10) : ldexpf(m, -9);
    return code & 128 ? -v : v;
}

inline u8 to_e4m3(float v) {
    if (v != v) return 127;
    u8 sign = to_bits(v) >> 31 ? 128 : 0;
    float a = fminf(fabsf(v), 448.0f);
    int e = a == 0.0f ? -6 : ilogbf(a);
    if (e < -6) e = -6;
    int steps = (int)nearbyintf(ldexpf(a, 3 - e));  // 8 .. 16, fewer below the smallest normal number
    return sign | (u8)(steps + (e + 6) * 8);
}

// --- products ---

#if ROWS8
constexpr int WIDTH = 1, DEPTH = 32;
#else
constexpr int WIDTH = 2, DEPTH = 16;
#endif

inline float element(const u8 *from) {
#if ROWS8
    static const std::vector<float> values = [] {
        std::vector<float> all;
        for (int i = 0; i < 256; i++) all.push_back(from_e4m3((u8)i));
        return all;
    }();
    return values[*from];
#else
    u16 bits;
    memcpy(&bits, from, 2);
    return HALVES ? from_half(bits) : from_bf16(bits);
#endif
}

// Byte `k` of row `row` of a tile that a descriptor names.
inline const u8 *of_tile(u64 descriptor, int row, int k) {
    u32 place = ((u32)(descriptor & 0x3FFF) << 4) + row / 8 * ((u32)(descriptor >> 32 & 0x3FFF) << 4) + row % 8 * 128 + k;
    return at(place ^ (place >> 7 & 7) << 4);
}

// d (+)= w x^T, of which this thread has its own elements; w: DEPTH elements of this thread's row and of the one 8 on.
template <int N> inline void multiply(float *d, const float (&w)[2][DEPTH], u64 x, bool fresh) {
    int lane = here->thread.x % 32;
    for (int j = 0; j < N / 8; j++)
        for (int i = 0; i < 2; i++) {
            float v[DEPTH];
            for (int k = 0; k < DEPTH; k++) v[k] = element(of_tile(x, 8 * j + 2 * (lane % 4) + i, k * WIDTH));
            for (int r = 0; r < 2; r++) {
                double sum = fresh ? 0.0f : d[4 * j + 2 * r + i];  // in which, within a product, order makes no difference
                for (int k = 0; k < DEPTH; k++) sum += (double)w[r][k] * v[k];
                d[4 * j + 2 * r + i] = (float)sum;
            }
        }
}

// Operands of a product in registers, of which four lanes share rows lane / 4 and + 8.
inline void rows_of(const u64 (&all)[32][6], int lane, float (&w)[2][DEPTH]) {
    for (int c = 0; c < 4; c++)
        for (int i = 0; i < 4; i++)
            for (int b = 0; b < 4 / WIDTH; b++) {
                u32 word = (u32)all[lane / 4 * 4 + c][i] >> (8 * WIDTH * b);
                w[i % 2][i / 2 * (DEPTH / 2) + c * (4 / WIDTH) + b] = element((const u8 *)&word);
            }
}

template <int N> inline void multiply_registers(float *d, u32 a0, u32 a1, u32 a2, u32 a3, u64 x, bool fresh) {
    float w[2][DEPTH];
    rows_of(together("a product", a0, a1, a2, a3), here->thread.x % 32, w);
    multiply<N>(d, w, x, fresh);
}

template <int N> inline void multiply_shared(float *d, u64 tile, u64 x, bool fresh) {
    float w[2][DEPTH];
    int row = here->thread.x / 32 % 4 * 16 + here->thread.x % 32 / 4;
    together("a product");
    for (int r = 0; r < 2; r++)
        for (int k = 0; k < DEPTH; k++) w[r][k] = element(of_tile(tile, row + 8 * r, k * WIDTH));
    multiply<N>(d, w, x, fresh);
}

// A product of one warp: w [16, 16] x^T of eight rows.
inline void multiply_warp(float *d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, float (*value)(u16)) {
    const u64(&all)[32][6] = together("a product", a0, a1, a2, a3, b0, b1);
    int lane = here->thread.x % 32;
    auto word = [&](int of, int i, int b) { return value((u16)(all[of][i] >> (16 * b))); };
    for (int r = 0; r < 2; r++)
        for (int i = 0; i < 2; i++) {
            double sum = d[2 * r + i];
            for (int half = 0; half < 2; half++)
                for (int c = 0; c < 4; c++)
                    for (int b = 0; b < 2; b++) sum += (double)word(lane / 4 * 4 + c, 2 * half + r, b) * word((2 * (lane % 4) + i) * 4 + c, 4 + half, b);
            d[2 * r + i] = (float)sum;
        }
}

// The same of TF32, which keeps the upper 19 bits: w [16, 8].
inline void multiply_wide(float *d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u64(&all)[32][6] = together("a product", a0, a1, a2, a3, b0, b1);
    int lane = here->thread.x % 32;
    auto number = [&](int of, int i) { return (double)from_bits((u32)all[of][i] & 0xFFFFE000u); };
    for (int r = 0; r < 2; r++)
        for (int i = 0; i < 2; i++) {
            double sum = d[2 * r + i];
            for (int half = 0; half < 2; half++)
                for (int c = 0; c < 4; c++) sum += number(lane / 4 * 4 + c, 2 * half + r) * number((2 * (lane % 4) + i) * 4 + c, 4 + half);
            d[2 * r + i] = (float)sum;
        }
}

}  // namespace machine

#define threadIdx (machine::here->thread)
#define blockIdx (machine::here->number)
#define gridDim (machine::blocks)
#define memory (machine::here->block->shared)

// --- what base.cuh has ---

struct alignas(64) TensorMap {
    u64 words[16];  // address, axes, bytes of a step along each axis but the first, sizes, sizes of a tile (hopper_machine.py)
};

DEVICE u32 shared_address(const void *p) { return (u32)((const u8 *)p - memory) + 1024; }

DEVICE void barrier_init(u32 bar, u32 arrivals) {
    machine::Barrier &each = machine::barrier(bar);
    each.expected = each.pending = (int)arrivals;
}

DEVICE void barrier_arrive(u32 bar) { machine::arrive(machine::barrier(bar)); }

DEVICE void barrier_announce(u32 bar, u32 bytes) {
    machine::barrier(bar).bytes += bytes;
    barrier_arrive(bar);
}

DEVICE void barrier_wait(u32 bar, u32 parity) {
    machine::Barrier &each = machine::barrier(bar);
    while ((each.phase & 1) == parity) machine::wait(each.waiters, "a barrier in shared memory");
}

DEVICE void barrier_arrive_copies(u32 bar) {
    machine::later.push_back([&each = machine::barrier(bar)] { machine::arrive(each); });
}

DEVICE void fence_barrier_init() {}
DEVICE void fence_to_async() {}
DEVICE void fence_shared_to_async() {}
template <int ID, int THREADS> DEVICE void group_sync() { machine::pass(ID, THREADS, true); }
template <int THREADS> DEVICE void group_sync(int id) { machine::pass(id, THREADS, true); }
template <int THREADS> DEVICE void group_arrive(int id) { machine::pass(id, THREADS, false); }
template <int COUNT> DEVICE void keep_registers() {}
template <int COUNT> DEVICE void take_registers() {}

DEVICE void copy16(u32 to, const void *from) {
    machine::even(to, from, 16);
    machine::copy([to = machine::at(to), from] { memcpy(to, from, 16); });
}

template <int SIZE> DEVICE void copy_small(u32 to, const void *from, int real) {
    machine::even(to, from, SIZE);
    machine::copy([to = machine::at(to), from, real] { memset(to, 0, SIZE), memcpy(to, from, real); });
}

// A tile of up to five axes; what lies outside is zero. Its 16-byte chunks are exchanged as the copy engine does.
DEVICE void copy_box(machine::Block *block, u32 to, const TensorMap &map, u32 bar, const i64 *place) {
    const u64 *w = map.words;
    int rank = (int)w[1], wide = (int)w[11];
    const u64 *strides = w + 2, *sizes = w + 6, *box = w + 11;
    i64 rows = 1, at[5];
    for (int i = 1; i < rank; i++) rows *= box[i];
    for (i64 r = 0; r < rows; r++) {
        const u8 *from = (const u8 *)w[0] + place[0];
        i64 rest = r;
        bool inside = true;
        for (int i = 1; i < rank; i++) {
            at[i] = place[i] + rest % (i64)box[i], rest /= (i64)box[i];
            inside &= at[i] >= 0 && at[i] < (i64)sizes[i];
            from += at[i] * (i64)strides[i - 1];
        }
        for (int k = 0; k < wide; k += 16) {
            u32 p = to + (u32)(r * wide + k), chunk = wide == 128 ? p >> 7 & 7 : p >> 7 & 3;
            for (int b = 0; b < 16; b++) machine::at(p ^ chunk << 4, block)[b] = inside && place[0] + k + b < (i64)sizes[0] ? from[k + b] : 0;
        }
    }
    machine::Barrier &each = machine::barrier(bar, block);
    each.bytes -= rows * wide;
    machine::settle(each);
}

struct Place {
    i64 at[5];
};

DEVICE void copy_tile(u32 to, const TensorMap *map, u32 bar, Place place) {
    machine::copy([=, map = *map, block = machine::here->block] { copy_box(block, to, map, bar, place.at); });
}

DEVICE void copy_tile2(u32 to, const TensorMap *map, u32 bar, int x, int y) { copy_tile(to, map, bar, {x, y}); }
DEVICE void copy_tile3(u32 to, const TensorMap *map, u32 bar, int x, int y, int z) { copy_tile(to, map, bar, {x, y, z}); }
DEVICE void copy_tile5(u32 to, const TensorMap *map, u32 bar, int x, int group, int e) { copy_tile(to, map, bar, {x, 0, 0, group, e}); }

DEVICE u64 first_to_go() { return 0; }
DEVICE void copy_once3(u32 to, const TensorMap *map, u32 bar, int x, int y, int z, u64) { copy_tile3(to, map, bar, x, y, z); }
DEVICE void copy_once5(u32 to, const TensorMap *map, u32 bar, int x, int group, int e, u64) { copy_tile5(to, map, bar, x, group, e); }
DEVICE void prefetch_tile5(const TensorMap *, int, int, int) {}
DEVICE void prefetch_map(const TensorMap *) {}
DEVICE int load_acquire(const int *p) { return *p; }
DEVICE void wait_for_grid() {}
DEVICE void let_next_grid_start() {}
DEVICE u64 nanoseconds() { return (u64)(machine::clock += 10); }
DEVICE int cluster_rank() { return (int)(machine::here->block - machine::here->block->first); }
DEVICE int cluster_blocks() { return (int)machine::cluster; }
DEVICE void cluster_arrive() { machine::arrive_in_cluster(); }
DEVICE void cluster_wait() { machine::wait_for_cluster(); }
DEVICE int load_at(u32 p, int block) { return *(const int *)machine::at(p, machine::here->block->first + block); }
DEVICE void products_fence() {}
DEVICE void products_commit() {}
template <int PENDING> DEVICE void products_wait() { machine::together("products"); }
template <int N> DEVICE void hold(float (&)[N]) {}
template <int N> DEVICE void hold(u32 (&)[N]) {}

DEVICE u64 tile_descriptor(u32 address) { return (u64)((address & 0x3FFFF) >> 4) | ((u64)1 << 16) | ((u64)64 << 32) | ((u64)1 << 62); }

DEVICE void store_transposed(u32 to, u32 a, u32 b, u32 c, u32 d) {
    const u64(&all)[32][6] = machine::together("stmatrix", to);
    u32 mine[4] = {a, b, c, d};
    int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++)
        for (int e = 0; e < 2; e++) {
            u16 v = (u16)(mine[i] >> (16 * e));
            memcpy(machine::at((u32)all[8 * i + 2 * (lane % 4) + e][0]) + 2 * (lane / 4), &v, 2);
        }
}

DEVICE void multiply_bf16(float *d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { machine::multiply_warp(d, a0, a1, a2, a3, b0, b1, machine::from_bf16); }
DEVICE void multiply_f16(float *d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { machine::multiply_warp(d, a0, a1, a2, a3, b0, b1, machine::from_half); }

DEVICE void multiply_tf32(float *d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { machine::multiply_wide(d, a0, a1, a2, a3, b0, b1); }

DEVICE u32 bf16_pair(float low, float high) { return machine::to_bf16(low) | (u32)machine::to_bf16(high) << 16; }
DEVICE float bf16_low(u32 pair) { return machine::from_bits(pair << 16); }
DEVICE float bf16_high(u32 pair) { return machine::from_bits(pair & 0xFFFF0000u); }
DEVICE u32 mul_pair(u32 a, u32 b) { return bf16_pair(bf16_low(a) * bf16_low(b), bf16_high(a) * bf16_high(b)); }
DEVICE u32 fma_pair(u32 a, u32 b, u32 c) {
    return bf16_pair((float)((double)bf16_low(a) * bf16_low(b) + bf16_low(c)), (float)((double)bf16_high(a) * bf16_high(b) + bf16_high(c)));
}
DEVICE u32 half_pair(float low, float high) { return machine::to_half(low) | (u32)machine::to_half(high) << 16; }

DEVICE u32 mul_halves(u32 a, u32 b) {
    return half_pair(machine::from_half((u16)a) * machine::from_half((u16)b), machine::from_half((u16)(a >> 16)) * machine::from_half((u16)(b >> 16)));
}

DEVICE u32 picked(u32 bits, u32 mask, u32 more) { return (bits & mask) | more; }
DEVICE u16 e4m3_pair(float low, float high) { return (u16)(machine::to_e4m3(low) | machine::to_e4m3(high) << 8); }
DEVICE u32 e4m3_halves(u16 pair) { return half_pair(machine::from_e4m3((u8)pair), machine::from_e4m3((u8)(pair >> 8))); }
DEVICE float larger(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }
DEVICE float half_value(u16 bits) { return machine::from_half(bits); }

DEVICE float about_reciprocal(float d) { return 1.0f / d; }

// --- what the compiler for GPUs brings along ---

struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

DEVICE uint4 load_fresh16(const void *p) { return *(const uint4 *)p; }
DEVICE void store16_at(u32 p, int block, float4 v) {
    machine::Block *to = machine::here->block->first + block;
    if (!to->begun) fprintf(stderr, "a thread block is written to that has not begun\n"), abort();
    memcpy(machine::at(p, to), &v, 16);
}

DEVICE float2 e4m3_values(u16 pair) { return {machine::from_e4m3((u8)pair), machine::from_e4m3((u8)(pair >> 8))}; }

DEVICE int2 make_int2(int x, int y) { return {x, y}; }
DEVICE int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
DEVICE uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
DEVICE uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
DEVICE float2 make_float2(float x, float y) { return {x, y}; }
DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class A, class B> DEVICE auto min(A a, B b) -> decltype(a + b) { return b < a ? b : a; }
template <class A, class B> DEVICE auto max(A a, B b) -> decltype(a + b) { return a < b ? b : a; }
template <class T> DEVICE T __ldg(const T *p) { return *p; }
template <class T> DEVICE T __ldcg(const T *p) { return *p; }
DEVICE void __nanosleep(int) { machine::yield(); }
DEVICE void __threadfence() {}
DEVICE void __syncthreads() { machine::pass(0, machine::here->block->threads, true); }
DEVICE void __syncwarp() { machine::together("__syncwarp"); }
DEVICE int __popc(u32 v) { return __builtin_popcount(v); }
DEVICE int __ffs(u32 v) { return __builtin_ffs((int)v); }
DEVICE float __int_as_float(int v) { return machine::from_bits((u32)v); }
DEVICE float __uint_as_float(u32 v) { return machine::from_bits(v); }
DEVICE u32 __float_as_uint(float v) { return machine::to_bits(v); }
DEVICE int __float_as_int(float v) { return (int)machine::to_bits(v); }
DEVICE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float __fadd_rn(float a, float b) { return a + b; }
DEVICE float __fsub_rn(float a, float b) { return a - b; }
DEVICE float __fmul_rn(float a, float b) { return a * b; }
DEVICE float __fdiv_rn(float a, float b) { return a / b; }
DEVICE float __fdividef(float a, float b) { return a / b; }

DEVICE u32 __funnelshift_r(u32 low, u32 high, u32 by) { return (u32)(((u64)high << 32 | low) >> (by & 31)); }

DEVICE u32 __byte_perm(u32 a, u32 b, u32 how) {
    u64 both = (u64)b << 32 | a;
    u32 made = 0;
    for (int i = 0; i < 4; i++) {
        u8 byte = (u8)(both >> (8 * (how >> (4 * i) & 7)));
        made |= (u32)(how >> (4 * i) & 8 ? (byte & 128 ? 255 : 0) : byte) << (8 * i);
    }
    return made;
}

DEVICE int atomicAdd(int *p, int v) {
    int before = *p;
    *p += v;
    return before;
}

DEVICE int atomicMax(int *p, int v) {
    int before = *p;
    *p = before < v ? v : before;
    return before;
}

DEVICE u64 atomicAdd(u64 *p, u64 v) {
    u64 before = *p;
    *p += v;
    return before;
}

template <class T> DEVICE u64 as_word(T v) {
    u64 word = 0;
    memcpy(&word, &v, sizeof v);
    return word;
}

template <class T> DEVICE T of_lane(const u64 (&all)[32][6], int lane) {
    T v;
    memcpy(&v, all[lane], sizeof v);
    return v;
}

template <class T> DEVICE T __shfl_sync(u32, T v, int lane) { return of_lane<T>(machine::together("a shuffle", as_word(v)), lane & 31); }
template <class T> DEVICE T __shfl_xor_sync(u32, T v, int step) { return of_lane<T>(machine::together("a shuffle", as_word(v)), (threadIdx.x % 32) ^ step); }

template <class T> DEVICE T __shfl_up_sync(u32, T v, int step) {
    int lane = threadIdx.x % 32;
    return of_lane<T>(machine::together("a shuffle", as_word(v)), lane < step ? lane : lane - step);
}

DEVICE u32 __ballot_sync(u32, bool v) {
    const u64(&all)[32][6] = machine::together("a ballot", v);
    u32 made = 0;
    for (int i = 0; i < 32; i++) made |= (u32)(all[i][0] & 1) << i;
    return made;
}

DEVICE u32 __reduce_max_sync(u32, u32 v) {
    const u64(&all)[32][6] = machine::together("a largest of a warp", v);
    u32 made = 0;
    for (int i = 0; i < 32; i++) made = max(made, (u32)all[i][0]);
    return made;
}

DEVICE u32 __reduce_min_sync(u32, u32 v) { return ~__reduce_max_sync(0xFFFFFFFFu, ~v); }

DEVICE bool __any_sync(u32, u32 v) { return __ballot_sync(0xFFFFFFFFu, v); }

DEVICE u32 __match_any_sync(u32, int v) {
    const u64(&all)[32][6] = machine::together("a match", as_word(v));
    u32 made = 0;
    for (int i = 0; i < 32; i++) made |= (u32)(all[i][0] == as_word(v)) << i;
    return made;
}
