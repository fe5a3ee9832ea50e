// Causal attention of prompts over the paged pool: persistent thread blocks of one warp that fetches and GROUPS warp
// groups that compute, 64 rows of one query head each.
//
// A work item is ROWS rows of a head of a sequence. Its tiles of TILE positions are walked from the last to the first, so
// that what must be masked comes first. Scores of the next tile are begun before the softmax of this one, whose weights
// meet their values meanwhile; warp groups take turns in beginning, so that one computes exponentials while another's
// products run. Items come from a counter, within a sequence the longest first.
//
// Constants: HEAD of a head (64 or 128), TILE, GROUPS, STAGES.
#include "base.cuh"
#include "products.cuh"  // generated: attend_prompt.py

constexpr int ROWS = 64 * GROUPS, PIECES = HEAD / 64, WARPS = 4 * GROUPS, PROMPT_THREADS = 128 * (GROUPS + 1);
constexpr int TILE_BYTES = TILE * HEAD * 2, Q_BYTES = ROWS * HEAD * 2;
constexpr float LOWEST = -1e30f;  // finite: what it is subtracted from stays a number, or an infinity
constexpr i64 IN_CACHE = 24 << 20;

struct Prompts {
    const void *table;  // [sequences, table_stride]: blocks of 2^block_bits positions; i64 where table_wide
    const i64 *spans;   // [sequences, 3]: first row, rows, length of the context, whose last positions the rows are
    const void *sinks;  // [heads] f32 or bf16, or null
    u16 *out;           // [rows, heads, HEAD]
    int *next;          // 0 in front; null where there are no more items than blocks
    i64 table_stride;
    int sequences, heads, repeat, slots, value_at, window, block_bits, box_bits, table_wide, sinks_wide;
    float scale;  // with log2 e
};

struct Item {
    int token, rows, at, head;  // first row, rows from there to the sequence's end, position of the first; head < 0: the end
};

struct alignas(1024) PromptRoom {
    u8 q[PIECES][ROWS * 128];
    u8 k[STAGES][PIECES][TILE * 128];
    u8 v[STAGES][PIECES][TILE * 128];
    u64 q_full, q_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    Item item;
};

extern "C" __device__ const int room_bytes = sizeof(PromptRoom);
extern "C" __device__ const int threads = PROMPT_THREADS;
extern "C" __device__ const int rows = ROWS;
extern __shared__ __align__(1024) u8 shared_bytes[];
#define prompt_room (*(PromptRoom *)shared_bytes)

struct Turn {
    int slot = 0;
    u32 parity = 0;
    DEVICE_MEMBER void next() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

template <int COUNT> DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }

template <int COUNT> DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Whatever x is made from is computed in front of waits that follow: the compiler would move a wait up to where nothing
// depends on it, and leave the tensor cores without company. Stores nothing, since a sum of exponentials is not negative.
DEVICE void stay_in_front(float x) { asm volatile("{.reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p st.shared.f32 [%1], %0;}" ::"f"(x), "r"(0) : "memory"); }

DEVICE int last_tile(const Item &item) { return (item.at + min(item.rows, ROWS) - 1) / TILE; }

DEVICE int first_tile(const Item &item, int window) { return window ? max(0, item.at - window + 1) / TILE : 0; }

// --- the warp that fetches ---

// Finds the item of a number: sequences in order; in each, as many kv heads at a time as the cache holds, and for those the
// last rows first. All lanes get the same.
struct Finder {
    const Prompts &a;
    int before = 0, group = 0;  // items in front of sequence 32 group
    int sequence = 0;

    DEVICE_MEMBER explicit Finder(const Prompts &given) : a(given) {}

    DEVICE_MEMBER Item find(int number) {
        int lane = threadIdx.x % 32;
        for (; group * 32 < a.sequences; group++) {
            int s = group * 32 + lane, count = s < a.sequences ? (int)a.spans[3 * s + 1] : 0;
            int own = (count + ROWS - 1) / ROWS * a.heads, through = own;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                int other = __shfl_up_sync(~0u, through, step);
                through += lane >= step ? other : 0;
            }
            u32 reached = __ballot_sync(~0u, number < before + through);
            if (!reached) {
                before += __shfl_sync(~0u, through, 31);
                continue;
            }
            int which = __ffs(reached) - 1;
            sequence = group * 32 + which;
            return within(number - before - __shfl_sync(~0u, through - own, which));
        }
        return {0, 0, 0, -1};
    }

    DEVICE_MEMBER Item within(int number) {
        int start = (int)a.spans[3 * sequence], count = (int)a.spans[3 * sequence + 1], length = (int)a.spans[3 * sequence + 2];
        int tiles = (count + ROWS - 1) / ROWS, kv_heads = a.heads / a.repeat;
        int together = (int)min((i64)kv_heads, max((i64)1, IN_CACHE / ((i64)length * HEAD * 4))) * a.repeat;
        int section = number / (tiles * together), rest = number - section * tiles * together;
        int heads = min(together, a.heads - section * together);
        int query = (tiles - 1 - rest / heads) * ROWS;
        return {start + query, count - query, length - count + query, section * together + rest % heads};
    }
};

