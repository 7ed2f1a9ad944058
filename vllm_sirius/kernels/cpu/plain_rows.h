// Weight rows stored as fp32, bf16 or fp16 and what the reduced FFNs need of them, for one thread.
#pragma once

#include <algorithm>
#include <cstddef>

#include "layout.h"
#include "packing.h"

namespace sirius {

template <typename Weight>
struct Layout {
    static constexpr int kLine = 64 / sizeof(Weight);  // columns of one cache line
    static int64_t stride(int64_t width) { return round_up(width, kLine); }
};

// Inputs of one pass: tokens padded with zeros to whole lines.
template <typename Weight>
struct Tokens {
    const typename Packing<Weight>::Stored* values;  // [count, stride]
    int64_t stride;
    int count;
};

// totals[token][row] = rows[row] . token, for kTokens tokens and kTile rows. Prefetches num_next other rows on the way.
template <typename Weight, int kTokens>
void dot_tile(const Weight* const* rows, const typename Packing<Weight>::Stored* tokens, int64_t stride, int64_t width,
              const Weight* const* next, int num_next, float* totals) {
    using Pack = Packing<Weight>;
    constexpr int kLine = Layout<Weight>::kLine;
    Vec total[kTokens][kTile];
    for (int t = 0; t < kTokens; t++) {
        for (int r = 0; r < kTile; r++) total[t][r] = zero();
    }
    auto step = [&](const Weight* const* at, int64_t offset, int64_t column) {
        typename Pack::Packed weights[kTile];
        for (int r = 0; r < kTile; r++) weights[r] = Pack::weights(at[r] + offset);
        for (int t = 0; t < kTokens; t++) {
            const typename Pack::Packed inputs = Pack::inputs(tokens + t * stride + column);
            for (int r = 0; r < kTile; r++) total[t][r] = Pack::dot(weights[r], inputs, total[t][r]);
        }
    };
    int64_t column = 0;
    for (; column + kLine <= width; column += kLine) {
        for (int i = 0; i < num_next; i++) __builtin_prefetch(next[i] + column, 0, kSecondLevel);
        for (int part = 0; part < kLine; part += Pack::kColumns) step(rows, column + part, column + part);
    }
    if (column < width) {
        Weight rest[kTile][kLine] = {};
        const Weight* at[kTile];
        for (int r = 0; r < kTile; r++) {
            at[r] = rest[r];
            std::memcpy(rest[r], rows[r] + column, (width - column) * sizeof(Weight));
        }
        for (int part = 0; part < kLine; part += Pack::kColumns) step(at, part, column + part);
    }
    for (int t = 0; t < kTokens; t++) sum_four(total[t], totals + t * kTile);
}

// totals[token][row] of kTile rows for every token, while the kTile rows of `next` are prefetched, spread over the tiles
// of tokens so that memory is as busy during the last as during the first.
template <typename Weight>
void dot_rows(const Weight* const* rows, const Tokens<Weight>& tokens, int64_t width, const Weight* const* next,
              float* totals) {
    const int num_tiles = (tokens.count + 3) / 4;
    const int share = (kTile + num_tiles - 1) / num_tiles;
    int prefetched = 0;
    for (int t = 0; t < tokens.count;) {
        const auto* at = tokens.values + t * tokens.stride;
        const int left = tokens.count - t;
        const int num_next = std::min(share, kTile - prefetched);
        if (left >= 4) {
            dot_tile<Weight, 4>(rows, at, tokens.stride, width, next + prefetched, num_next, totals + t * kTile);
            t += 4;
        } else if (left >= 2) {
            dot_tile<Weight, 2>(rows, at, tokens.stride, width, next + prefetched, num_next, totals + t * kTile);
            t += 2;
        } else {
            dot_tile<Weight, 1>(rows, at, tokens.stride, width, next + prefetched, num_next, totals + t * kTile);
            t += 1;
        }
        prefetched += num_next;
    }
}

// output[token] += sum over the group of hidden[token][neuron] * down[neuron]. Lanes stay as Packing mixes them.
template <typename Weight>
void mix_columns(const Weight* const* down, int64_t offset, const typename Packing<Weight>::Stored* hidden, int count,
                 float* output, int64_t stride) {
    using Pack = Packing<Weight>;
    constexpr int kSets = Pack::kHeld / Pack::kNeurons;
    for (int first = 0; first < kGroup; first += Pack::kHeld) {
        typename Pack::Mixed rows[kSets];
        for (int s = 0; s < kSets; s++) rows[s] = Pack::down_rows(down + first + s * Pack::kNeurons, offset);
        for (int t = 0; t < count; t++) {
            float* at = output + t * stride;
            Vec total[Pack::kParts];
            for (int p = 0; p < Pack::kParts; p++) total[p] = load(at + p * Vec::kWidth);
            for (int s = 0; s < kSets; s++) {
                Pack::mix(rows[s], Pack::hidden(hidden + t * kGroup + first + s * Pack::kNeurons), total);
            }
            for (int p = 0; p < Pack::kParts; p++) store(at + p * Vec::kWidth, total[p]);
        }
    }
}

// The same for whole rows; prefetches those of the next group.
template <typename Weight>
void mix_group(const Weight* const* down, const Weight* const* next, const typename Packing<Weight>::Stored* hidden,
               int count, int64_t width, float* output, int64_t stride) {
    constexpr int kColumns = Packing<Weight>::kColumns;
    int64_t column = 0;
    for (; column + kColumns <= width; column += kColumns) {
        if (column % Layout<Weight>::kLine == 0) {
            for (int i = 0; i < kGroup; i++) __builtin_prefetch(next[i] + column, 0, kSecondLevel);
        }
        mix_columns<Weight>(down, column, hidden, count, output + column, stride);
    }
    if (column < width) {
        Weight rest[kGroup][kColumns] = {};
        const Weight* at[kGroup];
        for (int i = 0; i < kGroup; i++) {
            at[i] = rest[i];
            std::memcpy(rest[i], down[i] + column, (width - column) * sizeof(Weight));
        }
        mix_columns<Weight>(at, 0, hidden, count, output + column, stride);
    }
}

// The rows of an FFN and the tokens that pass through them.
template <typename Weight>
struct PlainRows {
    using Pack = Packing<Weight>;
    using Stored = typename Pack::Stored;
    static constexpr int kUnit = Pack::kColumns;  // columns that are put in order together

