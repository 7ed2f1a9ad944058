// Which neurons each token keeps: the largest |act(gate)|, ties towards the lower index.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace sirius {

// Magnitudes of fp32 order like the integers of their bits.
inline uint32_t magnitude(float value) { return as_bits(value) & 0x7fffffffu; }

struct Cut {
    uint32_t smallest;   // least magnitude that is kept
    int64_t last_equal;  // highest index that is kept of those equal to it

    bool keeps(float value, int64_t index) const {
        const uint32_t key = magnitude(value);
        return key > smallest || (key == smallest && index <= last_equal);
    }
};

// Finds the cut that keeps num_kept (1 ... count) of the values, by counting digits from the highest on.
inline Cut find_cut(const float* values, int64_t count, int64_t num_kept) {
    constexpr int kDigits[3][2] = {{20, 11}, {10, 10}, {0, 10}};  // shift and width; bit 31 is the sign
    uint32_t prefix = 0;
    uint32_t known = 0;
    int64_t wanted = num_kept;
    uint32_t equal = 0;
    for (const auto& digit : kDigits) {
        const int shift = digit[0];
        const uint32_t mask = (1u << digit[1]) - 1u;
        uint32_t histogram[2048] = {};
        for (int64_t i = 0; i < count; i++) {
            const uint32_t key = magnitude(values[i]);
            histogram[(key >> shift) & mask] += (key & known) == prefix;
        }
        uint32_t bin = mask;
        while (int64_t(histogram[bin]) < wanted) wanted -= histogram[bin--];
        equal = histogram[bin];
        prefix |= bin << shift;
        known |= mask << shift;
    }
    Cut cut{prefix, count - 1};
    if (int64_t(equal) == wanted) return cut;
    for (int64_t i = 0; i < count; i++) {
        if (magnitude(values[i]) == prefix && --wanted == 0) {
            cut.last_equal = i;
            break;
        }
    }
    return cut;
}

}  // namespace sirius
