// Whether two tokens may stand side by side: whether merging, left to itself, keeps the border between them.
//
//   merges, in their order            1 lo   2 low   3 er   4 we          (a token is its merge)
//   what has stood at the end of low        o until 1,  w until 2,  low ever after
//   what has stood at the beginning of er   e until 3,  er ever after
//   low|er   w and e would be joined by 4, but w is gone at 2: the border stays
//   o|we     o stays for ever and w until 4; nothing joins o with w or we: the border stays
//   l|ow     l and o are joined by 1, before anything takes them: no such border
//
// A border goes if some merge joins what stands on its two sides at the time. Two bytes have a table. For all else a
// token knows, as sets of 64 bits, whom it would have been joined to and who has stood at its edges: where those sets do
// not meet, and they seldom do, the border stays. Many that meet have a bit in common and no token: so the same sets by
// other hashes are there for a second look. What is left is found out by undoing the merges beside the border, the
// latest first.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "flat_table.h"

namespace megascratch::bpe {

/// The edges of a token, as sets of tokens by one of several hashes.
struct Edges {
    uint64_t begins = 0, ends = 0;               // the tokens that have stood at them
    uint64_t joins_before = 0, joins_after = 0;  // the tokens that, beside them, would have been joined to those
};

/// What is known of a token: on one cache line what is always asked, on a second one what seldom is. Tokens are
/// numbered in the order of the merges: the 256 bytes by value, then each merge's result.
struct alignas(64) Token {
    static constexpr uint32_t kNone = UINT32_MAX;

    uint32_t id = 0;              // outside
    uint32_t length = 1;          // in bytes
    uint32_t shorter = kNone;     // the longest token that this one begins with
    uint32_t left = kNone, right = kNone;                    // what it is merged from
    uint32_t first_until = kNone, last_until = kNone;        // the merges inside that take its first and its last byte
    uint8_t first = 0, last = 0;
    static constexpr size_t kHashes = 3;
    Edges edges[kHashes];  // the first for a glance, the others for a second look
};
static_assert(sizeof(Token) == 128 && offsetof(Token, edges) == 32);

class Borders {
  public:
    enum class Guess { kNo = 0, kMaybe = 1, kYes = 2 };

    Borders(size_t expected) : merged_(expected), of_bytes_(256 * 256, Token::kNone) { tokens_.reserve(expected + 1); }

    const std::vector<Token>& tokens() const { return tokens_; }
    const Token& operator[](uint32_t token) const { return tokens_[token]; }
    void touch(uint32_t token) const { __builtin_prefetch(&tokens_[token]); }
    void touch_for_second_look(uint32_t token) const { __builtin_prefetch(&tokens_[token].edges[1]); }

    /// Take up the next of the 256 bytes.
    void add_byte(uint32_t id) {
        Token token;
        token.id = id;
        token.first = token.last = uint8_t(tokens_.size());
        tokens_.push_back(token);
        joined_.emplace_back();
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
        const bool of_bytes = is_byte(left) && is_byte(right);
        if (of_bytes) of_bytes_[left << 8 | right] = token;
        for (size_t hash = 0; hash < kHashes; ++hash) {
            Joined &by_left = joined_[left][hash], &by_right = joined_[right][hash];
            const Edges &begin = l.edges[hash], &end = r.edges[hash];
            Edges& edges = made.edges[hash];
            edges.ends = end.ends | (by_right.after ? bit(right, hash) : 0);
            edges.joins_after = end.joins_after | by_right.after;
            if (!of_bytes) {
                by_left.after |= bit(right, hash);
                by_right.before |= bit(left, hash);
            }
            // Of a a a the left two are joined: so this merge, too, takes what stands at its beginning.
            edges.begins = begin.begins | (by_left.before ? bit(left, hash) : 0);
            edges.joins_before = begin.joins_before | by_left.before;
        }
        merged_.insert(left, right, token);
        tokens_.push_back(made);
        joined_.emplace_back();
    }

    void set_shorter(uint32_t token, uint32_t shorter) { tokens_[token].shorter = shorter; }

    /// There are no more merges: what is at an edge now is so for ever. Before this only `survives` may be asked.
    void finish() {
        for (uint32_t token = 0; token < tokens_.size(); ++token) {
            for (size_t hash = 0; hash < kHashes; ++hash) {
                const Joined& joined = joined_[token][hash];
                Edges& edges = tokens_[token].edges[hash];
                edges.joins_after |= joined.after;
                edges.joins_before |= joined.before;
                if (joined.after) edges.ends |= bit(token, hash);
                if (joined.before) edges.begins |= bit(token, hash);
            }
        }
        joined_ = {};
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
        if (guess != Guess::kMaybe) return guess == Guess::kYes;
        return at_second_look(left, right) || survives(left, right);
    }

    /// The same, or kMaybe where it takes longer to find out. There are no branches in this.
    Guess at_a_glance(uint32_t left, uint32_t right) const {
        const Token &l = tokens_[left], &r = tokens_[right];
        const uint32_t merge = of_bytes_[size_t(l.last) << 8 | r.first];
        const unsigned joined = (merge < l.last_until) & (merge <= r.first_until);
        const unsigned apart = strangers(l.edges[0], r.edges[0]);
        return Guess((1 - joined) << apart);
    }

    /// Where the guess is `kMaybe`: true for yes, false for still maybe.
    bool at_second_look(uint32_t left, uint32_t right) const {
        const Token &l = tokens_[left], &r = tokens_[right];
        return strangers(l.edges[1], r.edges[1]) | strangers(l.edges[2], r.edges[2]);
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
    static constexpr size_t kHashes = Token::kHashes;
    struct Joined {  // what merges have joined to a token so far, on its two sides
        uint64_t before = 0, after = 0;
    };

    static bool is_byte(uint32_t token) { return token < 256; }

    /// The token in a set: six bits of a product, others for each hash.
    static uint64_t bit(uint32_t token, size_t hash) {
        return uint64_t(1) << (token * 0x9e3779b97f4a7c15ULL >> (58 - 6 * hash) & 63);
    }

    /// Whether no merge has ever joined what has stood at the one's end and at the other's beginning.
    static bool strangers(const Edges& left, const Edges& right) {
        return ((left.joins_after & right.begins) == 0) | ((left.ends & right.joins_before) == 0);
    }

    std::vector<Token> tokens_;
    PackedPairs merged_;
    std::vector<uint32_t> of_bytes_;                      // the merge of two bytes
    std::vector<std::array<Joined, kHashes>> joined_;  // of each token; only until `finish`
};

}  // namespace megascratch::bpe
