// The pre-token cache: what the encoder made of recent pre-tokens, in a table of fixed size.
//
// It is asked for those that are not one token (bpe_whole.h). A short pre-token is its own key, so there is no pointer to
// follow and no string to compare. Two entries share a cache line; the newer one pushes the older one out, so memory is
// bounded whatever the text holds. Long pre-tokens (rules of dashes, indentation, sentences without spaces) and those of
// many ids have a table of their own; the longest are not kept.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "huge_pages.h"
#include "scan_ahead.h"

namespace megascratch::bpe {

class PieceCache {
  public:
    static constexpr size_t kMaxIds = 4;
    static constexpr uint32_t kIdBits[kMaxIds] = {0xFFFFFF, ~0u, ~0u, ~0u};  // of the ids of an entry

    struct Entry {
        PieceKey key;
        uint32_t ids[kMaxIds] = {};  // of the first, the upper 8 bits are the number of ids:
        // 0 while they are awaited, and where it is more than four they are in the long entry

        uint32_t n_ids() const { return ids[0] >> 24; }
        uint32_t job() const { return ids[0]; }
    };

    struct LongEntry {
        static constexpr size_t kMaxBytes = 54, kMaxIds = 18;
        uint8_t length = 0, n_ids = 0;  // no ids while they are awaited: then the first is the job
        char bytes[kMaxBytes];
        uint32_t ids[kMaxIds];

        bool holds(const ScannedPiece& piece) const {
            return length == piece.length && std::memcmp(bytes, piece.at, length) == 0;
        }
        void put(const ScannedPiece& piece, const uint32_t* ids_, size_t n_ids_) {
            length = uint8_t(piece.length);
            n_ids = uint8_t(n_ids_);
            std::memcpy(bytes, piece.at, piece.length);
            std::memcpy(ids, ids_, std::max<size_t>(n_ids_, 1) * sizeof *ids);
        }
    };

    PieceCache() : lines_(size_t(1) << kLogLines), long_entries_(size_t(1) << kLogLongEntries) {}

    /// The entry of a short pre-token that is one token.
    static Entry entry_of(std::string_view piece, uint32_t id) {
        const uint8_t* const begin = reinterpret_cast<const uint8_t*>(piece.data());
        return {PieceKey(begin, piece.size(), begin + piece.size()), {id | 1u << 24}};
    }

    /// The entry of a short pre-token of any ids; where they are more than four, it only says how many.
    static Entry entry_of(const PieceKey& key, const uint32_t* ids, size_t n_ids) {
        Entry entry{key, {}};
        if (n_ids <= kMaxIds) std::memcpy(entry.ids, ids, n_ids * sizeof *ids);
        entry.ids[0] |= uint32_t(n_ids) << 24;
        return entry;
    }

    void keep(const Entry& entry) { line(entry.key.hash()).put(entry); }

    /// Keep many entries: the memory of some comes while others are put in.
    void keep(const Entry* entries, size_t n) {
        constexpr size_t kAtOnce = 32;
        for (size_t first = 0; first < n; first += kAtOnce) {
            const size_t last = std::min(n, first + kAtOnce);
            for (size_t i = first; i < last; ++i) __builtin_prefetch(&line(entries[i].key.hash()), 1);
            for (size_t i = first; i < last; ++i) keep(entries[i]);
        }
    }

    void touch(const ScannedPiece& piece) const {
        if (piece.has_key())
            __builtin_prefetch(&line(piece.hash));
        else
            __builtin_prefetch(&long_entry(piece.hash));
    }

    /// Return the entry of a piece with a key, or null.
    const Entry* find(const ScannedPiece& piece) const {
        const Entry* const entries = line(piece.hash).entries;
        const bool first = entries[0].key == piece.key, second = entries[1].key == piece.key;
        return first | second ? entries + second : nullptr;  // no branch on which: it is anybody's guess
    }

    /// Return the entry of a piece without a key, or of one whose own entry says that it has too many ids; or null.
    const LongEntry* find_long(const ScannedPiece& piece) const {
        const LongEntry& entry = long_entry(piece.hash);
        return entry.holds(piece) ? &entry : nullptr;
    }

    /// Note that a job is about to make the ids of a piece.
    void await(const ScannedPiece& piece, uint32_t job) {
        if (piece.has_key())
            line(piece.hash).put({piece.key, {job}});
        else if (piece.length <= LongEntry::kMaxBytes)
            long_entry(piece.hash).put(piece, &job, 0);
    }

    /// Keep the ids of a piece, unless there are too many; it is not awaited any more.
    void remember(const ScannedPiece& piece, const uint32_t* ids, size_t n_ids) {
        if (piece.has_key()) {
            line(piece.hash).put(entry_of(piece.key, ids, n_ids));
            if (n_ids <= kMaxIds) return;
        }
        if (piece.length > LongEntry::kMaxBytes) return;
        if (n_ids <= LongEntry::kMaxIds)
            long_entry(piece.hash).put(piece, ids, n_ids);
        else if (long_entry(piece.hash).holds(piece))
            long_entry(piece.hash).length = 0;
    }

  private:
    static constexpr unsigned kLogLines = 19;        // 32 MiB a thread,
    static constexpr unsigned kLogLongEntries = 18;  // and 32 MiB
    static_assert(sizeof(Entry) == 32 && sizeof(LongEntry) == 128);
    struct alignas(64) Line {
        Entry entries[2];

        void put(const Entry& entry) {
            if (!(entries[0].key == entry.key)) entries[1] = entries[0];
            entries[0] = entry;
        }
    };

    Line& line(uint64_t hash) const { return lines_[hash >> (64 - kLogLines)]; }
    LongEntry& long_entry(uint64_t hash) const { return long_entries_[hash >> (64 - kLogLongEntries)]; }

    HugeArray<Line> lines_;
    HugeArray<LongEntry> long_entries_;
};

/// What the threads of a run tell each other: the entries that each has made, for the caches of the others. Without it
/// every thread would encode for itself what is frequent in all of the text.
class Exchange {
  public:
    explicit Exchange(size_t n_threads) : made_(n_threads) {
        for (Made& made : made_) {
            made.entries.reserve(kMostEntries);  // so that they stay where they are
            made.n_heard.resize(n_threads);
        }
    }

    /// Tell an entry; the others hear of it once this thread calls `publish`. After many nothing more is told: what is
    /// frequent comes early.
    void tell(size_t thread, const PieceCache::Entry& entry) {
        if (made_[thread].entries.size() < kMostEntries) made_[thread].entries.push_back(entry);
    }
    void publish(size_t thread) {
        made_[thread].n.store(made_[thread].entries.size(), std::memory_order_release);
    }

    /// Keep what the others have told since the last time.
    void hear(size_t thread, PieceCache& cache) {
        for (Made& made : made_) {
            if (&made == &made_[thread]) continue;
            const size_t n = made.n.load(std::memory_order_acquire);
            size_t& n_heard = made.n_heard[thread];
            cache.keep(made.entries.data() + n_heard, n - n_heard);
            n_heard = n;
        }
    }

  private:
    static constexpr size_t kMostEntries = size_t(1) << 17;  // 4 MiB a thread, taken as it fills
    struct alignas(64) Made {
        std::vector<PieceCache::Entry> entries;  // read by others up to n
        std::vector<size_t> n_heard;             // by each of the others
        std::atomic<size_t> n{0};
    };
    std::vector<Made> made_;
};

}  // namespace megascratch::bpe
