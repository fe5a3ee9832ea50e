#include "experts.cuh"
#include "prepare.cuh"

static_assert(sizeof(Room) <= ROOM_LIMIT, "fewer stages are needed: Variant.stages");

extern "C" __device__ const int room_bytes = sizeof(Room);
extern "C" __device__ const int threads = THREADS;
