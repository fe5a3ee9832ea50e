// Threads: the team of the OpenMP runtime that torch has loaded, entered through pointers given at start.
// No second runtime is linked, so there is one pool of threads, and its idle members never spin against torch's.
#pragma once
#include <cstdint>
#include <cstdlib>

struct Runtime {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*index)() = nullptr;
    int (*count)() = nullptr;
    void (*barrier)() = nullptr;
};
extern Runtime runtime;

struct Member {
    int index, count;
    void wait() const {
        if (count > 1) runtime.barrier();
    }
    // This member's part of [0, n), in multiples of `grain`.
    void share(int64_t n, int64_t grain, int64_t& begin, int64_t& end) const {
        int64_t units = (n + grain - 1) / grain;
        begin = units * index / count * grain;
        end = units * (index + 1) / count * grain;
        if (end > n) end = n;
        if (begin > n) begin = n;
    }
};

template <class Body> void in_team(int64_t threads, const Body& body) {
    if (threads <= 1 || !runtime.parallel) return body(Member{0, 1});
    runtime.parallel([](void* body) { (*(const Body*)body)(Member{runtime.index(), runtime.count()}); }, (void*)&body,
                     (unsigned)threads, 0);
}

// Memory of the calling thread that lives from call to call; it grows, and what is large is not kept.
struct Scratch {
    static constexpr int64_t KEEP = 64 << 20;
    char* memory = nullptr;
    int64_t size = 0, used = 0;
    void reserve(int64_t bytes) {
        used = 0;
        if (bytes <= size) return;
        free(memory);
        size = (bytes + 4095) & ~int64_t(4095);
        memory = (char*)aligned_alloc(64, size);
        if (!memory) abort();
    }
    template <class T> T* take(int64_t count) {
        T* at = (T*)(memory + used);
        used += padded<T>(count);
        return at;
    }
    template <class T> static int64_t padded(int64_t count) { return (count * (int64_t)sizeof(T) + 63) & ~int64_t(63); }
    void release() {
        if (size <= KEEP) return;
        free(memory);
        memory = nullptr;
        size = 0;
    }
    ~Scratch() { free(memory); }
};
