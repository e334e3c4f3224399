// Pre-tokenisation without a regular-expression engine: one hand-written scanner a pattern, over UTF-8 in place.
//
//   o200k   "don't pay 12345 ␣␣now"  →  don't  ␣pay  ␣  123  45  ␣␣  ␣now
//
// Each scanner is the pattern's alternatives in their order, with backtracking worked out beforehand:
//
//   \s+(?!\S)          a run of spaces without its last one, unless the text ends there
//   \s*[\r\n]+         a run of spaces up to the last line end in it
//   U*L+ | U+L*        capitals, then small letters; where none follow, the capitals up to the last character that may
//                      also stand among small letters (a letter without case, a mark), or all of them
//
// A byte that is not part of a UTF-8 character counts as a symbol of its own. tests/tokenizer holds the scanners against
// the `regex` package.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "unicode_classes.h"

namespace megascratch::bpe {

/// The class bits of every code point, a byte each.
inline const uint8_t* class_table() {
    static const std::unique_ptr<uint8_t[]> table = [] {
        std::unique_ptr<uint8_t[]> classes(new uint8_t[0x110000]);
        uint8_t* at = classes.get();
        for (const ClassRun& run : kClassRuns) {
            std::memset(at, run.bits, run.length);
            at += run.length;
        }
        return classes;
    }();
    return table.get();
}

/// One character of the text: its class and how many bytes it takes. At the end of the text both are 0.
struct Character {
    uint8_t bits, size;
};

/// The bytes of one text, and how characters are read from it.
class Text {
  public:
    Text(const char* begin, const char* end)
        : end(reinterpret_cast<const uint8_t*>(end)), begin(reinterpret_cast<const uint8_t*>(begin)), classes_(class_table()) {}

    Character at(const uint8_t* p) const {
        if (p >= end) return {0, 0};
        if (*p < 0x80) return {classes_[*p], 1};
        return wide(p);
    }

    /// The first character at or after p that has none of (or, with negate, any of) these class bits.
    template <uint8_t bits>
    const uint8_t* skip(const uint8_t* p) const {
        for (Character c = at(p); c.bits & bits; c = at(p)) p += c.size;
        return p;
    }

    const uint8_t* skip_symbols(const uint8_t* p) const {
        for (Character c = at(p); c.size != 0 && is_symbol(c); c = at(p)) p += c.size;
        return p;
    }

    const uint8_t* skip_letters(const uint8_t* p) const {
#if defined(__SSE2__)
        while (end - p >= 16) {
            const unsigned letters = unsigned(letter_mask(p));
            const unsigned n = unsigned(__builtin_ctz(~letters));
            p += n;
            if (n < 16) {
                if (*p < 0x80) return p;
                break;
            }
        }
#endif
        return skip<kLetter>(p);
    }

    static bool is_symbol(Character c) { return (c.bits & (kLetter | kNumber | kSpace)) == 0; }

#if defined(__SSE2__)
    /// Bit i says that byte i is between first and first + 25, with the bits of `fold` set in each byte beforehand.
    static int range_mask(__m128i bytes, char first) {
        // x - first <= 25, unsigned: the saturating difference from 25 is zero.
        const __m128i offset = _mm_sub_epi8(bytes, _mm_set1_epi8(first));
        return _mm_movemask_epi8(_mm_cmpeq_epi8(_mm_subs_epu8(offset, _mm_set1_epi8(25)), _mm_setzero_si128()));
    }
    static int letter_mask(const uint8_t* p) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return range_mask(_mm_or_si128(bytes, _mm_set1_epi8(0x20)), 'a');
    }
#endif

    /// The class of a character of two, or three, bytes that is known to be well formed.
    uint8_t class_of_two(const uint8_t* p) const { return classes_[(p[0] & 0x1F) << 6 | (p[1] & 0x3F)]; }
    uint8_t class_of_three(const uint8_t* p) const {
        return classes_[uint32_t(p[0] & 0x0F) << 12 | uint32_t(p[1] & 0x3F) << 6 | (p[2] & 0x3F)];
    }

    const uint8_t* const end;
    const uint8_t* const begin;

