// One reduced FFN over a batch of tokens, spread over a team of threads.
#pragma once

#include "neuron_group.h"
#include "selection.h"
#include "threads.h"

namespace sirius {

// One pass over the weights for at most kMaxTokens tokens.
template <typename Weight>
struct Pass {
    using Pack = Packing<Weight>;
    using Stored = typename Pack::Stored;

    const Weight* rows;      // [num_neurons, 3, width]
    const int32_t* indices;  // [num_kept], coarse only
    Weight* output;          // [tokens.count, width]
    int64_t width;
    int64_t num_neurons;
    int64_t num_kept;
    Activation activation;
    Tokens<Weight> tokens;
    float* partial;    // [team, tokens.count, tokens.stride]
    float* gates;      // [tokens.count, num_neurons], fine only
    uint8_t* marked;   // [num_neurons], fine only
    int32_t* united;   // [num_neurons], fine only
    Cut* cuts;         // [tokens.count], fine only
    int64_t num_united;

    const Weight* row(int64_t neuron, int which) const { return rows + (3 * neuron + which) * width; }
    float* partial_of(int member) const { return partial + member * tokens.count * tokens.stride; }

    void coarse(Member member) {
        float* mine = partial_of(member.index);
        std::fill(mine, mine + tokens.count * tokens.stride, 0.0f);
        const int64_t end = member.end(num_kept, kGroup);
        for (int64_t start = member.begin(num_kept, kGroup); start < end; start += kGroup) {
            coarse_group(start, end, mine);
        }
        member.wait();
        reduce(member);
    }

    void coarse_group(int64_t start, int64_t end, float* mine) {
        const int count = int(std::min<int64_t>(kGroup, end - start));
        float gate[kMaxTokens * kGroup] = {};
        float up[kMaxTokens * kGroup] = {};
        float totals[kMaxTokens * kTile];
        const auto neuron = [&](int64_t position) { return indices[std::min(position, end - 1)]; };
        for (int i = 0; i < count; i += 2) {
            const int64_t now[2] = {neuron(start + i), neuron(start + i + 1)};
            const int64_t later[2] = {neuron(start + i + kAhead), neuron(start + i + kAhead + 1)};
            const Weight* tile[kTile] = {row(now[0], 0), row(now[1], 0), row(now[0], 1), row(now[1], 1)};
            const Weight* next[kTile] = {row(later[0], 0), row(later[0], 1), row(later[1], 0), row(later[1], 1)};
            dot_rows<Weight>(tile, tokens, width, next, totals);
            for (int t = 0; t < tokens.count; t++) {
                for (int half = 0; half < 2; half++) {
                    gate[t * kGroup + i + half] = totals[t * kTile + half];
                    up[t * kGroup + i + half] = totals[t * kTile + 2 + half];
                }
            }
        }
        activate(activation, gate, tokens.count * kGroup);
        Stored hidden[kMaxTokens * kGroup];
        for (int t = 0; t < tokens.count; t++) {
            for (int i = 0; i < kGroup; i++) {
                const int at = t * kGroup + i;
                hidden[at] = Pack::stored(i < count ? gate[at] * up[at] : 0.0f);
            }
        }
        mix(indices, start, end, hidden, mine);
    }

    void mix(const int32_t* kept, int64_t start, int64_t end, const Stored* hidden, float* mine) {
        const Weight* down[kGroup];
        const Weight* next[kGroup];
        for (int i = 0; i < kGroup; i++) {
            down[i] = row(kept[std::min(start + i, end - 1)], 2);
            next[i] = row(kept[std::min(start + i + kGroup, end - 1)], 2);
        }
        mix_group<Weight>(down, next, hidden, tokens.count, width, mine, tokens.stride);
    }

    void fine(Member member) {
        gate_pass(member);
        member.wait();
        for (int t = member.index; t < tokens.count; t += member.count) {
            cuts[t] = find_cut(gates + t * num_neurons, num_neurons, num_kept);
        }
        member.wait();
        mark(member);
        member.wait();
        if (member.index == 0) unite();
        float* mine = partial_of(member.index);
        std::fill(mine, mine + tokens.count * tokens.stride, 0.0f);
        member.wait();
        const int64_t end = member.end(num_united, kGroup);
        for (int64_t start = member.begin(num_united, kGroup); start < end; start += kGroup) {
            fine_group(start, end, mine);
        }
        member.wait();
        reduce(member);
    }

