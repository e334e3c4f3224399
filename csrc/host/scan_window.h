// Pre-tokenisation 64 characters at a time: the borders of all pieces in a window, by arithmetic on bit masks.
//
//   cl100k       if␣(x␣==␣'it'):⏎      →  if  ␣(  x  ␣==  ␣'  it  '):⏎
//   letters      1100100000110000       a bit a character, written from the left here
//   symbols      0001001101001110
//   blanks       0010010010000000
//   starts       1010110010101000
//
// A scanner (scanner.h) decides at each piece anew what comes next, and a processor cannot guess it: most of its time goes
// into wrong guesses. Here each rule of a pattern is a formula over the masks, the same work for whatever text:
//
//   a run of letters starts a piece unless the character before belongs to it    letters & ~(letters << 1) & ~(prefix << 1)
//   line ends after symbols belong to them                                       add 1 where the run of line ends begins
//                                                                                and see how far the carry goes
//
// A window starts where a piece starts. What its last piece needs to know may lie behind the window, so the next window
// starts with that piece. Characters beyond ASCII are looked up one by one, each leaving its class at its first byte; then
// the masks are squeezed to a bit a character, and the borders found are spread again.
//
// Idea: Langdale and Lemire, "Parsing gigabytes of JSON per second" (VLDB Journal, 2019), section 3.1.
#pragma once

#include "scanner.h"

#if defined(__AVX2__) && defined(__BMI2__)
#include <immintrin.h>
#define MEGASCRATCH_WINDOWS 1
#endif

namespace megascratch::bpe {

constexpr size_t kMostCut = 64;   // pieces,
constexpr size_t kCutAtOnce = 8;  // of which so many are written at a time, some of them in vain

/// Cuts a text from its beginning to its end, some pieces at a time.
template <class Scanner>
class Cutter {
  public:
    Cutter(const Text& text, const uint8_t* readable_end) : text_(text), readable_end_(readable_end), at_(text.begin) {}

    /// Write the ends of the next pieces, kMostCut at most, and return how many; 0 at the end of the text.
    ///
    /// Args: ends: room for kMostCut + kCutAtOnce.
    size_t operator()(const uint8_t** ends);

  private:
    Text text_;
    const uint8_t* readable_end_;
    const uint8_t* at_;
};

#if MEGASCRATCH_WINDOWS

/// The classes of up to 64 characters, a bit each.
struct Window {
    uint64_t letters = 0, numbers = 0, spaces = 0, newlines = 0, blanks = 0, apostrophes = 0, slashes = 0;
    uint64_t capitals = 0, smalls = 0;      // of the letters, those that can only be the one or the other
    uint64_t symbols = 0;
    uint64_t heads = 0;        // the bytes at which a character begins
    uint64_t either_case = 0;  // characters that may stand among capitals and among small letters
    bool ascii = true;

    uint64_t all() const { return letters | numbers | spaces | symbols; }

    /// Read the 64 bytes at p, or as many as the text has.
    Window(const Text& text, const uint8_t* p, const uint8_t* readable_end) {
        alignas(32) uint8_t copy[64];
        const uint64_t n = uint64_t(text.end - p);
        const uint64_t valid = n >= 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1;
        const uint8_t* bytes = p;
        if (readable_end - p < 64) {
            std::memset(copy, 0, sizeof copy);
            bytes = static_cast<const uint8_t*>(std::memcpy(copy, p, std::min<uint64_t>(n, 64)));
        }
        const Bytes both(bytes);
        const uint64_t wide = read_ascii(both) & valid;
        for (uint64_t* mask : {&capitals, &smalls, &numbers, &spaces, &newlines, &blanks, &apostrophes, &slashes}) *mask &= valid;
        heads = valid;
        if (wide) {
            ascii = false;
            if (!read_well_formed(text, p, both, wide, valid)) read_wide(text, p, wide);
        }
        letters |= capitals | smalls;
        symbols = heads & ~(letters | numbers | spaces);
        if (!ascii)
            for (uint64_t* mask : {&letters, &capitals, &smalls, &numbers, &spaces, &newlines, &blanks, &apostrophes, &slashes,
                                   &symbols, &either_case})
                *mask = _pext_u64(*mask, heads);
    }

