// C interface of the dense linear layers on panels. What the arrays must be is checked by the caller in Python.

#include "panels.h"

#include "workspace.h"

extern "C" {

// How many ways to multiply this machine has, see Products: 0 where it has no kernel.
int sirius_panel_products() {
#if defined(SIRIUS_AVX512)
    return sirius::kHasPairs ? 2 : 1;
#else
    return 0;
#endif
}

// `bias` may be null. Does nothing where there is no kernel.
void sirius_panel_linear(const void* inputs, const void* panels, const float* bias, void* output, int64_t num_tokens,
                         int64_t width, int64_t num_outputs, int products, int num_threads) {
#if defined(SIRIUS_AVX512)
    using namespace sirius;
    PanelLayer layer{static_cast<const BFloat16*>(inputs), static_cast<const BFloat16*>(panels), bias,
                     static_cast<BFloat16*>(output), nullptr, width, num_outputs};
    struct Prepared { float value; };
    layer.prepared = reinterpret_cast<float*>(workspace<Prepared>(2 * layer.pairs() * kPanelTokens));
    const bool by_pairs = kHasPairs && Products(products) == Products::kPairs;
    const int64_t passes = (num_tokens + kPanelTokens - 1) / kPanelTokens;
    for (int64_t pass = 0; pass < passes; pass++) {
        // Passes of about the same size: one of a single token would cost almost as much as one of several.
        const int64_t first = num_tokens * pass / passes;
        const int tokens = int(num_tokens * (pass + 1) / passes - first);
        layer.inputs = static_cast<const BFloat16*>(inputs) + first * width;
        layer.output = static_cast<BFloat16*>(output) + first * num_outputs;
        auto body = [&](Member member) {
            by_pairs ? run_layer<Products::kPairs>(layer, tokens, member)
                     : run_layer<Products::kFloats>(layer, tokens, member);
        };
        run_team(num_threads, body);
    }
#endif
}

}  // extern "C"
