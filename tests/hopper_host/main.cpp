// The kernels with a host's way to start them. 0, or 1 where threads wait for ever.
#include "hopper.cu"

static Maps given_maps;  // in a place of its own: those of the caller lie anywhere, and a map wants 64 bytes
static const Arguments *given;
static const Preparation *given_rows;

static struct {
    const u16 *y;
    const int *ids;
    const float *weights;
    u16 *out;
    int tokens, hidden, top_k;
} given_terms;

extern "C" int run_experts(const void *maps, const Arguments *arguments, int grid, int count, int shared) {
    memcpy(&given_maps, maps, sizeof given_maps), given = arguments;
    return machine::run([] { experts(given_maps, *given); }, grid, count, shared, grid);
}

extern "C" int run_prepare(const Preparation *p, int grid, int encoded) {
    given_rows = p;
    return encoded ? machine::run([] { prepare_encoded(*given_rows); }, grid, PREPARERS, 0, 1) : machine::run([] { prepare(*given_rows); }, grid, PREPARERS, 0, 1);
}

extern "C" int run_combine(const u16 *y, const int *ids, const float *weights, u16 *out, int tokens, int hidden, int top_k, int grid) {
    given_terms = {y, ids, weights, out, tokens, hidden, top_k};
    return machine::run([] { combine(given_terms.y, given_terms.ids, given_terms.weights, given_terms.out, given_terms.tokens, given_terms.hidden, given_terms.top_k); }, grid, COMBINERS, 0, 1);
}

extern "C" void begin_by_chance(u64 seed) { machine::chance = seed * 2 + 1; }
extern "C" int room_size() { return room_bytes; }
extern "C" int thread_count() { return threads; }
