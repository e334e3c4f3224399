// Encoding by longest matches, which are checked and taken back: what merging yields, in time linear in the bytes.
//
//   vocabulary, in the order of the merges   l o w e r  lo  low  er  we
//   "lower"   longest match low  →  longest match er: could low|er stand next to each other?
//             undo er: low|e; undo low: lo|w, and so on: no merge joins anything over the border, so it stays  →  low er
//   "lowe"    low  →  e fits
//   "owe"     o    →  we fits, as long as no (o,w) merge exists that comes before (w,e)
//
// A sequence of tokens is what merging yields exactly if each two neighbours are, so tokens are chosen from the left: the
// longest that fits beside the one before it. Where none fits, the one before it was too long, and no other way of
// reaching this border can help either: it is marked, and the next shorter token is tried there.
//
// That holds where merges run in the order of their results (each token is made of earlier ones) and every token is what
// its own bytes merge into; every trained vocabulary is so. `make` proves it for the vocabulary at hand, token by token:
// of the pairs that spell a token only one can ever stand side by side. A token that has none is never made by merging.
// Idea: van Antwerpen and Neubeck, "So many tokens, so little time" (GitHub blog, 2024).
#pragma once

#include <cassert>
#include <cstdint>
#include <memory>
#include <numeric>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "bpe_merge.h"
#include "bpe_trie.h"
#include "flat_table.h"

namespace megascratch::bpe {

/// Room to work in, and what was found out before about neighbours.
struct BacktrackScratch {
    static constexpr unsigned kLogChoices = 14;
    std::vector<uint32_t> chosen;
    std::vector<uint64_t> dead_ends;                                                // a bit a border
    std::vector<uint64_t> choices = std::vector<uint64_t>(1 << kLogChoices, ~0ULL);  // last, match, choice: 21 bits each
};

class Backtracker {
  public:
    /// Return an encoder for these rules, or null where they are not those of a trained vocabulary.
    ///
    /// Args: as those of `Merger`; tokens: the bytes of each id.
    static std::unique_ptr<Backtracker> make(const std::vector<std::string_view>& tokens, const int32_t* id_of_byte,
                                             const std::vector<uint64_t>& pairs, const std::vector<Rule>& rules) {
        std::unique_ptr<Backtracker> made(new Backtracker(tokens, id_of_byte));
        return made->learn(tokens, pairs, rules) ? std::move(made) : nullptr;
    }

    /// Say for each id whether merging can yield it.
    std::vector<bool> reachable(size_t n_ids) const {
        std::vector<bool> can(n_ids);
        for (uint32_t id : ids_) can[id] = true;
        return can;
    }

    /// Append the ids of a piece.
    void encode(std::string_view piece, BacktrackScratch& scratch, std::vector<uint32_t>& out) const {
        const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(piece.data());
        const uint8_t* const end = bytes + piece.size();
        uint32_t next = trie_->longest(bytes, end);
        if (prefixes_[next].length == piece.size()) {
            out.push_back(ids_[next]);
            return;
        }
        std::vector<uint32_t>& chosen = scratch.chosen;
        std::vector<uint64_t>& dead_ends = scratch.dead_ends;
        chosen.clear();
        dead_ends.assign(piece.size() / 64 + 1, 0);
        for (size_t at = 0; at < piece.size();) {
            const uint32_t last = chosen.empty() ? kNone : chosen.back();
            for (; (next = choose(last, next, scratch)) != kNone; next = prefixes_[next].shorter) {
                const size_t border = at + prefixes_[next].length;
                if (!(dead_ends[border / 64] >> (border % 64) & 1)) break;
            }
            if (next != kNone) {
                chosen.push_back(next);
                at += prefixes_[next].length;
                next = trie_->longest(bytes + at, end);
            } else {
                assert(last != kNone && "every text has an encoding");
                dead_ends[at / 64] |= uint64_t(1) << (at % 64);
                chosen.pop_back();
                at -= prefixes_[last].length;
                next = prefixes_[last].shorter;
            }
        }
        for (uint32_t token : chosen) out.push_back(ids_[token]);
        if (chosen.capacity() > kKeep) {  // do not keep a giant's scratch
            std::vector<uint32_t>().swap(chosen);
            std::vector<uint64_t>().swap(dead_ends);
        }
    }

  private:
    static constexpr uint32_t kNone = Trie::kNone;
    static constexpr size_t kKeep = 1 << 20;

    // Tokens are numbered by merge order here: the 256 bytes by value, then each merge's result.
    struct Split {
        uint32_t left, right;  // what a token is merged from; unused for bytes
    };
    struct Prefix {
        uint32_t shorter;  // the longest token that this one begins with
        uint32_t length;   // of this one, in bytes
    };

