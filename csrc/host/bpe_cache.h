// The pre-token cache: what the encoder made of recent pre-tokens, in memory of a fixed size.
//
//   index     lines of eight slots; a slot has the tag of a pre-token (half of its hash) and the place of its record
//   records   end to end in a ring, each     length, number of ids | ids | bytes
//
// It is asked for those that are not one token (bpe_whole.h). A record takes as much as it needs and is written behind
// the one before, so new memory is touched only as there is something to keep. Where the ring begins anew, the index
// first forgets a section of it; in a full line of the index the oldest slot makes way. Tags may agree by chance, so
// whoever finds a record compares its bytes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "huge_pages.h"
#include "scan_ahead.h"

namespace megascratch::bpe {

/// A pre-token with its ids, in 32-bit words that belong to someone else.
struct Record {
    static constexpr size_t kMaxBytes = 256;
    const uint32_t* words;

    size_t length() const { return words[0] & 0xFFFF; }
    size_t n_ids() const { return words[0] >> 16; }
    const uint32_t* ids() const { return words + 1; }
    const uint8_t* bytes() const { return reinterpret_cast<const uint8_t*>(words + 1 + n_ids()); }
    size_t n_words() const { return n_words(length(), n_ids()); }

    /// Args: readable_end: where reading must stop, at or after the end of the record.
    bool is_of(const ScannedPiece& piece, const uint32_t* readable_end) const {
        if (length() != piece.length) return false;
        if (!piece.key) return std::memcmp(bytes(), piece.at, piece.length) == 0;
        return PieceKey(bytes(), piece.length, reinterpret_cast<const uint8_t*>(readable_end)) == piece.key;
    }

    static size_t n_words(size_t length, size_t n_ids) { return 1 + n_ids + (length + 3) / 4; }
    static void write(uint32_t* to, const ScannedPiece& piece, const uint32_t* ids, size_t n_ids) {
        to[0] = uint32_t(piece.length) | uint32_t(n_ids) << 16;
        std::copy_n(ids, n_ids, to + 1);
        std::memcpy(to + 1 + n_ids, piece.at, piece.length);
    }
};

class PieceCache {
  public:
    /// Where a piece is: nowhere, in the hands of a job (kAwaited | job), or in a record.
    using Place = uint32_t;
    static constexpr Place kAbsent = 0, kAwaited = Place(1) << 31;
    static constexpr size_t kReadableIds = 16;  // of every record, however many it has

    PieceCache() : lines_(size_t(1) << kLogLines), words_(kWords + Record::n_words(Record::kMaxBytes, kReadableIds)) {}

    /// Ask for the memory that `find` needs.
    void touch(const ScannedPiece& piece) const { __builtin_prefetch(&line(piece.hash)); }

    /// Ask for the memory of the record where `find` says that it is.
    void touch_record(const ScannedPiece& piece) const {
        const uint32_t* const words = record(find(piece) & ~kAwaited).words;
        __builtin_prefetch(words);
        __builtin_prefetch(words + 15);  // the next line of memory: records begin anywhere
    }

    /// Say where a piece is; or, once in a long while, another piece.
    Place find(const ScannedPiece& piece) const {
        const Line& line = this->line(piece.hash);
        const unsigned found = line.with_tag(tag(piece.hash));
        return found ? line.places[__builtin_ctz(found)] : kAbsent;
    }

    Record record(Place place) const { return {&words_[place]}; }
    bool holds(Place place, const ScannedPiece& piece) const { return record(place).is_of(piece, &words_[kWords]); }

    /// Note that a job is about to make the ids of a piece.
    void await(const ScannedPiece& piece, uint32_t job) { line(piece.hash).push(tag(piece.hash), kAwaited | job); }

    /// Keep the ids of a piece that is not too long; no job has it in hand any more.
    void remember(const ScannedPiece& piece, const uint32_t* ids, size_t n_ids, uint32_t job = kNoJob) {
        if (piece.length > Record::kMaxBytes) return;
        const Place place = room_for(uint32_t(Record::n_words(piece.length, n_ids)));
        Record::write(&words_[place], piece, ids, n_ids);
        Line& line = this->line(piece.hash);
        Place* const awaited = std::find(line.places, line.places + kSlots, kAwaited | job);
        if (awaited == line.places + kSlots)
            line.push(tag(piece.hash), place);
        else
            *awaited = place;
    }

  private:
    static constexpr size_t kSlots = 8;
    static constexpr unsigned kLogLines = 17;        // 8 MiB a thread,
    static constexpr Place kWords = Place(1) << 23;  // and 32 MiB
    static constexpr Place kFirst = kAbsent + 1, kSection = kWords / 8;
    static constexpr uint32_t kNoJob = kAwaited - 1;

