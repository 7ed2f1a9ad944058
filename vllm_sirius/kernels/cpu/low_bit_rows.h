// Weight rows of 4 or 8 bits per column and what the reduced FFNs and linear layers need of them, for one thread.
//
// A row is a sequence of 64-byte lines. 8 bits: a line has 64 columns, stored as the value + 128, and a row has one fp32
// scale. 4 bits: a line has 128 columns, column i in the low and column 64 + i in the high half of byte i, stored as the
// value + 8, and every span of 64 columns has one bf16 scale. Inputs and hidden values are rounded to signed bytes on the
// way, with one scale for each span of 64 columns and for each group of 16 neurons: products are then integers and exact.
#pragma once

#include <algorithm>

#include "bytes.h"
#include "layout.h"

namespace sirius {

constexpr int kLineBytes = 64;
constexpr int kSpan = 64;                       // columns that share the scale of an input
constexpr float kLargest = 127.0f;              // magnitude of a signed byte
constexpr float kSmallestMagnitude = 1e-30f;    // keeps scales of all-zero spans finite
constexpr int kLanes = Vec::kWidth;
constexpr int kParts = kSpan / Bytes::kWidth;   // native vectors of a span

template <int kBits>
struct Code;
template <>
struct Code<8> {
    using Scale = float;
    static constexpr int kOffset = 128;
    static constexpr int kSpansOfLine = 1;
    static constexpr bool kScalePerSpan = false;
    static int weight(int64_t) { return 1; }
    static Bytes bytes(const uint8_t* line, int, int part) { return load_bytes(line + part * Bytes::kWidth); }
};
template <>
struct Code<4> {
    using Scale = BFloat16;
    static constexpr int kOffset = 8;
    static constexpr int kSpansOfLine = 2;
    static constexpr bool kScalePerSpan = true;
    // How many times their value the bytes of a span are.
    static int weight(int64_t span) { return span % 2 == 0 ? 1 : 16; }
    static Bytes bytes(const uint8_t* line, int span, int part) {
        const Bytes both = load_bytes(line + part * Bytes::kWidth);
        return span == 0 ? low_nibbles(both) : high_nibbles(both);
    }
};

// Inputs as signed bytes: input = value * scale of its span. Padded with zeros to whole lines of weights.
struct ByteTokens {
    int8_t* values;     // [count, num_spans * kSpan]
    float* scales;      // [count, lanes], divided by Code::weight
    float* offsets;     // [count, lanes]: -scale * kOffset * sum of the values of the span
    float* offset_sum;  // [count]: sum of the offsets
    int count;
};

// Shape of a set of rows.
template <int kBits>
struct LowBitLayout {
    int64_t width;
    int64_t num_lines;
    int64_t num_spans;
    int64_t num_scales;    // of a row
    int64_t lanes;         // num_spans, padded to whole vectors
    int64_t scale_lanes;   // num_scales, padded to whole vectors

    LowBitLayout(int64_t row_width = 0) : width(row_width) {
        num_lines = (width + kSpan * Code<kBits>::kSpansOfLine - 1) / (kSpan * Code<kBits>::kSpansOfLine);
        num_spans = num_lines * Code<kBits>::kSpansOfLine;
        num_scales = Code<kBits>::kScalePerSpan ? num_spans : 1;
        lanes = round_up(num_spans, kLanes);
        scale_lanes = round_up(num_scales, kLanes);
    }
    int64_t columns() const { return num_spans * kSpan; }
};

template <int kBits, typename Input>
void quantise_tokens(const Input* inputs, const LowBitLayout<kBits>& layout, const ByteTokens& tokens) {
    for (int t = 0; t < tokens.count; t++) {
        const Input* from = inputs + t * layout.width;
        tokens.offset_sum[t] = 0.0f;
        std::fill_n(tokens.scales + t * layout.lanes, layout.lanes, 0.0f);
        std::fill_n(tokens.offsets + t * layout.lanes, layout.lanes, 0.0f);
        for (int64_t s = 0; s < layout.num_spans; s++) {
            float values[kSpan] = {};
            const int count = int(std::min<int64_t>(kSpan, std::max<int64_t>(0, layout.width - s * kSpan)));
            for (int i = 0; i < count; i++) values[i] = to_float(from[s * kSpan + i]);
            Vec largest = broadcast(kSmallestMagnitude);
            for (int i = 0; i < kSpan; i += kLanes) largest = larger_magnitude(largest, load(values + i));
            const float magnitude = largest_lane(largest);
            const Vec inverse = broadcast(kLargest / magnitude);
            int8_t* to = tokens.values + t * layout.columns() + s * kSpan;
            Ints sum = broadcast_int(0);
            for (int i = 0; i < kSpan; i += kLanes) {
                const Ints bytes = nearest(multiply(load(values + i), inverse));
                sum = add(sum, bytes);
                store_bytes(to + i, bytes);
            }
            const int32_t total = sum_lanes(sum);
            const float scale = magnitude / kLargest;
            tokens.scales[t * layout.lanes + s] = scale / float(Code<kBits>::weight(s));
            tokens.offsets[t * layout.lanes + s] = scale * float(-Code<kBits>::kOffset * total);
            tokens.offset_sum[t] += tokens.offsets[t * layout.lanes + s];
        }
    }
}

template <int kBits>
struct LowBitRows {
    using C = Code<kBits>;
    static constexpr int kUnit = kSpan;  // columns that are put in order together

