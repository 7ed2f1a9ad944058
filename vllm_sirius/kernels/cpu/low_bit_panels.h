// 4-bit linear layers on panels of 16 outputs, for drafts that read every row: weights lie in the order in which they are read.
//
// A panel is a sequence of blocks of 128 inputs, each 17 lines of 64 bytes. Line i < 16 has the inputs 4i ... 4i+3 of the 16
// outputs in its low halves and the inputs 64+4i ... 64+4i+3 in its high halves, as the value + 8; line 16 has the bf16 scales
// of the outputs for the two spans of 64 inputs. Inputs are rounded as for rows (low_bit_rows.h), so that both compute the
// same. One vector holds a sum of 16 outputs: nothing is added across lanes, and a token does not depend on its company.
#pragma once

#include "activation.h"
#include "low_bit_rows.h"
#include "threads.h"

namespace sirius {

constexpr int kPanelOutputs = 16;
constexpr int kWeightLines = 16;
constexpr int kBlockBytes = (kWeightLines + 1) * kLineBytes;
constexpr int kSlices = kPanelOutputs / kLanes;  // vectors of 16 outputs
constexpr int kMostTogether = 8;                 // tokens that share the loads of a block
constexpr int64_t kBlocksAhead = 3;              // blocks between the weights in work and those prefetched

// Scales of one span: the even or odd ones of a line of bf16 pairs.
inline Vec scales_of_span(const uint8_t* line, int slice, int span) {
    const uint8_t* at = line + slice * kLanes * 4;
#if defined(SIRIUS_AVX512)
    const __m512i pairs = _mm512_loadu_si512(at);
    return {_mm512_castsi512_ps(span == 0 ? _mm512_slli_epi32(pairs, 16)
                                          : _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))))};
#else
    float lanes[kLanes];
    for (int i = 0; i < kLanes; i++) {
        uint32_t pair;
        std::memcpy(&pair, at + 4 * i, 4);
        lanes[i] = as_float(span == 0 ? pair << 16 : pair & 0xffff0000u);
    }
    return load(lanes);
#endif
}

// Panels in work together: enough sums to hide the latency of a dot product, as far as there are registers.
constexpr int low_bit_panels_together(int tokens) { return tokens <= 2 ? 4 : tokens <= 4 ? 2 : 1; }

struct LowBitPanels {
    const uint8_t* panels;  // [num_panels, blocks, kBlockBytes]
    int64_t num_panels;
    LowBitLayout<4> layout;  // of the inputs
    ByteTokens tokens;

    int64_t blocks() const { return layout.num_lines; }

    // Rounds this member's tokens.
    template <typename Input>
    void round_tokens(const Input* inputs, int64_t stride, Member member) const {
        for (int t = member.index; t < tokens.count; t += member.count) {
            const ByteTokens one{tokens.values + t * layout.columns(), tokens.scales + t * layout.lanes,
                                 tokens.offsets + t * layout.lanes, tokens.offset_sum + t, 1};
            quantise_tokens(inputs + t * stride, layout, one);
        }
    }

    // Calls emit(panel, token, const float (&)[16]) for panels [begin, end) and every token.
    template <typename Emit>
    void run(int64_t begin, int64_t end, const Emit& emit) const {
        switch (std::min(tokens.count, kMostTogether)) {
            case 1: return run_all<1>(begin, end, emit);
            case 2: return run_all<2>(begin, end, emit);
            case 3:
            case 4: return run_all<4>(begin, end, emit);
            default: return run_all<8>(begin, end, emit);
        }
    }

   private:
    template <int kTokens, typename Emit>
    void run_all(int64_t begin, int64_t end, const Emit& emit) const {
        constexpr int kPanels = low_bit_panels_together(kTokens);
        int64_t panel = begin;
        for (; panel + kPanels <= end; panel += kPanels) run_panels<kTokens, kPanels>(panel, emit);
        for (; panel < end; panel++) run_panels<kTokens, 1>(panel, emit);
    }