    /// Characters of either case that o200k's formula does not know: those beside capitals, where what follows decides, and
    /// marks after symbols, which are words or symbols themselves.
    uint64_t for_the_scanner() const { return capitals ? either_case : either_case & ~letters & (symbols & ~either_case) << 1; }

    /// The byte at which the character of this one bit begins.
    unsigned byte_of(uint64_t character) const {
        return unsigned(__builtin_ctzll(ascii ? character : _pdep_u64(character, heads)));
    }

  private:
    /// 64 bytes, and a bit for each that passes a test.
    struct Bytes {
        __m256i low, high;

        explicit Bytes(const uint8_t* p)
            : low(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
              high(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))) {}

        template <class Test>
        uint64_t where(Test&& test) const {
            return uint64_t(uint32_t(_mm256_movemask_epi8(test(low)))) | uint64_t(uint32_t(_mm256_movemask_epi8(test(high)))) << 32;
        }
        uint64_t between(uint8_t first, uint8_t last) const {  // x - first <= last - first, unsigned
            return where([&](__m256i x) {
                const __m256i offset = _mm256_sub_epi8(x, _mm256_set1_epi8(char(first)));
                return _mm256_cmpeq_epi8(_mm256_min_epu8(offset, _mm256_set1_epi8(char(last - first))), offset);
            });
        }
        uint64_t equal(char c) const {
            return where([&](__m256i x) { return _mm256_cmpeq_epi8(x, _mm256_set1_epi8(c)); });
        }
        template <uint8_t bit>
        uint64_t having() const {
            return where([](__m256i x) { return _mm256_slli_epi16(x, 7 - __builtin_ctz(bit)); });
        }
    };

    uint64_t read_ascii(const Bytes& bytes) {
        capitals = bytes.between('A', 'Z');
        smalls = bytes.between('a', 'z');
        numbers = bytes.between('0', '9');
        newlines = bytes.equal('\n') | bytes.equal('\r');
        blanks = bytes.equal(' ');
        spaces = bytes.between('\t', '\r') | blanks;
        apostrophes = bytes.equal('\'');
        slashes = bytes.equal('/');
        return bytes.where([](__m256i x) { return x; });
    }

    /// Read the characters beyond ASCII, or nothing where some byte is not part of one: false then.
    bool read_well_formed(const Text& text, const uint8_t* p, const Bytes& bytes, uint64_t wide, uint64_t valid) {
        const uint64_t twos = bytes.between(0xC2, 0xDF) & valid, threes = bytes.between(0xE0, 0xEF) & valid;
        const uint64_t fours = bytes.between(0xF0, 0xF4) & valid;
        const uint64_t behind = (twos | threes | fours) << 1 | (threes | fours) << 2 | fours << 3;
        if ((bytes.between(0x80, 0xBF) & valid) != behind || (wide & ~behind) != (twos | threes | fours)) return false;
        alignas(32) uint8_t classes[64] = {};
        const uint64_t cut_off = (twos & uint64_t(1) << 63) | (threes & uint64_t(3) << 62);
        for (uint64_t left = fours | cut_off; left; left &= left - 1) {
            const unsigned at = unsigned(__builtin_ctzll(left));
            const Character c = text.at(p + at);
            if (c.size == 1) return false;
            classes[at] = c.bits;
        }
        for (uint64_t left = twos & ~cut_off; left; left &= left - 1) {
            const unsigned at = unsigned(__builtin_ctzll(left));
            classes[at] = text.class_of_two(p + at);
        }
        bool malformed = false;
        for (uint64_t left = threes & ~cut_off; left; left &= left - 1) {
            const unsigned at = unsigned(__builtin_ctzll(left));
            const unsigned code_point_high = unsigned(p[at] & 0x0F) << 1 | (p[at + 1] >> 5 & 1);  // its upper 5 bits
            malformed |= code_point_high == 0 || code_point_high == 0x1B;                       // overlong, or a surrogate
            classes[at] = text.class_of_three(p + at);
        }
        if (malformed) return false;
        const Bytes found(classes);
        const uint64_t upper = found.having<kUpper>(), lower = found.having<kLower>();
        heads &= ~behind;
        either_case |= upper & lower;
        capitals |= upper & ~lower;
        smalls |= lower & ~upper;
        letters |= found.having<kLetter>();
        numbers |= found.having<kNumber>();
        spaces |= found.having<kSpace>();
        return true;
    }

