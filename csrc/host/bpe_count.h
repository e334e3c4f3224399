// Counting distinct pre-tokens, over threads. Memory grows with the distinct ones only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "flat_table.h"
#include "scan_ahead.h"

namespace megascratch::bpe {

/// The counts of one thread. Short pre-tokens are their own keys; long ones lie in an arena.
class PieceTable {
  public:
    PieceTable() : short_(size_t(1) << log_) {}

    void touch(const ScannedPiece& piece) const { __builtin_prefetch(&short_[piece.hash >> (64 - log_)]); }

    void add(const ScannedPiece& piece) {
        if (piece.key)
            add_short(piece.key, 1);
        else
            add_long(piece.view(), 1);
    }

    void add(const PieceTable& other) {
        other.for_each_short([&](const PieceKey& key, int64_t count) { add_short(key, count); });
        for (size_t i = 0; i < other.long_.size(); ++i) add_long(other.long_[i], other.long_counts_[i]);
    }

    size_t size() const { return n_short_ + long_.size(); }

    /// Call visit(piece, count) for each distinct piece.
    template <class Visit>
    void for_each(Visit&& visit) const {
        for_each_short([&](const PieceKey& key, int64_t count) {
            visit(std::string_view(reinterpret_cast<const char*>(key.bytes()), key.length()), count);
        });
        for (size_t i = 0; i < long_.size(); ++i) visit(long_[i], long_counts_[i]);
    }

  private:
    struct Slot {
        PieceKey key;
        int64_t count = 0;
    };

    template <class Visit>
    void for_each_short(Visit&& visit) const {
        for (const Slot& slot : short_)
            if (slot.count != 0) visit(slot.key, slot.count);
    }

    void add_short(const PieceKey& key, int64_t count) {
        Slot* slot = probe(key);
        if (slot->count == 0) {
            if (2 * ++n_short_ > short_.size()) {
                grow();
                slot = probe(key);
            }
            slot->key = key;
        }
        slot->count += count;
    }

    void add_long(std::string_view piece, int64_t count) {
        const uint32_t index = long_.insert(piece);
        if (index == long_counts_.size()) long_counts_.push_back(0);
        long_counts_[index] += count;
    }

    Slot* probe(const PieceKey& key) {
        const size_t mask = short_.size() - 1;
        size_t at = key.hash() >> (64 - log_);
        while (short_[at].count != 0 && !(short_[at].key == key)) at = (at + 1) & mask;
        return &short_[at];
    }

    void grow() {
        ++log_;
        std::vector<Slot> old(size_t(1) << log_);
        old.swap(short_);
        for (const Slot& slot : old)
            if (slot.count != 0) *probe(slot.key) = slot;
    }

    unsigned log_ = 12;
    std::vector<Slot> short_;
    size_t n_short_ = 0;
    StringTable long_;
    std::vector<int64_t> long_counts_;
};

/// Distinct pre-tokens of a corpus and how often each occurs.
class PieceCounter {
  public:
    /// Count the pieces of documents; document i is text[ends[i-1], ends[i]).
    template <class Scanner>
    void add(Scanner, const char* text, const int64_t* ends, size_t n_documents, size_t n_threads) {
        const std::vector<Share> shares = share_out(text, ends, n_documents, n_threads);
        const uint8_t* const readable_end = reinterpret_cast<const uint8_t*>(text + (n_documents ? ends[n_documents - 1] : 0));
        if (tables_.size() < n_threads) tables_.resize(n_threads);
        work_off(shares.size(), n_threads, [&](size_t share, size_t thread) {
            PieceTable& table = tables_[thread];
            const auto batches = std::make_unique<Batch[]>(2);
            for_each_stretch(shares[share], ends, [&](int64_t begin, int64_t end, bool) {
                const Text stretch(text + begin, text + end);
                const auto look = [&](Batch& batch) {
                    for (size_t i = 0; i < batch.n; ++i) {
                        batch.pieces[i] = ScannedPiece(batch.borders[i], batch.borders[i + 1], readable_end);
                        table.touch(batch.pieces[i]);
                    }
                };
                const auto count = [&](const Batch& batch) {
                    for (size_t i = 0; i < batch.n; ++i) table.add(batch.pieces[i]);
                };
                scan_ahead(batches.get(), Cutter<Scanner>(stretch, readable_end), stretch.begin, look, count);
            });
        });
    }

    /// All counts in one table. They may go on growing afterwards.
    const PieceTable& counts() {
        for (size_t i = 1; i < tables_.size(); ++i) {
            tables_[0].add(tables_[i]);
            tables_[i] = PieceTable();
        }
        return tables_[0];
    }

  private:
    struct Batch : ScannedBatch {
        ScannedPiece pieces[kMost];
    };

    std::vector<PieceTable> tables_ = std::vector<PieceTable>(1);
};

}  // namespace megascratch::bpe
