// As main.cpp, of the kernel that chooses experts.
#define ROWS8 0
#define HALVES 0
#include "gate.cu"

static const Gate *given;

extern "C" int run_gate(const Gate *g, int grid, int threads, int shared, int cluster) {
    given = g;
    return machine::run([] { gate(*given); }, grid, threads, shared, grid, cluster);
}

extern "C" int room_size() { return sizeof(Room); }

extern "C" void begin_by_chance(u64 seed) { machine::chance = seed * 2 + 1; }