    template <int kTokens, int kPanels, typename Emit>
    void run_panels(int64_t panel, const Emit& emit) const {
        for (int first = 0; first < tokens.count; first += kTokens) {
            // A last group that is not full repeats its last token.
            int token[kTokens];
            for (int t = 0; t < kTokens; t++) token[t] = std::min(first + t, tokens.count - 1);
            Vec total[kPanels][kTokens][kSlices];
            for (auto& panels : total) {
                for (auto& slices : panels) {
                    for (auto& slice : slices) slice = zero();
                }
            }
            const int64_t cut = std::max<int64_t>(0, blocks() - kBlocksAhead);
            for (int64_t block = 0; block < blocks(); block++) {
                // The last blocks of a panel prefetch the first ones of the panel that is next in the same place.
                const int64_t ahead = kBlocksAhead + (block < cut ? 0 : (kPanels - 1) * blocks());
                add_block<kTokens, kPanels>(total, token, panel, block, ahead * kBlockBytes);
            }
            for (int p = 0; p < kPanels; p++) {
                for (int t = 0; t < std::min(kTokens, tokens.count - first); t++) {
                    float values[kPanelOutputs];
                    for (int s = 0; s < kSlices; s++) store(values + s * kLanes, total[p][t][s]);
                    emit(panel + p, first + t, values);
                }
            }
        }
    }

    template <int kTokens, int kPanels>
    void add_block(Vec (&total)[kPanels][kTokens][kSlices], const int (&token)[kTokens], int64_t panel, int64_t block,
                   int64_t ahead) const {
        const uint8_t* at[kPanels];
        for (int p = 0; p < kPanels; p++) at[p] = panels + ((panel + p) * blocks() + block) * kBlockBytes;
        const int8_t* values[kTokens];
        for (int t = 0; t < kTokens; t++) values[t] = tokens.values + token[t] * layout.columns() + 2 * block * kSpan;
        for (int s = 0; s < kSlices; s++) {
            Ints low[kPanels][kTokens];
            Ints high[kPanels][kTokens];
            for (int p = 0; p < kPanels; p++) {
                for (int t = 0; t < kTokens; t++) low[p][t] = high[p][t] = broadcast_int(0);
            }
            for (int line = 0; line < kWeightLines; line++) {
                for (int p = 0; p < kPanels; p++) {
                    const uint8_t* source = at[p] + line * kLineBytes + s * Bytes::kWidth;
                    __builtin_prefetch(source + ahead);
                    const Bytes both = load_bytes(source);
                    for (int t = 0; t < kTokens; t++) {
                        low[p][t] = dot_bytes(low[p][t], low_nibbles(both), repeat(four(values[t] + 4 * line)));
                        high[p][t] = dot_bytes(high[p][t], high_nibbles(both), repeat(four(values[t] + kSpan + 4 * line)));
                    }
                }
            }
            for (int p = 0; p < kPanels; p++) {
                const uint8_t* scales = at[p] + kWeightLines * kLineBytes;
                __builtin_prefetch(scales + ahead);
                for (int t = 0; t < kTokens; t++) {
                    add_span(total[p][t][s], low[p][t], scales_of_span(scales, s, 0), token[t], 2 * block);
                    add_span(total[p][t][s], high[p][t], scales_of_span(scales, s, 1), token[t], 2 * block + 1);
                }
            }
        }
    }

    static int32_t four(const int8_t* from) {
        int32_t together;
        std::memcpy(&together, from, sizeof together);
        return together;
    }

    void add_span(Vec& total, Ints products, Vec scale, int token, int64_t span) const {
        const float factor = tokens.scales[token * layout.lanes + span];
        const float offset = tokens.offsets[token * layout.lanes + span];
        total = multiply_add(multiply_add(to_vec(products), broadcast(factor), broadcast(offset)), scale, total);
    }
};

}  // namespace sirius
