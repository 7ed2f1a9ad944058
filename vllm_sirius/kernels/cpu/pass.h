// One reduced FFN over a batch of tokens, spread over a team of threads.
//
// A group of kGroup neurons passes through all tokens before the next one starts, so weights are read from memory once.
#pragma once

#include <algorithm>

#include "activation.h"
#include "layout.h"
#include "selection.h"
#include "threads.h"

namespace sirius {

// Which rows are a neuron's. What is read together lies together: all three rows of a neuron, or, for fine sparsity, the
// gates of all neurons and then up and down row of each.
struct NeuronLayout {
    int64_t gate_step;
    int64_t first_up;  // the down row follows the up row
    int64_t up_step;

    static NeuronLayout by_neuron() { return {3, 1, 3}; }
    static NeuronLayout gates_first(int64_t num_neurons) { return {1, num_neurons, 2}; }

    int64_t gate(int64_t neuron) const { return gate_step * neuron; }
    int64_t up(int64_t neuron) const { return first_up + up_step * neuron; }
    int64_t down(int64_t neuron) const { return up(neuron) + 1; }
};

// One pass over the weights for at most kMaxTokens tokens. Rows computes with groups of rows given by their numbers.
template <typename Rows, typename Output>
struct Pass {
    Rows rows;
    NeuronLayout layout;
    const int32_t* indices;  // [num_kept], coarse only; null for neurons 0 ... num_kept - 1
    Output* output;          // [count, width]
    int64_t num_neurons;
    int64_t num_kept;
    Activation activation;
    float* partial;   // [team, count, stride]
    float* gates;     // [count, num_neurons], fine only
    uint8_t* marked;  // [num_neurons], fine only
    int32_t* united;  // [num_neurons], fine only
    Cut* cuts;        // [count], fine only
    int64_t num_united;

    float* partial_of(int member) const { return partial + member * rows.count() * rows.stride(); }

    void coarse(Member member) {
        float* mine = partial_of(member.index);
        std::fill(mine, mine + rows.count() * rows.stride(), 0.0f);
        const Rows local = rows.of_member(member.index);
        const int64_t end = member.end(num_kept, kGroup);
        for (int64_t start = member.begin(num_kept, kGroup); start < end; start += kGroup) {
            coarse_group(start, end, mine, local);
        }
        member.wait();
        reduce(member);
    }

    void coarse_group(int64_t start, int64_t end, float* mine, const Rows& local) {
        const int count = int(std::min<int64_t>(kGroup, end - start));
        float gate[kMaxTokens * kGroup] = {};
        float up[kMaxTokens * kGroup] = {};
        float totals[kMaxTokens * kTile];
        const auto neuron = [&](int64_t position) { return at(indices, std::min(position, end - 1)); };
        for (int i = 0; i < count; i += 2) {
            const int64_t now[2] = {neuron(start + i), neuron(start + i + 1)};
            const int64_t later[2] = {neuron(start + i + kAhead), neuron(start + i + kAhead + 1)};
            const int64_t tile[kTile] = {layout.gate(now[0]), layout.gate(now[1]), layout.up(now[0]), layout.up(now[1])};
            const int64_t next[kTile] = {layout.gate(later[0]), layout.up(later[0]), layout.gate(later[1]),
                                         layout.up(later[1])};
            local.dots(tile, next, totals);
            for (int t = 0; t < rows.count(); t++) {
                for (int half = 0; half < 2; half++) {
                    gate[t * kGroup + i + half] = totals[t * kTile + half];
                    up[t * kGroup + i + half] = totals[t * kTile + 2 + half];
                }
            }
        }
        activate(activation, gate, rows.count() * kGroup);
        float hidden[kMaxTokens * kGroup];
        for (int t = 0; t < rows.count(); t++) {
            for (int i = 0; i < kGroup; i++) {
                hidden[t * kGroup + i] = i < count ? gate[t * kGroup + i] * up[t * kGroup + i] : 0.0f;
            }
        }
        mix(indices, start, end, hidden, mine, local);
    }

    static int64_t at(const int32_t* kept, int64_t position) { return kept == nullptr ? position : kept[position]; }

    void mix(const int32_t* kept, int64_t start, int64_t end, const float* hidden, float* mine, const Rows& local) {
        int64_t down[kGroup];
        int64_t next[kGroup];
        for (int i = 0; i < kGroup; i++) {
            down[i] = layout.down(at(kept, std::min(start + i, end - 1)));
            next[i] = layout.down(at(kept, std::min(start + i + kGroup, end - 1)));
        }
        local.mix(down, next, hidden, mine);
    }