    const Weight* rows;
    int64_t row_width;
    Tokens<Weight> tokens;

    PlainRows of_member(int) const { return *this; }
    int count() const { return tokens.count; }
    int64_t width() const { return row_width; }
    int64_t stride() const { return tokens.stride; }
    const Weight* row(int64_t number) const { return rows + number * row_width; }

    // totals[token][row] of kTile rows for every token, while the kTile rows of `next` are prefetched.
    void dots(const int64_t* numbers, const int64_t* next, float* totals) const {
        const Weight* at[kTile];
        const Weight* ahead[kTile];
        for (int r = 0; r < kTile; r++) {
            at[r] = row(numbers[r]);
            ahead[r] = row(next[r]);
        }
        dot_rows<Weight>(at, tokens, row_width, ahead, totals);
    }

    // output[token] += sum over the group of hidden[token][neuron] * down row. Lanes stay as Packing mixes them.
    void mix(const int64_t* down, const int64_t* next, const float* hidden, float* output) const {
        const Weight* at[kGroup];
        const Weight* ahead[kGroup];
        for (int i = 0; i < kGroup; i++) {
            at[i] = row(down[i]);
            ahead[i] = row(next[i]);
        }
        Stored stored[kMaxTokens * kGroup];
        for (int i = 0; i < tokens.count * kGroup; i++) stored[i] = Pack::stored(hidden[i]);
        mix_group<Weight>(at, ahead, stored, tokens.count, row_width, output, tokens.stride);
    }

    static void in_order(float* unit) {
        Vec parts[Pack::kParts];
        for (int p = 0; p < Pack::kParts; p++) parts[p] = load(unit + p * Vec::kWidth);
        Pack::in_order(parts);
        for (int p = 0; p < Pack::kParts; p++) store(unit + p * Vec::kWidth, parts[p]);
    }
};

}  // namespace sirius
