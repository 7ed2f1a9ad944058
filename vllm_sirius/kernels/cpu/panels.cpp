// C interface of the dense linear layers on panels. What the arrays must be is checked by the caller in Python.

#include "panels.h"

#include "workspace.h"

#if defined(SIRIUS_AVX512)
namespace {

template <sirius::Products kProducts>
void run_block(const sirius::PanelLayer& layer, int64_t num_tokens, int num_threads) {
    const sirius::PanelPasses<kProducts> passes{layer, num_tokens};
    auto body = [&](sirius::Member member) { sirius::run_passes<kProducts>(passes, member); };
    sirius::run_team(num_threads, body);
}

}  // namespace
#endif

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
    struct Prepared { float value; };
    const bool by_pairs = kHasPairs && Products(products) == Products::kPairs;
    PanelLayer layer{nullptr, static_cast<const BFloat16*>(panels), bias, nullptr, nullptr, width, num_outputs};
    const int64_t most = std::min(num_tokens, kBlockTokens);
    layer.prepared = reinterpret_cast<float*>(workspace<Prepared>(2 * layer.pairs() * most));
    for (int64_t first = 0; first < num_tokens; first += kBlockTokens) {
        layer.inputs = static_cast<const BFloat16*>(inputs) + first * width;
        layer.output = static_cast<BFloat16*>(output) + first * num_outputs;
        const int64_t count = std::min(kBlockTokens, num_tokens - first);
        by_pairs ? run_block<Products::kPairs>(layer, count, num_threads)
                 : run_block<Products::kFloats>(layer, count, num_threads);
    }
#endif
}

}  // extern "C"
