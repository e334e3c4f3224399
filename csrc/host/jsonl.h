// Strings of chosen keys out of JSON Lines, at memory speed, for lines that leave no doubt.
//
//   {"id": 7, "text": "a\n\u00e9", "meta": {"text": 1}}     keys = text   →   61 0a c3 a9
//
// A line is taken only when this parser has checked all of it: grammar, escapes, UTF-8, every wanted key a string.
// Whatever is unusual (an error, a lone surrogate, NaN, a byte-order mark, deep nesting, a number of a thousand digits)
// is left to the caller, who asks Python's own json: so the two agree by construction, errors and their wording
// included, and this one stays small.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <vector>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace megascratch::jsonl {

/// Bytes of a string that are looked at together.
class Chunk {
  public:
#if defined(__SSE2__)
    static constexpr ptrdiff_t kBytes = 64;  // most strings of code and prose have an escape in as many
    __m128i parts[4];

    explicit Chunk(const char* at) {
        for (int i = 0; i < 4; ++i) parts[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at) + i);
    }
    void write(char* to) const {
        for (int i = 0; i < 4; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to) + i, parts[i]);
    }
    /// How many bytes from the first on are printable ASCII other than the quote and the backslash.
    ptrdiff_t n_plain() const {
        uint64_t special = 0;
        for (int i = 0; i < 4; ++i) special |= uint64_t(special_in(parts[i])) << 16 * i;
        return special ? __builtin_ctzll(special) : kBytes;
    }

  private:
    static unsigned special_in(__m128i bytes) {
        const __m128i quote = _mm_cmpeq_epi8(bytes, _mm_set1_epi8('"')), slash = _mm_cmpeq_epi8(bytes, _mm_set1_epi8('\\'));
        const __m128i other = _mm_cmplt_epi8(bytes, _mm_set1_epi8(0x20));  // signed: below 0x20, and 0x80 or more
        return unsigned(_mm_movemask_epi8(_mm_or_si128(_mm_or_si128(quote, slash), other)));
    }
#else
    static constexpr ptrdiff_t kBytes = 8;
    uint64_t bytes;

    explicit Chunk(const char* at) { std::memcpy(&bytes, at, kBytes); }
    void write(char* to) const { std::memcpy(to, &bytes, kBytes); }
    ptrdiff_t n_plain() const {
        constexpr uint64_t ones = 0x0101010101010101, tops = 0x8080808080808080;
        const auto zero_bytes = [](uint64_t word) { return (word - ones) & ~word; };  // exact up to the first
        const uint64_t special = (zero_bytes(bytes ^ ('"' * ones)) | zero_bytes(bytes ^ ('\\' * ones)) |
                                  (bytes - 0x20 * ones) | bytes) & tops;
        return special ? __builtin_ctzll(special) / 8 : kBytes;
    }
#endif
};

/// Strings one after the other in one buffer, [bytes], and the offset at which each ends, [strings].
class Texts {
  public:
    /// Bytes behind what is written that may be written over.
    static constexpr size_t kSlack = size_t(Chunk::kBytes);

    explicit Texts(size_t capacity) { reserve(capacity); }

    size_t size() const { return size_; }
    const std::vector<int64_t>& ends() const { return ends_; }
    char* release() { return utf8_.release(); }  // to be freed

    /// Where the next byte goes. A string never grows by parsing, so room for the rest of the line always suffices.
    char* end() { return utf8_.get() + size_; }
    void grow_to(const char* end) { size_ = size_t(end - utf8_.get()); }
    void restart() { size_ = ends_.empty() ? 0 : size_t(ends_.back()); }  // drop what was written of this string
    void close() { ends_.push_back(int64_t(size_)); }

    void append(std::string_view text) {
        reserve(text.size());
        std::memcpy(end(), text.data(), text.size());
        size_ += text.size();
        close();
    }
    /// Make room for `more` bytes.
    void reserve(size_t more) {
        const size_t needed = size_ + more + kSlack;
        if (needed <= capacity_) return;
        capacity_ = std::max(needed, 2 * capacity_);
        void* const larger = std::realloc(utf8_.get(), capacity_);
        if (!larger) throw std::bad_alloc();
        utf8_.release();
        utf8_.reset(static_cast<char*>(larger));
    }

  private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::unique_ptr<char[], Free> utf8_;
    size_t size_ = 0, capacity_ = 0;
    std::vector<int64_t> ends_;
};

/// Parses one line at a time.
class LineParser {
  public:
    /// Args: end: of all lines; a line ends there, or at a line feed, which no JSON object holds.
    LineParser(std::vector<std::string> keys, const char* end) : keys_(std::move(keys)), found_(keys_.size()), end_(end) {}