  private:
    Character wide(const uint8_t* p) const {
        const auto continues = [](uint8_t byte) { return (byte & 0xC0) == 0x80; };
        const ptrdiff_t left = end - p;
        const uint32_t first = *p;
        if (first < 0xE0) {
            if (first < 0xC2 || left < 2 || !continues(p[1])) return {0, 1};
            return {classes_[(first & 0x1F) << 6 | (p[1] & 0x3F)], 2};
        }
        if (first < 0xF0) {
            if (left < 3 || !continues(p[1]) || !continues(p[2])) return {0, 1};
            const uint32_t code_point = (first & 0x0F) << 12 | uint32_t(p[1] & 0x3F) << 6 | (p[2] & 0x3F);
            if (code_point < 0x800 || (code_point & 0xF800) == 0xD800) return {0, 1};  // overlong, or a surrogate
            return {classes_[code_point], 3};
        }
        if (left < 4 || !continues(p[1]) || !continues(p[2]) || !continues(p[3])) return {0, 1};
        const uint32_t code_point =
            (first & 0x07) << 18 | uint32_t(p[1] & 0x3F) << 12 | uint32_t(p[2] & 0x3F) << 6 | (p[3] & 0x3F);
        if (first > 0xF4 || code_point < 0x10000 || code_point > 0x10FFFF) return {0, 1};
        return {classes_[code_point], 4};
    }

    const uint8_t* classes_;
};

/// The length of 's 't 're 've 'm 'll 'd at p, where p is an apostrophe; 0 for none of them.
template <bool any_case>
inline size_t contraction(const Text& text, const uint8_t* p) {
    const ptrdiff_t left = text.end - p;
    if (left < 2) return 0;
    const uint8_t fold = any_case ? 0x20 : 0;
    const auto pair = [&](char first, char second) { return left >= 3 && (p[1] | fold) == first && (p[2] | fold) == second; };
    switch (p[1] | fold) {
        case 's': case 't': case 'm': case 'd': return 2;
        case 'r': return pair('r', 'e') ? 3 : 0;
        case 'v': return pair('v', 'e') ? 3 : 0;
        case 'l': return pair('l', 'l') ? 3 : 0;
        default: break;
    }
    // The long s, U+017F, is the one other character whose case folds to a letter of these.
    return any_case && left >= 3 && p[1] == 0xC5 && p[2] == 0xBF ? 3 : 0;
}

/// The end of a piece that begins with a space and no rule before those of spaces has taken.
template <bool line_ends, bool whole_at_end>
inline const uint8_t* spaces(const Text& text, const uint8_t* p) {
    const uint8_t *last = p, *q = p, *after_line_end = nullptr;
    for (Character c = text.at(q); c.bits & kSpace; c = text.at(q)) {
        last = q;
        q += c.size;
        if (c.bits & kNewline) after_line_end = q;
    }
    if (whole_at_end && q == text.end) return q;
    if (line_ends && after_line_end) return after_line_end;
    return q == text.end || last == p ? q : last;
}

/// '(s|t|re|ve|m|ll|d) | ␣?\p{L}+ | ␣?\p{N}+ | ␣?[^\s\p{L}\p{N}]+ | \s+(?!\S) | \s+
struct Gpt2 {
    static const uint8_t* next(const Text& text, const uint8_t* p) {
        if (*p == '\'')
            if (const size_t length = contraction<false>(text, p)) return p + length;
        const uint8_t* start = p + (*p == ' ');
        const Character c = text.at(start);
        if (c.bits & kLetter) return text.skip_letters(start + c.size);
        if (c.bits & kNumber) return text.skip<kNumber>(start + c.size);
        if (c.size != 0 && !(c.bits & kSpace)) return text.skip_symbols(start + c.size);
        return spaces<false, false>(text, p);
    }
};