    void gate_pass(Member member) {
        const int64_t end = member.end(num_neurons, kGroup);
        float totals[kMaxTokens * kTile];
        const int64_t begin = member.begin(num_neurons, kGroup);
        for (int64_t start = begin; start < end; start += kTile) {
            const Weight* tile[kTile];
            const Weight* next[kTile];
            for (int i = 0; i < kTile; i++) {
                tile[i] = row(std::min(start + i, end - 1), 0);
                next[i] = row(std::min(start + i + kAhead, end - 1), 0);
            }
            dot_rows<Weight>(tile, tokens, width, next, totals);
            const int count = int(std::min<int64_t>(kTile, end - start));
            for (int t = 0; t < tokens.count; t++) {
                for (int i = 0; i < count; i++) gates[t * num_neurons + start + i] = totals[t * kTile + i];
            }
        }
        for (int t = 0; t < tokens.count; t++) activate(activation, gates + t * num_neurons + begin, end - begin);
    }

    void mark(Member member) {
        const int64_t begin = member.begin(num_neurons, kGroup);
        const int64_t end = member.end(num_neurons, kGroup);
        std::fill(marked + begin, marked + end, uint8_t(0));
        for (int t = 0; t < tokens.count; t++) {
            for (int64_t j = begin; j < end; j++) marked[j] |= uint8_t(cuts[t].keeps(gates[t * num_neurons + j], j));
        }
    }

    void unite() {
        int64_t count = 0;
        for (int64_t j = 0; j < num_neurons; j++) {
            united[count] = int32_t(j);
            count += marked[j];
        }
        num_united = count;
    }

    void fine_group(int64_t start, int64_t end, float* mine) {
        const int count = int(std::min<int64_t>(kGroup, end - start));
        float up[kMaxTokens * kGroup];
        float totals[kMaxTokens * kTile];
        const auto neuron = [&](int64_t position) { return united[std::min(position, end - 1)]; };
        for (int i = 0; i < count; i += kTile) {
            const Weight* tile[kTile];
            const Weight* next[kTile];
            for (int r = 0; r < kTile; r++) {
                tile[r] = row(neuron(start + i + r), 1);
                next[r] = row(neuron(start + i + r + kAhead), 1);
            }
            dot_rows<Weight>(tile, tokens, width, next, totals);
            for (int t = 0; t < tokens.count; t++) {
                for (int r = 0; r < kTile; r++) up[t * kGroup + i + r] = totals[t * kTile + r];
            }
        }
        Stored hidden[kMaxTokens * kGroup];
        for (int t = 0; t < tokens.count; t++) {
            for (int i = 0; i < kGroup; i++) {
                float value = 0.0f;
                if (i < count) {
                    const int64_t index = united[start + i];
                    const float gate = gates[t * num_neurons + index];
                    if (cuts[t].keeps(gate, index)) value = gate * up[t * kGroup + i];
                }
                hidden[t * kGroup + i] = Pack::stored(value);
            }
        }
        mix(united, start, end, hidden, mine);
    }

    // Adds the members' partial outputs in the order of their numbers and rounds to the output's dtype.
    void reduce(Member member) {
        constexpr int kColumns = Pack::kColumns;
        const int64_t end = member.end(width, kColumns);
        for (int t = 0; t < tokens.count; t++) {
            for (int64_t column = member.begin(width, kColumns); column < end; column += kColumns) {
                Vec total[Pack::kParts];
                for (int p = 0; p < Pack::kParts; p++) total[p] = zero();
                for (int m = 0; m < member.count; m++) {
                    const float* from = partial_of(m) + t * tokens.stride + column;
                    for (int p = 0; p < Pack::kParts; p++) total[p] = add(total[p], load(from + p * Vec::kWidth));
                }
                Pack::in_order(total);
                float ordered[kColumns];
                for (int p = 0; p < Pack::kParts; p++) store(ordered + p * Vec::kWidth, total[p]);
                const int64_t count = std::min<int64_t>(kColumns, width - column);
                Weight* to = output + t * width + column;
                for (int64_t i = 0; i < count; i++) to[i] = from_float<Weight>(ordered[i]);
            }
        }
    }
};

}  // namespace sirius
