// The BPE encoder: within each pre-token, join the adjacent pair of the best rank until no pair has one.
//
//   merges, best rank first   0 (l,o)→lo   1 (lo,w)→low   2 (e,r)→er
//   "lower"   l o w e r  →  lo w e r  →  low e r  →  low er
//
// Equal ranks go to the leftmost pair. Short pre-tokens (nearly all) are scanned for the best pair at each step; long
// ones go through a heap, so that a megabyte of one letter costs n log n and not n². A direct-mapped cache of
// recent pre-tokens answers most of the text without any merging: it has a fixed size, so memory is bounded.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <queue>
#include <stdexcept>
#include <string_view>
#include <thread>
#include <vector>

#include "flat_table.h"

namespace megascratch::bpe {

/// How a pair merges: into which id, and before which other pairs (smaller ranks first).
struct Rule {
    int32_t rank = INT32_MAX;
    int32_t id = -1;
};

/// What one thread needs to itself: a cache of encoded pre-tokens, and scratch for the merging.
class Workspace {
  public:
    Workspace() : entries_(kEntries) {}

    static bool cacheable(std::string_view piece) { return piece.size() <= kKeyBytes; }

    /// Append the ids of a cached piece; false when it is not in the cache.
    bool lookup(std::string_view piece, uint64_t hash, std::vector<int32_t>& out) const {
        const Entry& entry = entries_[hash % kEntries];
        if (entry.length != piece.size() || std::memcmp(entry.key, piece.data(), piece.size()) != 0) return false;
        out.insert(out.end(), entry.ids, entry.ids + entry.n_ids);
        return true;
    }

    void remember(std::string_view piece, uint64_t hash, const int32_t* ids, size_t n_ids) {
        if (n_ids > kIds) return;
        Entry& entry = entries_[hash % kEntries];
        entry.length = uint8_t(piece.size());
        entry.n_ids = uint8_t(n_ids);
        std::memcpy(entry.key, piece.data(), piece.size());
        std::copy(ids, ids + n_ids, entry.ids);
    }

    struct Part {
        int32_t id;
        uint32_t previous, next;
    };
    struct Candidate {
        Rule rule;
        uint32_t at;
        int32_t left, right;

        bool operator<(const Candidate& other) const {  // std::priority_queue puts the largest first
            return rule.rank != other.rule.rank ? rule.rank > other.rule.rank : at > other.at;
        }
    };
    std::vector<Part> parts;

  private:
    static constexpr size_t kEntries = 1 << 16, kKeyBytes = 22, kIds = 10;
    struct alignas(64) Entry {  // one cache line; 4 MiB in all
        uint8_t length = 0, n_ids = 0;
        char key[kKeyBytes];
        int32_t ids[kIds];
    };
    static_assert(sizeof(Entry) == 64);

    std::vector<Entry> entries_;
};

class Encoder {
  public:
    /// Args:
    ///   tokens: the bytes of each id; every single byte must be among them. Empty where an id has no bytes.
    ///   rules: rules[i] belongs to the pair lefts[i], rights[i]; a later rule for the same pair replaces an earlier one.
    ///   whole_first: a pre-token that is a token as a whole is taken as that, whatever the rules would make of it.
    Encoder(const std::vector<std::string_view>& tokens, const std::vector<uint64_t>& pairs,
            const std::vector<Rule>& rules, bool whole_first)
        : rules_(pairs.size()), whole_first_(whole_first) {
        std::fill(std::begin(id_of_byte_), std::end(id_of_byte_), -1);
        for (size_t id = 0; id < tokens.size(); ++id)
            if (tokens[id].size() == 1) id_of_byte_[uint8_t(tokens[id][0])] = int32_t(id);
        if (std::count(std::begin(id_of_byte_), std::end(id_of_byte_), -1) != 0)
            throw std::invalid_argument("the tokens lack some of the 256 single bytes");
        for (size_t i = 0; i < pairs.size(); ++i) rules_[pairs[i]] = rules[i];
        if (whole_first)
            for (size_t id = 0; id < tokens.size(); ++id) {
                if (tokens[id].empty()) continue;
                if (whole_.insert(tokens[id]) == whole_ids_.size()) whole_ids_.push_back(int32_t(id));
            }
    }