struct Fetcher {
    const Prompts &a;
    const TensorMap *boxes, *lines;  // tiles of 2^box_bits rows, and of one
    int lane;

    DEVICE_MEMBER i64 slot_of(int sequence, int position) {
        i64 entry = sequence * a.table_stride + (position >> a.block_bits);
        i64 block = a.table_wide ? ((const i64 *)a.table)[entry] : ((const int *)a.table)[entry];
        return (block << a.block_bits) + (position & ((1 << a.block_bits) - 1));
    }

    // A tile of keys or values from `column` on. Behind the context's end there are zeros, which the copy engine writes for
    // rows that the pool does not have: what lies there may be another's, and no number.
    DEVICE_MEMBER void fetch(u32 to, u64 *full, u64 *empty, u32 parity, int sequence, int first, int length, int column) {
        barrier_wait(shared_address(empty), parity ^ 1);
        u32 bar = shared_address(full);
        if (lane == 0) barrier_announce(bar, TILE_BYTES);
        __syncwarp();
        int size = 1 << a.box_bits, boxes_each = TILE >> a.box_bits;
#pragma unroll 1
        for (int i = lane; i < boxes_each * PIECES; i += 32) {
            int piece = i / boxes_each, row = (i - piece * boxes_each) << a.box_bits, position = first + row;
            u32 target = to + piece * TILE * 128 + row * 128;
            int x = (column + piece * 64) * 2;
            i64 slot = position < length ? slot_of(sequence, position) : a.slots;
            if (position >= length || position + size <= length)
                copy_tile2(target, boxes, bar, x, (int)slot);
            else
#pragma unroll 1
                for (int r = 0; r < size; r++) copy_tile2(target + r * 128, lines, bar, x, position + r < length ? (int)slot + r : a.slots);
        }
    }
};

DEVICE void produce(const Prompts &a, const TensorMap *q, const TensorMap *boxes, const TensorMap *lines) {
    PromptRoom &room = prompt_room;
    Fetcher fetcher{a, boxes, lines, (int)threadIdx.x % 32};
    Finder finder(a);
    Turn k, v;
    for (u32 round = 0, number = blockIdx.x;; round++) {
        Item item = finder.find(number);
        barrier_wait(shared_address(&room.q_empty), (round & 1) ^ 1);
        u32 bar = shared_address(&room.q_full);
        if (fetcher.lane == 0) {
            room.item = item;
            if (item.head < 0) {
                barrier_arrive(bar);
            } else {
                barrier_announce(bar, Q_BYTES);
                for (int piece = 0; piece < PIECES; piece++) copy_tile3(shared_address(room.q[piece]), q, bar, piece * 128, item.head, item.token);
            }
        }
        if (item.head < 0) return;
        int length = item.at + item.rows, key_at = item.head / a.repeat * HEAD, value_at = key_at + a.value_at;
        int last = last_tile(item), first = first_tile(item, a.window);
#pragma unroll 1
        for (int j = last; j >= first - 1; j--) {
            if (j >= first) {
                fetcher.fetch(shared_address(room.k[k.slot]), room.k_full + k.slot, room.k_empty + k.slot, k.parity, finder.sequence, j * TILE, length, key_at);
                k.next();
            }
            if (j < last) {
                fetcher.fetch(shared_address(room.v[v.slot]), room.v_full + v.slot, room.v_empty + v.slot, v.parity, finder.sequence, (j + 1) * TILE, length, value_at);
                v.next();
            }
        }
        if (!a.next) {
            number = 0x7FFFFFFF;
        } else {
            if (fetcher.lane == 0) number = gridDim.x + atomicAdd(a.next, 1);
            number = __shfl_sync(~0u, number, 0);
        }
    }
}

// --- the warp groups that compute ---

// Columns of 16 bits that lie one behind another, eight rows in 1,024 bytes, pieces of 64 columns TILE rows apart.
DEVICE u64 values_descriptor(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | ((u64)(TILE * 8) << 16) | ((u64)64 << 32) | ((u64)1 << 62);
}

