// Vectors of bytes and of int32 for weights stored as unsigned and inputs stored as signed bytes.
//
// Every instruction set computes the same integers. Without dot-product instructions bytes are widened to 16 bits first:
// the older byte products saturate. `high_nibbles` leaves its values where they are, 16 times what they stand for.
#pragma once

#include <cmath>

#include "simd.h"

namespace sirius {

#if defined(SIRIUS_AVX512)

struct Bytes {
    static constexpr int kWidth = 64;
    __m512i v;
};
struct Ints {
    __m512i v;
};
inline Bytes load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes repeat(int32_t four) { return {_mm512_set1_epi32(four)}; }
inline Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(char(0xf0)))}; }
inline void interleave(const Bytes* rows, Bytes* columns) {
    const __m512i low[2] = {_mm512_unpacklo_epi8(rows[0].v, rows[1].v), _mm512_unpacklo_epi8(rows[2].v, rows[3].v)};
    const __m512i high[2] = {_mm512_unpackhi_epi8(rows[0].v, rows[1].v), _mm512_unpackhi_epi8(rows[2].v, rows[3].v)};
    columns[0].v = _mm512_unpacklo_epi16(low[0], low[1]);
    columns[1].v = _mm512_unpackhi_epi16(low[0], low[1]);
    columns[2].v = _mm512_unpacklo_epi16(high[0], high[1]);
    columns[3].v = _mm512_unpackhi_epi16(high[0], high[1]);
}
inline Ints dot_bytes(Ints total, Bytes weights, Bytes inputs) {
#if defined(SIRIUS_AVX512_VNNI)
    return {_mm512_dpbusd_epi32(total.v, weights.v, inputs.v)};
#else
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(weights.v, _mm512_set1_epi16(255)),
                                           _mm512_srai_epi16(_mm512_slli_epi16(inputs.v, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(weights.v, 8), _mm512_srai_epi16(inputs.v, 8));
    return {_mm512_add_epi32(total.v, _mm512_add_epi32(even, odd))};
#endif
}
inline Ints broadcast_int(int32_t value) { return {_mm512_set1_epi32(value)}; }
inline void store(int32_t* p, Ints a) { _mm512_storeu_si512(p, a.v); }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Vec to_vec(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Ints nearest(Vec a) { return {_mm512_cvtps_epi32(a.v)}; }
// Lane i: the low bytes of the lanes i of a[0] ... a[3], lowest first.
inline Ints four_bytes(const Ints* a) {
    const __m512i mask = _mm512_set1_epi32(255);
    const __m512i low = _mm512_or_si512(_mm512_and_si512(a[0].v, mask),
                                        _mm512_slli_epi32(_mm512_and_si512(a[1].v, mask), 8));
    const __m512i high = _mm512_or_si512(_mm512_and_si512(a[2].v, mask),
                                         _mm512_slli_epi32(a[3].v, 8));
    return {_mm512_or_si512(low, _mm512_slli_epi32(high, 16))};
}
inline Vec multiply(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec divide(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec larger_magnitude(Vec a, Vec b) { return {_mm512_max_ps(a.v, _mm512_abs_ps(b.v))}; }
inline float largest_lane(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline int32_t sum_lanes(Ints a) { return _mm512_reduce_add_epi32(a.v); }
// The lanes as signed bytes.
inline void store_bytes(int8_t* p, Ints a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }
// The first `count` elements, then zeros.
inline Vec widen_some(const float* p, int count) { return {_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1u), p)}; }
inline Vec widen_some(const BFloat16* p, int count) {
    const __m256i bits = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1u), p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}

#elif defined(SIRIUS_AVX2)

struct Bytes {
    static constexpr int kWidth = 32;
    __m256i v;
};
struct Ints {
    __m256i v;
};
inline Bytes load_bytes(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline Bytes repeat(int32_t four) { return {_mm256_set1_epi32(four)}; }
inline Bytes low_nibbles(Bytes a) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(char(0xf0)))}; }
inline void interleave(const Bytes* rows, Bytes* columns) {
    const __m256i low[2] = {_mm256_unpacklo_epi8(rows[0].v, rows[1].v), _mm256_unpacklo_epi8(rows[2].v, rows[3].v)};
    const __m256i high[2] = {_mm256_unpackhi_epi8(rows[0].v, rows[1].v), _mm256_unpackhi_epi8(rows[2].v, rows[3].v)};
    columns[0].v = _mm256_unpacklo_epi16(low[0], low[1]);
    columns[1].v = _mm256_unpackhi_epi16(low[0], low[1]);
    columns[2].v = _mm256_unpacklo_epi16(high[0], high[1]);
    columns[3].v = _mm256_unpackhi_epi16(high[0], high[1]);
}
inline Ints dot_bytes(Ints total, Bytes weights, Bytes inputs) {
#if defined(__AVXVNNI__)
    return {_mm256_dpbusd_avx_epi32(total.v, weights.v, inputs.v)};
#else
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(weights.v, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(inputs.v, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(weights.v, 8), _mm256_srai_epi16(inputs.v, 8));
    return {_mm256_add_epi32(total.v, _mm256_add_epi32(even, odd))};
#endif
}
inline Ints broadcast_int(int32_t value) { return {_mm256_set1_epi32(value)}; }
inline void store(int32_t* p, Ints a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Vec to_vec(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Ints nearest(Vec a) { return {_mm256_cvtps_epi32(a.v)}; }
// Lane i: the low bytes of the lanes i of a[0] ... a[3], lowest first.
inline Ints four_bytes(const Ints* a) {
    const __m256i mask = _mm256_set1_epi32(255);
    const __m256i low = _mm256_or_si256(_mm256_and_si256(a[0].v, mask),
                                        _mm256_slli_epi32(_mm256_and_si256(a[1].v, mask), 8));
    const __m256i high = _mm256_or_si256(_mm256_and_si256(a[2].v, mask),
                                         _mm256_slli_epi32(a[3].v, 8));
    return {_mm256_or_si256(low, _mm256_slli_epi32(high, 16))};
}
inline Vec multiply(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec divide(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec larger_magnitude(Vec a, Vec b) {
    return {_mm256_max_ps(a.v, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), b.v))};
}

#else

struct Bytes {
    static constexpr int kWidth = 32;
    uint8_t v[kWidth];
};
struct Ints {
    int32_t v[Vec::kWidth];
};
inline Bytes load_bytes(const void* p) {
    Bytes a;
    std::memcpy(a.v, p, sizeof a.v);
    return a;
}
inline Bytes repeat(int32_t four) {
    Bytes a;
    for (int i = 0; i < Bytes::kWidth; i += 4) std::memcpy(a.v + i, &four, 4);
    return a;
}
inline Bytes low_nibbles(Bytes a) {
    for (uint8_t& byte : a.v) byte &= 15;
    return a;
}
inline Bytes high_nibbles(Bytes a) {
    for (uint8_t& byte : a.v) byte &= 0xf0;
    return a;
}
inline void interleave(const Bytes* rows, Bytes* columns) {
    for (int c = 0; c < Bytes::kWidth; c++) {
        const int at = 4 * (4 * (c / 16) + c % 4);
        for (int r = 0; r < 4; r++) columns[c % 16 / 4].v[at + r] = rows[r].v[c];
    }
}
inline Ints dot_bytes(Ints total, Bytes weights, Bytes inputs) {
    for (int i = 0; i < Bytes::kWidth; i++) total.v[i / 4] += int32_t(weights.v[i]) * int32_t(int8_t(inputs.v[i]));
    return total;
}
inline Ints broadcast_int(int32_t value) {
    Ints a;
    for (int32_t& lane : a.v) lane = value;
    return a;
}
inline void store(int32_t* p, Ints a) { std::memcpy(p, a.v, sizeof a.v); }
inline Ints add(Ints a, Ints b) {
    for (int i = 0; i < Vec::kWidth; i++) a.v[i] += b.v[i];
    return a;
}
inline Vec to_vec(Ints a) {
    Vec b;
    for (int i = 0; i < Vec::kWidth; i++) b.v[i] = float(a.v[i]);
    return b;
}
inline Ints nearest(Vec a) {
    Ints b;
    for (int i = 0; i < Vec::kWidth; i++) b.v[i] = int32_t(std::nearbyint(a.v[i]));
    return b;
}
// Lane i: the low bytes of the lanes i of a[0] ... a[3], lowest first.
inline Ints four_bytes(const Ints* a) {
    Ints b;
    for (int i = 0; i < Vec::kWidth; i++) {
        uint32_t lane = 0;
        for (int k = 0; k < 4; k++) lane |= (uint32_t(a[k].v[i]) & 255u) << (8 * k);
        b.v[i] = int32_t(lane);
    }
    return b;
}
inline Vec multiply(Vec a, Vec b) {
    for (int i = 0; i < Vec::kWidth; i++) a.v[i] *= b.v[i];
    return a;
}
inline Vec divide(Vec a, Vec b) {
    for (int i = 0; i < Vec::kWidth; i++) a.v[i] /= b.v[i];
    return a;
}
inline Vec larger_magnitude(Vec a, Vec b) {
    for (int i = 0; i < Vec::kWidth; i++) a.v[i] = std::fabs(b.v[i]) > a.v[i] ? std::fabs(b.v[i]) : a.v[i];
    return a;
}

#endif

#if !defined(SIRIUS_AVX512)
inline float largest_lane(Vec a) {
    float lanes[Vec::kWidth];
    store(lanes, a);
    float largest = lanes[0];
    for (float lane : lanes) largest = lane > largest ? lane : largest;
    return largest;
}
inline int32_t sum_lanes(Ints a) {
    int32_t lanes[Vec::kWidth];
    store(lanes, a);
    int32_t total = 0;
    for (int32_t lane : lanes) total += lane;
    return total;
}
// The lanes as signed bytes.
inline void store_bytes(int8_t* p, Ints a) {
    int32_t lanes[Vec::kWidth];
    store(lanes, a);
    for (int i = 0; i < Vec::kWidth; i++) p[i] = int8_t(lanes[i]);
}
// The first `count` elements, then zeros.
template <typename T>
Vec widen_some(const T* p, int count) {
    float lanes[Vec::kWidth] = {};
    for (int i = 0; i < count; i++) lanes[i] = to_float(p[i]);
    return load(lanes);
}
#endif

// Where column c of an interleaved stretch of Bytes::kWidth columns lies: interleave works on 16 columns at a time, and
// vector j of its result takes columns 4j ... 4j+3 of each 16.
inline int interleaved_position(int c) { return c % 16 / 4 * Vec::kWidth + 4 * (c / 16) + c % 4; }

}  // namespace sirius
