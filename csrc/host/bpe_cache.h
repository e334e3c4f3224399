// The pre-token cache: what the encoder made of recent pre-tokens, in a table of fixed size.
//
// Most of a text is pre-tokens seen before, so the time of encoding is the time of these lookups. A short pre-token is
// its own key, so there is no pointer to follow and no string to compare. Two entries share a cache line; the newer one
// pushes the older one out, so memory is bounded whatever the text holds. Long pre-tokens (rules of dashes, indentation,
// sentences without spaces) and those of many ids have a table of their own; the longest are not kept.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "scan_ahead.h"

namespace megascratch::bpe {

class PieceCache {
  public:
    static constexpr size_t kMaxIds = 4;

    struct Entry {
        PieceKey key;
        uint32_t ids[kMaxIds] = {};  // of the first, the upper 8 bits are the number of ids

        uint32_t n_ids() const { return ids[0] >> 24; }
        uint32_t first() const { return ids[0] & 0xFFFFFF; }
    };

    struct LongEntry {
        static constexpr size_t kMaxBytes = 54, kMaxIds = 18;
        uint8_t length = 0, n_ids = 0;
        char bytes[kMaxBytes];
        uint32_t ids[kMaxIds];
    };

    PieceCache() : lines_(new Line[size_t(1) << kLogLines]), long_entries_(size_t(1) << kLogLongEntries) {}

    void touch(const ScannedPiece& piece) const {
        if (piece.has_key())
            __builtin_prefetch(&line(piece.hash));
        else
            __builtin_prefetch(&long_entries_[piece.hash >> (64 - kLogLongEntries)]);
    }

    /// Return the entry of a piece with a key, or null.
    const Entry* find(const ScannedPiece& piece) const {
        for (const Entry& entry : line(piece.hash).entries)
            if (entry.key == piece.key) return &entry;
        return nullptr;
    }

    /// Return the entry of a piece without a key, or of many ids, or null.
    const LongEntry* find_long(const ScannedPiece& piece) const {
        const LongEntry& entry = long_entries_[piece.hash >> (64 - kLogLongEntries)];
        return entry.length == piece.length && std::memcmp(entry.bytes, piece.at, piece.length) == 0 ? &entry : nullptr;
    }

    void remember(const ScannedPiece& piece, const uint32_t* ids, size_t n_ids) {
        if (piece.has_key() && n_ids <= kMaxIds) {
            Line& line = this->line(piece.hash);
            line.entries[1] = line.entries[0];
            line.entries[0].key = piece.key;
            std::memcpy(line.entries[0].ids, ids, n_ids * sizeof *ids);
            line.entries[0].ids[0] |= uint32_t(n_ids) << 24;
        } else if (piece.length <= LongEntry::kMaxBytes && n_ids <= LongEntry::kMaxIds) {
            LongEntry& entry = long_entries_[piece.hash >> (64 - kLogLongEntries)];
            entry.length = uint8_t(piece.length);
            entry.n_ids = uint8_t(n_ids);
            std::memcpy(entry.bytes, piece.at, piece.length);
            std::memcpy(entry.ids, ids, n_ids * sizeof *ids);
        }
    }

  private:
    static constexpr unsigned kLogLines = 18;        // 16 MiB a thread,
    static constexpr unsigned kLogLongEntries = 16;  // and 8 MiB
    static_assert(sizeof(Entry) == 32 && sizeof(LongEntry) == 128);
    struct alignas(64) Line {
        Entry entries[2];
    };

    Line& line(uint64_t hash) const { return lines_[hash >> (64 - kLogLines)]; }

    std::unique_ptr<Line[]> lines_;
    std::vector<LongEntry> long_entries_;
};

}  // namespace megascratch::bpe
