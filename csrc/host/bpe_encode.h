// The BPE encoder: text or pre-tokens to ids, over threads.
//
//   scanner       cuts pre-tokens ahead and asks the cache line of each into the processor's cache
//   cache         has nearly all of them, with their ids
//   vocabulary    has some of the others as a whole
//   merging       does the rest: by longest matches for a trained vocabulary, else by the book
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "bpe_backtrack.h"
#include "bpe_cache.h"
#include "bpe_merge.h"
#include "scan_ahead.h"

namespace megascratch::bpe {

/// Ids that grow without being cleared first; uint16 or uint32, as the file or model wants them.
template <class Id>
class IdBuffer {
  public:
    /// Make room for `more` ids and return where they go.
    Id* reserve(size_t more) {
        if (size_ + more > capacity_) {
            capacity_ = std::max(size_ + more, capacity_ + capacity_ / 2);
            void* grown = std::realloc(data_.get(), capacity_ * sizeof(Id));
            if (!grown) throw std::bad_alloc();
            data_.release();
            data_.reset(static_cast<Id*>(grown));
        }
        return data_.get() + size_;
    }
    /// Expect about so many ids: their memory comes in huge pages, which the kernel hands out faster.
    void expect(size_t n) {
        reserve(n);
        wish_huge_pages(data_.get(), capacity_ * sizeof(Id));
    }
    /// Give back what was expected in vain.
    void trim() {
        if (size_ == 0 || size_ == capacity_) return;
        if (void* const kept = std::realloc(data_.get(), size_ * sizeof(Id))) {
            data_.release();
            data_.reset(static_cast<Id*>(kept));
            capacity_ = size_;
        }
    }
    void advance(size_t n) { size_ += n; }
    size_t size() const { return size_; }
    const Id* data() const { return data_.get(); }
    Id* release() { return data_.release(); }

  private:
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    std::unique_ptr<Id[], Free> data_;
    size_t size_ = 0, capacity_ = 0;
};

/// The ids of some documents end to end, and the number of ids up to each document's end.
template <class Id>
struct Encoded {
    IdBuffer<Id> ids;
    std::vector<int64_t> ends;
};

class Encoder {
  public:
    /// Args:
    ///   tokens: the bytes of each id; every single byte must be among them. Empty where an id has no bytes.
    ///   pairs, rules: rules[i] belongs to pairs[i]; a later rule for the same pair replaces an earlier one.
    ///   whole_first: a pre-token that is a token as a whole is taken as that, whatever the rules would make of it.
    Encoder(const std::vector<std::string_view>& tokens, const std::vector<uint64_t>& pairs,
            const std::vector<Rule>& rules, bool whole_first) {
        if (tokens.size() > kMaxIds) throw std::invalid_argument("too many tokens");
        int32_t id_of_byte[256];
        std::fill(std::begin(id_of_byte), std::end(id_of_byte), -1);
        for (size_t id = 0; id < tokens.size(); ++id)
            if (tokens[id].size() == 1) id_of_byte[uint8_t(tokens[id][0])] = int32_t(id);
        if (std::count(std::begin(id_of_byte), std::end(id_of_byte), -1) != 0)
            throw std::invalid_argument("the tokens lack some of the 256 single bytes");
        backtracker_ = Backtracker::make(tokens, id_of_byte, pairs, rules);
        std::vector<bool> merges_find(tokens.size());
        if (backtracker_)
            merges_find = backtracker_->reachable(tokens.size());
        else
            merger_ = std::make_unique<Merger>(id_of_byte, pairs, rules);
        for (size_t id = 0; id < tokens.size(); ++id)
            if (merges_find[id]) own_piece(tokens[id], uint32_t(id));
        if (whole_first)
            for (size_t id = 0; id < tokens.size(); ++id) {
                if (tokens[id].empty() || merges_find[id]) continue;
                if (whole_.insert(tokens[id]) != whole_ids_.size()) continue;
                whole_ids_.push_back(uint32_t(id));
                own_piece(tokens[id], uint32_t(id));
            }
    }

    /// Whether encoding takes linear time; false for rules that no training yields.
    bool linear() const { return backtracker_ != nullptr; }

    /// Encode documents; document i is text[ends[i-1], ends[i]).
    template <class Id, class Scanner>
    Encoded<Id> encode_documents(Scanner, const char* text, const int64_t* ends, size_t n_documents,
                                 size_t n_threads) const {
        const std::vector<Share> shares = share_out(text, ends, n_documents, n_threads);
        const uint8_t* const readable_end = bytes(text + (n_documents == 0 ? 0 : ends[n_documents - 1]));
        return run<Id>(shares.size(), n_threads, [&](size_t share, Output<Id>& output) {
            output.made.ids.expect(size_t(shares[share].end - shares[share].begin) / 4);
            for_each_stretch(shares[share], ends, [&](int64_t begin, int64_t end, bool whole) {
                const Text stretch(text + begin, text + end);
                encode_stretch(Cutter<Scanner>(stretch, readable_end), stretch.begin, readable_end, output);
                if (whole) end_document(output);
            });
        });
    }

