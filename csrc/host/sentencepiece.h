// The encoder of SentencePiece's BPE: merges run over characters, and a character without a token becomes its bytes.
//
//   merges, best rank first   0 (h,e)→he   1 (▁,t)→▁t   2 (▁t,he)→▁the
//   "▁the▁é"   ▁ t h e | ▁ é  →  ▁ t he | ▁ é  →  ▁the | ▁ <0xC3> <0xA9>
//
// A text is one long piece here: nothing says where merges stop. But a merge can only yield a token, so where the two
// characters at a border stand side by side in no token (e▁ above), the text can be cut without changing one id. Cut
// so, before spaces first of all, it falls into words, and a fixed-size cache answers most of them. The merging itself
// goes through a heap: n log n for a text that cannot be cut.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <queue>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "flat_table.h"

namespace megascratch::sentencepiece {

using bpe::hash_bytes;
using bpe::pair_key;
using bpe::PairTable;

/// How a pair merges: into which id, and before which other pairs (smaller ranks first, then the leftmost).
struct Merging {
    int32_t rank = INT32_MAX;
    int32_t id = -1;
};

/// One character of a text: its bytes as a number that tells characters apart, and how many they are.
struct Character {
    uint32_t code;
    uint32_t n_bytes;
};

constexpr uint32_t kSpace = 0xE29681;  // ▁, as read_character gives it

/// Read the character at the front of text, which is not empty; a byte that is not UTF-8 is a character of its own.
inline Character read_character(std::string_view text) {
    const auto byte = [&](size_t i) { return uint32_t(uint8_t(text[i])); };
    const uint32_t first = byte(0);
    const uint32_t n_bytes = first < 0xC2 || first > 0xF4 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    uint32_t code = first;
    if (n_bytes > text.size()) return {first, 1};
    for (uint32_t i = 1; i < n_bytes; ++i) {
        if ((byte(i) & 0xC0) != 0x80) return {first, 1};
        code = code << 8 | byte(i);
    }
    return {code, n_bytes};
}

class CharacterEncoder {
  public:
    /// Args:
    ///   tokens: UTF-8 of each id that characters and merges can yield; empty for any other id.
    ///   byte_ids: the 256 ids that stand for single bytes.
    ///   pairs, rules: rules[i] belongs to pairs[i].
    ///   frozen: ids whose text is taken as that token wherever it stands, the longest first, and merges with nothing.
    ///   cut_spaces: no merge crosses the border before a space, even where a token would allow it.
    CharacterEncoder(const std::vector<std::string_view>& tokens, const std::vector<int32_t>& byte_ids,
                     const std::vector<uint64_t>& pairs, const std::vector<Merging>& rules,
                     const std::vector<int32_t>& frozen, bool cut_spaces)
        : rules_(pairs.size()), byte_ids_(byte_ids), cut_spaces_(cut_spaces) {
        for (size_t id = 0; id < tokens.size(); ++id)
            if (!tokens[id].empty() && read_character(tokens[id]).n_bytes == tokens[id].size())
                characters_[read_character(tokens[id]).code] = int32_t(id);
        for (uint32_t code = 0; code < 0x80; ++code) {
            const int32_t* id = characters_.find(code);
            ascii_ids_[code] = id != nullptr ? *id : byte_ids[code];
        }
        for (size_t i = 0; i < pairs.size(); ++i) {
            rules_[pairs[i]] = rules[i];
            note_neighbours(tokens[size_t(rules[i].id)]);
        }
        for (const int32_t id : frozen) {
            const std::string_view text = tokens[size_t(id)];
            if (frozen_.insert(text) == frozen_ids_.size()) frozen_ids_.push_back(id);
            std::vector<size_t>& sizes = frozen_sizes_[uint8_t(text[0])];
            if (std::find(sizes.begin(), sizes.end(), text.size()) == sizes.end()) sizes.push_back(text.size());
        }
        for (std::vector<size_t>& sizes : frozen_sizes_) std::sort(sizes.rbegin(), sizes.rend());
    }