    void read_wide(const Text& text, const uint8_t* p, uint64_t wide) {
        while (wide) {
            const unsigned at = unsigned(__builtin_ctzll(wide));
            const Character c = text.at(p + at);
            const uint64_t head = uint64_t(1) << at, whole = head * ((uint64_t(1) << c.size) - 1);
            heads &= ~whole | head;
            wide &= ~whole;
            const bool upper = c.bits & kUpper, lower = c.bits & kLower;
            if (upper && lower) either_case |= head;
            if (c.bits & kLetter) letters |= head;
            if (upper && !lower) capitals |= head;
            if (lower && !upper) smalls |= head;
            if (c.bits & kNumber) numbers |= head;
            if (c.bits & kSpace) spaces |= head;
        }
    }
};

inline uint64_t run_starts(uint64_t mask) { return mask & ~(mask << 1); }

/// Call visit(apostrophe, behind) for each contraction that one of these apostrophes begins, with the bit of the
/// apostrophe and the bit after the last letter.
template <bool any_case, class Visit>
void for_each_contraction(const Window& window, const Text& text, const uint8_t* p, uint64_t apostrophes, Visit&& visit) {
    for (; apostrophes; apostrophes &= apostrophes - 1) {
        const uint64_t apostrophe = apostrophes & (0 - apostrophes);
        const uint8_t* const at = p + window.byte_of(apostrophe);
        const size_t n_bytes = contraction<any_case>(text, at);
        if (n_bytes == 0) continue;
        const bool long_s = at[1] >= 0x80;  // one letter of two bytes
        visit(apostrophe, apostrophe << (long_s ? 2 : n_bytes));
    }
}

/// Starts of the pieces of white space, where `left` are the white-space characters that no piece of symbols has taken:
/// up to the last line end in a run; then all but the last character; then the last one.
inline uint64_t space_starts(const Window& window, uint64_t left) {
    const uint64_t inline_spaces = left & ~window.newlines;
    const uint64_t begin = run_starts(inline_spaces);
    const uint64_t behind = (inline_spaces + begin) & ~inline_spaces;  // each run's carry comes out behind it
    const uint64_t line_end_follows = _pext_u64(window.newlines, behind);
    return run_starts(left) | _pdep_u64(~line_end_follows, begin) | (inline_spaces & ~(window.spaces >> 1));
}

/// Starts of the groups of up to three digits.
inline uint64_t number_starts(uint64_t numbers) {
    uint64_t starts = 0;
    for (uint64_t group = run_starts(numbers); group; group = group << 3 & numbers & numbers << 1 & numbers << 2) starts |= group;
    return starts;
}

inline uint64_t starts_in(Gpt2, const Window& w, const Text& text, const uint8_t* p) {
    const uint64_t joined = w.blanks << 1;
    uint64_t starts = (run_starts(w.letters) | run_starts(w.numbers) | run_starts(w.symbols)) & ~joined;
    starts |= run_starts(w.spaces) | (w.spaces & ~(w.spaces >> 1));
    const uint64_t lone = run_starts(w.symbols) & ~joined & ~(w.symbols >> 1);
    for_each_contraction<false>(w, text, p, w.apostrophes & lone, [&](uint64_t apostrophe, uint64_t behind) {
        starts = (starts & ~(apostrophe << 1)) | (behind & w.letters);
    });
    return starts;
}

template <int max_digits, bool whole_at_end>
uint64_t starts_in(Cl100k<max_digits, whole_at_end>, const Window& w, const Text& text, const uint8_t* p) {
    const uint64_t first_ends = w.newlines & w.symbols << 1;
    const uint64_t taken = w.newlines & ~(w.newlines + first_ends);  // line ends right after symbols
    const uint64_t left = w.spaces & ~taken;
    const uint64_t symbols = run_starts(w.symbols) & ~(w.blanks << 1);
    const uint64_t lone = symbols & ~(w.symbols >> 1);
    const uint64_t prefix = lone | (left & ~w.newlines);
    uint64_t starts = symbols | space_starts(w, left) | (run_starts(w.letters) & ~(prefix << 1));
    starts |= max_digits == 1 ? w.numbers : number_starts(w.numbers);
    for_each_contraction<true>(w, text, p, w.apostrophes & lone,
                               [&](uint64_t, uint64_t behind) { starts |= behind & w.letters; });
    return starts;
}