    Backtracker(const std::vector<std::string_view>& tokens, const int32_t* id_of_byte)
        : merged_(tokens.size()), order_(tokens.size(), kNone) {
        for (uint32_t byte = 0; byte < 256; ++byte) {
            order_[size_t(id_of_byte[byte])] = byte;
            add(uint32_t(id_of_byte[byte]), {byte, byte});
        }
    }

    bool learn(const std::vector<std::string_view>& tokens, const std::vector<uint64_t>& pairs,
               const std::vector<Rule>& rules) {
        if (tokens.size() >= PackedPairs::kMaxIds) return false;
        std::vector<uint32_t> by_rank(rules.size());
        std::iota(by_rank.begin(), by_rank.end(), 0);
        std::stable_sort(by_rank.begin(), by_rank.end(),
                         [&](uint32_t a, uint32_t b) { return rules[a].rank < rules[b].rank; });
        std::vector<bool> seen(tokens.size());
        for (size_t first = 0; first < by_rank.size();) {
            const int32_t id = rules[by_rank[first]].id;
            if (seen[size_t(id)] || order_[size_t(id)] != kNone) return false;  // two merges at different times make it
            seen[size_t(id)] = true;
            size_t last = first;
            while (last < by_rank.size() && rules[by_rank[last]].id == id) ++last;
            if (!learn_token(tokens, id, &by_rank[first], last - first, pairs)) return false;
            first = last;
        }
        return finish(tokens);
    }

    /// Take up a token by the one pair of those given that can stand side by side.
    bool learn_token(const std::vector<std::string_view>& tokens, int32_t id, const uint32_t* rows, size_t n_rows,
                     const std::vector<uint64_t>& pairs) {
        bool from_later_ones = false;
        for (size_t row = 0; row < n_rows; ++row) {
            const size_t left_id = size_t(pairs[rows[row]] >> 32), right_id = size_t(uint32_t(pairs[rows[row]]));
            const std::string_view spelt = tokens[size_t(id)];
            if (spelt.size() != tokens[left_id].size() + tokens[right_id].size() ||
                spelt.substr(0, tokens[left_id].size()) != tokens[left_id] ||
                spelt.substr(tokens[left_id].size()) != tokens[right_id])
                return false;
            const uint32_t left = order_[left_id], right = order_[right_id];
            if (left == kNone || right == kNone) {
                from_later_ones = true;
                continue;
            }
            if (!compatible(left, right)) continue;
            order_[size_t(id)] = uint32_t(ids_.size());
            merged_.insert(left, right, uint32_t(ids_.size()));
            add(uint32_t(id), {left, right});
            return true;
        }
        return !from_later_ones;
    }

    void add(uint32_t id, Split split) {
        ids_.push_back(id);
        splits_.push_back(split);
    }

    bool finish(const std::vector<std::string_view>& tokens) {
        std::vector<std::string_view> strings;
        for (uint32_t id : ids_) strings.push_back(tokens[id]);
        trie_ = std::make_unique<Trie>(strings);
        for (uint32_t token = 0; token < strings.size(); ++token) {
            const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(strings[token].data());
            const size_t length = strings[token].size();
            if (trie_->longest(bytes, bytes + length) != token) return false;  // it has a twin
            prefixes_.push_back({trie_->longest(bytes, bytes + length - 1), uint32_t(length)});
        }
        order_ = {};
        return true;
    }

    /// The longest of `match` and the tokens that it begins with that fits after `last`; kNone where none does.
    uint32_t choose(uint32_t last, uint32_t match, BacktrackScratch& scratch) const {
        if (last == kNone || match == kNone) return match;
        constexpr uint64_t kNothing = PackedPairs::kMaxIds - 1;
        const uint64_t key = uint64_t(last) << 21 | match;
        uint64_t& known = scratch.choices[key * 0x9e3779b97f4a7c15ULL >> (64 - BacktrackScratch::kLogChoices)];
        if (known >> 21 == key) return (known & kNothing) == kNothing ? kNone : uint32_t(known & kNothing);
        while (match != kNone && !compatible(last, match)) match = prefixes_[match].shorter;
        known = key << 21 | (match == kNone ? kNothing : match);
        return match;
    }

    /// Say whether merging leaves the border between these two. Undoes their merges, the latest first; at each step, a
    /// merge over the border that would have come before the one undone says no.
    bool compatible(uint32_t left, uint32_t right) const {
        for (uint32_t before = kNone;;) {
            if (merged_.find(left, right) < before) return false;
            if (left > right) {
                if (left < 256) return true;
                before = left;
                left = splits_[left].right;
            } else {
                if (right < 256) return true;
                before = right + 1;  // of equals the leftmost goes first, and that is the one over the border
                right = splits_[right].left;
            }
        }
    }

    std::vector<uint32_t> ids_;
    std::vector<Split> splits_;
    std::vector<Prefix> prefixes_;
    PackedPairs merged_;
    std::unique_ptr<Trie> trie_;
    std::vector<uint32_t> order_;  // while learning: the number of each id, kNone for those not taken up
};

}  // namespace megascratch::bpe