    /// Encode pieces that were cut before; piece i is text[ends[i-1], ends[i]).
    ///
    /// Args: document_ends: for each document, the number of pieces up to its end.
    template <class Id>
    Encoded<Id> encode_pieces(const char* text, const int64_t* ends, const int64_t* document_ends, size_t n_documents,
                              size_t n_threads) const {
        const auto pieces_until = [&](size_t document) { return document == 0 ? int64_t(0) : document_ends[document - 1]; };
        const auto offset = [&](int64_t piece) { return text + (piece == 0 ? int64_t(0) : ends[piece - 1]); };
        const size_t n_shares = std::min(n_documents, n_threads == 1 ? 1 : n_threads * 4);
        return run<Id>(n_shares, n_threads, [&](size_t share, Output<Id>& output) {
            const size_t last = n_documents * (share + 1) / n_shares;
            for (size_t document = n_documents * share / n_shares; document < last; ++document) {
                int64_t piece = pieces_until(document);
                const int64_t last_piece = pieces_until(document + 1);
                const auto cut = [&](const uint8_t** next) {
                    const size_t n = size_t(std::min<int64_t>(last_piece - piece, kMostCut));
                    for (size_t i = 0; i < n; ++i) next[i] = bytes(text + ends[piece++]);
                    return n;
                };
                encode_stretch(cut, bytes(offset(piece)), bytes(offset(pieces_until(n_documents))), output);
                end_document(output);
            }
        });
    }

  private:
    static const uint8_t* bytes(const char* text) { return reinterpret_cast<const uint8_t*>(text); }

    static constexpr size_t kMaxIds = size_t(1) << 24;  // the cache packs a count beside an id

    /// Where ids are still to come in, or a document ends; `at` counts the ids that are there already.
    struct Gap {
        static constexpr uint32_t kDocumentEnd = UINT32_MAX;
        size_t at;
        uint32_t job;
    };

    /// What one thread needs to itself.
    struct Workspace {
        static constexpr size_t kMostJobs = Backtracker::kMostJobs, kMostGaps = 1024;
        PieceCache cache;
        BacktrackScratch scratch;
        std::vector<uint32_t> ids;
        std::vector<ScannedPiece> awaited;  // piece i is that of jobs[i]
        std::vector<PieceJob> jobs = std::vector<PieceJob>(kMostJobs);
        std::vector<Gap> gaps;
    };

    template <class Id>
    struct Output {
        Encoded<Id> made;
        Workspace* space = nullptr;
    };

    template <class Id, class Work>
    Encoded<Id> run(size_t n_shares, size_t n_threads, const Work& work) const {
        std::vector<Output<Id>> outputs(n_shares);
        work_off(n_shares, n_threads, [&](size_t share, size_t) {
            std::unique_ptr<Workspace> space = borrow();
            outputs[share].space = space.get();
            work(share, outputs[share]);
            settle(outputs[share]);
            give_back(std::move(space));
        });
        if (n_shares == 0) return {};
        if (n_shares == 1) {
            outputs[0].made.ids.trim();
            return std::move(outputs[0].made);
        }
        size_t n_ids = 0;
        for (const Output<Id>& output : outputs) n_ids += output.made.ids.size();
        Encoded<Id> all;
        all.ids.reserve(n_ids);
        for (Output<Id>& output : outputs) {
            const Encoded<Id> part = std::move(output.made);
            for (int64_t end : part.ends) all.ends.push_back(int64_t(all.ids.size()) + end);
            if (part.ids.size() == 0) continue;
            std::memcpy(all.ids.reserve(part.ids.size()), part.ids.data(), part.ids.size() * sizeof(Id));
            all.ids.advance(part.ids.size());
        }
        return all;
    }

    template <class Id, class Cut>
    void encode_stretch(Cut&& cut, const uint8_t* begin, const uint8_t* readable_end, Output<Id>& output) const {
        const PieceCache& cache = output.space->cache;
        IdBuffer<Id>& ids = output.made.ids;
        const auto touch = [&](const ScannedPiece& piece) { cache.touch(piece); };
        scan_ahead(cut, begin, readable_end, touch, [&](const ScannedPiece& piece) {
            if (piece.has_key()) {
                const PieceCache::Entry* const entry = cache.find(piece);
                if (!entry) return encode_new(piece, output);
                if (entry->n_ids() == 0) return leave_gap(entry->job(), output);
                if (entry->n_ids() <= PieceCache::kMaxIds) {
                    write_four(entry->ids, ids.reserve(PieceCache::kMaxIds));  // however many there are
                    return ids.advance(entry->n_ids());
                }
            }
            if (const PieceCache::LongEntry* const entry = cache.find_long(piece)) {
                if (entry->n_ids == 0) return leave_gap(entry->ids[0], output);
                return append(entry->ids, entry->n_ids, ids);
            }
            encode_new(piece, output);
        });
    }

