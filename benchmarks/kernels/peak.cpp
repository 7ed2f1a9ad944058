// Rates of the instructions that linear layers are made of, from registers alone: what no kernel can exceed.
//
//   g++ -O2 -fopenmp benchmarks/kernels/peak.cpp -o peak && ./peak
//
// Needs a processor with AVX-512; vdpbf16ps needs AVX512-BF16 and vpdpbusd AVX512-VNNI.
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#define ONE(OP, A) OP " %%zmm30, %%zmm31, %%zmm" #A "\n"
#define FOUR(OP, A, B, C, D) ONE(OP, A) ONE(OP, B) ONE(OP, C) ONE(OP, D)
// Sixteen sums that do not depend on each other hide the latency.
#define SIXTEEN(OP) FOUR(OP, 0, 1, 2, 3) FOUR(OP, 4, 5, 6, 7) FOUR(OP, 8, 9, 10, 11) FOUR(OP, 12, 13, 14, 15)
#define RATE(OP, OPERATIONS)                                                                                             \
    show(OP, OPERATIONS, [] {                                                                                            \
        asm volatile("vpxord %%zmm30, %%zmm30, %%zmm30\nvpxord %%zmm31, %%zmm31, %%zmm31\n" ::: "memory");               \
        for (long i = 0; i < kTurns; i++) asm volatile(SIXTEEN(OP)::: "memory");                                         \
    })

constexpr long kTurns = 10'000'000;

template <typename Body>
void show(const char* name, double operations, Body body) {
    for (int threads : {1, omp_get_num_procs()}) {
        double best = 1e9;
        for (int repeat = 0; repeat < 5; repeat++) {
            const auto start = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads)
            body();
            best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
        }
        std::printf("%-12s %3d thread(s): %8.1f billion operations a second\n", name, threads,
                    threads * kTurns * 16 * operations / best / 1e9);
    }
}

int main() {
    RATE("vdpbf16ps", 64);
    RATE("vfmadd231ps", 32);
    RATE("vpdpbusd", 128);
}