    /// Encode pieces, shared out over threads; piece i is text[ends[i-1], ends[i]).
    ///
    /// Args: document_ends: for each document, the number of pieces up to its end.
    /// Returns the ids of all documents end to end, and in id_ends the number of ids up to each document's end.
    std::vector<int32_t> encode(const char* text, const int64_t* ends, size_t n_pieces, const int64_t* document_ends,
                                size_t n_documents, size_t n_threads, std::vector<int64_t>& id_ends) const {
        id_ends.assign(n_documents, 0);
        const size_t n_runs = std::max<size_t>(1, std::min(n_threads, n_pieces / kPiecesPerThread));
        std::vector<Run> runs(n_runs);
        for (size_t r = 0; r < n_runs; ++r) {
            Run& run = runs[r];
            run.first = n_pieces * r / n_runs;
            run.last = n_pieces * (r + 1) / n_runs;
            // A document belongs to the run in which its last piece lies; the first run takes leading empty ones.
            const auto document_after = [&](size_t piece) {
                return size_t(std::upper_bound(document_ends, document_ends + n_documents, int64_t(piece)) - document_ends);
            };
            run.first_document = r == 0 ? 0 : document_after(run.first);
            run.last_document = r + 1 == n_runs ? n_documents : document_after(run.last);
        }
        const auto work = [&](Run& run) {
            try {
                encode_run(text, ends, document_ends, run, id_ends.data());
            } catch (...) {
                run.failure = std::current_exception();
            }
        };
        std::vector<std::thread> threads;
        for (size_t r = 1; r < n_runs; ++r) threads.emplace_back(work, std::ref(runs[r]));
        work(runs[0]);
        for (std::thread& thread : threads) thread.join();
        return gather(runs, id_ends);
    }

  private:
    static constexpr size_t kPiecesPerThread = 4096;  // below this a thread costs more than it brings
    static constexpr size_t kScanLimit = 48;          // bytes; up to here rescanning beats a heap
    static constexpr uint32_t kNone = UINT32_MAX;

    struct Run {
        size_t first, last, first_document, last_document;
        std::vector<int32_t> ids;
        std::exception_ptr failure;
    };

    void encode_run(const char* text, const int64_t* ends, const int64_t* document_ends, Run& run,
                    int64_t* id_ends) const {
        std::unique_ptr<Workspace> space = borrow();
        run.ids.reserve((run.last - run.first) * 2);
        size_t document = run.first_document;
        const auto close_documents = [&](size_t piece) {
            while (document < run.last_document && document_ends[document] == int64_t(piece))
                id_ends[document++] = int64_t(run.ids.size());
        };
        close_documents(run.first);
        int64_t start = run.first == 0 ? 0 : ends[run.first - 1];
        for (size_t i = run.first; i < run.last; start = ends[i++]) {
            encode_piece({text + start, size_t(ends[i] - start)}, *space, run.ids);
            close_documents(i + 1);
        }
        give_back(std::move(space));
    }

    static std::vector<int32_t> gather(std::vector<Run>& runs, std::vector<int64_t>& id_ends) {
        for (const Run& run : runs)
            if (run.failure) std::rethrow_exception(run.failure);
        std::vector<int32_t> ids = std::move(runs[0].ids);
        for (size_t r = 1; r < runs.size(); ++r) {
            for (size_t d = runs[r].first_document; d < runs[r].last_document; ++d) id_ends[d] += int64_t(ids.size());
            ids.insert(ids.end(), runs[r].ids.begin(), runs[r].ids.end());
        }
        return ids;
    }

    void encode_piece(std::string_view piece, Workspace& space, std::vector<int32_t>& out) const {
        if (piece.size() == 1) {
            out.push_back(id_of_byte_[uint8_t(piece[0])]);
            return;
        }
        if (!Workspace::cacheable(piece)) {
            merge(piece, space, out);
            return;
        }
        const uint64_t hash = hash_bytes(piece);
        if (space.lookup(piece, hash, out)) return;
        const size_t before = out.size();
        merge(piece, space, out);
        space.remember(piece, hash, out.data() + before, out.size() - before);
    }