inline uint64_t starts_in(O200k, const Window& w, const Text& text, const uint8_t* p) {
    const uint64_t of_words = w.letters | w.either_case, others = w.symbols & ~w.either_case;  // marks are of words
    const uint64_t line_ends = w.newlines | w.slashes, first_ends = w.newlines & others << 1;
    const uint64_t taken = (line_ends & ~(line_ends + first_ends)) | first_ends;  // and slashes after those line ends
    const uint64_t left = w.spaces & ~taken, symbols = others & ~taken;
    const uint64_t symbol_runs = run_starts(symbols) & ~(w.blanks << 1);
    const uint64_t lone = symbol_runs & ~(symbols >> 1);
    const uint64_t prefix = lone | (left & ~w.newlines);
    uint64_t starts = symbol_runs | space_starts(w, left) | number_starts(w.numbers);
    starts |= (run_starts(of_words) & ~(prefix << 1)) | (w.capitals & w.smalls << 1);
    uint64_t end_of_last = 0;  // a word has one contraction at most
    for_each_contraction<true>(w, text, p, w.apostrophes & lone & of_words << 1, [&](uint64_t apostrophe, uint64_t behind) {
        if (apostrophe == end_of_last) return;
        starts = (starts & ~(behind - apostrophe)) | (behind & of_words);  // in f'rE, E is no start
        end_of_last = behind;
    });
    return starts;
}

template <class Scanner>
size_t Cutter<Scanner>::operator()(const uint8_t** ends) {
    if (at_ == text_.end) return 0;
    const Window window(text_, at_, readable_end_);
    // White space at the end of the window may go on behind it, and only the scanner knows some words of either case.
    const uint64_t settled = ~window.spaces & window.all();
    unsigned n_sure = settled ? 64 - unsigned(__builtin_clzll(settled)) : 0;
    const bool whole = text_.end - at_ <= 64 && n_sure == unsigned(__builtin_popcountll(window.all()));
    const uint64_t difficult = std::is_same_v<Scanner, O200k> ? window.for_the_scanner() : 0;
    if (difficult) n_sure = std::min(n_sure, unsigned(__builtin_ctzll(difficult)));
    uint64_t starts = starts_in(Scanner{}, window, text_, at_) & ~uint64_t(1);
    if (n_sure < 64) starts &= (uint64_t(1) << n_sure) - 1;
    if (!window.ascii) starts = _pdep_u64(starts, window.heads);
    const uint8_t* const begin = at_;
    const size_t n_starts = size_t(__builtin_popcountll(starts));
    // The next window waits for this and for nothing else; and a loop that ends after each start is guessed wrong.
    if (starts) at_ = begin + 63 - __builtin_clzll(starts);
    for (size_t i = 0; i < n_starts; i += kCutAtOnce)
        for (size_t j = 0; j < kCutAtOnce; ++j, starts &= starts - 1) ends[i + j] = begin + _tzcnt_u64(starts);
    size_t n = n_starts;
    if (whole && !difficult) at_ = ends[n++] = text_.end;
    if (n == 0) {
        const uint64_t by_scanner = difficult ? _pdep_u64(difficult, window.heads) : 1;
        const uint8_t* const behind = at_ + 64 - __builtin_clzll(by_scanner);
        while (at_ < behind && n < kMostCut) ends[n++] = at_ = Scanner::next(text_, at_);
    }
    return n;
}

#else

template <class Scanner>
size_t Cutter<Scanner>::operator()(const uint8_t** ends) {
    size_t n = 0;
    for (; n < kMostCut && at_ < text_.end; ++n) ends[n] = at_ = Scanner::next(text_, at_);
    return n;
}

#endif

}  // namespace megascratch::bpe
