// Parallel regions on the OpenMP runtime that PyTorch uses already.
//
// The library is not linked with any OpenMP runtime: a second one would bring its own threads, which fight with PyTorch's
// for the same cores and know nothing of how vLLM bound them. The loader hands in the entry points of the runtime in use.
#pragma once

#include <cstdint>

namespace sirius {

struct OpenMP {
    void (*parallel)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);  // GOMP_parallel
    void (*barrier)();                                                                        // GOMP_barrier
    int (*thread_num)();
    int (*num_threads)();
};
inline OpenMP openmp{};

struct Member {
    int index;
    int count;
    void wait() const {
        if (count > 1) openmp.barrier();
    }
    // This thread's share of [0, total), in whole units.
    int64_t begin(int64_t total, int64_t unit) const { return share(total, unit, index); }
    int64_t end(int64_t total, int64_t unit) const { return share(total, unit, index + 1); }

   private:
    int64_t share(int64_t total, int64_t unit, int64_t position) const {
        const int64_t units = (total + unit - 1) / unit;
        const int64_t start = units * position / count * unit;
        return start < total ? start : total;
    }
};

// Runs body(Member) on every member of a team of at most num_threads threads, the calling one included.
template <typename Body>
void run_team(int num_threads, Body& body) {
    if (num_threads <= 1 || openmp.parallel == nullptr) {
        body(Member{0, 1});
        return;
    }
    openmp.parallel(
        [](void* data) { (*static_cast<Body*>(data))(Member{openmp.thread_num(), openmp.num_threads()}); }, &body,
        unsigned(num_threads), 0u);
}

}  // namespace sirius