    const uint8_t* packed;
    const typename C::Scale* scales;
    LowBitLayout<kBits> layout;
    ByteTokens tokens;
    float* scratch;  // [team, scratch_floats]; of one thread after of_member

    LowBitRows of_member(int index) const {
        LowBitRows mine = *this;
        mine.scratch += index * scratch_floats(layout, tokens.count);
        return mine;
    }
    int count() const { return tokens.count; }
    int64_t width() const { return layout.width; }
    int64_t stride() const { return layout.columns(); }
    static int64_t scratch_floats(const LowBitLayout<kBits>& layout, int64_t num_tokens) {
        const int64_t dots = kTile * layout.scale_lanes + 4 * kTile * layout.lanes;
        const int64_t mixing = kGroup * layout.scale_lanes + num_tokens * (kGroup / 4 + 2) * layout.scale_lanes;
        return round_up(std::max(dots, mixing), kLineBytes / sizeof(float));
    }

    const uint8_t* row(int64_t number) const { return packed + number * layout.num_lines * kLineBytes; }
    const typename C::Scale* scales_of(int64_t number) const { return scales + number * layout.num_scales; }

    void widen_scales(int64_t number, float* to) const {
        const auto* from = scales_of(number);
        for (int64_t s = 0; s < layout.scale_lanes; s += kLanes) {
            store(to + s, widen_some(from + s, int(std::min<int64_t>(kLanes, layout.num_scales - s))));
        }
    }

    void prefetch_scales(int64_t number) const {
        const char* from = reinterpret_cast<const char*>(scales_of(number));
        const char* end = reinterpret_cast<const char*>(scales_of(number + 1));
        for (; from < end; from += kLineBytes) __builtin_prefetch(from, 0, kSecondLevel);
        __builtin_prefetch(end - 1, 0, kSecondLevel);
    }

    // totals[token][row] of kTile rows for every token, while the kTile rows of `next` are prefetched.
    void dots(const int64_t* rows, const int64_t* next, float* totals) const {
        float* row_scales = scratch;
        const uint8_t* at[kTile];
        const uint8_t* ahead[kTile];
        for (int r = 0; r < kTile; r++) {
            at[r] = row(rows[r]);
            ahead[r] = row(next[r]);
            prefetch_scales(next[r]);
            widen_scales(rows[r], row_scales + r * layout.scale_lanes);
        }
        const int num_tiles = (tokens.count + 3) / 4;
        const int share = (kTile + num_tiles - 1) / num_tiles;
        int prefetched = 0;
        for (int t = 0; t < tokens.count;) {
            const int left = tokens.count - t;
            const int num_next = std::min(share, kTile - prefetched);
            const uint8_t* const* coming = ahead + prefetched;
            if (tokens.count == 1) {
                dot_tile<1, kTile>(at, row_scales, t, coming, kTile, totals);
                t += 1;
            } else if (left >= 4) {
                dot_tile<4>(at, row_scales, t, coming, num_next, totals + t * kTile);
                t += 4;
            } else if (left >= 2) {
                dot_tile<2>(at, row_scales, t, coming, num_next, totals + t * kTile);
                t += 2;
            } else {
                dot_tile<1>(at, row_scales, t, coming, num_next, totals + t * kTile);
                t += 1;
            }
            prefetched += num_next;
        }
    }

