// As main.cpp, of the kernels for dense products: few.cu, or dozens.cu where products are of groups of warps.
#ifdef ROWS8
#include "dozens.cu"
#define KERNEL dozens
#else
#define ROWS8 0
#define HALVES (FORMAT == 0) /* of products of groups of warps, which there are none of */
#include "few.cu"
#define KERNEL few
#endif

static const Dense *given;

extern "C" int run_dense(const Dense *a, int grid, int threads, int shared) {
    given = a;
    return machine::run([] { KERNEL(*given); }, grid, threads, shared, grid);
}

extern "C" void begin_by_chance(u64 seed) { machine::chance = seed * 2 + 1; }
