// Walking over text by pre-tokens: sharing it out over threads, and looking some pre-tokens ahead.
//
// Whoever looks pre-tokens up in a large table waits for memory at each one. `scan_ahead` lets the caller ask for the
// memory of each, and cuts some 32 more before the first of those is looked up; by then it has come. And so on, where
// what is found says where to look next.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#include "piece_key.h"
#include "scan_window.h"

namespace megascratch::bpe {

/// Pieces that are cut together: piece i is [borders[i], borders[i + 1]).
struct ScannedBatch {
    static constexpr size_t kEnough = 32, kMost = kEnough - 1 + kMostCut;
    size_t n = 0;
    const uint8_t* borders[kMost + 1 + kCutAtOnce];
};

/// Walk over a text by its pieces, in batches that go through stages, each while the others are in another.
///
/// Args:
///   batches: as many as there are stages, of `ScannedBatch` or of something that is one.
///   cut(ends): write the ends of the next pieces, kMostCut at most, and return how many; 0 at the end of the text.
///   begin: where the first piece begins.
///   stages(batch): each asks for the memory that the next one will need; the batches come in order.
template <class Batch, class Cut, class... Stages>
void scan_ahead(Batch* batches, Cut&& cut, const uint8_t* begin, Stages&&... stages) {
    constexpr size_t kBatches = sizeof...(stages);
    Batch* line[kBatches];  // from the newest
    for (size_t i = 0; i < kBatches; ++i) {
        line[i] = batches + i;
        line[i]->n = 0;
    }
    bool some_left;
    do {
        Batch& newest = *line[0];
        newest.borders[0] = begin;
        newest.n = 0;
        while (newest.n < ScannedBatch::kEnough) {
            const size_t n_more = cut(newest.borders + 1 + newest.n);
            if (n_more == 0) break;
            newest.n += n_more;
        }
        begin = newest.borders[newest.n];
        size_t next = 0;
        some_left = false;
        const auto do_stage = [&](auto& stage) {
            Batch& batch = *line[next++];
            if (batch.n == 0) return;
            stage(batch);
            some_left = true;
        };
        (do_stage(stages), ...);
        std::rotate(line, line + kBatches - 1, line + kBatches);
    } while (some_left);
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
