// Whether two tokens may stand side by side: whether merging, left to itself, keeps the border between them.
//
//   merges, in their order            1 lo   2 low   3 er   4 we          (a token is its merge)
//   what has stood at the end of low        o until 1,  w until 2,  low ever after
//   what has stood at the beginning of er   e until 3,  er ever after
//   low|er   w and e would be joined by 4, but w is gone at 2: the border stays
//   o|we     o stays for ever and w until 4; nothing joins o with w or we: the border stays
//   l|ow     l and o are joined by 1, before anything takes them: no such border
//
// A border goes if some merge joins what stands on its two sides at the time. Two bytes have a table. For all else a token
// knows, as sets of 64 bits, whom it would have been joined to and who has stood at its edges: where those sets do not
// meet, and they seldom do, the border stays. What is left is found out by undoing the merges beside the border, the
// latest first.
#pragma once

#include <cstdint>
#include <vector>

#include "flat_table.h"

namespace megascratch::bpe {

/// What is known of a token, on a cache line of its own. Tokens are numbered in the order of the merges: the 256 bytes by
/// value, then each merge's result.
struct alignas(64) Token {
    static constexpr uint32_t kNone = UINT32_MAX;

    uint32_t id = 0;              // outside
    uint32_t length = 1;          // in bytes
    uint32_t shorter = kNone;     // the longest token that this one begins with
    uint32_t left = kNone, right = kNone;                    // what it is merged from
    uint32_t first_until = kNone, last_until = kNone;        // the merges inside that take its first and its last byte
    uint8_t first = 0, last = 0;
    uint64_t begins = 0, ends = 0;               // the tokens that have stood at its edges
    uint64_t joins_before = 0, joins_after = 0;  // the tokens that, beside them, would have been joined to those
};

class Borders {
  public:
    enum class Guess { kNo = 0, kMaybe = 1, kYes = 2 };

    Borders(size_t expected) : merged_(expected), of_bytes_(256 * 256, Token::kNone) { tokens_.reserve(expected + 1); }

    const std::vector<Token>& tokens() const { return tokens_; }
    const Token& operator[](uint32_t token) const { return tokens_[token]; }
    void touch(uint32_t token) const { __builtin_prefetch(&tokens_[token]); }

    /// Take up the next of the 256 bytes.
    void add_byte(uint32_t id) {
        Token token;
        token.id = id;
        token.first = token.last = uint8_t(tokens_.size());
        tokens_.push_back(token);
        joined_before_.push_back(0);
        joined_after_.push_back(0);
    }

    /// Take up the next merge.
    void add(uint32_t id, uint32_t left, uint32_t right) {
        const uint32_t token = uint32_t(tokens_.size());
        const Token &l = tokens_[left], &r = tokens_[right];
        Token made;
        made.id = id;
        made.length = l.length + r.length;
        made.left = left;
        made.right = right;
        made.first = l.first;
        made.last = r.last;
        made.first_until = is_byte(left) ? token : l.first_until;
        made.last_until = is_byte(right) ? token : r.last_until;
        made.ends = r.ends | (joined_after_[right] ? bit(right) : 0);
        made.joins_after = r.joins_after | joined_after_[right];
        if (is_byte(left) && is_byte(right)) {
            of_bytes_[left << 8 | right] = token;
        } else {
            joined_after_[left] |= bit(right);
            joined_before_[right] |= bit(left);
        }
        made.begins = l.begins | (joined_before_[left] ? bit(left) : 0);  // of a a a the left two are joined: so this
        made.joins_before = l.joins_before | joined_before_[left];        // merge, too, takes what stands at its beginning
        merged_.insert(left, right, token);
        tokens_.push_back(made);
        joined_before_.push_back(0);
        joined_after_.push_back(0);
    }

    void set_shorter(uint32_t token, uint32_t shorter) { tokens_[token].shorter = shorter; }

    /// There are no more merges: what is at an edge now is so for ever. Before this only `survives` may be asked.
    void finish() {
        for (uint32_t token = 0; token < tokens_.size(); ++token) {
            tokens_[token].joins_after |= joined_after_[token];
            tokens_[token].joins_before |= joined_before_[token];
            if (joined_after_[token]) tokens_[token].ends |= bit(token);
            if (joined_before_[token]) tokens_[token].begins |= bit(token);
        }
        joined_before_ = joined_after_ = {};
        Token nothing;
        nothing.last_until = 0;  // nor is a byte of it ever joined to another
        tokens_.push_back(nothing);
    }

    /// What stands before the first token of a text: compatible with all that come after. Its number is the one behind
    /// that of the last token, and only `finish` gives it.
    uint32_t nothing() const { return uint32_t(tokens_.size() - 1); }

    /// Say whether merging leaves the border between these two.
    bool compatible(uint32_t left, uint32_t right) const {
        const Guess guess = at_a_glance(left, right);
        return guess == Guess::kMaybe ? survives(left, right) : guess == Guess::kYes;
    }

    /// The same, or kMaybe where it takes longer to find out. There are no branches in this.
    Guess at_a_glance(uint32_t left, uint32_t right) const {
        const Token &l = tokens_[left], &r = tokens_[right];
        const uint32_t merge = of_bytes_[size_t(l.last) << 8 | r.first];
        const unsigned joined = (merge < l.last_until) & (merge <= r.first_until);
        const unsigned apart = ((l.joins_after & r.begins) == 0) | ((l.ends & r.joins_before) == 0);
        return Guess((1 - joined) << apart);
    }

    /// What `compatible` says, by undoing the later of the merges beside the border, and so on: one over it that would
    /// have come before the one undone last says no.
    bool survives(uint32_t left, uint32_t right) const {
        for (uint32_t before = Token::kNone;;) {
            if (merged_.find(left, right) < before) return false;
            if (left > right) {
                if (is_byte(left)) return true;
                before = left;
                left = tokens_[left].right;
            } else {
                if (is_byte(right)) return true;
                before = right + 1;  // of equals the leftmost goes first, and that is the one over the border
                right = tokens_[right].left;
            }
        }
    }

  private:
    static bool is_byte(uint32_t token) { return token < 256; }
    static uint64_t bit(uint32_t token) { return uint64_t(1) << (token * 0x9e3779b9u >> 26); }

    std::vector<Token> tokens_;
    PackedPairs merged_;
    std::vector<uint32_t> of_bytes_;                      // the merge of two bytes
    std::vector<uint64_t> joined_before_, joined_after_;  // of each token, what merges have joined to it so far
};

}  // namespace megascratch::bpe
