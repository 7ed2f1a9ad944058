// The activation of the gate, on fp32 values in place. Loops are written so that the compiler vectorises them.
#pragma once

#include <cmath>

#include "simd.h"

namespace sirius {

enum class Activation : int { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

// exp with a relative error below 2e-7, clamped to the range of normal fp32.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are round(x / ln 2)
    const float power = shifted - 12582912.0f;
    const float rest = (x - power * 0.693359375f) + power * 2.12194440e-4f;
    float series = 1.9875691500e-4f;
    series = series * rest + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = series * rest * rest + rest + 1.0f;
    return series * as_float((as_bits(shifted) << 23) + 0x3f800000u);
}

inline void activate(Activation activation, float* values, int64_t count) {
    switch (activation) {
        case Activation::kSilu:
            for (int64_t i = 0; i < count; i++) values[i] = values[i] / (1.0f + exponential(-values[i]));
            return;
        case Activation::kGeluTanh:
            // 0.5 * (1 + tanh(u)) is the logistic function of 2u.
            for (int64_t i = 0; i < count; i++) {
                const float x = values[i];
                const float twice = 1.59576912f * (x + 0.044715f * x * x * x);
                values[i] = x / (1.0f + exponential(-twice));
            }
            return;
        case Activation::kGelu:
            for (int64_t i = 0; i < count; i++) {
                values[i] = 0.5f * values[i] * (1.0f + std::erf(values[i] * 0.707106781f));
            }
            return;
    }
}

}  // namespace sirius
