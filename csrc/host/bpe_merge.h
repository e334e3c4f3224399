// Merging by the book: within a pre-token, join the adjacent pair of the best rank until no pair has one.
//
//   merges, best rank first   0 (l,o)→lo   1 (lo,w)→low   2 (e,r)→er
//   "lower"   l o w e r  →  lo w e r  →  low e r  →  low er
//
// Equal ranks go to the leftmost pair. Short pre-tokens are scanned for the best pair at each step; long ones go through
// a heap, so that a megabyte of one letter costs n log n and not n². This works for any rules whatever;
// `bpe_backtrack.h` is faster for those of a trained vocabulary.
#pragma once

#include <algorithm>
#include <cstdint>
#include <queue>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "flat_table.h"

namespace megascratch::bpe {

/// How a pair merges: into which id, and before which other pairs (smaller ranks first).
struct Rule {
    int32_t rank = INT32_MAX;
    int32_t id = -1;
};

class Merger {
  public:
    /// Args:
    ///   id_of_byte: the ids of the 256 single bytes.
    ///   rules: rules[i] belongs to pairs[i]; a later rule for the same pair replaces an earlier one.
    Merger(const int32_t* id_of_byte, const std::vector<uint64_t>& pairs, const std::vector<Rule>& rules)
        : rules_(pairs.size()) {
        std::copy_n(id_of_byte, 256, id_of_byte_);
        for (size_t i = 0; i < pairs.size(); ++i) rules_[pairs[i]] = rules[i];
    }

    /// Append the ids of a piece.
    void encode(std::string_view piece, std::vector<uint32_t>& out) const {
        if (piece.size() <= kScanLimit)
            by_scan(piece, out);
        else
            by_heap(piece, out);
    }

  private:
    static constexpr size_t kScanLimit = 48;  // bytes; up to here rescanning beats a heap
    static constexpr uint32_t kNone = UINT32_MAX;

    struct Part {
        int32_t id;
        uint32_t previous, next;
    };
    struct Candidate {
        Rule rule;
        uint32_t at;
        int32_t left, right;

        bool operator<(const Candidate& other) const {  // std::priority_queue puts the largest first
            return rule.rank != other.rule.rank ? rule.rank > other.rule.rank : at > other.at;
        }
    };

    Rule rule(int32_t left, int32_t right) const {
        const Rule* found = rules_.find(pair_key(left, right));
        return found ? *found : Rule{};
    }

    void by_scan(std::string_view piece, std::vector<uint32_t>& out) const {
        int32_t ids[kScanLimit];
        Rule rules[kScanLimit];  // rules[i] joins ids[i] and ids[i + 1]
        size_t n = piece.size();
        for (size_t i = 0; i < n; ++i) ids[i] = id_of_byte_[uint8_t(piece[i])];
        for (size_t i = 0; i + 1 < n; ++i) rules[i] = rule(ids[i], ids[i + 1]);
        while (n > 1) {
            size_t best = 0;
            for (size_t i = 1; i + 1 < n; ++i)
                if (rules[i].rank < rules[best].rank) best = i;
            if (rules[best].id < 0) break;
            ids[best] = rules[best].id;
            --n;
            std::copy(ids + best + 2, ids + n + 1, ids + best + 1);
            std::copy(rules + best + 1, rules + n, rules + best);
            if (best + 1 < n) rules[best] = rule(ids[best], ids[best + 1]);
            if (best > 0) rules[best - 1] = rule(ids[best - 1], ids[best]);
        }
        out.insert(out.end(), ids, ids + n);
    }

    void by_heap(std::string_view piece, std::vector<uint32_t>& out) const {
        if (piece.size() >= kNone) throw std::length_error("a pre-token of 4 GiB or more");
        const uint32_t n = uint32_t(piece.size());
        std::vector<Part> parts(n);
        std::priority_queue<Candidate> queue;
        const auto offer = [&](uint32_t at) {
            if (at == kNone || parts[at].next == kNone) return;
            const int32_t left = parts[at].id, right = parts[parts[at].next].id;
            const Rule found = rule(left, right);
            if (found.id >= 0) queue.push({found, at, left, right});
        };
        for (uint32_t i = 0; i < n; ++i)
            parts[i] = {id_of_byte_[uint8_t(piece[i])], i == 0 ? kNone : i - 1, i + 1 == n ? kNone : i + 1};
        for (uint32_t i = 0; i < n; ++i) offer(i);
        while (!queue.empty()) {
            const Candidate best = queue.top();
            queue.pop();
            Part& left = parts[best.at];
            // An entry is stale when either side has been merged away since; a swallowed part has id -1.
            if (left.id != best.left || left.next == kNone || parts[left.next].id != best.right) continue;
            Part& right = parts[left.next];
            left.id = best.rule.id;
            right.id = -1;
            left.next = right.next;
            if (left.next != kNone) parts[left.next].previous = best.at;
            offer(left.previous);
            offer(best.at);
        }
        for (uint32_t at = 0; at != kNone; at = parts[at].next) out.push_back(uint32_t(parts[at].id));
    }

    int32_t id_of_byte_[256];
    PairTable<Rule> rules_;
};

}  // namespace megascratch::bpe
