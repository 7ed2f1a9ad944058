// C interface of the 4-bit linear layers and FFNs on panels. What the arrays must be is checked by the caller in Python.

#include "low_bit_panels.h"

#include "call.h"

namespace sirius {
namespace {

// Memory for the rounded tokens of one layer; kPlace keeps two layers apart.
template <int kPlace>
ByteTokens token_memory(const LowBitLayout<4>& layout, int64_t most) {
    struct TokenFloat { float value; };
    struct TokenByte { int8_t value; };
    auto* floats = reinterpret_cast<float*>(workspace<TokenFloat>(most * (2 * layout.lanes + 1)));
    auto* bytes = reinterpret_cast<int8_t*>(workspace<TokenByte>(most * layout.columns()));
    return {bytes, floats, floats + most * layout.lanes, floats + 2 * most * layout.lanes, 0};
}

struct PanelCall {
    const void* inputs;      // [num_tokens, width]
    const void* panels;      // of the layer, or of gate and up by turns
    const void* down;        // FFN only
    const float* bias;       // [num_outputs] or null, linear layer only
    void* output;            // [num_tokens, num_outputs], of an FFN [num_tokens, width]
    int64_t num_tokens;
    int64_t width;
    int64_t num_outputs;     // neurons of an FFN
    Activation activation;
    int num_threads;

    int64_t num_panels() const { return (num_outputs + kPanelOutputs - 1) / kPanelOutputs; }
};

template <typename Output>
void put(const float* values, const float* bias, Output* output, int64_t start, int64_t num_outputs) {
    const int64_t count = std::min<int64_t>(kPanelOutputs, num_outputs - start);
    for (int64_t i = 0; i < count; i++) {
        output[start + i] = from_float<Output>(bias == nullptr ? values[i] : values[i] + bias[start + i]);
    }
}

template <typename Input>
void run_linear(const PanelCall& call) {
    const LowBitLayout<4> layout(call.width);
    const int64_t most = std::min<int64_t>(call.num_tokens, kMaxTokens);
    LowBitPanels panels{static_cast<const uint8_t*>(call.panels), call.num_panels(), layout, token_memory<0>(layout, most)};
    for (int64_t first = 0; first < call.num_tokens; first += kMaxTokens) {
        panels.tokens.count = int(std::min<int64_t>(kMaxTokens, call.num_tokens - first));
        const auto* inputs = static_cast<const Input*>(call.inputs) + first * call.width;
        auto* output = static_cast<Input*>(call.output) + first * call.num_outputs;
        auto body = [&](Member member) {
            panels.round_tokens(inputs, call.width, member);
            member.wait();
            panels.run(member.begin(panels.num_panels, 1), member.end(panels.num_panels, 1),
                       [&](int64_t panel, int token, const float* values) {
                           put(values, call.bias, output + token * call.num_outputs, panel * kPanelOutputs, call.num_outputs);
                       });
        };
        run_team(call.num_threads, body);
    }
}

// Gate and up of the same 16 neurons are neighbouring panels, and of one member, which multiplies them at once.
template <typename Input>
void run_ffn_pass(const PanelCall& call, const LowBitPanels& gate_up, const LowBitPanels& down, float* sums, float* hidden,
                  int64_t first) {
    const int64_t padded = call.num_panels() * kPanelOutputs;
    const auto* inputs = static_cast<const Input*>(call.inputs) + first * call.width;
    auto* output = static_cast<Input*>(call.output) + first * call.width;
    auto body = [&](Member member) {
        gate_up.round_tokens(inputs, call.width, member);
        member.wait();
        const int64_t begin = member.begin(gate_up.num_panels, 2), end = member.end(gate_up.num_panels, 2);
        gate_up.run(begin, end, [&](int64_t panel, int token, const float* values) {
            float* to = sums + (token * 2 + panel % 2) * padded + panel / 2 * kPanelOutputs;
            std::copy_n(values, kPanelOutputs, to);
        });
        const int64_t start = begin / 2 * kPanelOutputs, count = (end - begin) / 2 * kPanelOutputs;
        for (int t = 0; t < gate_up.tokens.count; t++) {
            float* gate = sums + 2 * t * padded + start;
            activate(call.activation, gate, count);
            for (int64_t i = 0; i < count; i++) hidden[t * padded + start + i] = gate[i] * gate[padded + i];
        }
        member.wait();
        down.round_tokens(hidden, padded, member);
        member.wait();
        down.run(member.begin(down.num_panels, 1), member.end(down.num_panels, 1),
                 [&](int64_t panel, int token, const float* values) {
                     put(values, nullptr, output + token * call.width, panel * kPanelOutputs, call.width);
                 });
    };
    run_team(call.num_threads, body);
}

template <typename Input>
void run_whole_ffn(const PanelCall& call) {
    const LowBitLayout<4> outer(call.width), inner(call.num_outputs);
    const int64_t most = std::min<int64_t>(call.num_tokens, kMaxTokens);
    const int64_t padded = call.num_panels() * kPanelOutputs;
    LowBitPanels gate_up{static_cast<const uint8_t*>(call.panels), 2 * call.num_panels(), outer, token_memory<0>(outer, most)};
    LowBitPanels down{static_cast<const uint8_t*>(call.down), (call.width + kPanelOutputs - 1) / kPanelOutputs, inner,
                      token_memory<1>(inner, most)};
    struct Sum { float value; };
    auto* sums = reinterpret_cast<float*>(workspace<Sum>(3 * most * padded));
    for (int64_t first = 0; first < call.num_tokens; first += kMaxTokens) {
        gate_up.tokens.count = down.tokens.count = int(std::min<int64_t>(kMaxTokens, call.num_tokens - first));
        run_ffn_pass<Input>(call, gate_up, down, sums, sums + 2 * most * padded, first);
    }
}

template <typename Input>
void run_call(const PanelCall& call) {
    call.down == nullptr ? run_linear<Input>(call) : run_whole_ffn<Input>(call);
}

void run_any(const PanelCall& call, int dtype) {
    switch (dtype) {
        case kFloat32: return run_call<float>(call);
        case kBFloat16: return run_call<BFloat16>(call);
        case kFloat16: return run_call<Half>(call);
    }
}

}  // namespace
}  // namespace sirius

extern "C" {

// `bias` may be null.
void sirius_low_bit_panel_linear(const void* inputs, const void* panels, const float* bias, void* output, int64_t num_tokens,
                                 int64_t width, int64_t num_outputs, int dtype, int num_threads) {
    sirius::run_any({inputs, panels, nullptr, bias, output, num_tokens, width, num_outputs, sirius::Activation::kSilu,
                     num_threads},
                    dtype);
}

void sirius_low_bit_panel_ffn(const void* inputs, const void* gate_up, const void* down, void* output, int64_t num_tokens,
                              int64_t width, int64_t num_neurons, int dtype, int activation, int num_threads) {
    sirius::run_any({inputs, gate_up, down, nullptr, output, num_tokens, width, num_neurons, sirius::Activation(activation),
                     num_threads},
                    dtype);
}

}  // extern "C"
