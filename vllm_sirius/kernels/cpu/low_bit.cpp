// C interface of the FFNs and linear layers on low-bit rows. What the arrays must be is checked by the caller in Python.

#include "call.h"
#include "linear.h"
#include "low_bit_rows.h"

namespace sirius {
namespace {

// Memory of one pass over low-bit rows: the tokens as bytes and the scratch of every thread.
template <int kBits>
LowBitRows<kBits> low_bit_rows(const void* packed, const void* scales, int64_t width, int64_t num_tokens,
                               int num_threads) {
    const LowBitLayout<kBits> layout(width);
    struct TokenFloat { float value; };
    auto* floats = reinterpret_cast<float*>(workspace<TokenFloat>(num_tokens * (2 * layout.lanes + 1)));
    struct Scratch { float value; };
    auto* scratch = workspace<Scratch>(num_threads * LowBitRows<kBits>::scratch_floats(layout, num_tokens));
    const ByteTokens tokens{workspace<int8_t>(num_tokens * layout.columns()), floats, floats + num_tokens * layout.lanes,
                            floats + 2 * num_tokens * layout.lanes, 0};
    return {static_cast<const uint8_t*>(packed), static_cast<const typename Code<kBits>::Scale*>(scales), layout, tokens,
            reinterpret_cast<float*>(scratch)};
}

template <int kBits, typename Input>
void run_rows(const Call& call) {
    const int64_t largest = std::min<int64_t>(call.num_tokens, kMaxTokens);
    auto rows = low_bit_rows<kBits>(call.rows, call.scales, call.width, largest, call.num_threads);
    run_ffn<Input>(call, rows.stride(), [&](int64_t first, int count) {
        rows.tokens.count = count;
        quantise_tokens(static_cast<const Input*>(call.inputs) + first * call.width, rows.layout, rows.tokens);
        return rows;
    });
}

struct LinearCall {
    const void* inputs;   // [num_tokens, width]
    const void* rows;     // [num_rows, width], low-bit
    const void* scales;
    const float* bias;    // [num_rows] or null
    void* output;         // [num_tokens, num_rows]
    int64_t num_tokens;
    int64_t width;
    int64_t num_rows;
    int num_threads;
};

template <int kBits, typename Input>
void run_rows(const LinearCall& call) {
    const int64_t largest = std::min<int64_t>(call.num_tokens, kMaxTokens);
    auto rows = low_bit_rows<kBits>(call.rows, call.scales, call.width, largest, call.num_threads);
    for (int64_t first = 0; first < call.num_tokens; first += kMaxTokens) {
        rows.tokens.count = int(std::min<int64_t>(kMaxTokens, call.num_tokens - first));
        quantise_tokens(static_cast<const Input*>(call.inputs) + first * call.width, rows.layout, rows.tokens);
        Linear<LowBitRows<kBits>, Input> linear{rows, call.bias, static_cast<Input*>(call.output) + first * call.num_rows,
                                                call.num_rows};
        auto body = [&](Member member) { linear.run(member); };
        run_team(call.num_threads, body);
    }
}

template <int kBits, typename Any>
void run_bits(const Any& call, int dtype) {
    switch (dtype) {
        case kFloat32: return run_rows<kBits, float>(call);
        case kBFloat16: return run_rows<kBits, BFloat16>(call);
        case kFloat16: return run_rows<kBits, Half>(call);
    }
}

template <typename Any>
void run_any(const Any& call, int bits, int dtype) {
    bits == 8 ? run_bits<8>(call, dtype) : run_bits<4>(call, dtype);
}

}  // namespace
}  // namespace sirius

extern "C" {

// `indices` may be null for all of num_kept = num_neurons. Returns 0, or 1 if an index lies outside [0, num_neurons).
int sirius_low_bit_coarse_ffn(const void* inputs, const void* rows, const void* scales, const int32_t* indices,
                              void* output, int64_t num_tokens, int64_t width, int64_t num_neurons, int64_t num_kept,
                              int bits, int dtype, int activation, int num_threads) {
    if (indices != nullptr && !sirius::indices_fit(indices, num_kept, num_neurons)) return 1;
    const sirius::Call call{inputs, rows, scales, indices, output, num_tokens, width, num_neurons, num_kept, false,
                            sirius::Activation(activation), num_threads};
    sirius::run_any(call, bits, dtype);
    return 0;
}

// Rows with the gates first. num_kept must lie in [1, num_neurons].
void sirius_low_bit_fine_ffn(const void* inputs, const void* rows, const void* scales, void* output, int64_t num_tokens,
                             int64_t width, int64_t num_neurons, int64_t num_kept, int bits, int dtype, int activation,
                             int num_threads) {
    const sirius::Call call{inputs, rows, scales, nullptr, output, num_tokens, width, num_neurons, num_kept, true,
                            sirius::Activation(activation), num_threads};
    sirius::run_any(call, bits, dtype);
}

// `bias` may be null.
void sirius_low_bit_linear(const void* inputs, const void* rows, const void* scales, const float* bias, void* output,
                           int64_t num_tokens, int64_t width, int64_t num_rows, int bits, int dtype, int num_threads) {
    const sirius::LinearCall call{inputs, rows, scales, bias, output, num_tokens, width, num_rows, num_threads};
    sirius::run_any(call, bits, dtype);
}

}  // extern "C"
