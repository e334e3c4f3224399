// Encoding by longest matches, which are checked and taken back: what merging yields, in time linear in the bytes.
//
//   vocabulary, in the order of the merges   l o w e r  lo  low  er  we
//   "lower"   longest match low  →  longest match er: may low|er stand side by side? They may (bpe_borders.h)  →  low er
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
#include <vector>

#include "bpe_borders.h"
#include "bpe_merge.h"
#include "bpe_trie.h"

namespace megascratch::bpe {

/// Room to work in.
struct BacktrackScratch {
    std::vector<uint32_t> chosen;
    std::vector<uint64_t> dead_ends;  // a bit a border
};

/// A short piece to encode among others, and room for its ids.
struct PieceJob {
    static constexpr size_t kMaxBytes = 256;
    const uint8_t* at;
    uint32_t length;  // from 1 to kMaxBytes
    uint32_t n_ids;
    uint32_t ids[kMaxBytes];

    unsigned byte(uint32_t i) const { return i < length ? at[i] : Trie::kEnd; }
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
        for (const Token& token : borders_.tokens()) can[token.id] = true;
        return can;
    }

    /// Append the ids of a piece.
    void encode(std::string_view piece, BacktrackScratch& scratch, std::vector<uint32_t>& out) const {
        const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(piece.data());
        const uint8_t* const end = bytes + piece.size();
        std::vector<uint32_t>& chosen = scratch.chosen;
        std::vector<uint64_t>& dead_ends = scratch.dead_ends;
        chosen.clear();
        dead_ends.assign(piece.size() / 64 + 1, 0);
        uint32_t next = trie_->longest(bytes, end);
        for (size_t at = 0;;) {
            const uint32_t last = chosen.empty() ? kNone : chosen.back();
            for (; next != kNone; next = borders_[next].shorter) {
                const size_t border = at + borders_[next].length;
                if (!(dead_ends[border / 64] >> (border % 64) & 1) && fits(last, next)) break;
            }
            if (next != kNone) {
                chosen.push_back(next);
                at += borders_[next].length;
                if (at == piece.size()) break;
                next = trie_->longest(bytes + at, end);
            } else {
                assert(last != kNone && "every text has an encoding");
                dead_ends[at / 64] |= uint64_t(1) << (at % 64);
                chosen.pop_back();
                at -= borders_[last].length;
                next = borders_[last].shorter;
            }
        }
        for (uint32_t token : chosen) out.push_back(borders_[token].id);
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
            turns[i].job = &jobs[i];
            waiting[i] = &turns[i];
        }
        for (size_t n_waiting = n_jobs; n_waiting != 0;) {
            for (size_t i = 0; i < n_waiting; ++i) begin_walk(*waiting[i]);
            std::copy_n(waiting, n_waiting, working);
            in_step(working, n_waiting, [&](Turn& turn) { return walk_on(turn); });
            for (size_t i = 0; i < n_waiting; ++i) borders_.touch(waiting[i]->walk.found);
            std::copy_n(waiting, n_waiting, working);
            in_step(working, n_waiting, [&](Turn& turn) { return check_on(turn); });
            size_t n_left = 0;
            for (size_t i = 0; i < n_waiting; ++i)
                if (take(*waiting[i])) waiting[n_left++] = waiting[i];
            n_waiting = n_left;
        }
        for (size_t i = 0; i < n_jobs; ++i)
            for (uint32_t j = 0; j < jobs[i].n_ids; ++j) jobs[i].ids[j] = borders_[jobs[i].ids[j]].id;
    }

  private:
    static constexpr uint32_t kNone = Token::kNone;
    static constexpr size_t kKeep = 1 << 20;

    /// Where a piece stands among those encoded together. Its job's ids are tokens until it is done.
    struct Turn {
        PieceJob* job;
        uint32_t at = 0;         // of the next token
        uint32_t walked;         // where the walk stands
        Trie::Walk walk;         // what it found is the candidate for the next token
        uint64_t dead_ends[PieceJob::kMaxBytes / 64] = {};  // a bit a border

        uint32_t last() const { return job->n_ids == 0 ? kNone : job->ids[job->n_ids - 1]; }
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

    void begin_walk(Turn& turn) const {
        turn.walk = trie_->begin(turn.job->at[turn.at], turn.job->byte(turn.at + 1));
        turn.walked = turn.at + 2;
        trie_->touch(turn.walk, turn.job->byte(turn.walked));
    }

    /// Go a byte further along the longest match; false at its end.
    bool walk_on(Turn& turn) const {
        trie_->step(turn.walk, turn.job->byte(turn.walked++));
        trie_->touch(turn.walk, turn.job->byte(turn.walked));
        return !turn.walk.over();
    }

    /// Look at the candidate, and choose another where it does not fit; false once it does.
    bool check_on(Turn& turn) const {
        uint32_t& candidate = turn.walk.found;
        const uint32_t last = turn.last();
        if (candidate == kNone) {  // a dead end: back to the token before, which was too long
            assert(last != kNone && "every text has an encoding");
            turn.dead_ends[turn.at / 64] |= uint64_t(1) << (turn.at % 64);
            turn.at -= borders_[last].length;
            --turn.job->n_ids;
            candidate = borders_[last].shorter;
        } else {
            const uint32_t end = turn.at + borders_[candidate].length;
            const bool dead = end < turn.job->length && turn.dead_ends[end / 64] >> (end % 64) & 1;
            if (!dead && fits(last, candidate)) return false;
            candidate = borders_[candidate].shorter;
        }
        if (candidate != kNone) borders_.touch(candidate);
        return true;
    }

    /// Take the candidate; say whether there is more to encode.
    bool take(Turn& turn) const {
        turn.job->ids[turn.job->n_ids++] = turn.walk.found;
        turn.at += borders_[turn.walk.found].length;
        return turn.at < turn.job->length;
    }

    bool fits(uint32_t last, uint32_t next) const { return last == kNone || borders_.compatible(last, next); }

    Backtracker(const std::vector<std::string_view>& tokens, const int32_t* id_of_byte)
        : borders_(tokens.size()), order_(tokens.size(), kNone) {
        for (uint32_t byte = 0; byte < 256; ++byte) {
            order_[size_t(id_of_byte[byte])] = byte;
            borders_.add_byte(uint32_t(id_of_byte[byte]));
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
            if (!borders_.survives(left, right)) continue;
            order_[size_t(id)] = uint32_t(borders_.tokens().size());
            borders_.add(uint32_t(id), left, right);
            return true;
        }
        return !from_later_ones;
    }

    bool finish(const std::vector<std::string_view>& tokens) {
        std::vector<std::string_view> strings;
        for (const Token& token : borders_.tokens()) strings.push_back(tokens[token.id]);
        trie_ = std::make_unique<Trie>(strings);
        for (uint32_t token = 0; token < strings.size(); ++token) {
            const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(strings[token].data());
            const size_t length = strings[token].size();
            if (trie_->longest(bytes, bytes + length) != token) return false;  // it has a twin
            if (length > 1) borders_.set_shorter(token, trie_->longest(bytes, bytes + length - 1));
        }
        borders_.finish();
        order_ = {};
        return true;
    }

    Borders borders_;
    std::unique_ptr<Trie> trie_;
    std::vector<uint32_t> order_;  // while learning: the number of each id, kNone for those not taken up
};

}  // namespace megascratch::bpe