    // kNext is num_next if that is known, else -1: a single token has no time for counting.
    template <int kTokens, int kNext = -1>
    void dot_tile(const uint8_t* const* rows, const float* row_scales, int first, const uint8_t* const* next,
                  int num_next, float* totals) const {
        Vec total[kTokens][kTile];
        const float* factors = tokens.scales + first * layout.lanes;  // [token, span], or [token, row, span]
        for (int t = 0; t < kTokens; t++) {
            for (int r = 0; r < kTile; r++) total[t][r] = zero();
        }
        if (C::kScalePerSpan) factors = scale_factors<kTokens>(row_scales, first, total);
        const int8_t* values = tokens.values + first * layout.columns();
        for (int64_t line = 0; line < layout.num_lines; line++) {
            for (int i = 0; i < (kNext < 0 ? num_next : kNext); i++) {
                __builtin_prefetch(next[i] + line * kLineBytes, 0, kSecondLevel);
            }
            for (int half = 0; half < C::kSpansOfLine; half++) {
                const int64_t span = line * C::kSpansOfLine + half;
                for (int part = 0; part < kParts; part++) {
                    Bytes weights[kTile];
                    for (int r = 0; r < kTile; r++) weights[r] = C::bytes(rows[r] + line * kLineBytes, half, part);
                    for (int t = 0; t < kTokens; t++) {
                        const int8_t* from = values + t * layout.columns() + span * kSpan;
                        const Bytes inputs = load_bytes(from + part * Bytes::kWidth);
                        for (int r = 0; r < kTile; r++) {
                            const int64_t factor = (C::kScalePerSpan ? t * kTile + r : t) * layout.lanes + span;
                            const Ints products = dot_bytes(broadcast_int(0), weights[r], inputs);
                            total[t][r] = multiply_add(to_vec(products), broadcast(factors[factor]), total[t][r]);
                        }
                    }
                }
            }
        }
        for (int t = 0; t < kTokens; t++) {
            float* to = totals + t * kTile;
            sum_four(total[t], to);
            if (C::kScalePerSpan) continue;
            for (int r = 0; r < kTile; r++) {
                to[r] = row_scales[r * layout.scale_lanes] * (to[r] + tokens.offset_sum[first + t]);
            }
        }
    }

    // Scales of rows times scales of tokens, span by span; starts the totals with what the offset of the weights adds.
    template <int kTokens>
    const float* scale_factors(const float* row_scales, int first, Vec (*total)[kTile]) const {
        float* factors = scratch + kTile * layout.scale_lanes;
        for (int t = 0; t < kTokens; t++) {
            const float* token_scales = tokens.scales + (first + t) * layout.lanes;
            const float* offsets = tokens.offsets + (first + t) * layout.lanes;
            for (int r = 0; r < kTile; r++) {
                for (int64_t s = 0; s < layout.lanes; s += kLanes) {
                    const Vec scale = load(row_scales + r * layout.scale_lanes + s);
                    store(factors + (t * kTile + r) * layout.lanes + s, multiply(scale, load(token_scales + s)));
                    total[t][r] = multiply_add(scale, load(offsets + s), total[t][r]);
                }
            }
        }
        return factors;
    }

    // Hidden values of a group as signed bytes: for every token and scale of the down rows, four neurons to an int32.
    struct Hidden {
        int32_t* quads;    // [token, kGroup / 4, scale_lanes]
        int32_t* offsets;  // [token, scale_lanes]: -kOffset * sum of the bytes, times Code::weight
        float* scales;     // [token, scale_lanes], divided by Code::weight
    };

