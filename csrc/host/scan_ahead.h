// Walking over text by pre-tokens: sharing it out over threads, and looking some pre-tokens ahead.
//
// Whoever looks pre-tokens up in a large table waits for memory at each one. `scan_ahead` lets the caller ask for the
// memory of each, and cuts some 32 more before the first of those is looked up; by then it has come. And once again, for
// those that need a second look.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <new>
#include <string_view>
#include <thread>
#include <vector>
#if defined(__BMI2__)
#include <immintrin.h>
#endif

#include "flat_table.h"
#include "scan_window.h"

namespace megascratch::bpe {

/// A word's first n bytes, and zeros; all of them from n = 8 on.
inline uint64_t first_bytes(uint64_t word, size_t n) {
#if defined(__BMI2__)
    return _bzhi_u64(word, unsigned(8 * n));
#else
    return n >= 8 ? word : word & ((uint64_t(1) << 8 * (n % 8)) - 1);
#endif
}

/// A pre-token of 1 to 15 bytes as a number: two words, with the length in the last byte. 0, 0 is no piece.
struct PieceKey {
    static constexpr size_t kMaxBytes = 15;
    uint64_t low = 0, high = 0;

    PieceKey() = default;
    /// Args: readable_end: where reading must stop, at or after the end of the piece.
    PieceKey(const uint8_t* piece, size_t length, const uint8_t* readable_end) {
        if (readable_end - piece >= 16) {  // no branch on the length: it would be guessed wrong too often
            std::memcpy(&low, piece, 8);
            std::memcpy(&high, piece + 8, 8);
            low = first_bytes(low, length);
            high = first_bytes(high, length > 8 ? length - 8 : 0);
        } else {
            std::memcpy(&low, piece, std::min<size_t>(length, 8));
            if (length > 8) std::memcpy(&high, piece + 8, length - 8);
        }
        high |= uint64_t(length) << 56;
    }

    bool operator==(const PieceKey& other) const { return ((low ^ other.low) | (high ^ other.high)) == 0; }
    size_t length() const { return size_t(high >> 56); }
    uint64_t hash() const {
        const uint64_t product = (low ^ high * 0x9e3779b97f4a7c15ULL) * 0xd6e8feb86659fd93ULL;
        return product ^ __builtin_bswap64(product);
    }
};

/// A pre-token on its way; its key is empty where it is longer than a key can hold.
struct ScannedPiece {
    const uint8_t* at;
    size_t length;
    PieceKey key;
    uint64_t hash;  // of the key, or of the first 56 bytes

    ScannedPiece() = default;
    ScannedPiece(const uint8_t* begin, const uint8_t* end, const uint8_t* readable_end) : at(begin), length(size_t(end - begin)) {
        if (length <= PieceKey::kMaxBytes) {
            key = PieceKey(begin, length, readable_end);
            hash = key.hash();
        } else {
            hash = hash_bytes({view().data(), std::min<size_t>(length, 56)});
        }
    }