    /// Encode pieces, whole documents to a thread; piece i is text[ends[i-1], ends[i]).
    ///
    /// Args: document_ends: for each document, the number of pieces up to its end.
    /// Returns the ids of all documents end to end, and in id_ends the number of ids up to each document's end.
    std::vector<int32_t> encode(const char* text, const int64_t* ends, const int64_t* document_ends,
                                size_t n_documents, size_t n_threads, std::vector<int64_t>& id_ends) const {
        id_ends.assign(n_documents, 0);
        const auto byte_of = [&](size_t document) {  // where a document begins
            const int64_t piece = document == 0 ? 0 : document_ends[document - 1];
            return piece == 0 ? 0 : ends[piece - 1];
        };
        const int64_t n_bytes = byte_of(n_documents);
        const size_t n_runs = size_t(std::clamp<int64_t>(n_bytes / kBytesPerThread, 1, int64_t(n_threads)));
        std::vector<Run> runs(n_runs);
        size_t document = 0;
        for (size_t r = 0; r < n_runs; ++r) {
            runs[r].first = document;
            const int64_t share = r + 1 == n_runs ? INT64_MAX : n_bytes / int64_t(n_runs) * int64_t(r + 1);
            while (document < n_documents && byte_of(document) < share) ++document;
            runs[r].last = document;
        }
        const auto work = [&](Run& run) {
            try {
                std::unique_ptr<Workspace> space = borrow();
                for (size_t d = run.first; d < run.last; ++d) {
                    for (int64_t i = d == 0 ? 0 : document_ends[d - 1]; i < document_ends[d]; ++i) {
                        const int64_t start = i == 0 ? 0 : ends[i - 1];
                        encode_piece({text + start, size_t(ends[i] - start)}, *space, run.ids);
                    }
                    id_ends[d] = int64_t(run.ids.size());
                }
                give_back(std::move(space));
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
    static constexpr int64_t kBytesPerThread = 1 << 15;  // below this a thread costs more than it brings
    static constexpr size_t kLongWord = 64;              // bytes; from here on a word is cut between any two characters
    static constexpr uint32_t kNone = UINT32_MAX, kRare = 0x81;

    struct Run {
        size_t first, last;
        std::vector<int32_t> ids;
        std::exception_ptr failure;
    };
    struct Symbol {
        int32_t id;
        uint32_t previous, next;
    };
    struct Candidate {
        Merging merging;
        uint32_t at;
        int32_t left, right;

        bool operator<(const Candidate& other) const {  // the heap has the largest on top
            return merging.rank != other.merging.rank ? merging.rank > other.merging.rank : at > other.at;
        }
    };

    /// What one thread needs to itself: a direct-mapped cache of words, a cache line each (2 MiB in all), and scratch.
    struct Workspace {
        static constexpr size_t kEntries = 1 << 15, kKeyBytes = 22, kIds = 10;
        struct alignas(64) Entry {
            uint8_t n_bytes = 0, n_ids = 0;
            char key[kKeyBytes];
            int32_t ids[kIds];
        };
        std::vector<Entry> entries{kEntries};
        std::vector<Symbol> symbols;
        std::vector<Candidate> heap;
    };

    /// Which of the frequent characters a character is: ASCII or ▁. kRare for any other.
    static uint32_t frequent(uint32_t code) { return code < 0x80 ? code : code == kSpace ? 0x80 : kRare; }

    void note_neighbours(std::string_view token) {
        for (uint32_t previous = kNone; !token.empty();) {
            const uint32_t next = read_character(token).code;
            if (previous != kNone) {
                neighbours_[uint64_t(previous) << 32 | next] = true;
                if (frequent(previous) != kRare && frequent(next) != kRare)
                    frequent_neighbours_[frequent(previous)][frequent(next)] = true;
            }
            previous = next;
            token.remove_prefix(read_character(token).n_bytes);
        }
    }

    /// The frozen token at the front of text, and its size in bytes; size 0 where there is none.
    std::pair<int32_t, size_t> frozen_at(std::string_view text) const {
        for (const size_t size : frozen_sizes_[uint8_t(text[0])]) {
            if (size > text.size()) continue;
            const uint32_t found = frozen_.find(text.substr(0, size));
            if (found != bpe::StringTable::kAbsent) return {frozen_ids_[found], size};
        }
        return {-1, 0};
    }

    void encode_piece(std::string_view text, Workspace& space, std::vector<int32_t>& out) const {
        size_t start = 0;
        const auto close_word = [&](size_t end) {
            if (end > start) encode_word(text.substr(start, end - start), space, out);
            start = end;
        };
        uint32_t previous = kNone;
        for (size_t at = 0; at < text.size();) {
            if (const auto [id, size] = frozen_at(text.substr(at)); size != 0) {
                close_word(at);
                out.push_back(id);
                at += size;
                start = at;
                continue;
            }
            const Character next = read_character(text.substr(at));
            if (at > start && may_cut(previous, next.code, at - start >= kLongWord)) close_word(at);
            previous = next.code;
            at += next.n_bytes;
        }
        close_word(text.size());
    }

    /// Whether no merge crosses the border between two characters; for rare ones it is looked up in a long word only.
    bool may_cut(uint32_t previous, uint32_t next, bool in_long_word) const {
        if (cut_spaces_ && next == kSpace) return true;
        const uint32_t left = frequent(previous), right = frequent(next);
        if (left != kRare && right != kRare) return !frequent_neighbours_[left][right];
        return (in_long_word || next == kSpace) && neighbours_.find(uint64_t(previous) << 32 | next) == nullptr;
    }

    void encode_word(std::string_view word, Workspace& space, std::vector<int32_t>& out) const {
        if (word.size() == 1 && uint8_t(word[0]) < 0x80) return out.push_back(ascii_ids_[uint8_t(word[0])]);
        if (word.size() > Workspace::kKeyBytes) return merge(word, space, out);
        Workspace::Entry& entry = space.entries[hash_bytes(word) % Workspace::kEntries];
        if (entry.n_bytes == word.size() && std::memcmp(entry.key, word.data(), word.size()) == 0) {
            out.insert(out.end(), entry.ids, entry.ids + entry.n_ids);
            return;
        }
        const size_t before = out.size();
        merge(word, space, out);
        if (out.size() - before > Workspace::kIds) return;
        entry.n_bytes = uint8_t(word.size());
        entry.n_ids = uint8_t(out.size() - before);
        std::memcpy(entry.key, word.data(), word.size());
        std::copy(out.begin() + ptrdiff_t(before), out.end(), entry.ids);
    }

    void read_symbols(std::string_view word, std::vector<Symbol>& symbols) const {
        if (word.size() >= kNone) throw std::length_error("a word of 4 GiB or more");
        symbols.clear();
        const auto append = [&](int32_t id) {
            const uint32_t at = uint32_t(symbols.size());
            symbols.push_back({id, at - 1, at + 1});  // at 0 the previous one wraps round to kNone
        };
        while (!word.empty()) {
            const Character next = read_character(word);
            if (const int32_t* id = characters_.find(next.code))
                append(*id);
            else
                for (uint32_t i = 0; i < next.n_bytes; ++i) append(byte_ids_[uint8_t(word[i])]);
            word.remove_prefix(next.n_bytes);
        }
        symbols.back().next = kNone;
    }

    void merge(std::string_view word, Workspace& space, std::vector<int32_t>& out) const {
        std::vector<Symbol>& symbols = space.symbols;
        std::vector<Candidate>& heap = space.heap;
        read_symbols(word, symbols);
        heap.clear();
        const auto offer = [&](uint32_t at) {
            if (at == kNone || symbols[at].next == kNone) return;
            const int32_t left = symbols[at].id, right = symbols[symbols[at].next].id;
            const Merging* found = rules_.find(pair_key(left, right));
            if (found == nullptr) return;
            heap.push_back({*found, at, left, right});
            std::push_heap(heap.begin(), heap.end());
        };
        for (uint32_t i = 0; i < symbols.size(); ++i) offer(i);
        while (!heap.empty()) {
            const Candidate best = heap.front();
            std::pop_heap(heap.begin(), heap.end());
            heap.pop_back();
            Symbol& left = symbols[best.at];
            // Stale when either side has been merged away since; a swallowed symbol has id -1.
            if (left.id != best.left || left.next == kNone || symbols[left.next].id != best.right) continue;
            Symbol& right = symbols[left.next];
            left.id = best.merging.id;
            right.id = -1;
            left.next = right.next;
            if (left.next != kNone) symbols[left.next].previous = best.at;
            offer(left.previous);
            offer(best.at);
        }
        for (uint32_t at = 0; at != kNone; at = symbols[at].next) out.push_back(symbols[at].id);
        if (symbols.capacity() > (1 << 20)) {  // do not keep a giant's scratch
            std::vector<Symbol>().swap(symbols);
            std::vector<Candidate>().swap(heap);
        }
    }

    static std::vector<int32_t> gather(std::vector<Run>& runs, std::vector<int64_t>& id_ends) {
        for (const Run& run : runs)
            if (run.failure) std::rethrow_exception(run.failure);
        std::vector<int32_t> ids = std::move(runs[0].ids);
        for (size_t r = 1; r < runs.size(); ++r) {
            for (size_t d = runs[r].first; d < runs[r].last; ++d) id_ends[d] += int64_t(ids.size());
            ids.insert(ids.end(), runs[r].ids.begin(), runs[r].ids.end());
        }
        return ids;
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

    PairTable<int32_t> characters_;  // id by code
    PairTable<bool> neighbours_;     // previous and next code of two characters that stand side by side in some token
    bool frequent_neighbours_[kRare][kRare] = {};  // the same for the frequent characters, in the first cache
    int32_t ascii_ids_[0x80];
    PairTable<Merging> rules_;
    std::vector<int32_t> byte_ids_;
    bool cut_spaces_;
    bpe::StringTable frozen_;
    std::vector<int32_t> frozen_ids_;
    std::vector<size_t> frozen_sizes_[256];  // sizes of the frozen tokens by their first byte, the largest first
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<Workspace>> idle_;  // at most as many as have ever run at once
};

}  // namespace megascratch::sentencepiece
