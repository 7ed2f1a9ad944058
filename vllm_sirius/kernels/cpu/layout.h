// Sizes that the passes over weights share.
#pragma once

#include <cstdint>

namespace sirius {

constexpr int kGroup = 16;       // neurons whose down rows are held in registers together
constexpr int kTile = 4;         // weight rows that share the loads of a few tokens
constexpr int kMaxTokens = 32;   // tokens per pass over the weights
constexpr int kAhead = 8;        // neurons between the gate and up rows in work and the ones prefetched
constexpr int kSecondLevel = 2;  // prefetch into the second-level cache: a group does not fit into the first

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace sirius