    template <class Id>
    void encode_new(const ScannedPiece& piece, Output<Id>& output) const {
        Workspace& space = *output.space;
        const uint32_t whole = whole_ids_.empty() ? StringTable::kAbsent : whole_.find(piece.view());
        if (whole != StringTable::kAbsent) {
            space.cache.remember(piece, &whole_ids_[whole], 1);
            append(&whole_ids_[whole], 1, output.made.ids);
        } else if (backtracker_ && piece.length <= PieceJob::kMaxBytes) {
            const uint32_t job = uint32_t(space.awaited.size());
            space.awaited.push_back(piece);
            space.jobs[job].at = piece.at;
            space.jobs[job].length = uint32_t(piece.length);
            space.cache.await(piece, job);
            leave_gap(job, output);
        } else {
            constexpr size_t kKeep = 1 << 16;
            std::vector<uint32_t>& ids = space.ids;
            ids.clear();
            if (backtracker_)
                backtracker_->encode(piece.view(), space.scratch, ids);
            else
                merger_->encode(piece.view(), ids);
            space.cache.remember(piece, ids.data(), ids.size());
            append(ids.data(), ids.size(), output.made.ids);
            if (ids.capacity() > kKeep) std::vector<uint32_t>().swap(ids);  // do not keep a giant's ids
        }
    }

    /// Write the ids of an entry, without the count in the first of them.
    template <class Id>
    static void write_four(const uint32_t* ids, Id* out) {
        uint32_t four[PieceCache::kMaxIds];
        for (size_t i = 0; i < PieceCache::kMaxIds; ++i) four[i] = ids[i] & PieceCache::kIdBits[i];
        for (size_t i = 0; i < PieceCache::kMaxIds; ++i) out[i] = Id(four[i]);
    }

    template <class Id>
    static void append(const uint32_t* ids, size_t n, IdBuffer<Id>& out) {
        std::copy_n(ids, n, out.reserve(n));
        out.advance(n);
    }

    template <class Id>
    void leave_gap(uint32_t job, Output<Id>& output) const {
        Workspace& space = *output.space;
        space.gaps.push_back({output.made.ids.size(), job});
        if (space.awaited.size() == Workspace::kMostJobs || space.gaps.size() == Workspace::kMostGaps) settle(output);
    }

    template <class Id>
    void end_document(Output<Id>& output) const {
        if (output.space->gaps.empty())
            output.made.ends.push_back(int64_t(output.made.ids.size()));
        else
            leave_gap(Gap::kDocumentEnd, output);
    }

    /// Do the jobs that have gathered, and put their ids in.
    template <class Id>
    void settle(Output<Id>& output) const {
        Workspace& space = *output.space;
        if (space.gaps.empty()) return;
        backtracker_->encode_together(space.jobs.data(), space.awaited.size());
        size_t n_more = 0;
        for (const Gap& gap : space.gaps)
            if (gap.job == Gap::kDocumentEnd)
                output.made.ends.push_back(int64_t(gap.at + n_more));
            else
                n_more += space.jobs[gap.job].n_ids;
        IdBuffer<Id>& ids = output.made.ids;
        Id* to = ids.reserve(n_more) + n_more;
        Id* from = to - n_more;
        Id* const begin = from - ids.size();
        for (size_t i = space.gaps.size(); i-- > 0;) {  // from the last, so that nothing is moved twice
            const Gap& gap = space.gaps[i];
            if (gap.job == Gap::kDocumentEnd) continue;
            to = std::move_backward(begin + gap.at, from, to);
            from = begin + gap.at;
            const PieceJob& job = space.jobs[gap.job];
            to = std::copy_backward(job.ids, job.ids + job.n_ids, to);
        }
        ids.advance(n_more);
        for (size_t job = 0; job < space.awaited.size(); ++job)
            space.cache.remember(space.awaited[job], space.jobs[job].ids, space.jobs[job].n_ids);
        space.awaited.clear();
        space.gaps.clear();
    }

    std::unique_ptr<Workspace> borrow() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (idle_.empty()) return new_workspace();
        std::unique_ptr<Workspace> space = std::move(idle_.back());
        idle_.pop_back();
        return space;
    }

    /// Note that a token, as a pre-token, is itself.
    void own_piece(std::string_view token, uint32_t id) {
        if (token.size() <= PieceKey::kMaxBytes) own_entries_.push_back(PieceCache::entry_of(token, id));
    }

    /// A workspace whose cache has the tokens that may be pre-tokens: most text is made of them.
    std::unique_ptr<Workspace> new_workspace() const {
        auto space = std::make_unique<Workspace>();
        for (const PieceCache::Entry& entry : own_entries_) space->cache.keep(entry);
        return space;
    }

    void give_back(std::unique_ptr<Workspace> space) const {
        const std::lock_guard<std::mutex> lock(mutex_);
        idle_.push_back(std::move(space));
    }

    std::unique_ptr<Backtracker> backtracker_;  // or, for rules that it cannot take,
    std::unique_ptr<Merger> merger_;
    StringTable whole_;  // tokens taken as a whole that merging might not yield
    std::vector<uint32_t> whole_ids_;
    std::vector<PieceCache::Entry> own_entries_;  // of tokens that, as pre-tokens, are themselves
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<Workspace>> idle_;  // at most as many as have ever run at once
};

}  // namespace megascratch::bpe
