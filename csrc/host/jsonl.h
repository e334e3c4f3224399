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
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace megascratch::jsonl {

/// Strings one after the other in one buffer, [bytes], and the offset at which each ends, [strings].
class Texts {
  public:
    explicit Texts(size_t capacity) : utf8_(new char[capacity ? capacity : 1]), capacity_(capacity) {}

    std::string_view utf8() const { return {utf8_.get(), size_}; }
    const std::vector<int64_t>& ends() const { return ends_; }

    /// Where the next byte goes. A string never grows by parsing, so a buffer of the line's size always suffices.
    char* end() { return utf8_.get() + size_; }
    void grow_to(const char* end) { size_ = size_t(end - utf8_.get()); }
    void restart() { size_ = ends_.empty() ? 0 : size_t(ends_.back()); }  // drop what was written of this string
    void close() { ends_.push_back(int64_t(size_)); }

    void append(std::string_view text) {
        reserve(size_ + text.size());
        std::memcpy(end(), text.data(), text.size());
        size_ += text.size();
        close();
    }
    void reserve(size_t capacity) {
        if (capacity <= capacity_) return;
        capacity = std::max(capacity, 2 * capacity_);
        std::unique_ptr<char[]> larger(new char[capacity]);
        std::memcpy(larger.get(), utf8_.get(), size_);
        utf8_ = std::move(larger);
        capacity_ = capacity;
    }

  private:
    std::unique_ptr<char[]> utf8_;
    size_t size_ = 0, capacity_;
    std::vector<int64_t> ends_;
};

/// Parses one line at a time.
class LineParser {
  public:
    explicit LineParser(std::vector<std::string> keys) : keys_(std::move(keys)), found_(keys_.size()) {}

    /// Append the string of each key to its texts, and return true; or change nothing and return false.
    bool parse(std::string_view line, std::vector<Texts>& texts) {
        at_ = line.data();
        end_ = at_ + line.size();
        const bool taken = object(texts);
        for (Texts& one : texts) taken ? one.close() : one.restart();
        return taken;
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
            if (!string(nullptr)) return false;
            const size_t key = index_of({key_begin, size_t(at_ - 1 - key_begin)});
            space();
            if (!take(':')) return false;
            space();
            if (key == keys_.size()) {
                if (!value(0)) return false;
            } else {
                Texts& wanted = texts[key];
                wanted.restart();  // of equal keys the last one counts
                wanted.reserve(wanted.utf8().size() + size_t(end_ - at_));
                char* out = wanted.end();
                if (!take('"') || !string(&out)) return false;
                wanted.grow_to(out);
                found_[key] = true;
            }
            space();
        } while (take(','));
        if (!take('}')) return false;
        space();
        for (const bool found : found_)
            if (!found) return false;
        return at_ == end_;
    }

    size_t index_of(std::string_view raw) {
        std::string unescaped;
        if (raw.find('\\') != raw.npos) {
            unescaped.resize(raw.size());
            const char *at = at_, *end = end_;
            char* out = unescaped.data();
            at_ = raw.data();
            end_ = raw.data() + raw.size() + 1;  // with its closing quote
            string(&out);                        // it was checked already
            unescaped.resize(size_t(out - unescaped.data()));
            raw = unescaped;
            at_ = at;
            end_ = end;
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
        while (at_ != end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\r' || *at_ == '\n')) ++at_;
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
            case '"': ++at_; return string(nullptr);
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
                if (!take('"') || !string(nullptr)) return false;
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

    /// Read a string from behind its opening quote to behind its closing one, writing it to *out unless that is null.
    bool string(char** out) {
        const char* run = at_;  // bytes from here on stand in the string as they are
        const auto flush = [&] {
            if (!out) return;
            std::memcpy(*out, run, size_t(at_ - run));
            *out += at_ - run;
        };
        for (;;) {
            skip_plain();
            if (at_ == end_) return false;
            const auto byte = static_cast<unsigned char>(*at_);
            if (byte >= 0x80) {
                if (!multibyte(byte)) return false;
            } else if (byte == '"') {
                flush();
                ++at_;
                return true;
            } else if (byte == '\\') {
                flush();
                ++at_;
                if (!escape(out)) return false;
                run = at_;
            } else {
                return false;  // a control character
            }
        }
    }

    /// Pass over printable ASCII other than the quote and the backslash, eight bytes at a time.
    void skip_plain() {
        constexpr uint64_t ones = 0x0101010101010101, tops = 0x8080808080808080;
        const auto zero_bytes = [](uint64_t word) { return (word - ones) & ~word; };
        while (end_ - at_ >= 8) {
            uint64_t word;
            std::memcpy(&word, at_, 8);
            const uint64_t special = zero_bytes(word ^ ('"' * ones)) | zero_bytes(word ^ ('\\' * ones)) |
                                     (word - 0x20 * ones) | word;  // the last two: below 0x20, and 0x80 or more
            if (special & tops) break;
            at_ += 8;
        }
        while (at_ != end_ && static_cast<unsigned char>(*at_) >= 0x20 && static_cast<signed char>(*at_) >= 0 &&
               *at_ != '"' && *at_ != '\\')
            ++at_;
    }

    /// Pass over one character of two to four bytes (RFC 3629: no overlong form, no surrogate, at most U+10FFFF).
    bool multibyte(unsigned char lead) {
        if (lead < 0xC2 || lead > 0xF4) return false;
        const ptrdiff_t size = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
        if (end_ - at_ < size) return false;
        const unsigned char lowest = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        const unsigned char highest = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        const auto second = static_cast<unsigned char>(at_[1]);
        if (second < lowest || second > highest) return false;
        for (ptrdiff_t i = 2; i < size; ++i)
            if ((static_cast<unsigned char>(at_[i]) & 0xC0) != 0x80) return false;
        at_ += size;
        return true;
    }

    bool escape(char** out) {
        if (at_ == end_) return false;
        char plain;
        switch (*at_++) {
            case '"': plain = '"'; break;
            case '\\': plain = '\\'; break;
            case '/': plain = '/'; break;
            case 'b': plain = '\b'; break;
            case 'f': plain = '\f'; break;
            case 'n': plain = '\n'; break;
            case 'r': plain = '\r'; break;
            case 't': plain = '\t'; break;
            case 'u': return unicode_escape(out);
            default: return false;
        }
        if (out) *(*out)++ = plain;
        return true;
    }

    bool unicode_escape(char** out) {
        uint32_t point;
        if (!hex4(point)) return false;
        if (point >= 0xD800 && point < 0xE000) {  // half of a pair; a half alone is Python's to judge
            uint32_t low;
            if (point >= 0xDC00 || !word("\\u") || !hex4(low) || low < 0xDC00 || low >= 0xE000) return false;
            point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
        }
        if (!out) return true;
        const auto put = [&](uint32_t byte) { *(*out)++ = char(byte); };
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

    bool hex4(uint32_t& point) {
        if (end_ - at_ < 4) return false;
        point = 0;
        for (int i = 0; i < 4; ++i) {
            const char digit = *at_++;
            const char lower = char(digit | 0x20);
            uint32_t nibble;
            if (digit >= '0' && digit <= '9')
                nibble = uint32_t(digit - '0');
            else if (lower >= 'a' && lower <= 'f')
                nibble = uint32_t(lower - 'a' + 10);
            else
                return false;
            point = point << 4 | nibble;
        }
        return true;
    }

    std::vector<std::string> keys_;
    std::vector<char> found_;
    const char *at_ = nullptr, *end_ = nullptr;
};

}  // namespace megascratch::jsonl