struct Computer {
    const Prompts &a;
    int group, warp, lane;
    Turn k, v;
    u32 p[TILE / 4];
    float o[HEAD / 2], top[2], total[2];

    DEVICE_MEMBER void release(u64 *bar) {
        if (lane == 0) barrier_arrive(shared_address(bar));
    }

    DEVICE_MEMBER void await_turn() { asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory"); }

    DEVICE_MEMBER void pass_turn() { asm volatile("bar.arrive %0, 256;" ::"r"(1 + (group + 1) % GROUPS) : "memory"); }

    DEVICE_MEMBER void begin_scores(float (&s)[TILE / 2]) {
        u64 q = tile_descriptor(shared_address(prompt_room.q[0]) + group * 8192), keys = tile_descriptor(shared_address(prompt_room.k[k.slot][0]));
        products_fence();
#pragma unroll
        for (int step = 0; step < HEAD / 16; step++) {
            int at = step % 4 * 2, piece = step / 4;
            if (step == 0)
                scores_begin(s, q, keys);
            else
                scores_more(s, q + piece * ROWS * 8 + at, keys + piece * TILE * 8 + at);
        }
        products_commit();
    }

    DEVICE_MEMBER void begin_values() {
        u64 values = values_descriptor(shared_address(prompt_room.v[v.slot][0]));
        products_fence();
#pragma unroll
        for (int step = 0; step < TILE / 16; step++) values_more(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3], values + step * 128);
        products_commit();
    }

    // at: position of this thread's first row.  first: of the tile.
    DEVICE_MEMBER void mask(float (&s)[TILE / 2], int at, int first) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            int high = at + 8 * row - first - lane % 4 * 2, low = a.window ? high - a.window : -1000000;
#pragma unroll
            for (int i = 0; i < TILE / 8; i++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &x = s[4 * i + 2 * row + e];
                    x = 8 * i + e <= high && 8 * i + e > low ? x : __int_as_float(0xFF800000);
                }
        }
    }

    // Scores become weights; by what the sums so far must be multiplied.
    DEVICE_MEMBER void softmax(float (&s)[TILE / 2], float (&fade)[2]) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            float peak = top[row], other = s[2 * row + 1];
#pragma unroll
            for (int i = 0; i < TILE / 8; i++) {
                peak = fmaxf(peak, s[4 * i + 2 * row]);
                other = fmaxf(other, s[4 * i + 2 * row + 1]);
            }
            peak = fmaxf(peak, other);
            peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
            peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
            fade[row] = power_of_two((top[row] - peak) * a.scale);
            top[row] = peak;
            float base = peak * a.scale, sum = 0, more = 0;
