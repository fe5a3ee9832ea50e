// The entry points, in a plain C calling convention: each takes the address of its arguments, eight bytes apiece.
// Every buffer belongs to the caller. Nothing is allocated for it, nothing is kept, nothing throws.
#include "experts.h"
#include "latent.h"
#include "linear.h"
#include <chrono>

Runtime runtime;

namespace {
thread_local Scratch scratch;

enum Name { RMS_NORM, ROTATE, ACTIVATE, ROUTE, LINEAR, GATE, EXPERTS, ATTEND, ATTEND_LATENT, STORE_LATENT, NAMES };
int64_t nanoseconds[NAMES];  // spent in entry points, over all threads that call them

struct Clock {
    Name name;
    std::chrono::steady_clock::time_point began = std::chrono::steady_clock::now();
    explicit Clock(Name of) : name(of) {}
    ~Clock() {
        auto spent = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - began);
        __atomic_fetch_add(&nanoseconds[name], spent.count(), __ATOMIC_RELAXED);
    }
};

struct NormArgs {
    const char *x, *residual, *w;
    char *y, *total;
    int64_t x_outer, x_inner, outer, inner, residual_row, size, threads;
    double eps;
};
// Rows in an outer and an inner count, each with its distance; the results follow one another.
template <class T> void rms_norm(const NormArgs& a) {
    typedef typename T::Element Element;
    each(a.outer * a.inner, a.outer * a.inner * a.size, a.threads, [&](int64_t i) {
        const Element* x = (const Element*)(a.x + i / a.inner * a.x_outer + i % a.inner * a.x_inner);
        if (a.residual) {
            Element* total = (Element*)a.total + i * a.size;
            add_row<T>(x, row_at<T>(a.residual, a.residual_row, i), a.size, total);
            x = total;
        }
        norm_row<T>(x, (const Element*)a.w, a.size, (float)a.eps, (Element*)a.y + i * a.size);
    });
}

struct RotateArgs {
    const char* x;
    const float *cos, *sin;
    char* y;
    int64_t x_outer, x_inner, tokens, heads, half, interleaved, threads;
};
template <class T> void rotate(const RotateArgs& a) {
    typedef typename T::Element Element;
    each(a.tokens * a.heads, a.tokens * a.heads * a.half * 2, a.threads, [&](int64_t i) {
        int64_t t = i / a.heads;
        rotate_row<T>((const Element*)(a.x + t * a.x_outer + i % a.heads * a.x_inner), a.cos + t * a.half,
                      a.sin + t * a.half, a.half, a.interleaved, (Element*)a.y + 2 * i * a.half);
    });
}

struct ActivateArgs {
    const char* x;
    char* y;
    int64_t x_row, tokens, width, threads;
    Activation activation;
};
template <class T> void activate(const ActivateArgs& a) {
    typedef typename T::Element Element;
    each(a.tokens, 4 * a.tokens * a.width, a.threads, [&](int64_t t) {
        activate_row<T>(a.activation, row_at<T>(a.x, a.x_row, t), a.width, (Element*)a.y + t * a.width);
    });
}

struct RouteArgs {
    const float *logits, *bias;
    int32_t* ids;
    float* weights;
    int64_t tokens;
    Router router;
};
void route(const RouteArgs& a) {
    int64_t experts = a.router.experts;
    scratch.reserve(8 * (experts + a.router.groups));
    float *scores = scratch.take<float>(2 * (experts + a.router.groups)), *choice = scores + experts;
    for (int64_t t = 0; t < a.tokens; t++)
        route_row(a.router, a.logits + t * experts, a.bias, scores, choice, a.ids + t * a.router.top_k,
                  a.weights + t * a.router.top_k);
}
}  // namespace

#define ENTRY(name, NAME, Args, call)                                 \
    extern "C" void name##_float32(const Args* a) {                   \
        Clock clock(NAME);                                            \
        using T = Single;                                             \
        call;                                                         \
    }                                                                 \
    extern "C" void name##_bfloat16(const Args* a) {                  \
        Clock clock(NAME);                                            \
        using T = Brain;                                              \
        call;                                                         \
    }

ENTRY(rms_norm, RMS_NORM, NormArgs, rms_norm<T>(*a))
ENTRY(rotate, ROTATE, RotateArgs, rotate<T>(*a))
ENTRY(activate, ACTIVATE, ActivateArgs, activate<T>(*a))
ENTRY(linear, LINEAR, LinearArgs, linear<T>(*a, scratch))
ENTRY(gate, GATE, GateArgs, gate<T>(*a, scratch))
ENTRY(experts, EXPERTS, ExpertsArgs, Experts<T>(*a).run(scratch))
ENTRY(attend, ATTEND, AttendArgs, attend<T>(*a, scratch))
ENTRY(attend_latent, ATTEND_LATENT, LatentArgs, Latent<T>(*a).run(scratch))
ENTRY(store_latent, STORE_LATENT, StoreLatentArgs, store_latent<T>(*a))

extern "C" void route_float32(const RouteArgs* a) {
    Clock clock(ROUTE);
    route(*a);
}

// A list of calls in order.
struct Record {
    void (*call)(const void*);
    const void* args;
};
extern "C" void replay(const Record* records, int64_t count) {
    for (int64_t i = 0; i < count; i++) records[i].call(records[i].args);
}

extern "C" void use_threads(void* parallel, void* index, void* count, void* barrier) {
    runtime = {(decltype(runtime.parallel))parallel, (decltype(runtime.index))index, (decltype(runtime.count))count,
               (decltype(runtime.barrier))barrier};
}
// Nanoseconds spent so far, in the order of `Name`; returns how many there are.
extern "C" int64_t spent(int64_t* each) {
    for (int i = 0; i < NAMES; i++) each[i] = __atomic_load_n(&nanoseconds[i], __ATOMIC_RELAXED);
    return NAMES;
}
