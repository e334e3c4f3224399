// Decoding: the bytes of each id, end to end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace megascratch::bpe {

class Decoder {
  public:
    /// Args: tokens: the bytes of each id.
    explicit Decoder(const std::vector<std::string_view>& tokens) {
        for (const std::string_view& token : tokens) {
            entries_.push_back({uint32_t(bytes_.size()), uint32_t(token.size())});
            bytes_.insert(bytes_.end(), token.begin(), token.end());
        }
        bytes_.resize(bytes_.size() + kAtOnce);  // so that reading at once stays inside
    }

    size_t n_tokens() const { return entries_.size(); }

    /// The length of what ids decode to, or -1 - i where ids[i] is not in the vocabulary.
    template <class Id>
    int64_t length(const Id* ids, size_t n) const {
        int64_t sum = 0;
        for (size_t i = 0; i < n; ++i) {
            if (ids[i] < 0 || uint64_t(ids[i]) >= entries_.size()) return -1 - int64_t(i);
            sum += entries_[size_t(ids[i])].length;
        }
        return sum;
    }

    /// Write what ids decode to, which is `length(ids, n)` bytes.
    template <class Id>
    void decode(const Id* ids, size_t n, char* out) const {
        const char* const end = out + length(ids, n);
        for (size_t i = 0; i < n; ++i) {
            const Entry entry = entries_[size_t(ids[i])];
            const char* const bytes = bytes_.data() + entry.start;
            if (entry.length <= kAtOnce && end - out >= ptrdiff_t(kAtOnce))
                std::memcpy(out, bytes, kAtOnce);  // of fixed size, so no call; what is too much is overwritten next
            else
                std::memcpy(out, bytes, entry.length);
            out += entry.length;
        }
    }

  private:
    static constexpr size_t kAtOnce = 16;
    struct Entry {
        uint32_t start, length;
    };
    std::vector<Entry> entries_;
    std::vector<char> bytes_;
};

}  // namespace megascratch::bpe
