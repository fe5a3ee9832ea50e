// As main.cpp, of few.cu.
#define HALVES (FORMAT == 0) /* of products of groups of warps, which there are none of */
#define ROWS8 0
#include "few.cu"

static const Few *given;

extern "C" int run_few(const Few *a, int grid, int threads, int shared) {
    given = a;
    return machine::run([] { few(*given); }, grid, threads, shared, grid);
}

extern "C" void begin_by_chance(u64 seed) { machine::chance = seed * 2 + 1; }
