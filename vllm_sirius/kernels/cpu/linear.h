// A linear layer over a few tokens, spread over a team of threads.
#pragma once

#include <algorithm>

#include "layout.h"
#include "simd.h"
#include "threads.h"

namespace sirius {

template <typename Rows, typename Output>
struct Linear {
    Rows rows;
    const float* bias;  // [num_rows] or null
    Output* output;     // [count, num_rows]
    int64_t num_rows;

    void run(Member member) const {
        const Rows local = rows.of_member(member.index);
        const int64_t end = member.end(num_rows, kGroup);
        float totals[kMaxTokens * kTile];
        for (int64_t start = member.begin(num_rows, kGroup); start < end; start += kTile) {
            int64_t tile[kTile];
            int64_t next[kTile];
            for (int i = 0; i < kTile; i++) {
                tile[i] = std::min(start + i, end - 1);
                next[i] = std::min(start + i + kAhead, end - 1);
            }
            local.dots(tile, next, totals);
            const int count = int(std::min<int64_t>(kTile, end - start));
            for (int t = 0; t < rows.count(); t++) {
                for (int i = 0; i < count; i++) {
                    const float added = bias == nullptr ? 0.0f : bias[start + i];
                    output[t * num_rows + start + i] = from_float<Output>(totals[t * kTile + i] + added);
                }
            }
        }
    }
};

}  // namespace sirius