    void merge(std::string_view piece, Workspace& space, std::vector<int32_t>& out) const {
        if (whole_first_) {
            const uint32_t found = whole_.find(piece);
            if (found != StringTable::kAbsent) {
                out.push_back(whole_ids_[found]);
                return;
            }
        }
        if (piece.size() <= kScanLimit)
            merge_by_scan(piece, out);
        else
            merge_by_heap(piece, space.parts, out);
    }

    Rule rule(int32_t left, int32_t right) const {
        const Rule* found = rules_.find(pair_key(left, right));
        return found ? *found : Rule{};
    }

    void merge_by_scan(std::string_view piece, std::vector<int32_t>& out) const {
        int32_t ids[kScanLimit];
        Rule rules[kScanLimit];  // rules[i] joins ids[i] and ids[i + 1]
        size_t n = piece.size();
        for (size_t i = 0; i < n; ++i) ids[i] = id_of_byte_[uint8_t(piece[i])];
        for (size_t i = 0; i + 1 < n; ++i) rules[i] = rule(ids[i], ids[i + 1]);
        while (n > 1) {
            size_t best = 0;
            for (size_t i = 1; i + 1 < n; ++i)
                if (rules[i].rank < rules[best].rank) best = i;
            if (rules[best].id < 0) break;
            ids[best] = rules[best].id;
            --n;
            std::copy(ids + best + 2, ids + n + 1, ids + best + 1);
            std::copy(rules + best + 1, rules + n, rules + best);
            if (best + 1 < n) rules[best] = rule(ids[best], ids[best + 1]);
            if (best > 0) rules[best - 1] = rule(ids[best - 1], ids[best]);
        }
        out.insert(out.end(), ids, ids + n);
    }

    void merge_by_heap(std::string_view piece, std::vector<Workspace::Part>& parts, std::vector<int32_t>& out) const {
        if (piece.size() >= kNone) throw std::length_error("a pre-token of 4 GiB or more");
        const uint32_t n = uint32_t(piece.size());
        std::priority_queue<Workspace::Candidate> queue;
        const auto offer = [&](uint32_t at) {
            if (at == kNone || parts[at].next == kNone) return;
            const int32_t left = parts[at].id, right = parts[parts[at].next].id;
            const Rule found = rule(left, right);
            if (found.id >= 0) queue.push({found, at, left, right});
        };
        parts.resize(n);
        for (uint32_t i = 0; i < n; ++i)
            parts[i] = {id_of_byte_[uint8_t(piece[i])], i == 0 ? kNone : i - 1, i + 1 == n ? kNone : i + 1};
        for (uint32_t i = 0; i < n; ++i) offer(i);
        while (!queue.empty()) {
            const Workspace::Candidate best = queue.top();
            queue.pop();
            Workspace::Part& left = parts[best.at];
            // An entry is stale when either side has been merged away since; a swallowed part has id -1.
            if (left.id != best.left || left.next == kNone || parts[left.next].id != best.right) continue;
            Workspace::Part& right = parts[left.next];
            left.id = best.rule.id;
            right.id = -1;
            left.next = right.next;
            if (left.next != kNone) parts[left.next].previous = best.at;
            offer(left.previous);
            offer(best.at);
        }
        for (uint32_t at = 0; at != kNone; at = parts[at].next) out.push_back(parts[at].id);
        if (parts.capacity() > (1 << 20)) std::vector<Workspace::Part>().swap(parts);  // do not keep a giant's scratch
    }

    std::unique_ptr<Workspace> borrow() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (idle_.empty()) return std::make_unique<Workspace>();
        std::unique_ptr<Workspace> space = std::move(idle_.back());
        idle_.pop_back();
        return space;
    }

    void give_back(std::unique_ptr<Workspace> space) const {
        const std::lock_guard<std::mutex> lock(mutex_);
        idle_.push_back(std::move(space));
    }

    int32_t id_of_byte_[256];
    PairTable<Rule> rules_;
    bool whole_first_;
    StringTable whole_;
    std::vector<int32_t> whole_ids_;
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<Workspace>> idle_;  // at most as many as have ever run at once
};

}  // namespace megascratch::bpe