/// The part that cl100k, llama3, qwen2 and o200k share: \p{N}{1,n} | ␣?[^\s\p{L}\p{N}]+[\r\n]* | spaces
template <int max_digits, bool slash, bool whole_at_end>
inline const uint8_t* after_words(const Text& text, const uint8_t* p, Character c) {
    if (c.bits & kNumber) {
        for (int n = 0; n < max_digits && (c.bits & kNumber); ++n, c = text.at(p)) p += c.size;
        return p;
    }
    const uint8_t* symbol = p + (*p == ' ');
    if (const Character s = text.at(symbol); s.size != 0 && Text::is_symbol(s)) {
        const uint8_t* q = text.skip_symbols(symbol + s.size);
        while (q < text.end && (*q == '\r' || *q == '\n' || (slash && *q == '/'))) ++q;
        return q;
    }
    return spaces<true, whole_at_end>(text, p);
}

/// (?i:contraction) | [^\r\n\p{L}\p{N}]?\p{L}+ | after_words
template <int max_digits, bool whole_at_end>
struct Cl100k {
    static const uint8_t* next(const Text& text, const uint8_t* p) {
        const Character c = text.at(p);
        if (c.bits & kLetter) return text.skip_letters(p + c.size);
        if (*p == '\'')
            if (const size_t length = contraction<true>(text, p)) return p + length;
        if (!(c.bits & (kNewline | kNumber)))
            if (const Character d = text.at(p + c.size); d.bits & kLetter) return text.skip_letters(p + c.size + d.size);
        return after_words<max_digits, false, whole_at_end>(text, p, c);
    }
};

/// [^\r\n\p{L}\p{N}]?U*L+C? | [^\r\n\p{L}\p{N}]?U+L*C? | after_words, where C is a contraction
struct O200k {
    static const uint8_t* next(const Text& text, const uint8_t* p) {
        const Character c = text.at(p);
        if (c.bits & kLetter) return word(text, p).end;
        if (!(c.bits & (kNewline | kNumber))) {
            const Word prefixed = word(text, p + c.size);
            if (prefixed.end && prefixed.small) return prefixed.end;
            if (c.bits & kLower) return word(text, p).end;  // a mark that begins a word of its own
            if (prefixed.end) return prefixed.end;
        }
        return after_words<3, true, false>(text, p, c);
    }

  private:
    struct Word {
        const uint8_t* end;  // null where there is no word
        bool small;          // matched by U*L+, which goes before U+L*
    };

    static Word word(const Text& text, const uint8_t* p) {
        const uint8_t *q = p, *after_either = nullptr;
#if defined(__SSE2__)
        if (text.end - p >= 17) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
            const unsigned small = unsigned(Text::range_mask(bytes, 'a'));
            const unsigned n_capital = unsigned(__builtin_ctz(~unsigned(Text::range_mask(bytes, 'A'))));
            const unsigned n_small = unsigned(__builtin_ctz(~(small >> n_capital)));
            q = p + n_capital + n_small;
            if (n_small != 0 && *q < 0x80 && n_capital + n_small < 16) return {suffixed(text, q), true};
            q = p + n_capital;
        }
#endif
        for (Character c = text.at(q); c.bits & kUpper; c = text.at(q)) {
            q += c.size;
            if (c.bits & kLower) after_either = q;
        }
        if (text.at(q).bits & kLower) return {suffixed(text, text.skip<kLower>(q)), true};
        if (after_either) return {suffixed(text, after_either), true};
        if (q != p) return {suffixed(text, q), false};
        return {nullptr, false};
    }

    static const uint8_t* suffixed(const Text& text, const uint8_t* p) {
        return p < text.end && *p == '\'' ? p + contraction<true>(text, p) : p;
    }
};

using Tiktoken100k = Cl100k<3, true>;
using Llama3 = Cl100k<3, false>;
using Qwen2 = Cl100k<1, false>;

/// Call visit(Scanner{}) with the scanner of a pattern's name. Raises: invalid_argument: for a name without one.
template <class Visit>
auto with_scanner(std::string_view name, Visit&& visit) {
    if (name == "gpt2") return visit(Gpt2{});
    if (name == "cl100k") return visit(Tiktoken100k{});
    if (name == "llama3") return visit(Llama3{});
    if (name == "qwen2") return visit(Qwen2{});
    if (name == "o200k") return visit(O200k{});
    throw std::invalid_argument("no scanner for " + std::string(name));
}

}  // namespace megascratch::bpe
