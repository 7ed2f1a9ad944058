// C interface of the reduced FFNs. Arrays are dense and row-major; what they must be is checked by the caller in Python.

#include <memory>
#include <vector>

#include "pass.h"

namespace sirius {
namespace {

// Grows to the largest size the calling thread has needed and is kept, so that steady calls allocate nothing.
template <typename T>
T* workspace(int64_t count) {
    static thread_local std::vector<T> storage;
    constexpr int64_t kSlack = 64 / sizeof(T) + 1;
    if (int64_t(storage.size()) < count + kSlack) storage.resize(count + kSlack);
    void* start = storage.data();
    size_t space = storage.size() * sizeof(T);
    return static_cast<T*>(std::align(64, count * sizeof(T), start, space));
}

template <typename Weight>
void fill_tokens(const Weight* inputs, int count, int64_t width, int64_t stride,
                 typename Packing<Weight>::Stored* values) {
    for (int t = 0; t < count; t++) {
        auto* to = values + t * stride;
        for (int64_t c = 0; c < width; c++) to[c] = Packing<Weight>::stored(to_float(inputs[t * width + c]));
        std::fill(to + width, to + stride, typename Packing<Weight>::Stored{});
    }
}

struct Call {
    const void* inputs;
    const void* rows;
    const int32_t* indices;  // null for fine
    void* output;
    int64_t num_tokens;
    int64_t width;
    int64_t num_neurons;
    int64_t num_kept;
    Activation activation;
    int num_threads;
};

template <typename Weight>
void run(const Call& call) {
    using Stored = typename Packing<Weight>::Stored;
    const int64_t stride = Layout<Weight>::stride(call.width);
    const int64_t largest = std::min<int64_t>(call.num_tokens, kMaxTokens);
    const bool fine = call.indices == nullptr;
    Stored* values = workspace<Stored>(largest * stride + 16);
    Pass<Weight> pass{};
    pass.rows = static_cast<const Weight*>(call.rows);
    pass.indices = call.indices;
    pass.width = call.width;
    pass.num_neurons = call.num_neurons;
    pass.num_kept = call.num_kept;
    pass.activation = call.activation;
    // One array for partial outputs and gates: `Stored` may be float too, so the two must not share a workspace.
    struct Partial { float value; };
    pass.partial = reinterpret_cast<float*>(
        workspace<Partial>(largest * (call.num_threads * stride + (fine ? call.num_neurons : 0))));
    pass.gates = pass.partial + largest * call.num_threads * stride;
    if (fine) {
        pass.marked = workspace<uint8_t>(call.num_neurons);
        pass.united = workspace<int32_t>(call.num_neurons);
        pass.cuts = workspace<Cut>(largest);
    }
    for (int64_t first = 0; first < call.num_tokens; first += kMaxTokens) {
        const int count = int(std::min<int64_t>(kMaxTokens, call.num_tokens - first));
        fill_tokens(static_cast<const Weight*>(call.inputs) + first * call.width, count, call.width, stride, values);
        pass.tokens = {values, stride, count};
        pass.output = static_cast<Weight*>(call.output) + first * call.width;
        auto body = [&](Member member) { fine ? pass.fine(member) : pass.coarse(member); };
        run_team(call.num_threads, body);
    }
}

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

void run_any(const Call& call, int dtype) {
    switch (dtype) {
        case kFloat32: return run<float>(call);
        case kBFloat16: return run<BFloat16>(call);
        case kFloat16: return run<Half>(call);
    }
}

}  // namespace
}  // namespace sirius

extern "C" {

// Entry points of the OpenMP runtime that PyTorch uses, see threads.h.
void sirius_use_openmp(void* parallel, void* barrier, void* thread_num, void* num_threads) {
    using sirius::openmp;
    openmp.parallel = reinterpret_cast<decltype(openmp.parallel)>(parallel);
    openmp.barrier = reinterpret_cast<decltype(openmp.barrier)>(barrier);
    openmp.thread_num = reinterpret_cast<decltype(openmp.thread_num)>(thread_num);
    openmp.num_threads = reinterpret_cast<decltype(openmp.num_threads)>(num_threads);
}

const char* sirius_instruction_set() {
#if defined(SIRIUS_AVX512_BF16)
    return "avx512_bf16";
#elif defined(SIRIUS_AVX512)
    return "avx512";
#elif defined(SIRIUS_AVX2)
    return "avx2";
#else
    return "scalar";
#endif
}

// Returns 0, or 1 if an index lies outside [0, num_neurons).
int sirius_coarse_ffn(const void* inputs, const void* rows, const int32_t* indices, void* output, int64_t num_tokens,
                      int64_t width, int64_t num_neurons, int64_t num_kept, int dtype, int activation,
                      int num_threads) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < num_kept; i++) largest = std::max(largest, uint32_t(indices[i]));
    if (num_kept > 0 && int64_t(largest) >= num_neurons) return 1;
    sirius::run_any({inputs, rows, indices, output, num_tokens, width, num_neurons, num_kept,
                     sirius::Activation(activation), num_threads},
                    dtype);
    return 0;
}

// num_kept must lie in [1, num_neurons].
void sirius_fine_ffn(const void* inputs, const void* rows, void* output, int64_t num_tokens, int64_t width,
                     int64_t num_neurons, int64_t num_kept, int dtype, int activation, int num_threads) {
    sirius::run_any({inputs, rows, nullptr, output, num_tokens, width, num_neurons, num_kept,
                     sirius::Activation(activation), num_threads},
                    dtype);
}

}  // extern "C"
