// Pre-tokens that are one token: nineteen of twenty in a text that the vocabulary fits.
//
// All threads read one table of them, made with the encoder and never changed, so it needs no lock and nothing in it is
// ever pushed out. An entry is 16 bytes and four share a cache line: the most frequent of them stay near.
//
//   entry   12 bytes of the token, padded with zeros | 3 bytes of its id | 1 byte of its length
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "huge_pages.h"
#include "scan_ahead.h"

namespace megascratch::bpe {

class WholeTokens {
  public:
    static constexpr size_t kMaxBytes = 12;
    static constexpr uint32_t kAbsent = UINT32_MAX;

    explicit WholeTokens(size_t expected) : log_(log_for(expected)), lines_(size_t(1) << log_) {
        for (size_t i = 0; i < size_t(1) << log_; ++i)
            for (PieceKey& entry : lines_[i].entries) entry.high = kFree;
    }

    /// Take up a token, of kMaxBytes at most, for the one with the same bytes where there is one; false where the line is
    /// full.
    bool insert(const PieceKey& key, uint32_t id) {
        for (PieceKey& entry : lines_[line_of(key.hash())].entries) {
            if (entry.high != kFree && !same(entry, key)) continue;
            entry.low = key.low;
            entry.high = key.high | uint64_t(id) << 32;
            return true;
        }
        return false;
    }

    void touch(const ScannedPiece& piece) const { __builtin_prefetch(&lines_[line_of(piece.hash)]); }

    /// The id of a piece, or kAbsent; the latter, too, for those without a key. No branch depends on the piece.
    uint32_t find(const ScannedPiece& piece) const {
        const Line& line = lines_[line_of(piece.hash)];
#if defined(__AVX2__)
        const __m256i key = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(&piece.key)));
        const __m256i kept = _mm256_set_epi64x(int64_t(kKeyBits), -1, int64_t(kKeyBits), -1);
        const auto equal_words = [&](const PieceKey* two) {  // a bit for each of the four
            const __m256i entries = _mm256_load_si256(reinterpret_cast<const __m256i*>(two));
            const __m256i equal = _mm256_cmpeq_epi64(_mm256_and_si256(entries, kept), key);
            return unsigned(_mm256_movemask_pd(_mm256_castsi256_pd(equal)));
        };
        const unsigned words = equal_words(line.entries) | equal_words(line.entries + 2) << 4;
        const unsigned found = words & words >> 1 & 0x55;
        const unsigned at = unsigned(__builtin_ctz(found | 0x100)) / 2 % 4;
        const uint32_t id = id_of(line.entries[at]);
        return found ? id : kAbsent;
#else
        uint32_t id = kAbsent;
        for (const PieceKey& entry : line.entries) id = same(entry, piece.key) ? id_of(entry) : id;
        return id;
#endif
    }

  private:
    static constexpr uint64_t kKeyBits = 0xFF000000FFFFFFFF;  // of an entry's second word; the id has the others
    static constexpr uint64_t kFree = ~0ULL;                  // no piece has this length
    struct alignas(64) Line {
        PieceKey entries[4];
    };

    static unsigned log_for(size_t expected) {
        unsigned log = 4;
        while (size_t(8) << log < 5 * expected) ++log;  // of five places two or more stay free
        return log;
    }
    static bool same(const PieceKey& entry, const PieceKey& key) {
        return ((entry.low ^ key.low) | ((entry.high & kKeyBits) ^ key.high)) == 0;
    }
    static uint32_t id_of(const PieceKey& entry) { return uint32_t(entry.high >> 32) & 0xFFFFFF; }
    size_t line_of(uint64_t hash) const { return hash >> (64 - log_); }

    unsigned log_;
    HugeArray<Line> lines_;
};

}  // namespace megascratch::bpe
