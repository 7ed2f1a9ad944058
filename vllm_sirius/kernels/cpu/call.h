// What the C interface passes on, and how the passes of one call are run.
#pragma once

#include "pass.h"
#include "threads.h"
#include "workspace.h"

namespace sirius {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Call {
    const void* inputs;      // [num_tokens, width]
    const void* rows;        // as the kind of rows has them
    const void* scales;      // low-bit rows only
    const int32_t* indices;  // [num_kept]; null for neurons 0 ... num_kept - 1
    void* output;            // [num_tokens, width]
    int64_t num_tokens;
    int64_t width;
    int64_t num_neurons;
    int64_t num_kept;
    bool fine;
    Activation activation;
    int num_threads;
};

// Every index lies in [0, num_neurons).
inline bool indices_fit(const int32_t* indices, int64_t num_kept, int64_t num_neurons) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < num_kept; i++) largest = std::max(largest, uint32_t(indices[i]));
    return num_kept == 0 || int64_t(largest) < num_neurons;
}

// Runs an FFN, kMaxTokens tokens at a time. `fill(first, count)` returns the rows with these tokens.
template <typename Output, typename Fill>
void run_ffn(const Call& call, int64_t stride, const Fill& fill) {
    const int64_t largest = std::min<int64_t>(call.num_tokens, kMaxTokens);
    Pass<decltype(fill(0, 1)), Output> pass{};
    pass.layout = call.fine ? NeuronLayout::gates_first(call.num_neurons) : NeuronLayout::by_neuron();
    pass.indices = call.indices;
    pass.num_neurons = call.num_neurons;
    pass.num_kept = call.num_kept;
    pass.activation = call.activation;
    struct Partial { float value; };  // partial outputs and gates, apart from other floats
    pass.partial = reinterpret_cast<float*>(
        workspace<Partial>(largest * (call.num_threads * stride + (call.fine ? call.num_neurons : 0))));
    pass.gates = pass.partial + largest * call.num_threads * stride;
    if (call.fine) {
        pass.marked = workspace<uint8_t>(call.num_neurons);
        pass.united = workspace<int32_t>(call.num_neurons);
        pass.cuts = workspace<Cut>(largest);
    }
    for (int64_t first = 0; first < call.num_tokens; first += kMaxTokens) {
        pass.rows = fill(first, int(std::min<int64_t>(kMaxTokens, call.num_tokens - first)));
        pass.output = static_cast<Output*>(call.output) + first * call.width;
        auto body = [&](Member member) { call.fine ? pass.fine(member) : pass.coarse(member); };
        run_team(call.num_threads, body);
    }
}

}  // namespace sirius