    /// Append the string of each key to its texts, and return where the next line begins; or change nothing and return
    /// null.
    const char* parse(const char* line, std::vector<Texts>& texts) {
        at_ = line;
        const bool taken = object(texts);
        for (Texts& one : texts) taken ? one.close() : one.restart();
        return !taken ? nullptr : at_ == end_ ? end_ : at_ + 1;
    }

  private:
    static constexpr int kMaxDepth = 100;            // Python's own limit depends on its stack
    static constexpr ptrdiff_t kMaxNumberBytes = 1000;  // Python refuses whole numbers of more than 4,300 digits

    bool object(std::vector<Texts>& texts) {
        found_.assign(keys_.size(), false);
        space();
        if (!take('{')) return false;
        do {
            space();
            if (!take('"')) return false;  // an empty object lacks every key
            const char* key_begin = at_;
            if (!pass_string()) return false;
            const size_t key = index_of({key_begin, size_t(at_ - 1 - key_begin)});
            space();
            if (!take(':')) return false;
            space();
            if (key == keys_.size()) {
                if (!value(0)) return false;
            } else {
                Texts& wanted = texts[key];
                wanted.restart();  // of equal keys the last one counts
                wanted.reserve(size_t(end_ - at_));
                char* out = wanted.end();
                if (!take('"') || !string<true>(out)) return false;
                wanted.grow_to(out);
                found_[key] = true;
            }
            space();
        } while (take(','));
        if (!take('}')) return false;
        space();
        for (const bool found : found_)
            if (!found) return false;
        return at_ == end_ || *at_ == '\n';
    }

    size_t index_of(std::string_view raw) {
        std::string unescaped;
        if (raw.find('\\') != raw.npos) {
            unescaped.resize(raw.size() + Texts::kSlack);
            const char* const at = at_;
            at_ = raw.data();
            char* out = unescaped.data();
            string<true>(out);  // up to its closing quote: it was checked already
            unescaped.resize(size_t(out - unescaped.data()));
            raw = unescaped;
            at_ = at;
        }
        size_t key = 0;
        while (key < keys_.size() && keys_[key] != raw) ++key;
        return key;
    }

    bool take(char wanted) {
        if (at_ == end_ || *at_ != wanted) return false;
        ++at_;
        return true;
    }

