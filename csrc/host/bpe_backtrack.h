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
#include <cstring>
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
};

class Backtracker {
  public:
    static constexpr size_t kMostJobs = 256;

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
        for (uint32_t token = 0; token < borders_.nothing(); ++token) can[borders_[token].id] = true;
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
            const uint32_t last = chosen.empty() ? borders_.nothing() : chosen.back();
            for (; next != kNone; next = borders_[next].shorter) {
                const size_t border = at + borders_[next].length;
                if (!(dead_ends[border / 64] >> (border % 64) & 1) && borders_.compatible(last, next)) break;
            }
            if (next != kNone) {
                chosen.push_back(next);
                at += borders_[next].length;
                if (at == piece.size()) break;
                next = trie_->longest(bytes + at, end);
            } else {
                assert(!chosen.empty() && "every text has an encoding");
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

    /// Encode up to kMostJobs short pieces at once: that is several times faster than one after the other.
    void encode_together(PieceJob* jobs, size_t n_jobs) const { Group(borders_, *trie_, jobs, n_jobs).encode(); }

  private:
    static constexpr uint32_t kNone = Token::kNone;
    static constexpr size_t kKeep = 1 << 20;

    /// Some of the pieces of a group, by number.
    struct Members {
        uint32_t n = 0;
        uint32_t pieces[kMostJobs + 1];

        /// Take up a piece if it belongs here: without a branch, for whether it does is anybody's guess.
        void add(uint32_t piece, bool belongs) {
            pieces[n] = piece;
            n += belongs;
        }

        /// Remove all, and call `use` for each, which may add it again.
        template <class Use>
        void use_up(Use&& use) {
            const uint32_t n_old = n;
            n = 0;
            for (uint32_t i = 0; i < n_old; ++i) use(pieces[i]);
        }
    };

    /// Pieces that are encoded together. The tables are larger than the nearest caches: what a piece will read of them
    /// is asked for, and has come by the time that the piece has its turn again. What a piece needs next depends on
    /// what it has read, and the processor would guess it wrong; so there is a list of pieces for each thing to do, and
    /// a round goes through one list after the other.
    ///
    ///   walking → found      the longest match from here, a byte a round
    ///   found → candidate    it is asked for, and looked at in the next round
    ///   candidate → fitting, unsure or unfit;  unsure → fitting or doubtful;  doubtful → fitting or unfit
    ///   fitting → walking    it is taken: on from its end
    ///   unfit → candidate    the next shorter one
    class Group {
      public:
        Group(const Borders& borders, const Trie& trie, PieceJob* jobs, size_t n_jobs)
            : borders_(borders), trie_(trie), jobs_(jobs), n_jobs_(uint32_t(n_jobs)) {}

        void encode() {
            using Guess = Borders::Guess;
            Members walking, found, candidates, unsure, doubtful, fitting, unfit;
            copy_texts();
            for (uint32_t piece = 0; piece < n_jobs_; ++piece) {
                begin_walk(piece);
                walking.add(piece, true);
            }
            while (walking.n + candidates.n + unsure.n != 0) {
                walking.use_up([&](uint32_t piece) {
                    const bool goes_on = walk_on(piece);
                    walking.add(piece, goes_on);
                    found.add(piece, !goes_on);
                });
                for (uint32_t i = 0; i < found.n; ++i) borders_.touch(turns_[found.pieces[i]].candidate());
                unsure.use_up([&](uint32_t piece) {
                    const bool fits = look_again(piece);
                    fitting.add(piece, fits);
                    doubtful.add(piece, !fits);
                });
                candidates.use_up([&](uint32_t piece) {
                    const Guess fits = look_at_candidate(piece);
                    fitting.add(piece, fits == Guess::kYes);
                    unsure.add(piece, fits == Guess::kMaybe);
                    unfit.add(piece, fits == Guess::kNo);
                });
                for (uint32_t i = 0; i < unsure.n; ++i) ask_for_second_look(unsure.pieces[i]);
                doubtful.use_up([&](uint32_t piece) {
                    const bool fits = find_out(piece);
                    fitting.add(piece, fits);
                    unfit.add(piece, !fits);
                });
                fitting.use_up([&](uint32_t piece) {
                    take_candidate(piece);
                    begin_walk(piece);
                    walking.add(piece, !at_end(piece));
                });
                unfit.use_up([&](uint32_t piece) {
                    shorten_candidate(piece);
                    candidates.add(piece, true);
                });
                found.use_up([&](uint32_t piece) { candidates.add(piece, true); });
            }
            for (uint32_t piece = 0; piece < n_jobs_; ++piece) {
                PieceJob& job = jobs_[piece];
                job.n_ids = uint32_t(turns_[piece].to - job.ids);
                for (uint32_t i = 0; i < job.n_ids; ++i) job.ids[i] = borders_[job.ids[i]].id;
            }
        }

      private:
        /// Where a piece stands.
        struct Turn {
            uint32_t at;      // of the next token in `text_`
            uint32_t last;    // the token before it
            uint32_t walked;  // where the walk stands in `text_`
            uint32_t* to;     // the place of the next token among the job's ids, which are tokens until all is done
            Trie::Walk walk;

            uint32_t& candidate() { return walk.found; }  // for the next token
        };

        /// Put the pieces end to end, each with a kEnd behind it.
        void copy_texts() {
            uint32_t n = 0;
            for (uint32_t piece = 0; piece < n_jobs_; ++piece) {
                PieceJob& job = jobs_[piece];
                Turn& turn = turns_[piece];
                turn.at = n;
                turn.last = borders_.nothing();
                turn.to = job.ids;
                std::copy_n(job.at, job.length, text_ + n);
                n += job.length;
                text_[n++] = Trie::kEnd;
            }
            text_[n] = text_[n + 1] = Trie::kEnd;  // asked for beyond the last piece, and never used
            std::memset(is_dead_end_, 0, n);
        }

        bool at_end(uint32_t piece) const { return text_[turns_[piece].at] == Trie::kEnd; }

        void begin_walk(uint32_t piece) {
            Turn& turn = turns_[piece];
            turn.walk = trie_.begin(text_[turn.at], text_[turn.at + 1]);
            turn.walked = turn.at + 2;
            trie_.touch(turn.walk, text_[turn.walked]);
        }

        /// Go a byte further along the longest match; false at its end.
        bool walk_on(uint32_t piece) {
            Turn& turn = turns_[piece];
            Trie::Walk walk = turn.walk;
            trie_.step(walk, text_[turn.walked++]);
            trie_.touch(walk, text_[turn.walked]);
            turn.walk = walk;
            return !walk.over();
        }

        /// Say whether the candidate fits beside the token before, as far as that is known at a glance.
        Borders::Guess look_at_candidate(uint32_t piece) {
            Turn& turn = turns_[piece];
            const bool dead_end = is_dead_end_[turn.at + borders_[turn.candidate()].length];
            const Borders::Guess guess = borders_.at_a_glance(turn.last, turn.candidate());
            return Borders::Guess(unsigned(guess) * !dead_end);  // no is 0
        }

        void ask_for_second_look(uint32_t piece) {
            borders_.touch_for_second_look(turns_[piece].last);
            borders_.touch_for_second_look(turns_[piece].candidate());
        }

        bool look_again(uint32_t piece) {
            return borders_.at_second_look(turns_[piece].last, turns_[piece].candidate());
        }

        bool find_out(uint32_t piece) {
            return borders_.survives(turns_[piece].last, turns_[piece].candidate());
        }

        void take_candidate(uint32_t piece) {
            Turn& turn = turns_[piece];
            *turn.to++ = turn.last = turn.candidate();
            turn.at += borders_[turn.last].length;
        }

        /// Choose the next shorter candidate. Where there is none, this is a dead end: the token before was too long.
        void shorten_candidate(uint32_t piece) {
            Turn& turn = turns_[piece];
            uint32_t shorter = borders_[turn.candidate()].shorter;
            while (shorter == kNone) {
                assert(turn.last != borders_.nothing() && "every text has an encoding");
                is_dead_end_[turn.at] = true;
                turn.at -= borders_[turn.last].length;
                shorter = borders_[turn.last].shorter;
                --turn.to;
                turn.last = turn.to == jobs_[piece].ids ? borders_.nothing() : turn.to[-1];
            }
            turn.candidate() = shorter;
            borders_.touch(shorter);
        }

        static constexpr size_t kMostSymbols = kMostJobs * (PieceJob::kMaxBytes + 1);

        const Borders& borders_;
        const Trie& trie_;
        PieceJob* const jobs_;
        const uint32_t n_jobs_;
        Turn turns_[kMostJobs];
        uint16_t text_[kMostSymbols + 2];  // bytes and kEnds
        bool is_dead_end_[kMostSymbols];   // a border from which no token leads on
    };

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