    bool has_key() const { return key.high != 0; }
    std::string_view view() const { return {reinterpret_cast<const char*>(at), length}; }
};

/// Pieces that are cut, and looked up, together.
struct ScannedBatch {
    static constexpr size_t kEnough = 32, kMost = kEnough - 1 + kMostCut;
    size_t n = 0;
    ScannedPiece pieces[kMost];
};

/// Walk over a text by its pieces, in batches that go through three stages, each while the others are in another.
///
/// Args:
///   batches: room for three of `ScannedBatch`, or of something that is one.
///   cut(ends): write the ends of the next pieces, kMostCut at most, and return how many; 0 at the end of the text.
///   begin: where the first piece begins.
///   readable_end: where reading must stop, at or after the end of the text.
///   touch(piece): ask for the memory that `look` will need.
///   look(batch): ask for what else `use` will need.
///   use(batch): the batches come in order.
template <class Batch, class Cut, class Touch, class Look, class Use>
void scan_ahead(Batch* batches, Cut&& cut, const uint8_t* begin, const uint8_t* readable_end, Touch&& touch, Look&& look,
                Use&& use) {
    const uint8_t* ends[ScannedBatch::kMost];
    const uint8_t* p = begin;
    for (size_t i = 0; i < 3; ++i) batches[i].n = 0;
    Batch *newest = batches, *middle = batches + 1, *oldest = batches + 2;
    do {
        size_t n = 0;
        while (n < ScannedBatch::kEnough) {
            const size_t n_more = cut(ends + n);
            if (n_more == 0) break;
            n += n_more;
        }
        for (size_t i = 0; i < n; p = ends[i++]) touch(newest->pieces[i] = ScannedPiece(p, ends[i], readable_end));
        newest->n = n;
        if (middle->n != 0) look(*middle);
        if (oldest->n != 0) use(*oldest);
        Batch* const used = oldest;
        oldest = middle;
        middle = newest;
        newest = used;
    } while (oldest->n != 0 || middle->n != 0);
}

/// What one thread does at a time: bytes [begin, end) of the text, in which the documents [first, last) end.
struct Share {
    int64_t begin, end;
    size_t first, last;
};

/// Share out documents, of which document i is text[ends[i-1], ends[i]). A long one is cut where no piece of any pattern
/// can lie: between a letter or digit and the line feed after it.
///
/// Args: share_bytes: about how large shares are where there are many; each thread gets some, so that one with the easier
///   text takes more of it.
inline std::vector<Share> share_out(const char* text, const int64_t* ends, size_t n_documents, size_t n_threads,
                                    int64_t share_bytes = INT64_MAX) {
    constexpr int64_t kSharesPerThread = 4;
    constexpr int64_t kShareBytes = 1 << 16;  // below this a thread costs more than it brings
    const auto border_after = [text](int64_t at, int64_t end) {
        for (; at < end; ++at) {
            const uint8_t before = at > 0 ? uint8_t(text[at - 1]) : 0;
            const bool ascii_letter_or_digit = uint8_t((before | 0x20) - 'a') < 26 || uint8_t(before - '0') < 10;
            if (text[at] == '\n' && ascii_letter_or_digit) break;
        }
        return at;
    };
    const int64_t size = n_documents == 0 ? 0 : ends[n_documents - 1];
    const int64_t most = n_threads == 1 ? 1 : std::max(int64_t(n_threads) * kSharesPerThread, size / share_bytes);
    const int64_t n_shares = std::max<int64_t>(1, std::min(most, size / kShareBytes));
    std::vector<Share> shares;
    int64_t begin = 0;
    size_t first = 0;
    for (int64_t s = 1; s < n_shares; ++s) {
        const int64_t wanted = std::max(begin, size / n_shares * s);
        size_t last = size_t(std::upper_bound(ends + first, ends + n_documents, wanted) - ends);
        if (last == n_documents) break;
        const int64_t document_begin = last == 0 ? 0 : ends[last - 1];
        const bool near = document_begin >= begin && wanted - document_begin < kShareBytes;
        const int64_t end = near ? document_begin : border_after(wanted, ends[last]);
        if (end == ends[last]) ++last;
        shares.push_back({begin, end, first, last});
        begin = end;
        first = last;
    }
    shares.push_back({begin, size, first, n_documents});
    return shares;
}

/// Call visit(begin, end, whole) for each stretch of a share that lies in one document, with offsets into the text;
/// `whole` says that the document ends with it.
template <class Visit>
void for_each_stretch(const Share& share, const int64_t* ends, Visit&& visit) {
    int64_t at = share.begin;
    for (size_t document = share.first; document < share.last; ++document) {
        visit(at, ends[document], true);
        at = ends[document];
    }
    if (at < share.end) visit(at, share.end, false);
}

/// Call work(share, thread) for every share, each thread taking the next one that is left.
template <class Work>
void work_off(size_t n_shares, size_t n_threads, const Work& work) {
    std::vector<std::exception_ptr> failures(std::max<size_t>(1, std::min(n_threads, n_shares)));
    std::atomic<size_t> taken{0};
    const auto take = [&](size_t thread) {
        try {
            for (size_t share; (share = taken++) < n_shares;) work(share, thread);
        } catch (...) {
            failures[thread] = std::current_exception();
        }
    };
    std::vector<std::thread> threads;
    for (size_t t = 1; t < failures.size(); ++t) threads.emplace_back(take, t);
    take(0);
    for (std::thread& thread : threads) thread.join();
    for (const std::exception_ptr& failure : failures)
        if (failure) std::rethrow_exception(failure);
}

}  // namespace megascratch::bpe