    void fine(Member member) {
        const Rows local = rows.of_member(member.index);
        gate_pass(member, local);
        member.wait();
        for (int t = member.index; t < rows.count(); t += member.count) {
            cuts[t] = find_cut(gates + t * num_neurons, num_neurons, num_kept);
        }
        member.wait();
        mark(member);
        member.wait();
        if (member.index == 0) unite();
        float* mine = partial_of(member.index);
        std::fill(mine, mine + rows.count() * rows.stride(), 0.0f);
        member.wait();
        const int64_t end = member.end(num_united, kGroup);
        for (int64_t start = member.begin(num_united, kGroup); start < end; start += kGroup) {
            fine_group(start, end, mine, local);
        }
        member.wait();
        reduce(member);
    }

    void gate_pass(Member member, const Rows& local) {
        const int64_t end = member.end(num_neurons, kGroup);
        float totals[kMaxTokens * kTile];
        const int64_t begin = member.begin(num_neurons, kGroup);
        for (int64_t start = begin; start < end; start += kTile) {
            int64_t tile[kTile];
            int64_t next[kTile];
            for (int i = 0; i < kTile; i++) {
                tile[i] = layout.gate(std::min(start + i, end - 1));
                next[i] = layout.gate(std::min(start + i + kAhead, end - 1));
            }
            local.dots(tile, next, totals);
            const int count = int(std::min<int64_t>(kTile, end - start));
            for (int t = 0; t < rows.count(); t++) {
                for (int i = 0; i < count; i++) gates[t * num_neurons + start + i] = totals[t * kTile + i];
            }
        }
        for (int t = 0; t < rows.count(); t++) activate(activation, gates + t * num_neurons + begin, end - begin);
    }

    void mark(Member member) {
        const int64_t begin = member.begin(num_neurons, kGroup);
        const int64_t end = member.end(num_neurons, kGroup);
        std::fill(marked + begin, marked + end, uint8_t(0));
        for (int t = 0; t < rows.count(); t++) {
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

    void fine_group(int64_t start, int64_t end, float* mine, const Rows& local) {
        const int count = int(std::min<int64_t>(kGroup, end - start));
        float up[kMaxTokens * kGroup];
        float totals[kMaxTokens * kTile];
        const auto neuron = [&](int64_t position) { return int64_t(united[std::min(position, end - 1)]); };
        for (int i = 0; i < count; i += kTile) {
            int64_t tile[kTile];
            int64_t next[kTile];
            for (int r = 0; r < kTile; r++) {
                tile[r] = layout.up(neuron(start + i + r));
                next[r] = layout.up(neuron(start + i + r + kAhead));
            }
            local.dots(tile, next, totals);
            for (int t = 0; t < rows.count(); t++) {
                for (int r = 0; r < kTile; r++) up[t * kGroup + i + r] = totals[t * kTile + r];
            }
        }
        float hidden[kMaxTokens * kGroup];
        for (int t = 0; t < rows.count(); t++) {
            for (int i = 0; i < kGroup; i++) {
                float value = 0.0f;
                if (i < count) {
                    const int64_t index = united[start + i];
                    const float gate = gates[t * num_neurons + index];
                    if (cuts[t].keeps(gate, index)) value = gate * up[t * kGroup + i];
                }
                hidden[t * kGroup + i] = value;
            }
        }
        mix(united, start, end, hidden, mine, local);
    }

    // Adds the members' partial outputs in the order of their numbers and rounds to the output's dtype.
    void reduce(Member member) {
        constexpr int kUnit = Rows::kUnit;
        const int64_t width = rows.width();
        const int64_t end = member.end(width, kUnit);
        for (int t = 0; t < rows.count(); t++) {
            for (int64_t column = member.begin(width, kUnit); column < end; column += kUnit) {
                float total[kUnit] = {};
                for (int m = 0; m < member.count; m++) {
                    const float* from = partial_of(m) + t * rows.stride() + column;
                    for (int i = 0; i < kUnit; i += Vec::kWidth) store(total + i, add(load(total + i), load(from + i)));
                }
                Rows::in_order(total);
                const int64_t count = std::min<int64_t>(kUnit, width - column);
                Output* to = output + t * width + column;
                for (int64_t i = 0; i < count; i++) to[i] = from_float<Output>(total[i]);
            }
        }
    }
};

}  // namespace sirius