    void space() {
        while (at_ != end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\r')) ++at_;
    }

    bool word(std::string_view wanted) {
        if (size_t(end_ - at_) < wanted.size() || std::memcmp(at_, wanted.data(), wanted.size()) != 0) return false;
        at_ += wanted.size();
        return true;
    }

    /// Pass over any value.
    bool value(int depth) {
        if (at_ == end_ || depth == kMaxDepth) return false;
        switch (*at_) {
            case '"': ++at_; return pass_string();
            case '{': return members(depth, '}', true);
            case '[': return members(depth, ']', false);
            case 't': return word("true");
            case 'f': return word("false");
            case 'n': return word("null");
            default: return number();
        }
    }

    bool members(int depth, char close, bool named) {
        ++at_;
        space();
        if (take(close)) return true;
        do {
            space();
            if (named) {
                if (!take('"') || !pass_string()) return false;
                space();
                if (!take(':')) return false;
                space();
            }
            if (!value(depth + 1)) return false;
            space();
        } while (take(','));
        return take(close);
    }

    bool digits() {
        const char* begin = at_;
        while (at_ != end_ && *at_ >= '0' && *at_ <= '9') ++at_;
        return at_ != begin;
    }

    bool number() {
        const char* begin = at_;
        take('-');
        if (!take('0') && !digits()) return false;
        if (take('.') && !digits()) return false;
        if (take('e') || take('E')) {
            if (!take('+')) take('-');
            if (!digits()) return false;
        }
        return at_ - begin <= kMaxNumberBytes;
    }

    bool pass_string() {
        char* nowhere = nullptr;
        return string<false>(nowhere);
    }

    /// Read a string from behind its opening quote to behind its closing one; `keep` writes it to out, which has room for
    /// all that is left of the line, and for a chunk more.
    template <bool keep>
    bool string(char*& out) {
        for (;;) {
            pass_plain<keep>(out);
            if (at_ == end_) return false;
            if (*at_ == '\\') {
                do {  // in other scripts than Latin escapes often follow each other
                    if (!escape<keep>(out)) return false;
                } while (at_ != end_ && *at_ == '\\');
            } else if (*at_ == '"') {
                ++at_;
                return true;
            } else {
                do {
                    if (!multibyte<keep>(out)) return false;
                } while (at_ != end_ && !is_ascii(*at_));
            }
        }
    }

    static bool is_ascii(char byte) { return static_cast<signed char>(byte) >= 0; }

    /// Pass over printable ASCII other than the quote and the backslash.
    template <bool keep>
    void pass_plain(char*& out) {
        while (end_ - at_ >= Chunk::kBytes) {
            const Chunk chunk(at_);
            const ptrdiff_t n = chunk.n_plain();
            if constexpr (keep) {
                chunk.write(out);  // more than is plain: what comes next writes over it
                out += n;
            }
            at_ += n;
            if (n < Chunk::kBytes) return;
        }
        for (; at_ != end_ && *at_ >= 0x20 && is_ascii(*at_) && *at_ != '"' && *at_ != '\\'; ++at_)
            if constexpr (keep) *out++ = *at_;
    }

    /// Read one character of two to four bytes (RFC 3629: no overlong form, no surrogate, at most U+10FFFF).
    template <bool keep>
    bool multibyte(char*& out) {
        const auto lead = static_cast<unsigned char>(*at_);
        if (lead < 0xC2 || lead > 0xF4) return false;
        const ptrdiff_t size = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
        if (end_ - at_ < size) return false;
        const unsigned char lowest = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        const unsigned char highest = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        const auto second = static_cast<unsigned char>(at_[1]);
        if (second < lowest || second > highest) return false;
        for (ptrdiff_t i = 2; i < size; ++i)
            if ((static_cast<unsigned char>(at_[i]) & 0xC0) != 0x80) return false;
        if constexpr (keep)
            for (ptrdiff_t i = 0; i < size; ++i) *out++ = at_[i];
        at_ += size;
        return true;
    }

    /// What stands behind a backslash → the character; 0 for u, and for what must not stand there.
    static constexpr std::array<char, 256> kPlainEscapes = [] {
        std::array<char, 256> plain{};
        for (const char itself : {'"', '\\', '/'}) plain[size_t(itself)] = itself;
        plain['b'] = '\b', plain['f'] = '\f', plain['n'] = '\n', plain['r'] = '\r', plain['t'] = '\t';
        return plain;
    }();

    /// A hexadecimal digit → its value; all bits for anything else.
    static constexpr std::array<uint32_t, 256> kNibbles = [] {
        std::array<uint32_t, 256> nibbles{};
        for (uint32_t& nibble : nibbles) nibble = ~0u;
        for (uint32_t i = 0; i < 16; ++i) nibbles[size_t("0123456789abcdef"[i])] = nibbles[size_t("0123456789ABCDEF"[i])] = i;
        return nibbles;
    }();

    template <bool keep>
    bool escape(char*& out) {
        if (end_ - at_ < 2) return false;
        const char plain = kPlainEscapes[static_cast<unsigned char>(at_[1])];
        if (plain == 0) return unicode_escape<keep>(out);
        if constexpr (keep) *out++ = plain;
        at_ += 2;
        return true;
    }

    template <bool keep>
    bool unicode_escape(char*& out) {
        uint32_t point;
        if (!escaped_unit(point)) return false;
        if (point >= 0xD800 && point < 0xE000) {  // half of a pair; a half alone is Python's to judge
            uint32_t low;
            if (point >= 0xDC00 || !escaped_unit(low) || low < 0xDC00 || low >= 0xE000) return false;
            point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
        }
        if constexpr (!keep) return true;
        const auto put = [&](uint32_t byte) { *out++ = char(byte); };
        if (point < 0x80) {
            put(point);
            return true;
        }
        if (point < 0x800) {
            put(0xC0 | point >> 6);
        } else {
            if (point < 0x10000) {
                put(0xE0 | point >> 12);
            } else {
                put(0xF0 | point >> 18);
                put(0x80 | (point >> 12 & 0x3F));
            }
            put(0x80 | (point >> 6 & 0x3F));
        }
        put(0x80 | (point & 0x3F));
        return true;
    }

    /// Read \uXXXX.
    bool escaped_unit(uint32_t& unit) {
        if (end_ - at_ < 6 || at_[0] != '\\' || at_[1] != 'u') return false;
        const auto nibble = [&](int i) { return kNibbles[static_cast<unsigned char>(at_[i])]; };
        unit = nibble(2) << 12 | nibble(3) << 8 | nibble(4) << 4 | nibble(5);
        at_ += 6;
        return unit <= 0xFFFF;
    }

    std::vector<std::string> keys_;
    std::vector<char> found_;
    const char *at_ = nullptr, *end_;
};

}  // namespace megascratch::jsonl
