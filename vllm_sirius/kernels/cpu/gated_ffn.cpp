// C interface of the reduced FFNs. Arrays are dense and row-major; what they must be is checked by the caller in Python.

#include "call.h"
#include "plain_rows.h"

namespace sirius {
namespace {

template <typename Weight>
void fill_tokens(const Weight* inputs, int count, int64_t width, int64_t stride,
                 typename Packing<Weight>::Stored* values) {
    using Pack = Packing<Weight>;
    for (int t = 0; t < count; t++) {
        auto* to = values + t * stride;
        if (width < stride) std::fill_n(to, stride, typename Packing<Weight>::Stored{});
        for (int64_t start = 0; start < width; start += Pack::kColumns) {
            const int columns = int(std::min<int64_t>(Pack::kColumns, width - start));
            for (int c = 0; c < columns; c++) {
                to[start + Pack::place(c)] = Pack::stored(to_float(inputs[t * width + start + c]));
            }
        }
    }
}

template <typename Weight>
void run(const Call& call) {
    const int64_t stride = Layout<Weight>::stride(call.width);
    const int64_t largest = std::min<int64_t>(call.num_tokens, kMaxTokens);
    auto* values = workspace<typename Packing<Weight>::Stored>(largest * stride + 16);
    run_ffn<Weight>(call, stride, [&](int64_t first, int count) {
        fill_tokens(static_cast<const Weight*>(call.inputs) + first * call.width, count, call.width, stride, values);
        return PlainRows<Weight>{static_cast<const Weight*>(call.rows), call.width, {values, stride, count}};
    });
}

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
#elif defined(SIRIUS_AVX512_VNNI)
    return "avx512_vnni";
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
    if (!sirius::indices_fit(indices, num_kept, num_neurons)) return 1;
    sirius::run_any({inputs, rows, nullptr, indices, output, num_tokens, width, num_neurons, num_kept, false,
                     sirius::Activation(activation), num_threads},
                    dtype);
    return 0;
}

// Rows with the gates first. num_kept must lie in [1, num_neurons].
void sirius_fine_ffn(const void* inputs, const void* rows, void* output, int64_t num_tokens, int64_t width,
                     int64_t num_neurons, int64_t num_kept, int dtype, int activation, int num_threads) {
    sirius::run_any({inputs, rows, nullptr, nullptr, output, num_tokens, width, num_neurons, num_kept, true,
                     sirius::Activation(activation), num_threads},
                    dtype);
}

}  // extern "C"