    Hidden quantise_hidden(const int64_t* down, const float* hidden) const {
        const int64_t lanes = layout.scale_lanes;
        float* row_scales = scratch;
        for (int i = 0; i < kGroup; i++) widen_scales(down[i], row_scales + i * lanes);
        Hidden to;
        to.quads = reinterpret_cast<int32_t*>(row_scales + kGroup * lanes);
        to.offsets = to.quads + tokens.count * (kGroup / 4) * lanes;
        to.scales = reinterpret_cast<float*>(to.offsets + tokens.count * lanes);
        for (int t = 0; t < tokens.count; t++) {
            for (int64_t s = 0; s < lanes; s += kLanes) {
                Vec value[kGroup];
                Vec largest = broadcast(kSmallestMagnitude);
                for (int i = 0; i < kGroup; i++) {
                    value[i] = multiply(broadcast(hidden[t * kGroup + i]), load(row_scales + i * lanes + s));
                    largest = larger_magnitude(largest, value[i]);
                }
                const Vec inverse = divide(broadcast(kLargest), largest);
                Ints sum = broadcast_int(0);
                for (int k = 0; k < kGroup / 4; k++) {
                    Ints bytes[4];
                    for (int i = 0; i < 4; i++) {
                        bytes[i] = nearest(multiply(value[4 * k + i], inverse));
                        sum = add(sum, bytes[i]);
                    }
                    store(to.quads + (t * (kGroup / 4) + k) * lanes + s, four_bytes(bytes));
                }
                store(to.offsets + t * lanes + s, sum);
                store(to.scales + t * lanes + s, divide(largest, broadcast(kLargest)));
            }
            for (int64_t s = 0; s < lanes; s++) {
                to.offsets[t * lanes + s] *= -C::kOffset * C::weight(s);
                to.scales[t * lanes + s] /= float(C::weight(s));
            }
        }
        return to;
    }

    // output[token] += sum over the group of hidden[token][neuron] * down row. Columns lie as `interleave` leaves them.
    void mix(const int64_t* down, const int64_t* next, const float* hidden, float* output) const {
        const Hidden bytes = quantise_hidden(down, hidden);
        const uint8_t* rows[kGroup];
        const uint8_t* ahead[kGroup];
        for (int i = 0; i < kGroup; i++) {
            rows[i] = row(down[i]);
            ahead[i] = row(next[i]);
        }
        for (int64_t line = 0; line < layout.num_lines; line++) {
            for (int i = 0; i < kGroup; i++) __builtin_prefetch(ahead[i] + line * kLineBytes, 0, kSecondLevel);
            for (int half = 0; half < C::kSpansOfLine; half++) {
                const int64_t span = line * C::kSpansOfLine + half;
                for (int part = 0; part < kParts; part++) mix_part(rows, bytes, line, half, span, part, output);
            }
        }
    }

    void mix_part(const uint8_t* const* rows, const Hidden& hidden, int64_t line, int half, int64_t span, int part,
                  float* output) const {
        constexpr int kQuads = kGroup / 4;
        const int64_t lanes = layout.scale_lanes;
        const int64_t scale = C::kScalePerSpan ? span : 0;
        Bytes weights[kQuads][4];
        for (int k = 0; k < kQuads; k++) {
            Bytes four[4];
            for (int i = 0; i < 4; i++) four[i] = C::bytes(rows[4 * k + i] + line * kLineBytes, half, part);
            interleave(four, weights[k]);
        }
        for (int t = 0; t < tokens.count; t++) {
            Ints total[4];
            for (int j = 0; j < 4; j++) total[j] = broadcast_int(hidden.offsets[t * lanes + scale]);
            for (int k = 0; k < kQuads; k++) {
                const Bytes factors = repeat(hidden.quads[(t * kQuads + k) * lanes + scale]);
                for (int j = 0; j < 4; j++) total[j] = dot_bytes(total[j], weights[k][j], factors);
            }
            const Vec factor = broadcast(hidden.scales[t * lanes + scale]);
            float* at = output + t * stride() + span * kSpan + part * Bytes::kWidth;
            for (int j = 0; j < 4; j++) {
                store(at + j * kLanes, multiply_add(to_vec(total[j]), factor, load(at + j * kLanes)));
            }
        }
    }

    static void in_order(float* unit) {
        float mixed[kUnit];
        std::memcpy(mixed, unit, sizeof mixed);
        for (int c = 0; c < kUnit; c++) {
            const int part = c / Bytes::kWidth * Bytes::kWidth;
            unit[c] = mixed[part + interleaved_position(c % Bytes::kWidth)];
        }
    }
};

}  // namespace sirius
