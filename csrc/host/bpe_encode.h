// The BPE encoder: text or pre-tokens to ids, over threads.
//
//   scanner        cuts pre-tokens, some way ahead of those that are looked up, and asks for the memory of each
//   whole tokens   are nine of ten of them
//   cache          has nearly all others, with their ids
//   vocabulary     has some of what is left as a whole
//   merging        does the rest: by longest matches for a trained vocabulary, else by the book
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "bpe_backtrack.h"
#include "bpe_cache.h"
#include "bpe_ids.h"
#include "bpe_merge.h"
#include "bpe_whole.h"
#include "scan_ahead.h"

namespace megascratch::bpe {

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
        whole_tokens_ = std::make_unique<WholeTokens>(own_pieces_);
    }

    /// Whether encoding takes linear time; false for rules that no training yields.
    bool linear() const { return backtracker_ != nullptr; }

    /// Encode documents; document i is text[ends[i-1], ends[i]).
    template <class Id, class Scanner>
    Encoded<Id> encode_documents(Scanner, const char* text, const int64_t* ends, size_t n_documents,
                                 size_t n_threads) const {
        const std::vector<Share> shares = share_out(text, ends, n_documents, n_threads, kShareBytes);
        const int64_t n_bytes = n_documents == 0 ? 0 : ends[n_documents - 1];
        const uint8_t* const readable_end = bytes(text + n_bytes);
        return run<Id>(shares.size(), n_threads, size_t(n_bytes), [&](size_t share, Output<Id>& output) {
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
        const size_t n_bytes = n_documents == 0 ? 0 : size_t(offset(pieces_until(n_documents)) - text);
        return run<Id>(n_shares, n_threads, n_bytes, [&](size_t share, Output<Id>& output) {
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

    static constexpr size_t kMaxIds = size_t(1) << 24;  // an entry of `WholeTokens` has three bytes for it

    /// Where ids are still to come in, or a document ends; `at` counts the ids that are there already.
    struct Gap {
        static constexpr uint32_t kDocumentEnd = UINT32_MAX;
        size_t at;
        uint32_t job;
    };

    static constexpr size_t kAtOnce = 8;  // ids that are copied together

    /// Pieces, and the ids of those that are whole tokens.
    struct Batch : ScannedBatch {
        WholeTokens::Sought sought[kMost];
        uint32_t ids[kMost + kAtOnce];
        size_t n_others;
        uint8_t others[kMost];       // which are not,
        ScannedPiece pieces[kMost];  // and those
    };

    /// What one thread needs to itself.
    struct Workspace {
        static constexpr size_t kMostJobs = Backtracker::kMostJobs, kMostGaps = 1024;
        PieceCache cache;
        Batch batches[4];
        BacktrackScratch scratch;
        std::vector<uint32_t> ids;
        std::vector<ScannedPiece> awaited;  // piece i is that of jobs[i]
        std::vector<PieceJob> jobs = std::vector<PieceJob>(kMostJobs);
        std::vector<Gap> gaps;
    };

    template <class Id>
    struct Output {
        Encoded<Id> made;
        Workspace* space;
        Exchange* exchange = nullptr;  // with the other threads, where there are any
        size_t thread = 0;
    };

    static constexpr int64_t kShareBytes = 1 << 18;  // whose ids are still near when they are put with the others

    template <class Id, class Work>
    Encoded<Id> run(size_t n_shares, size_t n_threads, size_t n_bytes, const Work& work) const {
        const size_t n_ids_expected = n_bytes / 4;
        n_threads = std::min(n_threads, n_shares);
        std::vector<std::unique_ptr<Workspace>> spaces(n_threads);  // one a thread, for as long as this runs
        const auto make = [&](size_t share, Output<Id>& output) {
            std::unique_ptr<Workspace>& space = spaces[output.thread];
            if (!space) space = borrow();
            output.space = space.get();
            work(share, output);
            settle(output);
        };
        Encoded<Id> all;
        if (n_shares == 1) {
            Output<Id> output{};
            output.made.ids.reserve(n_ids_expected);
            make(0, output);
            all = std::move(output.made);
        } else if (n_shares > 1) {
            Collector<Id> collector(n_shares, n_ids_expected);
            Exchange exchange(n_threads);
            work_off(n_shares, n_threads, [&](size_t share, size_t thread) {
                Output<Id> output{{}, nullptr, &exchange, thread};
                output.made.ids.reserve(n_ids_expected / n_shares);
                make(share, output);
                collector.add(share, std::move(output.made));
            });
            all = collector.take();
        }
        for (std::unique_ptr<Workspace>& space : spaces)
            if (space) give_back(std::move(space));
        all.ids.trim();
        return all;
    }

    template <class Id, class Cut>
    void encode_stretch(Cut&& cut, const uint8_t* begin, const uint8_t* readable_end, Output<Id>& output) const {
        const PieceCache& cache = output.space->cache;
        const auto seek = [&](Batch& batch) { whole_tokens_->seek(batch.borders, batch.n, readable_end, batch.sought); };
        const auto find = [&](Batch& batch) {
            batch.n_others = whole_tokens_->find(batch.sought, batch.n, batch.ids, batch.others);
            for (size_t i = 0; i < batch.n_others; ++i) {
                const uint8_t* const* const borders = batch.borders + batch.others[i];
                batch.pieces[i] = ScannedPiece(borders[0], borders[1], readable_end);
                cache.touch(batch.pieces[i]);
            }
        };
        const auto find_others = [&](const Batch& batch) {
            for (size_t i = 0; i < batch.n_others; ++i) cache.touch_record(batch.pieces[i]);
        };
        const auto use = [&](const Batch& batch) {
            size_t done = 0;
            for (size_t i = 0; i < batch.n_others; ++i) {
                const size_t other = batch.others[i];
                append_readily(batch.ids + done, other - done, output.made.ids);
                encode_other(batch.pieces[i], output);
                done = other + 1;
            }
            append_readily(batch.ids + done, batch.n - done, output.made.ids);
        };
        scan_ahead(output.space->batches, cut, begin, seek, find, find_others, use);
    }

    /// Encode a piece that is not one of `whole_tokens_`.
    template <class Id>
    void encode_other(const ScannedPiece& piece, Output<Id>& output) const {
        const Workspace& space = *output.space;
        const PieceCache::Place place = space.cache.find(piece);
        if (place == PieceCache::kAbsent) return encode_new(piece, output);
        if (place & PieceCache::kAwaited) {
            const uint32_t job = place & ~PieceCache::kAwaited;
            if (job < space.awaited.size() && space.awaited[job].view() == piece.view()) return leave_gap(job, output);
        } else if (space.cache.holds(place, piece)) {
            const Record record = space.cache.record(place);
            return append_readily(record.ids(), record.n_ids(), output.made.ids);
        }
        encode_new(piece, output);
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

    template <class Id>
    static void append(const uint32_t* ids, size_t n, IdBuffer<Id>& out) {
        std::copy_n(ids, n, out.reserve(n));
        out.advance(n);
    }

    /// Append n ids, kAtOnce of them at a time, where as many more may be read: that is quicker than to stop in time.
    template <class Id>
    static void append_readily(const uint32_t* ids, size_t n, IdBuffer<Id>& out) {
        Id* const to = out.reserve(n + kAtOnce);
        size_t i = 0;
        do
            std::copy_n(ids + i, kAtOnce, to + i);
        while ((i += kAtOnce) < n);
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
        for (size_t i = 0; i < space.awaited.size(); ++i) {
            const PieceJob& job = space.jobs[i];
            space.cache.remember(space.awaited[i], job.ids, job.n_ids, uint32_t(i));
            if (output.exchange) output.exchange->tell(output.thread, space.awaited[i], job.ids, job.n_ids);
        }
        if (output.exchange) {
            output.exchange->publish(output.thread);
            output.exchange->hear(output.thread, space.cache);
        }
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
        const uint8_t* const begin = reinterpret_cast<const uint8_t*>(token.data());
        if (token.size() <= PieceKey::kMaxBytes)
            own_pieces_.push_back({PieceKey(begin, token.size(), begin + token.size()), id});
    }

    /// A workspace whose cache has the tokens for which there is no place among the whole ones.
    std::unique_ptr<Workspace> new_workspace() const {
        auto space = std::make_unique<Workspace>();
        for (const auto& [key, id] : own_pieces_) {
            const uint8_t* const end = key.bytes() + key.length();
            space->cache.remember(ScannedPiece(key.bytes(), end, end), &id, 1);
        }
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
    std::unique_ptr<WholeTokens> whole_tokens_;  // tokens that, as pre-tokens, are themselves
    std::vector<WholeToken> own_pieces_;         // and those of them for which there is no place there
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<Workspace>> idle_;  // at most as many as have ever run at once
};

}  // namespace megascratch::bpe
