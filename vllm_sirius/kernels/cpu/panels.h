// Dense linear layers on the target's own bf16 weights, for the few tokens of a decoding step or a verification pass.
//
// Sums are fp32. There are two ways to multiply, because processors differ: dot products of bf16 pairs need one instruction
// where fp32 needs two and one to widen the weights, but many processors take several cycles for it (measured: half of fp32's
// rate on Emerald Rapids, twice on Zen 5). The caller says which way.
//
// Panels hold 16 outputs: [pairs of inputs][16 outputs][2 inputs], so that one vector has a pair of inputs of 16 outputs. An
// output is summed in the order of its inputs whatever the number of tokens: a token's result does not depend on which
// tokens it shares a pass with.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"
#include "threads.h"

#if defined(SIRIUS_AVX512)

namespace sirius {

enum class Products { kFloats = 0, kPairs = 1 };

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

constexpr int kPanel = 16;            // outputs of a panel
constexpr int kPanelTokens = 16;      // most tokens of a pass that is alone: one register each, and some to spare
constexpr int64_t kBlockTokens = 128;        // tokens whose passes share the weights in the cache
constexpr int64_t kChunkBytes = 256 * 1024;  // of weights that stay in the second-level cache, inputs beside them
// Tokens for which the registers hold the sums of two panels.
constexpr int tokens_for_two(Products products) { return products == Products::kPairs ? 14 : 11; }
// Tokens of a pass that finds its weights in the cache. Pairs are then bound by loading the inputs, which two panels share;
// floats by their arithmetic.
constexpr int tokens_from_cache(Products products) {
    return products == Products::kPairs ? tokens_for_two(products) : kPanelTokens;
}
// Panels in work together: enough sums to hide the latency of an addition, as far as there are registers.
constexpr int panels_together(Products products, int tokens) {
    return tokens == 1 ? 8 : tokens <= 5 ? 4 : tokens <= 8 ? 3 : tokens <= tokens_for_two(products) ? 2 : 1;
}
// Cache lines of a panel between the weights in work and those prefetched: fewer panels are read further ahead, so that as
// many lines are under way.
constexpr int64_t lines_ahead(int panels) { return std::min(320 / panels, 128); }

struct PanelLayer {
    const BFloat16* inputs;  // [tokens, width]
    const BFloat16* panels;  // [ceil(num_outputs / 16), pairs, 16, 2]
    const float* bias;       // [num_outputs] or null
    BFloat16* output;        // [tokens, num_outputs]
    float* prepared;         // [2 * pairs, tokens] widened inputs, or [pairs, tokens] pairs of inputs
    int64_t width;
    int64_t num_outputs;

