// Vectors of fp32 and the conversions of stored elements to them: AVX-512, AVX2, or plain loops the compiler vectorises.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define SIRIUS_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define SIRIUS_AVX2 1
#endif
// Dot products of bf16 pairs pay where they do more products per cycle than fp32 does: on AMD's processors, which build.py
// tells by SIRIUS_PREFER_BF16 (measured on Zen 5: twice fp32's rate), not on those that take several cycles for one (measured
// on Emerald Rapids: half of it). Compilers older than the processor do not know its name.
#if defined(SIRIUS_AVX512) && defined(__AVX512BF16__) && defined(SIRIUS_PREFER_BF16)
#define SIRIUS_AVX512_BF16 1
#endif
#if defined(SIRIUS_AVX512) && defined(__AVX512VNNI__)
#define SIRIUS_AVX512_VNNI 1
#endif

namespace sirius {

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return as_float(uint32_t(value.bits) << 16); }
inline float to_float(Half value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return as_float(sign | 0x7f800000u | (magnitude << 13));
    // Scaling by 2^112 rebiases the exponent and makes subnormals come out right.
    return as_float(sign | as_bits(as_float(magnitude << 13) * as_float(0x77800000u)));
}

template <typename T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
    return value;
}
// Round to nearest even.
template <>
inline BFloat16 from_float<BFloat16>(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return BFloat16{uint16_t(nan ? 0x7fc0u : rounded)};
}
template <>
inline Half from_float<Half>(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return Half{uint16_t(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return Half{uint16_t(sign | 0x7c00u)};
    if (magnitude < 0x38800000u) {
        // Subnormal results: adding 0.5 puts the units of fp16 subnormals into the last bits of the fp32 mantissa.
        return Half{uint16_t(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u))};
    }
    const uint32_t odd = (magnitude >> 13) & 1u;
    return Half{uint16_t(sign | ((magnitude - 0x38000000u + 0x0fffu + odd) >> 13))};
}

#if defined(SIRIUS_AVX512)

struct Vec {
    static constexpr int kWidth = 16;
    __m512 v;
};
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// totals[i] = sum of the lanes of a[i], for four vectors.
inline void sum_four(const Vec* a, float* totals) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
    // Four numbers in each 128-bit lane: those of a[0], a[1], a[2], a[3].
    const __m512 lanes = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    _mm_storeu_ps(totals, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
inline Vec widen(const float* p) { return load(p); }
inline Vec widen(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec widen(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

#elif defined(SIRIUS_AVX2)

struct Vec {
    static constexpr int kWidth = 8;
    __m256 v;
};
inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec broadcast(float value) { return {_mm256_set1_ps(value)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// totals[i] = sum of the lanes of a[i], for four vectors.
inline void sum_four(const Vec* a, float* totals) {
    const __m256 ab = _mm256_hadd_ps(a[0].v, a[1].v);
    const __m256 lanes = _mm256_hadd_ps(ab, _mm256_hadd_ps(a[2].v, a[3].v));
    _mm_storeu_ps(totals, _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1)));
}
inline Vec widen(const float* p) { return load(p); }
inline Vec widen(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline Vec widen(const Half* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }

#else

struct Vec {
    static constexpr int kWidth = 8;
    float v[8];
};
inline Vec broadcast(float value) {
    Vec a;
    for (float& lane : a.v) lane = value;
    return a;
}
inline Vec zero() { return broadcast(0.0f); }
inline Vec load(const float* p) {
    Vec a;
    std::memcpy(a.v, p, sizeof a.v);
    return a;
}
inline void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof a.v); }
inline Vec add(Vec a, Vec b) {
    for (int i = 0; i < Vec::kWidth; i++) a.v[i] += b.v[i];
    return a;
}
inline Vec multiply_add(Vec a, Vec b, Vec c) {
    for (int i = 0; i < Vec::kWidth; i++) c.v[i] += a.v[i] * b.v[i];
    return c;
}
// totals[i] = sum of the lanes of a[i], for four vectors.
inline void sum_four(const Vec* a, float* totals) {
    for (int i = 0; i < 4; i++) {
        totals[i] = 0.0f;
        for (float lane : a[i].v) totals[i] += lane;
    }
}
template <typename T>
Vec widen(const T* p) {
    Vec a;
    for (int i = 0; i < Vec::kWidth; i++) a.v[i] = to_float(p[i]);
    return a;
}

#endif

}  // namespace sirius
