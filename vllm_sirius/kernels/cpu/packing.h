// How stored weights meet the inputs (dot products) and the hidden values (the down projection) in vector registers.
//
// Packing<Weight> has two parts:
//   dot   kColumns columns of one weight row times the same columns of an input row, accumulated in one Vec;
//   mix   kColumns columns of kNeurons down rows, each times its hidden value, accumulated in kParts Vecs whose lanes may
//         be out of order until `in_order`. kHeld neurons are held in registers at once.
// Column c of each kColumns of an input is stored at place(c).
#pragma once

#include "simd.h"

namespace sirius {

// Every dtype without dot-product instructions of its own: widened to fp32.
template <typename Weight>
struct Packing {
    using Stored = float;  // element of inputs and hidden values
    using Packed = Vec;
    static constexpr int kColumns = Vec::kWidth;
    static constexpr int kNeurons = 1;
    static constexpr int kParts = 1;
    static constexpr int kHeld = 16;
    struct Mixed {
        Vec part[kParts];
    };

    static int place(int column) { return column; }
    static Stored stored(float value) { return to_float(from_float<Weight>(value)); }
    static Packed weights(const Weight* p) { return widen(p); }
    static Packed inputs(const Stored* p) { return load(p); }
    static Vec dot(Packed weights, Packed inputs, Vec total) { return multiply_add(weights, inputs, total); }

    static Mixed down_rows(const Weight* const* rows, int64_t column) { return {{widen(rows[0] + column)}}; }
    static Packed hidden(const Stored* p) { return broadcast(*p); }
    static void mix(const Mixed& rows, Packed hidden, Vec* total) {
        total[0] = multiply_add(rows.part[0], hidden, total[0]);
    }
    static void in_order(Vec*) {}
};

#if defined(SIRIUS_AVX512_BF16)
// bf16 pairs: each fp32 lane takes two products at once. Subnormals count as zero.
template <>
struct Packing<BFloat16> {
    using Stored = BFloat16;
    using Packed = __m512bh;
    static constexpr int kColumns = 32;
    static constexpr int kNeurons = 2;
    static constexpr int kParts = 2;
    static constexpr int kHeld = 16;
    struct Mixed {
        __m512bh part[kParts];
    };

    static int place(int column) { return column; }
    static Stored stored(float value) { return from_float<BFloat16>(value); }
    static Packed weights(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Packed inputs(const Stored* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Vec dot(Packed weights, Packed inputs, Vec total) {
        return {_mm512_dpbf16_ps(total.v, weights, inputs)};
    }

    // Puts the same column of two neurons side by side.
    static Mixed down_rows(const BFloat16* const* rows, int64_t column) {
        const __m512i first = _mm512_loadu_si512(rows[0] + column);
        const __m512i second = _mm512_loadu_si512(rows[1] + column);
        return {{(__m512bh)_mm512_unpacklo_epi16(first, second), (__m512bh)_mm512_unpackhi_epi16(first, second)}};
    }
    static Packed hidden(const Stored* p) {
        int pair;
        std::memcpy(&pair, p, sizeof pair);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static void mix(const Mixed& rows, Packed hidden, Vec* total) {
        total[0].v = _mm512_dpbf16_ps(total[0].v, rows.part[0], hidden);
        total[1].v = _mm512_dpbf16_ps(total[1].v, rows.part[1], hidden);
    }
    // Lane 4q+p of the parts holds column 8q+p and 8q+4+p.
    static void in_order(Vec* total) {
        const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        const __m512 first = total[0].v;
        total[0].v = _mm512_permutex2var_ps(first, low, total[1].v);
        total[1].v = _mm512_permutex2var_ps(first, high, total[1].v);
    }
};
#elif defined(SIRIUS_AVX512)
// bf16 as fp32, even and odd columns apart: each half of a pair is one instruction away from its fp32.
template <>
struct Packing<BFloat16> {
    using Stored = float;
    struct Packed {
        Vec even, odd;
    };
    static constexpr int kColumns = 32;
    static constexpr int kNeurons = 1;
    static constexpr int kParts = 2;
    static constexpr int kHeld = 8;
    using Mixed = Packed;

    static int place(int column) { return column % 2 * 16 + column / 2; }
    static Stored stored(float value) { return to_float(from_float<BFloat16>(value)); }
    static Packed weights(const BFloat16* p) {
        const __m512i pairs = _mm512_loadu_si512(p);
        return {{_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))},
                {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))))}};
    }
    static Packed inputs(const Stored* p) { return {load(p), load(p + 16)}; }
    static Vec dot(Packed weights, Packed inputs, Vec total) {
        return multiply_add(weights.odd, inputs.odd, multiply_add(weights.even, inputs.even, total));
    }

    static Mixed down_rows(const BFloat16* const* rows, int64_t column) { return weights(rows[0] + column); }
    static Vec hidden(const Stored* p) { return broadcast(*p); }
    static void mix(const Mixed& rows, Vec hidden, Vec* total) {
        total[0] = multiply_add(rows.even, hidden, total[0]);
        total[1] = multiply_add(rows.odd, hidden, total[1]);
    }
    static void in_order(Vec* total) {
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        const __m512 even = total[0].v;
        total[0].v = _mm512_permutex2var_ps(even, low, total[1].v);
        total[1].v = _mm512_permutex2var_ps(even, high, total[1].v);
    }
};
#endif

}  // namespace sirius