    int64_t pairs() const { return (width + 1) / 2; }
    int64_t num_panels() const { return (num_outputs + kPanel - 1) / kPanel; }
};

// Adds the products of one line of weights, a pair of inputs of 16 outputs, in every panel.
template <Products kProducts, int kTokens, int kPanels>
inline void add_lines(__m512 (&sums)[kPanels][kTokens], const __m512i (&line)[kPanels], const float* inputs, int64_t pair) {
    if constexpr (kProducts == Products::kFloats) {
        const __m512i high = _mm512_set1_epi32(int(0xffff0000u));
        const float* first = inputs + 2 * pair * kTokens;
        const float* second = first + kTokens;
        for (int p = 0; p < kPanels; p++) {
            const __m512 weight = _mm512_castsi512_ps(_mm512_slli_epi32(line[p], 16));
            for (int t = 0; t < kTokens; t++) {
                sums[p][t] = _mm512_fmadd_ps(weight, _mm512_set1_ps(first[t]), sums[p][t]);
            }
        }
        for (int p = 0; p < kPanels; p++) {
            const __m512 weight = _mm512_castsi512_ps(_mm512_and_si512(line[p], high));
            for (int t = 0; t < kTokens; t++) {
                sums[p][t] = _mm512_fmadd_ps(weight, _mm512_set1_ps(second[t]), sums[p][t]);
            }
        }
    } else {
#if defined(__AVX512BF16__)
        for (int t = 0; t < kTokens; t++) {
            const __m512i both = _mm512_castps_si512(_mm512_set1_ps(inputs[pair * kTokens + t]));
            for (int p = 0; p < kPanels; p++) {
                sums[p][t] = _mm512_dpbf16_ps(sums[p][t], __m512bh(line[p]), __m512bh(both));
            }
        }
#endif
    }
}

// Adds the products of pairs [from, to); `ahead` is the distance of the prefetched weights in elements.
template <Products kProducts, int kTokens, int kPanels>
inline void add_pairs(__m512 (&sums)[kPanels][kTokens], const BFloat16* weights, const float* inputs, int64_t pairs,
                      int64_t from, int64_t to, int64_t ahead) {
    for (int64_t pair = from; pair < to; pair++) {
        __m512i line[kPanels];
        for (int p = 0; p < kPanels; p++) {
            const BFloat16* source = weights + (p * pairs + pair) * 2 * kPanel;
            _mm_prefetch(reinterpret_cast<const char*>(source + ahead), _MM_HINT_T0);
            line[p] = _mm512_loadu_si512(source);
        }
        add_lines<kProducts>(sums, line, inputs, pair);
    }
}

template <Products kProducts, int kTokens, int kPanels>
void run_panels(const PanelLayer& layer, int64_t panel) {
    const int64_t pairs = layer.pairs();
    const BFloat16* weights = layer.panels + panel * pairs * 2 * kPanel;
    __m512 sums[kPanels][kTokens];
    for (auto& row : sums) {
        for (auto& sum : row) sum = _mm512_setzero_ps();
    }
    // The last lines of a panel prefetch the first ones of the panel that is next in the same place.
    const int64_t cut = std::max<int64_t>(0, pairs - lines_ahead(kPanels));
    const int64_t ahead = lines_ahead(kPanels) * 2 * kPanel;
    add_pairs<kProducts>(sums, weights, layer.prepared, pairs, 0, cut, ahead);
    add_pairs<kProducts>(sums, weights, layer.prepared, pairs, cut, pairs, ahead + (kPanels - 1) * pairs * 2 * kPanel);
    for (int p = 0; p < kPanels; p++) {
        const int64_t start = (panel + p) * kPanel;
        const int count = int(std::min<int64_t>(kPanel, layer.num_outputs - start));
        for (int t = 0; t < kTokens; t++) {
            float values[kPanel];
            _mm512_storeu_ps(values, sums[p][t]);
            BFloat16* output = layer.output + t * layer.num_outputs + start;
            for (int i = 0; i < count; i++) {
                output[i] = from_float<BFloat16>(layer.bias == nullptr ? values[i] : values[i] + layer.bias[start + i]);
            }
        }
    }
}

// Writes this member's part of the inputs in the order in which they are read.
template <Products kProducts>
void prepare(const PanelLayer& layer, int tokens, Member member) {
    const int64_t padded = 2 * layer.pairs();
    const auto input = [&](int64_t i, int t) {
        return i < layer.width ? layer.inputs[t * layer.width + i] : BFloat16{0};
    };
    for (int64_t i = member.begin(padded, kPanel); i < member.end(padded, kPanel); i += 2) {
        for (int t = 0; t < tokens; t++) {
            const BFloat16 first = input(i, t), second = input(i + 1, t);
            if (kProducts == Products::kPairs) {
                layer.prepared[i / 2 * tokens + t] = as_float(uint32_t(second.bits) << 16 | first.bits);
            } else {
                layer.prepared[i * tokens + t] = to_float(first);
                layer.prepared[(i + 1) * tokens + t] = to_float(second);
            }
        }
    }
}

// Panels [panel, end) for kTokens tokens.
template <Products kProducts, int kTokens>
void run_range(const PanelLayer& layer, int64_t panel, int64_t end) {
    constexpr int kPanels = panels_together(kProducts, kTokens);
    for (; panel + kPanels <= end; panel += kPanels) run_panels<kProducts, kTokens, kPanels>(layer, panel);
    for (; panel < end; panel++) run_panels<kProducts, kTokens, 1>(layer, panel);
}

template <Products kProducts, int kTokens = kPanelTokens>
void run_range(const PanelLayer& layer, int tokens, int64_t panel, int64_t end) {
    if constexpr (kTokens > 0) {
        tokens == kTokens ? run_range<kProducts, kTokens>(layer, panel, end)
                          : run_range<kProducts, kTokens - 1>(layer, tokens, panel, end);
    }
}

// Tokens in passes of about the same size: one of a single token would cost almost as much as one of several. A pass that is
// alone reads its weights from memory, which bounds it; the others find them in the cache.
template <Products kProducts>
struct PanelPasses {
    PanelLayer layer;  // of all tokens; `prepared` has room for them
    int64_t num_tokens;

    int64_t count() const {
        constexpr int kMost = tokens_from_cache(kProducts);
        return num_tokens <= kPanelTokens ? 1 : (num_tokens + kMost - 1) / kMost;
    }
    int64_t first(int64_t pass) const { return num_tokens * pass / count(); }
    int tokens(int64_t pass) const { return int(first(pass + 1) - first(pass)); }
    PanelLayer of(int64_t pass) const {
        PanelLayer part = layer;
        part.inputs += first(pass) * layer.width;
        part.output += first(pass) * layer.num_outputs;
        part.prepared += first(pass) * 2 * layer.pairs();
        return part;
    }
    // Panels that all passes go through before the next ones are read: few enough to stay in the second-level cache, by twos.
    int64_t panels_of_chunk() const {
        const int64_t bytes = layer.pairs() * 2 * kPanel * int64_t(sizeof(BFloat16));
        return count() == 1 ? layer.num_panels() : 2 * std::max<int64_t>(1, kChunkBytes / bytes / 2);
    }
};

// One member's part.
template <Products kProducts>
void run_passes(const PanelPasses<kProducts>& passes, Member member) {
    for (int64_t pass = 0; pass < passes.count(); pass++) prepare<kProducts>(passes.of(pass), passes.tokens(pass), member);
    member.wait();
    const int64_t end = member.end(passes.layer.num_panels(), 1), step = passes.panels_of_chunk();
    for (int64_t start = member.begin(passes.layer.num_panels(), 1); start < end; start += step) {
        for (int64_t pass = 0; pass < passes.count(); pass++) {
            run_range<kProducts>(passes.of(pass), passes.tokens(pass), start, std::min(start + step, end));
        }
    }
}

}  // namespace sirius

#endif
