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

#include <algorithm>
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

/// A short piece to encode among others, and room for its ids.
struct PieceJob {
    static constexpr size_t kMaxBytes = 64;
    const uint8_t* at;
    uint32_t length;  // from 1 to kMaxBytes
    uint32_t n_ids;
    uint32_t ids[kMaxBytes];
};

class Backtracker {
  public:
    static constexpr size_t kMostJobs = 64;

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

    /// Encode up to kMostJobs short pieces in step: a byte of each, then the next byte of each. The tables are larger than
    /// the nearest caches, and by the time that a piece has its turn again its memory has come.
    void encode_together(PieceJob* jobs, size_t n_jobs) const {
        Turn turns[kMostJobs];
        Turn *waiting[kMostJobs], *working[kMostJobs];
        for (size_t i = 0; i < n_jobs; ++i) {
            jobs[i].n_ids = 0;
            turns[i] = {&jobs[i], 0, 0, {}, {}};
            waiting[i] = &turns[i];
        }
        for (size_t n_waiting = n_jobs; n_waiting != 0;) {
            for (size_t i = 0; i < n_waiting; ++i) waiting[i]->walk = trie_->begin(waiting[i]->next_byte());
            std::copy_n(waiting, n_waiting, working);
            in_step(working, n_waiting, [&](Turn& turn) { return walk_on(turn); });
            for (size_t i = 0; i < n_waiting; ++i) compare(*waiting[i], waiting[i]->walk.found);
            std::copy_n(waiting, n_waiting, working);
            in_step(working, n_waiting, [&](Turn& turn) { return check_on(turn); });
            size_t n_left = 0;
            for (size_t i = 0; i < n_waiting; ++i)
                if (waiting[i]->take(prefixes_)) waiting[n_left++] = waiting[i];
            n_waiting = n_left;
        }
        for (size_t i = 0; i < n_jobs; ++i)
            for (uint32_t j = 0; j < jobs[i].n_ids; ++j) jobs[i].ids[j] = ids_[jobs[i].ids[j]];
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

    /// The tokens on both sides of a border, and before which merge one over it has to come to take it away.
    struct Border {
        uint32_t left = kNone, right = kNone, before = kNone;
    };
    enum class Answer { kYes, kNo, kOpen };

    /// Where a piece stands among those encoded together. Its job's ids are tokens until it is done.
    struct Turn {
        PieceJob* job;
        uint32_t at;         // of the next token
        uint64_t dead_ends;  // a bit a border
        Trie::Walk walk;     // what it found is the candidate for the next token
        Border border;       // between the token before and the candidate

        const uint8_t* next_byte() const { return job->at + at; }
        uint32_t last() const { return job->n_ids == 0 ? kNone : job->ids[job->n_ids - 1]; }

        /// Take the candidate; say whether there is more to encode.
        bool take(const std::vector<Prefix>& prefixes) {
            job->ids[job->n_ids++] = walk.found;
            at += prefixes[walk.found].length;
            return at < job->length;
        }
    };

    /// Call go_on for each in turn, until it has said false to all.
    template <class GoOn>
    static void in_step(Turn** working, size_t n, GoOn&& go_on) {
        for (size_t n_left; n != 0; n = n_left) {
            n_left = 0;
            for (size_t i = 0; i < n; ++i)
                if (go_on(*working[i])) working[n_left++] = working[i];
        }
    }

    /// Go a byte further along the longest match; false at its end.
    bool walk_on(Turn& turn) const {
        if (!trie_->step(turn.walk) || turn.walk.at == turn.job->at + turn.job->length) return false;
        trie_->touch(turn.walk);
        return true;
    }

    static void compare(Turn& turn, uint32_t candidate) {
        turn.walk.found = candidate;
        turn.border = {turn.last(), candidate};
    }

    /// Undo one merge beside the border, or do what follows; false once the candidate fits.
    bool check_on(Turn& turn) const {
        if (turn.walk.found == kNone) {  // a dead end: back to the token before, which was too long
            const uint32_t last = turn.last();
            assert(last != kNone && "every text has an encoding");
            turn.dead_ends |= uint64_t(1) << turn.at;
            turn.at -= prefixes_[last].length;
            --turn.job->n_ids;
            compare(turn, prefixes_[last].shorter);
            return true;
        }
        const Answer stays = turn.border.left == kNone ? Answer::kYes : undo(turn.border);
        if (stays == Answer::kOpen) return true;
        const uint32_t end = turn.at + prefixes_[turn.walk.found].length;
        if (stays == Answer::kYes && (end == turn.job->length || !(turn.dead_ends >> end & 1))) return false;
        compare(turn, prefixes_[turn.walk.found].shorter);
        return true;
    }

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

    /// Say whether merging leaves the border between these two.
    bool compatible(uint32_t left, uint32_t right) const {
        Border border{left, right};
        Answer stays;
        while ((stays = undo(border)) == Answer::kOpen) {
        }
        return stays == Answer::kYes;
    }

    /// Undo the later of the merges beside a border; one over it that would have come before the one undone last says no.
    Answer undo(Border& border) const {
        if (merged_.find(border.left, border.right) < border.before) return Answer::kNo;
        if (border.left > border.right) {
            if (border.left < 256) return Answer::kYes;
            border.before = border.left;
            border.left = splits_[border.left].right;
        } else {
            if (border.right < 256) return Answer::kYes;
            border.before = border.right + 1;  // of equals the leftmost goes first, and that is the one over the border
            border.right = splits_[border.right].left;
        }
        return Answer::kOpen;
    }

    std::vector<uint32_t> ids_;
    std::vector<Split> splits_;
    std::vector<Prefix> prefixes_;
    PackedPairs merged_;
    std::unique_ptr<Trie> trie_;
    std::vector<uint32_t> order_;  // while learning: the number of each id, kNone for those not taken up
};

}  // namespace megascratch::bpe