    struct alignas(64) Line {
        uint32_t tags[kSlots];
        Place places[kSlots];

        /// A bit for each slot with a tag.
        unsigned with_tag(uint32_t tag) const {
#if defined(__AVX2__)
            const __m256i all = _mm256_load_si256(reinterpret_cast<const __m256i*>(tags));
            const __m256i equal = _mm256_cmpeq_epi32(all, _mm256_set1_epi32(int(tag)));
            return unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(equal)));
#else
            unsigned found = 0;
            for (size_t i = 0; i < kSlots; ++i) found |= unsigned(tags[i] == tag) << i;
            return found;
#endif
        }

        /// Take the first slot, for the last one.
        void push(uint32_t tag, Place place) {
            std::memmove(tags + 1, tags, sizeof tags - sizeof *tags);
            std::memmove(places + 1, places, sizeof places - sizeof *places);
            tags[0] = tag;
            places[0] = place;
        }
    };

    static uint32_t tag(uint64_t hash) { return uint32_t(hash); }
    Line& line(uint64_t hash) const { return lines_[hash >> (64 - kLogLines)]; }

    /// Take room for the next record.
    Place room_for(uint32_t n_words) {
        if (next_ + n_words > kWords) {
            next_ = kFirst;
            free_until_ = 0;
        }
        for (; next_ + n_words > free_until_; free_until_ += kSection) forget(free_until_, free_until_ + kSection);
        const Place place = next_;
        next_ += n_words;
        return place;
    }

    /// Forget the records in [first, last).
    void forget(Place first, Place last) {
        for (size_t i = 0; i < size_t(1) << kLogLines; ++i)
            for (Place& place : lines_[i].places)
                if (place - first < last - first) place = kAbsent;
    }

    HugeArray<Line> lines_;
    HugeArray<uint32_t> words_;
    Place next_ = kFirst;
    Place free_until_ = kWords;  // no slot has a place from next_ up to here
};

/// What the threads of a run tell each other: the records that each has made, for the caches of the others. Without it
/// every thread would encode for itself what is frequent in all of the text.
class Exchange {
  public:
    explicit Exchange(size_t n_threads) : made_(n_threads) {
        for (Made& made : made_) {
            made.words.reserve(kMostWords);  // so that they stay where they are
            made.n_heard.resize(n_threads);
        }
    }

    /// Tell a record; the others hear of it once this thread calls `publish`. After many nothing more is told: what is
    /// frequent comes early.
    void tell(size_t thread, const ScannedPiece& piece, const uint32_t* ids, size_t n_ids) {
        std::vector<uint32_t>& words = made_[thread].words;
        const size_t n_before = words.size(), n_words = Record::n_words(piece.length, n_ids);
        if (piece.length > Record::kMaxBytes || n_before + n_words > kMostWords) return;
        words.resize(n_before + n_words);
        Record::write(&words[n_before], piece, ids, n_ids);
    }
    void publish(size_t thread) { made_[thread].n.store(made_[thread].words.size(), std::memory_order_release); }

    /// Keep what the others have told since the last time.
    void hear(size_t thread, PieceCache& cache) {
        for (Made& made : made_) {
            if (&made == &made_[thread]) continue;
            const uint32_t* const words = made.words.data();
            const uint32_t* const end = words + made.n.load(std::memory_order_acquire);
            const uint32_t* next = words + made.n_heard[thread];
            while (next != end) next = keep_some(next, end, cache);
            made.n_heard[thread] = size_t(end - words);
        }
    }

  private:
    /// Keep some records, and return the one behind them: the memory of some comes while others are put in.
    static const uint32_t* keep_some(const uint32_t* next, const uint32_t* end, PieceCache& cache) {
        constexpr size_t kAtOnce = 32;
        ScannedPiece pieces[kAtOnce];
        Record records[kAtOnce];
        size_t n = 0;
        for (; n < kAtOnce && next != end; next += records[n++].n_words()) {
            records[n] = {next};
            const uint8_t* const bytes = records[n].bytes();
            pieces[n] = ScannedPiece(bytes, bytes + records[n].length(), reinterpret_cast<const uint8_t*>(end));
            cache.touch(pieces[n]);
        }
        for (size_t i = 0; i < n; ++i) cache.remember(pieces[i], records[i].ids(), records[i].n_ids());
        return next;
    }

    static constexpr size_t kMostWords = size_t(1) << 20;  // 4 MiB a thread, taken as it fills
    struct alignas(64) Made {
        std::vector<uint32_t> words;  // records end to end, read by others up to n
        std::vector<size_t> n_heard;  // by each of the others
        std::atomic<size_t> n{0};
    };
    std::vector<Made> made_;
};

}  // namespace megascratch::bpe
