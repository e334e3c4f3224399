// Pre-tokens that are one token: nine of ten in a text that the vocabulary fits.
//
// All threads read one table of them, made with the encoder and never changed. It is a perfect hash: no two tokens have
// the same place, so a piece is compared with one entry.
//
//   place of a piece   upper bits of its hash ^ displacement of its bucket     the bucket is the lower bits of its hash
//   entry of 16 bytes  12 bytes of the token, padded with zeros | 3 bytes of its id | 1 byte of its length
//
// Idea: Pagh, "Hash and displace" (WADS 1999); the fullest buckets choose first, as in Belazzougui, Botelho and
// Dietzfelbinger, "Hash, displace, and compress" (ESA 2009).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "huge_pages.h"
#include "piece_key.h"

namespace megascratch::bpe {

/// A token that, as a pre-token, is itself.
struct WholeToken {
    PieceKey key;
    uint32_t id;
};

class WholeTokens {
  public:
    static constexpr size_t kMaxBytes = 12;
    static constexpr uint32_t kAbsent = UINT32_MAX;

    /// Args: tokens: those for which there is no place stay in it, the others are taken out.
    explicit WholeTokens(std::vector<WholeToken>& tokens)
        : shift_(64 - log_for(tokens.size())), displacements_(n_entries() >> kLogBucket), entries_(n_entries()) {
        for (size_t i = 0; i < n_entries(); ++i) entries_[i].words[1] = kFree;
        std::vector<std::vector<WholeToken>> buckets(displacements_.size());
        std::vector<WholeToken> left;
        for (const WholeToken& token : tokens)
            (token.key.length() <= kMaxBytes ? buckets[places().bucket_of(token.key.hash())] : left).push_back(token);
        std::vector<uint32_t> order(buckets.size());
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(),
                         [&](uint32_t a, uint32_t b) { return buckets[a].size() > buckets[b].size(); });
        for (const uint32_t bucket : order)
            if (!place(bucket, buckets[bucket])) left.insert(left.end(), buckets[bucket].begin(), buckets[bucket].end());
        tokens = std::move(left);
    }

    /// A piece that is looked for, and where it must be.
    struct Sought {
        PieceKey key;
        uint32_t place;
    };

    /// Say of n pieces where they are sought, and ask for the memory there.
    ///
    /// Args: borders: piece i is [borders[i], borders[i + 1]); readable_end: where reading must stop, at or after the last.
    void seek(const uint8_t* const* borders, size_t n, const uint8_t* readable_end, Sought* sought) const {
        if (readable_end - borders[n] >= 16)
            seek(borders, n, sought, [](const uint8_t* piece, size_t length) { return PieceKey(piece, length); });
        else
            seek(borders, n, sought, [=](const uint8_t* piece, size_t length) { return PieceKey(piece, length, readable_end); });
    }

    /// Write the ids of n pieces, or kAbsent, and which are absent; return how many are.
    size_t find(const Sought* sought, size_t n, uint32_t* ids, uint8_t* absent) const {
        const PieceKey* const entries = &entries_[0];
        size_t n_absent = 0;
        for (size_t i = 0; i < n; ++i) {  // no branch depends on the piece: it would often be guessed wrong
            const PieceKey& entry = entries[sought[i].place];
            const uint32_t unlike = differ(entry.words & kKeyBits, sought[i].key.words);
            ids[i] = id_of(entry) | unlike;
            absent[n_absent] = uint8_t(i);
            n_absent -= int32_t(unlike);
        }
        return n_absent;
    }

  private:
    static constexpr Words kKeyBits{~0ULL, 0xFF000000FFFFFFFF};  // the id has the others
    static constexpr uint64_t kFree = ~0ULL;                  // no piece has this length
    static constexpr unsigned kLogBucket = 2;                 // of the places for each bucket

    size_t n_entries() const { return size_t(1) << (64 - shift_); }
    static unsigned log_for(size_t n_tokens) {
        unsigned log = 8;
        while (size_t(4) << log < 5 * n_tokens) ++log;  // one place of five or more stays free
        return log;
    }
    static PieceKey with_id(WholeToken token) {
        token.key.words[1] |= uint64_t(token.id) << 32;
        return token.key;
    }
    static uint32_t id_of(const PieceKey& entry) { return uint32_t(entry.words[1] >> 32) & 0xFFFFFF; }

    /// Where pieces go, as a few words for registers.
    struct Places {
        const uint16_t* displacements;
        uint64_t last_bucket, shift;

        uint64_t bucket_of(uint64_t hash) const { return hash & last_bucket; }
        uint64_t operator[](uint64_t hash) const { return (hash >> shift) ^ displacements[bucket_of(hash)]; }
    };
    Places places() const { return {displacements_.data(), displacements_.size() - 1, shift_}; }
    PieceKey& entry_of(const WholeToken& token) const { return entries_[places()[token.key.hash()]]; }

    template <class MakeKey>
    void seek(const uint8_t* const* borders, size_t n, Sought* sought, MakeKey&& make_key) const {
        const PieceKey* const entries = &entries_[0];
        const Places places = this->places();
        for (size_t i = 0; i < n; ++i) {
            const PieceKey key = make_key(borders[i], size_t(borders[i + 1] - borders[i]));
            const uint64_t place = places[key.hash()];
            sought[i] = {key, uint32_t(place)};
            __builtin_prefetch(entries + place);
        }
    }

    /// Find a displacement that brings the tokens of a bucket to free places.
    bool place(uint32_t bucket, const std::vector<WholeToken>& tokens) {
        for (uint32_t displacement = 0; displacement <= UINT16_MAX; ++displacement) {
            displacements_[bucket] = uint16_t(displacement);
            size_t n = 0;
            for (; n < tokens.size() && entry_of(tokens[n]).words[1] == kFree; ++n)
                entry_of(tokens[n]) = with_id(tokens[n]);
            if (n == tokens.size()) return true;
            while (n > 0) entry_of(tokens[--n]).words[1] = kFree;  // two of them meet, or one another bucket's
        }
        return false;
    }

    size_t shift_;  // of a hash, to be a place
    std::vector<uint16_t> displacements_;  // of each bucket
    HugeArray<PieceKey> entries_;
};

}  // namespace megascratch::bpe
