// Open-addressing hash tables, the one data structure that the BPE trainer and encoder share.
//
// Linear probing over a power-of-two array that is at most half full: a lookup touches one or two cache lines, where a
// node-based map chases a pointer per step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <vector>

namespace megascratch::bpe {

/// Scatter the bits of x (the multiply-xorshift finaliser: every input bit reaches every output bit).
inline uint64_t mix(uint64_t x) {
    x ^= x >> 32;
    x *= 0xd6e8feb86659fd93ULL;
    x ^= x >> 32;
    x *= 0xd6e8feb86659fd93ULL;
    return x ^ (x >> 32);
}

inline uint64_t hash_bytes(std::string_view bytes) {
    const char* at = bytes.data();
    size_t left = bytes.size();
    uint64_t hash = mix(left + 0x9e3779b97f4a7c15ULL);
    for (uint64_t word; left >= sizeof word; at += sizeof word, left -= sizeof word) {
        std::memcpy(&word, at, sizeof word);
        hash = mix(hash ^ word);
    }
    if (left != 0) {
        uint64_t word = 0;
        std::memcpy(&word, at, left);
        hash = mix(hash ^ word);
    }
    return hash;
}

/// Two adjacent token ids as one key. Comparing keys compares left ids first, then right ids.
inline uint64_t pair_key(int32_t left, int32_t right) {
    return uint64_t(uint32_t(left)) << 32 | uint32_t(right);
}

/// A map from id pairs to small values.
template <class Value>
class PairTable {
  public:
    explicit PairTable(size_t expected = 8) {
        size_t capacity = 16;
        while (capacity < 2 * expected) capacity *= 2;
        slots_.assign(capacity, Slot{});
    }

    const Value* find(uint64_t key) const {
        const Slot& slot = slots_[probe(key)];
        return slot.key == key ? &slot.value : nullptr;
    }

    /// The value of a key, made by default where it is new. The reference holds until the next insertion.
    Value& operator[](uint64_t key) {
        if (2 * (size_ + 1) > slots_.size()) grow();
        Slot& slot = slots_[probe(key)];
        if (slot.key != key) {
            slot.key = key;
            ++size_;
        }
        return slot.value;
    }

  private:
    static constexpr uint64_t kFree = ~0ULL;  // the pair (-1, -1): ids are never negative
    struct Slot {
        uint64_t key = kFree;
        Value value{};
    };

    size_t probe(uint64_t key) const {
        const size_t mask = slots_.size() - 1;
        size_t at = mix(key) & mask;
        while (slots_[at].key != key && slots_[at].key != kFree) at = (at + 1) & mask;
        return at;
    }

    void grow() {
        std::vector<Slot> old(2 * slots_.size());
        old.swap(slots_);
        for (Slot& slot : old)
            if (slot.key != kFree) slots_[probe(slot.key)] = slot;
    }

    std::vector<Slot> slots_;
    size_t size_ = 0;
};

/// A map from pairs of small ids to a small id, 8 bytes an entry. Most questions are about pairs that are not there, and
/// most of those are answered by a filter of a few bits an entry, which stays in the processor's nearest cache.
class PackedPairs {
  public:
    static constexpr uint32_t kMaxIds = 1 << 21;
    static constexpr uint32_t kAbsent = UINT32_MAX;

    explicit PackedPairs(size_t expected) {
        while ((size_t(1) << log_) < 2 * expected) ++log_;
        slots_.assign(size_t(1) << log_, kFree);
        filter_.assign(slots_.size() >> 3, 0);
    }

    uint32_t find(uint32_t left, uint32_t right) const {
        const uint64_t hash = hash_of(left, right);
        if (!(filter_[filter_word(hash)] >> (hash & 63) & 1)) return kAbsent;
        const uint64_t slot = slots_[probe(key(left, right), hash)];
        return slot == kFree ? kAbsent : uint32_t(slot & (kMaxIds - 1));
    }

    void insert(uint32_t left, uint32_t right, uint32_t value) {
        const uint64_t hash = hash_of(left, right);
        slots_[probe(key(left, right), hash)] = key(left, right) << 21 | value;
        filter_[filter_word(hash)] |= uint64_t(1) << (hash & 63);
    }

  private:
    static constexpr uint64_t kFree = ~0ULL;

    static uint64_t key(uint32_t left, uint32_t right) { return uint64_t(left) << 21 | right; }

    static uint64_t hash_of(uint32_t left, uint32_t right) {
        const uint64_t product = key(left, right) * 0x9e3779b97f4a7c15ULL;
        return product ^ product >> 32;
    }

    size_t filter_word(uint64_t hash) const { return hash >> (64 - log_ + 3); }

    size_t probe(uint64_t key, uint64_t hash) const {
        const size_t mask = slots_.size() - 1;
        size_t at = hash >> (64 - log_);
        while (slots_[at] != kFree && slots_[at] >> 21 != key) at = (at + 1) & mask;
        return at;
    }

    unsigned log_ = 4;
    std::vector<uint64_t> slots_, filter_;
};

/// Distinct byte strings, numbered in order of first appearance; the bytes lie end to end in one arena.
class StringTable {
  public:
    static constexpr uint32_t kAbsent = UINT32_MAX;

    StringTable() : slots_(16, Slot{0, kAbsent}), starts_(1, 0) {}

    size_t size() const { return starts_.size() - 1; }

    std::string_view operator[](size_t index) const {
        return {arena_.data() + starts_[index], starts_[index + 1] - starts_[index]};
    }

    uint32_t find(std::string_view bytes) const { return slots_[probe(bytes, hash_bytes(bytes))].index; }

    uint32_t insert(std::string_view bytes) {
        if (2 * (size() + 1) > slots_.size()) grow();
        const uint64_t hash = hash_bytes(bytes);
        Slot& slot = slots_[probe(bytes, hash)];
        if (slot.index == kAbsent) {
            if (size() + 1 >= kAbsent) throw std::length_error("more than 2^32 distinct strings");
            slot = {hash, uint32_t(size())};
            arena_.insert(arena_.end(), bytes.begin(), bytes.end());
            starts_.push_back(arena_.size());
        }
        return slot.index;
    }

  private:
    struct Slot {
        uint64_t hash;
        uint32_t index;
    };

    size_t probe(std::string_view bytes, uint64_t hash) const {
        const size_t mask = slots_.size() - 1;
        size_t at = hash & mask;
        while (slots_[at].index != kAbsent && (slots_[at].hash != hash || (*this)[slots_[at].index] != bytes))
            at = (at + 1) & mask;
        return at;
    }

    void grow() {
        std::vector<Slot> old(2 * slots_.size(), Slot{0, kAbsent});
        old.swap(slots_);
        const size_t mask = slots_.size() - 1;
        for (const Slot& slot : old) {
            if (slot.index == kAbsent) continue;
            size_t at = slot.hash & mask;
            while (slots_[at].index != kAbsent) at = (at + 1) & mask;
            slots_[at] = slot;
        }
    }

    std::vector<Slot> slots_;
    std::vector<char> arena_;
    std::vector<size_t> starts_;
};

}  // namespace megascratch::bpe