#pragma unroll
            for (int i = 0; i < TILE / 8; i++) {
                float &x = s[4 * i + 2 * row], &y = s[4 * i + 2 * row + 1];
                x = power_of_two(fmaf(x, a.scale, -base));
                y = power_of_two(fmaf(y, a.scale, -base));
                sum += x;
                more += y;
            }
            total[row] = fmaf(total[row], fade[row], sum + more);
        }
    }

    DEVICE_MEMBER void keep_weights(const float (&s)[TILE / 2]) {
#pragma unroll
        for (int i = 0; i < TILE / 4; i++) p[i] = bf16_pair(s[2 * i], s[2 * i + 1]);
    }

    DEVICE_MEMBER void fade_out(const float (&fade)[2]) {
#pragma unroll
        for (int i = 0; i < HEAD / 2; i++) o[i] *= fade[i / 2 % 2];
    }

    DEVICE_MEMBER bool masked(const Item &item, int j) {
        int low = item.at + group * 64;
        return j * TILE + TILE - 1 > low || (a.window && j * TILE <= low + 63 - a.window);
    }

    DEVICE_MEMBER void compute(const Item &item) {
        PromptRoom &room = prompt_room;
        int last = last_tile(item), first = first_tile(item, a.window), at = item.at + group * 64 + warp * 16 + lane / 4;
        float s[TILE / 2], fade[2];
#pragma unroll
        for (int i = 0; i < HEAD / 2; i++) o[i] = 0;
        top[0] = top[1] = LOWEST;
        total[0] = total[1] = 0;
        barrier_wait(shared_address(room.k_full + k.slot), k.parity);
        begin_scores(s);
        products_wait<0>();
        hold(s);
        release(room.k_empty + k.slot);
        if (last == first) release(&room.q_empty);
        k.next();
        mask(s, at, last * TILE);
        softmax(s, fade);
        keep_weights(s);
        for (int j = last - 1; j >= first; j--) {
            barrier_wait(shared_address(room.k_full + k.slot), k.parity);
            if (TURNS) await_turn();
            begin_scores(s);
            barrier_wait(shared_address(room.v_full + v.slot), v.parity);
            begin_values();
            if (TURNS) pass_turn();
            products_wait<1>();
            hold(s);
            release(room.k_empty + k.slot);
            if (j == first) release(&room.q_empty);
            k.next();
            if (masked(item, j)) mask(s, at, j * TILE);
            softmax(s, fade);
            stay_in_front(total[0] + total[1]);
            products_wait<0>();
            hold(o);
            hold(p);
            release(room.v_empty + v.slot);
            v.next();
            fade_out(fade);
            keep_weights(s);
        }
        barrier_wait(shared_address(room.v_full + v.slot), v.parity);
        begin_values();
        products_wait<0>();
        hold(o);
        release(room.v_empty + v.slot);
        v.next();
    }

    // Divides by the sums, and writes rows in pieces of 16 bytes, for which four lanes exchange what they have.
    DEVICE_MEMBER void finish(const Item &item) {
        int first = group * 64 + warp * 16 + lane / 4, quarter = lane % 4;
        float sink = LOWEST;
        if (a.sinks) sink = 1.4426950408889634f * (a.sinks_wide ? ((const float *)a.sinks)[item.head] : __uint_as_float((u32)((const u16 *)a.sinks)[item.head] << 16));
#pragma unroll
        for (int row = 0; row < 2; row++) {
            float sum = total[row];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            float peak = top[row] * a.scale, high = fmaxf(peak, sink), factor = a.sinks ? power_of_two(peak - high) : 1.0f;
            sum = sum * factor + (a.sinks ? power_of_two(sink - high) : 0.0f);
            factor = sum == 0 ? 0.0f : factor / sum;
            u16 *to = a.out + ((i64)(item.token + first + 8 * row) * a.heads + item.head) * HEAD;
            bool real = first + 8 * row < item.rows;
#pragma unroll
            for (int part = 0; part < HEAD / 32; part++) {
                u32 x[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float *pair = o + 16 * part + 4 * i + 2 * row;
                    x[i] = bf16_pair(pair[0] * factor, pair[1] * factor);
                }
                exchange(x, quarter);
                if (real) *(uint4 *)(to + part * 32 + quarter * 8) = make_uint4(x[0], x[1], x[2], x[3]);
            }
        }
    }

    // Of four lanes' four words, lane q gets word q of each.
    DEVICE_MEMBER void exchange(u32 (&x)[4], int q) {
#pragma unroll
        for (int step = 1; step <= 2; step *= 2) {
            bool upper = q & step;
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (!(i & step)) {
                    u32 got = __shfl_xor_sync(~0u, upper ? x[i] : x[i + step], step);
                    if (upper)
                        x[i] = got;
                    else
                        x[i + step] = got;
                }
        }
    }
};

DEVICE void consume(const Prompts &a) {
    PromptRoom &room = prompt_room;
    Computer me{a, (int)threadIdx.x / 128 - 1, (int)threadIdx.x / 32 % 4, (int)threadIdx.x % 32};
    if (TURNS && me.group == GROUPS - 1) me.pass_turn();  // the first one begins
    for (u32 round = 0;; round++) {
        barrier_wait(shared_address(&room.q_full), round & 1);
        Item item = room.item;
        if (item.head < 0) return;
        me.compute(item);
        me.finish(item);
    }
}

extern "C" __global__ void __launch_bounds__(PROMPT_THREADS, 1)
    attend_prompt(const __grid_constant__ Prompts a, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap boxes, const __grid_constant__ TensorMap lines) {
    PromptRoom &room = prompt_room;
    if (threadIdx.x == 0) {
        barrier_init(shared_address(&room.q_full), 1);
        barrier_init(shared_address(&room.q_empty), WARPS);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(shared_address(room.k_full + i), 1);
            barrier_init(shared_address(room.v_full + i), 1);
            barrier_init(shared_address(room.k_empty + i), WARPS);
            barrier_init(shared_address(room.v_empty + i), WARPS);
        }
        fence_barrier_init();
        prefetch_map(&q);
        prefetch_map(&boxes);
        prefetch_map(&lines);
    }
    __syncthreads();
    wait_for_grid();
    if (threadIdx.x < 128) {
        fewer_registers<GROUPS == 2 ? 40 : 32>();
        if (threadIdx.x < 32) produce(a, &q, &boxes, &lines);
    } else {
        more_registers<GROUPS == 2 ? 232 : 160>();
        consume(a);
    }
}
